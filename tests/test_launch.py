"""The launch check and its lint: what they find, shown on faults put there."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import kdfast
from bench import aot, launch, launch_lint, smoke, stand_in
from bench.aot_cases import Case
from bench.machine_code import SHARED, Report
from kdfast.head_grams import head_of
from kdfast.options import Head, RowOptions

triton = pytest.importorskip("triton")
tl = triton.language
THREADS = 1


class Two(NamedTuple):
    a: Any
    b: Any


@pytest.mark.parametrize("value", [1, 2.0, True, "x", None, torch.ones(1), (1, torch.ones(1)), Two(1, 2.0), Head()])
def test_what_a_kernel_takes(value: object) -> None:
    assert launch_lint.refused("x", value) == ""


@pytest.mark.parametrize("value", [[1.0], {"a": 1}, (1, [2]), Two(1, [2.0]), {1}, torch.Size])
def test_what_a_kernel_does_not_take(value: object) -> None:
    assert "expected int, float, bool, str, a tensor" in launch_lint.refused("x", value)


def test_grids_that_no_gpu_has() -> None:
    assert launch_lint.grid((1, 65535)) == launch_lint.grid((2**31 - 1,)) == ""
    assert launch_lint.grid((1, 65536)) == "grid: 65536 blocks along y, expected 1 to 65535"
    assert launch_lint.grid((0,)) == "grid: 0 blocks along x, expected 1 to 2147483647"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is told of lines of this file."""
    monkeypatch.setattr(stand_in, "_PACKAGE", str(Path(__file__).parent))
    told: list[str] = []
    with stand_in.device(told.append):
        yield told


WAITING: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x[0].item(), "bool": lambda x: bool((x > 0).any()), "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(), "mask": lambda x: x[x > 0], "cpu": lambda x: x.cpu(), "numpy": lambda x: x.numpy(),
    "tensor": lambda x: torch.tensor([1.0], device=x.device), "host's index": lambda x: x[torch.tensor([1])],
    "host's values": lambda x: x.copy_(torch.ones(3)), "float": lambda x: float(x.sum()),
    "equal": lambda x: torch.equal(x, x + 1), "allclose": lambda x: torch.allclose(x, x), "unique": lambda x: x.unique(),
    "where": lambda x: torch.where(x > 0), "argwhere": lambda x: torch.argwhere(x > 0), "if": lambda x: 1 if x.sum() > 0 else 2,
    "is_nonzero": lambda x: torch.is_nonzero(x[:1]), "masked_select": lambda x: x.masked_select(x > 0),
    "repeat_interleave": lambda x: torch.repeat_interleave(x, (x > 0).long()),
    "one_hot": lambda x: torch.nn.functional.one_hot((x > 0).long()),
    "synchronize": lambda x: torch.cuda.synchronize(), "stream": lambda x: torch.cuda.current_stream().synchronize(),
}  # fmt: skip
FREE: dict[str, Callable[[torch.Tensor], object]] = {
    "arithmetic": lambda x: (x * 2 + 1).sum(), "set": lambda x: x.fill_(1),
    "full": lambda x: torch.full((), 3, device=x.device),
    "gather": lambda x: x[torch.arange(2, device=x.device)], "where": lambda x: x.where(x > 0, 0), "item": lambda x: x.shape[0],
    "half": lambda x: x.half().to(x.device),
}  # fmt: skip


@pytest.mark.parametrize("name", WAITING)
def test_the_stand_in_tells_of_waits(name: str, waits: list[str]) -> None:
    x = torch.randn(3, device="cuda")
    assert waits == []
    WAITING[name](x)
    assert waits
    assert "test_launch.py" in waits[0]


def test_a_method_named_to_is_asked_to_wait(waits: list[str]) -> None:
    def to(x: torch.Tensor) -> torch.Tensor:
        return WAITING["cpu"](x)  # type: ignore[return-value]

    to(torch.ones(3, device="cuda"))
    assert waits == []


@pytest.mark.parametrize("name", FREE)
def test_the_stand_in_tells_of_nothing_else(name: str, waits: list[str]) -> None:
    FREE[name](torch.randn(3, device="cuda"))
    assert waits == []


#: Where the tensor is a CPU's, the interpreter's, nothing is copied between host and device, and there is no stream.
OF_DEVICES = ("host's index", "host's values", "synchronize", "stream")


@pytest.mark.parametrize("name", [name for name in WAITING if name not in OF_DEVICES])
def test_the_interpreter_refuses_waits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, here = torch.randn(3), Path(__file__).parent
    with launch_lint.interpreted():
        WAITING[name](x)  # a test's own lines may ask
    monkeypatch.setattr(launch_lint, "_PACKAGE", here)
    monkeypatch.setattr(launch_lint, "_NEVER", (str(here),))
    with pytest.raises(RuntimeError, match=r"test_launch.py:\d+: .* would make the host wait"), launch_lint.interpreted():
        WAITING[name](x)
    WAITING[name](x)


@pytest.mark.parametrize("name", FREE)
def test_the_interpreter_refuses_nothing_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_lint, "_PACKAGE", Path(__file__).parent)
    monkeypatch.setattr(launch_lint, "_NEVER", (str(Path(__file__).parent),))
    with launch_lint.interpreted():
        FREE[name](torch.randn(3))


@pytest.fixture
def within(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[torch.Tensor], object], str], None]:
    """Calls `hidden_cosine` on a device, whose op asks something of a tensor, as a line of a Triton backend's."""
    from kdfast.backends.reference import hidden

    names: dict[str, Any] = {}
    place = Path(kdfast.__file__).parent / "backends" / "triton" / "hidden.py"
    exec(compile("def waiting(ask, x):\n    ask(x)", str(place), "exec"), names)
    own = hidden.cosine

    def run(ask: Callable[[torch.Tensor], object], device: str) -> None:
        def cosine(student: torch.Tensor, *rest: Any) -> Any:
            names["waiting"](ask, student[0])
            return own(student, *rest)

        monkeypatch.setattr(hidden, "cosine", cosine)
        with kdfast.use_backend("reference"):
            x = torch.randn(4, 3, device=device).requires_grad_()
            kdfast.hidden_cosine(x, torch.randn(4, 3, device=device)).backward()

    return run


@pytest.mark.parametrize("name", WAITING)
def test_waits_within_an_op_are_told(name: str, within: Callable[..., None]) -> None:
    told: list[str] = []
    with stand_in.device(told.append):
        within(WAITING[name], "cuda")
    assert told
    assert all("hidden.py:2 waiting" in line for line in told)


def test_a_graph_forms_its_own_gram_of_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a capture forms is filled when that graph is replayed: another that read it would read what nobody wrote."""
    with stand_in.device(lambda line: None):
        weight = torch.randn(8, 4, device="cuda")
        assert weight.is_cuda
        kept = head_of(weight, False)
        assert head_of(weight, False) is kept
        with monkeypatch.context() as capture:
            capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            first, second = head_of(weight, False), head_of(weight, False)
        assert len({id(head) for head in (kept, first, second)}) == 3
        assert head_of(weight, False) is kept


@pytest.mark.parametrize("name", FREE)
def test_nothing_else_within_an_op_is_told(name: str, within: Callable[..., None]) -> None:
    told: list[str] = []
    with stand_in.device(told.append):
        within(FREE[name], "cuda")
    assert told == []


@pytest.mark.parametrize("name", [name for name in WAITING if name not in OF_DEVICES])
def test_the_interpreter_refuses_waits_within_an_op(name: str, within: Callable[..., None]) -> None:
    with pytest.raises(RuntimeError, match=r"hidden.py:2: .* would make the host wait"), launch_lint.interpreted():
        within(WAITING[name], "cpu")


@pytest.mark.parametrize("name", FREE)
def test_the_interpreter_refuses_nothing_else_within_an_op(name: str, within: Callable[..., None]) -> None:
    with launch_lint.interpreted():
        within(FREE[name], "cpu")


def test_the_stand_in_computes_what_a_cpu_does() -> None:
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    leaf = x.clone().requires_grad_()
    (leaf @ w.t()).logsumexp(-1).sum().backward()
    with stand_in.device(lambda line: None):
        there = x.to("cuda").requires_grad_()
        assert (there.is_cuda, str(there.device), torch.cuda.current_device()) == (True, "cuda:1", 0)
        (there @ w.to("cuda").t()).logsumexp(-1).sum().backward()
        assert there.grad is not None
        assert torch.equal(there.grad.held, leaf.grad)
    assert not torch.cuda.is_available()
    assert not torch.randn(2).is_cuda


@contextlib.contextmanager
def launched() -> Iterator[launch.Launches]:
    with launch.launches_only() as found, kdfast.use_backend("triton"):
        yield found


def test_public_calls_launch_what_can_be_launched() -> None:
    with launched() as found:
        x = torch.randn(9, 1000, device="cuda").requires_grad_()
        loss = kdfast.kd_loss(x, torch.randn(9, 1000, device="cuda"))
        (loss * 2).backward()
        assert float(loss) > 0
    assert found.wrong == {}
    assert {v.kernel for v in found.variants.values()} == {"forward_kernel", "scale_kernel"}
    forward = next(v for v in found.variants.values() if v.kernel == "forward_kernel")
    forward.read()
    assert (forward.wrong, forward.dots) == ("", "")
    assert forward.registers > 0
    assert forward.resident >= 1


def test_a_list_where_a_tuple_belongs_is_found() -> None:
    from kdfast.backends.triton import logits

    with launched() as found:
        student, scale = torch.randn(4, 100, device="cuda"), torch.ones(4, device="cuda")
        with pytest.raises(TypeError):
            logits.forward(student, [student], None, scale, RowOptions(teacher_weights=[1.0]), False, None)  # type: ignore[arg-type]
    assert any("expected int, float, bool" in line for line in found.wrong)


def test_a_launch_on_another_device_is_found() -> None:
    from kdfast.backends.triton.scale import scale_kernel

    with launched() as found:
        scale_kernel[(1,)](torch.ones(8, device="cuda"), torch.ones((), device="cuda"), 8, BLOCK=16)
        scale_kernel[(1, 70000)](torch.ones(8, device="cuda"), torch.ones((), device="cuda"), 8, BLOCK=16)
    assert "scale_kernel: launched on device 0, its tensors are on 1" in found.wrong
    assert "scale_kernel: grid: 70000 blocks along y, expected 1 to 65535" in found.wrong


def test_spills_are_found_with_the_table_and_without(capsys: pytest.CaptureFixture[str]) -> None:
    from kdfast.backends.triton.scale import scale_kernel

    with launched() as found:
        x, scale = torch.ones(1 << 14, device="cuda", dtype=torch.bfloat16), torch.ones((), device="cuda")
        with torch.cuda.device(x.device):
            scale_kernel[(1,)](x, scale, len(x), BLOCK=len(x), num_warps=1, maxnreg=32)
    for table in (False, True):
        assert launch.report(found, 0, 0.0, table) == 1
        assert "FAIL  scale_kernel: " in (said := capsys.readouterr().out)
        assert "instructions of spills" in said


@triton.jit
def shared_kernel(a_ptr, b_ptr, c_ptr, n, M: tl.constexpr, K: tl.constexpr):  # type: ignore[no-untyped-def]
    i, k = tl.arange(0, M), tl.arange(0, K)
    total = tl.zeros([M, M], tl.float32)
    for start in range(0, n, K):
        a = tl.load(a_ptr + i[:, None] * n + start + k[None, :])
        total += tl.dot(a, tl.load(b_ptr + (start + k)[:, None] * M + i[None, :]))
    tl.store(c_ptr + i[:, None] * M + i[None, :], total)


@triton.jit
def nonsense_kernel(x_ptr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, 32)
    y = tl.inline_asm_elementwise("nonsense $0, $1;", "=r,r", [tl.load(x_ptr + i)], tl.int32, True, 1)
    tl.store(x_ptr + i, y)


def test_more_shared_memory_than_there_is_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    with launched() as found:
        a, b = (torch.ones(128, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        with torch.cuda.device(a.device):
            shared_kernel[(1,)](a, b, a.float(), 128, M=128, K=64, num_warps=8, num_stages=9)
    assert launch.report(found, 0, 0.0, False) == 1
    assert "bytes of shared memory, expected at most 232448" in capsys.readouterr().out
    (variant,) = found.variants.values()
    variant.shared = SHARED["sm_90"]
    assert variant.wrong == ""


@pytest.mark.parametrize("target", aot.TARGETS)
def test_ahead_of_time_shared_memory_has_to_fit(target: str) -> None:
    most = SHARED[target]
    fits, not_ = (aot_report(target, shared_bytes=n) for n in (most, most + 1))
    assert (aot._failed(fits), aot._failed(not_)) == (False, True)
    assert f"SHARED MEMORY: expected at most {most} bytes" in aot._line(not_)
    assert "SHARED" not in aot._line(fits)


def aot_report(target: str, **found: Any) -> Report:
    return Report("module.kernel", "bf16", target, 4, registers=32, **found)


def test_what_an_assembler_refuses_is_a_finding() -> None:
    case = Case(nonsense_kernel, "", {"x": torch.float32}, {}, {"num_warps": 1})
    report = aot.compile_case(case, "sm_90")
    assert "Not a name of any known instruction: 'nonsense'" in report.error
    assert aot._failed(report)


def test_the_last_sentence_names_what_may_not_spill() -> None:
    assert aot._all_well(["sm_90", "sm_100"]) == "no spills on sm_90; all compile"
    assert aot._all_well(["sm_100"]) == "all compile"


def test_products_are_read_off_the_layouts() -> None:
    of = "tensor<16x16xf32, #o> * tensor<16x16xf32, #o1> -> tensor<16x16xf32"
    text = f"""
    %9 = ttng.warp_group_dot %a, %b, %c : !ttg.memdesc<64x64xbf16> * !ttg.memdesc<64x64xbf16> -> tensor<64x64xf32, #mma>
    %7 = tt.dot %a, %b, %c, inputPrecision = tf32 : {of}, #mma>
    %8 = tt.dot %a, %b, %c : {of}, #blocked>
    %6 = tt.dot %a, %b, %c, inputPrecision = tf32 : {of}, #blocked>
    """
    assert launch.dots(text) == "1 FFMA (ieee), 1 FFMA (tf32 or half), 1 HGMMA, 1 HMMA"
    variant = launch.Variant("k", "", 4, 0.0, None, "", dots=launch.dots(text))
    assert variant.wrong == "a product of halves or TF32 by FFMA"
    assert launch.Variant("k", "", 4, 0.0, None, "", dots="1 FFMA (ieee)").wrong == ""


def test_a_name_that_no_gpu_test_has() -> None:
    command = [sys.executable, "-m", "bench", "aot", "--launch", "--kernel", "no such test"]
    found = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300)
    assert found.returncode == 2
    assert found.stderr.strip().splitlines()[-1] == "aot: --kernel: expected part of a GPU test's name, got 'no such test'"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_smoke_calls_say_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert smoke.main([]) == 2
    assert capsys.readouterr().err.startswith("bench smoke: torch sees no CUDA device; --launch ")


@pytest.mark.parametrize("factor", [1.0, 1.5, float("nan"), float("inf")])
@pytest.mark.parametrize("of", ["value", "student"])
def test_the_smoke_check_names_what_is_wrong(of: str, factor: float) -> None:
    def run(student: torch.Tensor, labels: torch.Tensor, teacher0: torch.Tensor) -> torch.Tensor:
        off = factor if student.dtype == torch.float32 else 1.0
        if of == "student" and student.requires_grad:
            student.register_hook(lambda grad: grad * off)
        loss = kdfast.kd_loss(student, teacher0, labels, hard_weight=0.3)
        return loss + (loss * off - loss).detach() if of == "value" else loss

    call = smoke.Call("", smoke._rows(17), run, ("student",), torch.float32)
    wrong = smoke.check(call, "cpu")
    assert wrong.startswith(f"{of} off by ") if factor != 1 else wrong == ""
