"""The cluster kernel without a GPU: its arithmetic and indices compiled for the CPU, and what its Python side lets through.

`cluster_emulation.cpp` runs what `csrc/cuda/{element,plan,row}.h` say, and answers whether every column was met exactly once
and every bulk copy was aligned and inside its row. Copies, barriers and clusters themselves need the device: `test_gpu.py`.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import plain
import pytest
import torch
from torch import Tensor

from kdfast.options import RowOptions

ROOT = Path(__file__).parent.parent
#: Pairs of dtypes as the emulation counts them.
PAIRS = {
    "fp32": (torch.float32, torch.float32), "fp32+bf16": (torch.float32, torch.bfloat16),
    "fp32+fp16": (torch.float32, torch.float16), "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
}  # fmt: skip
#: How the student's softmax at T = 1 comes about.
MODES = {"none": 0, "same": 1, "square": 2, "own": 3}
PLACES = {1: "a copy is not aligned or not inside its row", 2: "a column is not met exactly once"}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = next((found for c in (os.environ.get("CXX"), "g++", "clang++") if c and (found := shutil.which(c))), None)
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    target = tmp_path_factory.mktemp("cluster") / "emulation.so"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC", "-w", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *flags, str(ROOT / "tests" / "cluster_emulation.cpp"), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


Emulate = Callable[..., tuple[dict[str, float], Tensor]]


@pytest.fixture
def emulate(library: ctypes.CDLL) -> Emulate:
    """(student row, teacher row, ...) -> (loss and parts, gradient); asserts that every column was met once."""

    def placed(x: Tensor, dtype: torch.dtype, offset: int) -> Tensor:
        # torch aligns storage to 64 bytes, so the row starts `offset` elements after a 16-byte boundary.
        room = torch.full((x.numel() + offset + 64,), torch.nan, dtype=dtype)
        room[offset : offset + x.numel()] = x
        return room[offset : offset + x.numel()]

    def run(
        student: Tensor, teacher: Tensor, label: int | None = None, *, pair: str = "fp32", blocks: int = 1, offset: int = 0,
        mode: str = "own", temperature: float = 1.0, soft: float = 1.0, hard: float = 0.0, z_loss: float = 0.0,
        scale: float = 1.0, parts: bool = False,
    ) -> tuple[dict[str, float], Tensor]:  # fmt: skip
        s, t = (placed(x, dtype, offset) for x, dtype in zip((student, teacher), PAIRS[pair], strict=True))
        grad = placed(torch.full_like(student, torch.nan), PAIRS[pair][0], offset)
        out = (ctypes.c_float * 7)()
        pointer, real = ctypes.c_void_p, ctypes.c_float
        place = library.emulate(
            list(PAIRS).index(pair), pointer(s.data_ptr()), pointer(t.data_ptr()), pointer(grad.data_ptr()), s.numel(),
            min(s.numel(), t.numel()), blocks, -1 if label is None else label, label is not None, real(temperature),
            real(soft * temperature**2), real(hard), real(z_loss), real(scale), MODES[mode], parts, out,
        )  # fmt: skip
        assert place == 0, PLACES[place]
        names = ("loss", "soft", "nll", "kl_at_1", "teacher_nll", "entropy", "agree")
        return dict(zip(names, out, strict=True)), grad

    return run


def truth(dtype: torch.dtype, student: Tensor, teacher: Tensor, label: int | None, **options: float) -> tuple[Tensor, Tensor]:
    labels = None if label is None else torch.tensor([label])

    def loss(x: Tensor) -> Tensor:
        wide = x if dtype == torch.float64 else x.float()
        return plain.kd_rows(wide, [teacher.to(wide.dtype)[None]], labels, **options).sum()

    return plain.gradient(loss, student[None], dtype)


def check(
    emulate: Emulate, student: Tensor, teacher: Tensor, label: int | None, pair: str, mode: str, **options: float
) -> None:
    """Value and gradient as near to float64 as plain PyTorch with float32 arithmetic."""
    student, teacher = (x.to(dtype) for x, dtype in zip((student, teacher), PAIRS[pair], strict=True))
    where = {name: int(options.pop(name)) for name in ("blocks", "offset") if name in options}
    got, grad = emulate(student, teacher, label, pair=pair, mode=mode, **where, **options)
    exact, same = (truth(d, student, teacher, label, **options) for d in (torch.float64, student.dtype))
    plain.assert_as_good(torch.tensor(got["loss"]), same[0], exact[0], torch.float32, "value")
    plain.assert_as_good(grad[None].double(), same[1], exact[1], student.dtype, "gradient")


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(
    ("vs", "vt"),
    [(1, 1), (2, 2), (7, 7), (8, 8), (17, 17), (1000, 1000), (4096, 4096), (4104, 4104), (50257, 50257), (5003, 4000),
     (4000, 5003)],
    ids=["V1", "V2", "V7-edge-only", "V8-one-unit", "V17", "V1000", "V4096-one-chunk", "V4104-chunk-and-unit", "V50257-odd",
         "student-larger", "teacher-larger"],
)  # fmt: skip
def test_every_column_once_and_as_good_as_pytorch(vs: int, vt: int, pair: str, emulate: Emulate) -> None:
    student, teacher = torch.randn(vs) * 3, torch.randn(vt) * 3
    places = [(1, 0), (2, 3), (8, 7)] if vs > 10000 else [(b, o) for b in (1, 2, 8, 16) for o in range(8)]
    for i, (blocks, offset) in enumerate(places):
        mode, temperature = [("same", 1.0), ("square", 2.0), ("own", 3.0)][i % 3]
        label = (vs - 1) * i // len(places)
        options = {"temperature": temperature, "soft": 0.7, "hard": 0.3, "z_loss": 1e-3}
        check(emulate, student, teacher, label, pair, mode, blocks=blocks, offset=offset, **options)


@pytest.mark.parametrize(("mode", "temperature"), [("none", 2.0), ("same", 1.0), ("square", 2.0), ("own", 1.0), ("own", 2.0)])
@pytest.mark.parametrize("spread", [3.0, 640.0])
def test_modes_and_saturated_rows(mode: str, temperature: float, spread: float, emulate: Emulate) -> None:
    student, teacher = (torch.randn(4003).sign() * spread for _ in range(2))
    hard = 0.0 if mode == "none" else 0.3
    label = None if mode == "none" else 17
    check(emulate, student, teacher, label, "fp32", mode, blocks=2, temperature=temperature, soft=0.7, hard=hard)


def test_a_large_column_that_only_the_student_has(emulate: Emulate) -> None:
    """The sums over the common columns keep their digits beside it."""
    student, teacher = torch.randn(1010) * 3, torch.randn(1000) * 3
    student[1003] = 200
    for mode, temperature in (("same", 1.0), ("square", 2.0), ("own", 3.0)):
        check(emulate, student, teacher, 5, "fp32", mode, temperature=temperature, soft=0.7, hard=0.3)


@pytest.mark.parametrize("distance", [0.3, 0.1, 0.01, 0.001])
def test_value_near_agreement(distance: float, emulate: Emulate) -> None:
    teacher = torch.randn(32000) * 3
    student = teacher + distance * torch.randn(32000)
    got, _ = emulate(student, teacher, mode="none", blocks=2)
    exact = float(truth(torch.float64, student, teacher, None)[0])
    assert got["soft"] >= 0
    assert abs(got["soft"] / exact - 1) <= 1e-3


def test_excluded_ids(emulate: Emulate) -> None:
    student, teacher = torch.randn(3001) * 3, torch.randn(3001) * 3
    student[::3] = teacher[::3] = -torch.inf
    teacher[1], student[5] = -torch.inf, -torch.inf  # what one side alone excludes
    teacher[5] = -300.0  # beside p = 0 an infinite d adds nothing
    got, grad = emulate(student, teacher, 2, mode="square", temperature=2.0, hard=0.5, parts=False)
    assert torch.tensor(got["loss"]).isfinite()
    assert grad.isfinite().all()
    teacher[5] = -torch.inf
    exact = truth(torch.float64, student, teacher, 2, temperature=2.0, hard=0.5)
    assert abs(got["loss"] / float(exact[0]) - 1) <= 1e-5


@pytest.mark.parametrize("mask", [-1e4, -1e9, -1e10, -1e20, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 3.7])
def test_finite_masks_are_as_good_as_infinite_ones(temperature: float, mask: float, emulate: Emulate) -> None:
    """Whole threads see nothing but the mask."""
    student, teacher = torch.randn(9001) * 3, torch.randn(9001) * 3
    results = []
    for value in (mask, -torch.inf):
        student[2000:] = teacher[2000:] = value
        results.append(emulate(student, teacher, 2, mode="own", temperature=temperature, hard=0.5, blocks=2))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "all-excluded"])
@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
def test_bad_rows_are_nan(bad: float, side: int, emulate: Emulate) -> None:
    rows = [torch.randn(1001), torch.randn(1001)]
    rows[side][slice(None) if bad == -torch.inf else 500] = bad
    for mode in ("none", "same", "own"):
        got, _ = emulate(*rows, mode=mode)
        assert torch.tensor(got["loss"]).isnan()


@pytest.mark.parametrize(("mode", "temperature"), [("same", 1.0), ("own", 2.0)])
@pytest.mark.parametrize(("vs", "vt"), [(1001, 1001), (1010, 1001)], ids=["V1001", "student-larger"])
def test_parts(mode: str, temperature: float, vs: int, vt: int, emulate: Emulate) -> None:
    student, teacher = torch.randn(vs) * 3, torch.randn(vt) * 3
    got, _ = emulate(student, teacher, 7, mode=mode, temperature=temperature, hard=0.5, parts=True, offset=3, blocks=2)
    log_q, log_p = student[:vt].double().log_softmax(0), teacher.double().log_softmax(0)
    wanted = {
        "kl_at_1": float(plain.kl(log_p, log_q)),
        "nll": float(-student.double().log_softmax(0)[7]),
        "teacher_nll": float(-log_p[7]),
        "entropy": float(torch.special.entr(log_p.exp()).sum()),
        "agree": float(log_p.argmax() == log_q.argmax()),
    }
    for name, value in wanted.items():
        assert abs(got[name] - value) <= 1e-5 * max(1, abs(value)), name
    student[:vt] = teacher
    assert emulate(student, teacher, 7, mode=mode, temperature=temperature, parts=True)[0]["agree"] == 1


def test_half_precision_codecs(library: ctypes.CDLL) -> None:
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    wide = torch.empty(65536)
    pointer = ctypes.c_void_p
    library.widen_fp16(pointer(bits.data_ptr()), 65536, pointer(wide.data_ptr()))
    torch.testing.assert_close(wide, bits.view(torch.float16).float(), rtol=0, atol=0, equal_nan=True)
    x = torch.cat(
        [torch.randn(20000) * 10.0 ** torch.randint(-9, 5, (20000,)), torch.tensor([0.0, -0.0, torch.inf, -torch.inf])]
    )
    for bf16, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        narrow = torch.empty(x.numel(), dtype=torch.int16)
        library.narrow(bf16, pointer(x.data_ptr()), x.numel(), pointer(narrow.data_ptr()))
        torch.testing.assert_close(narrow.view(dtype), x.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("common", "pair_bytes", "blocks"),
    [(1, 4, 1), (32000, 4, 2), (50257, 4, 4), (128256, 4, 8), (151936, 4, 8), (262144, 4, 8), (151936, 8, 8), (262144, 8, 16),
     (1 << 20, 4, 0)],
)  # fmt: skip
def test_cluster_size(common: int, pair_bytes: int, blocks: int, library: ctypes.CDLL) -> None:
    assert library.blocks(common, pair_bytes) == blocks


def _refusal(student: Tensor, *teachers: Tensor, grad: Tensor | None = None, **options: object) -> str | None:
    pytest.importorskip("kdfast._cuda", reason="the CUDA extension is not built")
    from kdfast.backends.cuda import logits

    return logits.refusal(student, teachers, RowOptions(**options), grad)


def test_what_goes_to_triton_says_why() -> None:
    half = torch.zeros(3, 50257, dtype=torch.bfloat16)
    assert _refusal(half, half) is None
    assert _refusal(half.float(), half) is None
    assert _refusal(half, half, grad=torch.zeros_like(half), hard_weight=0.5, z_loss=0.1, temperature=2.0) is None
    assert "not jsd" in str(_refusal(half, half, divergence="jsd"))
    assert _refusal(half, half, divergence="jsd", beta=0.0) is None
    assert "one teacher" in str(_refusal(half, half, half))
    assert "no heads" in str(_refusal(half, half, student_softcap=30.0))
    assert "smoothing" in str(_refusal(half, half, label_smoothing=0.1))
    assert "gradients in the student's dtype" in str(_refusal(half.float(), half, grad=half))
    assert "aligned alike" in str(_refusal(half, torch.zeros(3, 50258, dtype=torch.bfloat16)))
    assert "aligned alike" in str(_refusal(half[:, 1:], half))
    assert "no cluster holds" in str(_refusal(half, half.half()))
    assert "no cluster holds" in str(_refusal(*torch.zeros(2, 1, 1 << 20)))
