"""The choice between backends, instruction sets and threads."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import kdfast
from kdfast import _C, debug_checks, dispatch, kd_loss, use_backend
from kdfast.backends import cuda
from kdfast.ops import rows


def python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_backends_lists_every_one_with_its_reason() -> None:
    rows = {row.name: row for row in kdfast.backends()}
    assert rows["cpp"].available
    assert rows["reference"].available
    assert rows["triton"].available or "TRITON_INTERPRET" in rows["triton"].reason or "pip install" in rows["triton"].reason
    for row in rows.values():
        assert row.available == (row.reason == "")
        assert row.proven == (row.name != "cuda")
        assert set(row.ops) >= ({"logits", "linear", "topk", "scale"} if row.proven else {"logits"})


def test_cpu_prefers_cpp_and_float64_is_the_reference_without_a_warning() -> None:
    assert dispatch.choose("logits", torch.device("cpu"), torch.bfloat16) == "cpp"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose("logits", torch.device("cpu"), torch.float64) == "reference"


def test_use_backend_is_undone() -> None:
    device = torch.device("cpu")
    with use_backend("reference"):
        assert dispatch.choose("logits", device, torch.float32) == "reference"
    assert dispatch.choose("logits", device, torch.float32) == "cpp"
    with contextlib.suppress(KeyError), use_backend("reference"):
        raise KeyError
    assert dispatch.choose("logits", device, torch.float32) == "cpp"


def test_blocks_may_end_in_another_order_than_they_began() -> None:
    """As those of two threads do: what the first to begin put back must not outlive the second."""
    device = torch.device("cpu")
    first, second = use_backend("reference"), use_backend("cpp")
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert dispatch.choose("logits", device, torch.float32) == "cpp"
    second.__exit__(None, None, None)
    assert not dispatch._forced
    gpu = torch.device("cuda")
    assert not rows.values_are_checked(gpu)
    first, second = debug_checks(), debug_checks(False)
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert not rows.values_are_checked(gpu)
    second.__exit__(None, None, None)
    assert not rows.values_are_checked(gpu)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_cuda_without_a_gpu_says_what_is_missing() -> None:
    reason = next(row.reason for row in kdfast.backends() if row.name == "cuda")
    assert "not built" in reason or "driver" in reason or "no GPU" in reason or "another version" in reason
    with pytest.raises(RuntimeError, match="use_backend\\('cuda'\\)") as raised, use_backend("cuda"):
        pass
    assert reason in str(raised.value)
    assert "available here: cpp" in str(raised.value)


@pytest.mark.parametrize(
    ("driver", "build", "says"),
    [(0, 13000, "no CUDA driver"), (12080, 13000, "the driver's CUDA is 12.8, expected 13.0 or later"), (13000, 13000, None),
     (13000, 13020, None), (14010, 13000, None)],
    ids=["none", "older-major", "same", "older-minor", "newer"],
)  # fmt: skip
def test_a_driver_must_be_as_new_as_the_build(driver: int, build: int, says: str | None) -> None:
    found = cuda.driver_refusal(driver, build)
    assert found is None if says is None else says in str(found)


def test_cuda_gives_way_to_triton_for_ops_it_does_not_have() -> None:
    pytest.importorskip("triton")
    assert dispatch.kernel("scale", "cuda") is dispatch.kernel("scale", "triton")
    assert dispatch.kernel("scale", "cpp") is not dispatch.kernel("scale", "triton")


def test_an_error_names_the_backend_that_was_asked_and_the_one_it_gives_way_to() -> None:
    message = r"use_backend\('cuda'\): has no kernel for topk and gives way to triton: takes float32, .* not torch.float64;"
    with pytest.raises(RuntimeError, match=message):
        dispatch._choose("topk", "cuda", torch.float64, "cuda")
    with pytest.raises(RuntimeError, match=r"use_backend\('cuda'\): runs on cuda, not cpu; for logits on cpu there is: cpp"):
        dispatch._choose("logits", "cpu", torch.float32, "cuda")


def test_an_unproven_backend_is_not_chosen_by_itself() -> None:
    name = "unproven-here"
    dispatch.register(dispatch.Backend(name, "kdfast.backends.reference", ("logits",), proven=False))
    try:
        for device in ("cpu", "cuda"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert dispatch.choose("logits", torch.device(device), torch.float32) not in (name, "cuda")
        with use_backend(name):
            assert dispatch.choose("logits", torch.device("cpu"), torch.float32) == name
    finally:
        del dispatch._BACKENDS[name]


def test_falling_back_warns_once_and_says_why() -> None:
    code = """
import importlib.util, warnings
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "kdfast._C" else find(name, *a)
import torch, kdfast
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(3):
        kdfast.kd_loss(torch.randn(2, 5), torch.randn(2, 5))
print(len(seen), seen[0].message)
"""
    out = python(code)
    assert out.startswith("1 kdfast logits on cpu runs on the slow reference backend")
    assert "install a C++ compiler" in out


def test_importing_needs_neither_triton_nor_the_training_libraries() -> None:
    names = ("triton", "transformers", "accelerate", "safetensors", "yaml", "rich", "matplotlib")
    code = f"import sys, kdfast; print([n for n in {names} if n in sys.modules])"
    assert python(code) == "[]"


ISA_SCRIPT = """
import torch, kdfast
from kdfast import _C, use_backend
torch.manual_seed(0)
worst = 0.0
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for vocab in (1, 17, 5003):
        student, teacher = torch.randn(5, vocab).mul(5).to(dtype), torch.randn(5, vocab).mul(5).to(dtype)
        labels = torch.randint(0, vocab, (5,))
        results = []
        for backend in ("cpp", "reference"):
            with use_backend(backend):
                x = student.clone().requires_grad_()
                targets = kdfast.topk_targets(teacher, min(9, vocab), temperatures=(2.0,))
                loss = kdfast.kd_loss(x, teacher, labels, temperature=2.0, hard_weight=0.5)
                loss = loss + kdfast.topk_kd_loss(x, targets, labels, temperature=2.0, hard_weight=0.5)
                results.append((loss.double(), torch.autograd.grad(loss, x)[0].double()))
        for a, b in zip(*results):
            eps = {torch.float32: 1.0, torch.bfloat16: 4e3, torch.float16: 500.0}[dtype]
            worst = max(worst, float((a - b).norm() / b.norm().clamp(min=1e-6)) / eps)
print(_C.isa(), worst)
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_numbers(isa: str) -> None:
    order = ["baseline", "avx2", "avx512"]
    if order.index(isa) > order.index(_C.isa()):
        pytest.skip(f"this processor stops at {_C.isa()}")
    got, worst = python(ISA_SCRIPT, KDFAST_ISA=isa).split()
    assert got == isa
    assert float(worst) < 2e-6


class LossInWorker(Dataset):
    """Each item is a loss computed in the worker process."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        torch.set_num_threads(2)  # DataLoader says 1; a user may say otherwise
        generator = torch.Generator().manual_seed(index)
        a, b = torch.randn(64, 500, generator=generator), torch.randn(64, 500, generator=generator)
        return torch.stack([kd_loss(a, b), torch.tensor(float(_C.safe_threads(8)))])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_workers_do_not_hang() -> None:
    parent = LossInWorker()[0]
    assert parent[1] == 8
    loader = DataLoader(LossInWorker(), batch_size=1, num_workers=2, multiprocessing_context="fork", timeout=60)
    values = torch.cat(list(loader))
    assert torch.equal(values[0, 0], parent[0])
    assert (values[:, 1] == 1).all()


@pytest.mark.parametrize("loss", ["kd_loss(x, x)", "topk_kd_loss(x, topk_targets(x, 3))", "linear_kd_loss(x, x, x, x)"])
def test_the_first_call_of_a_process_may_be_compiled(loss: str) -> None:
    """Which backend there is, is found out while the graph is traced."""
    code = (
        "import torch; from kdfast import kd_loss, linear_kd_loss, topk_kd_loss, topk_targets\n"
        f"f = torch.compile(lambda x: {loss}, fullgraph=True, backend='eager')\n"
        "x = torch.randn(4, 8, requires_grad=True); f(x).backward(); assert x.grad.isfinite().all()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
