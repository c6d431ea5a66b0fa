"""The cluster kernel without a GPU: its own code on a cluster of fibers, and what its Python side lets through.

`cluster_device.h` runs `csrc/cuda/walk.h` as it stands, every thread of every block, in random order: barriers, chunks that
arrive late, blocks that run a row ahead. What is left to a GPU (`test_gpu_cluster.py`) is the machine: its instructions, its
memory model, its speed.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import plain
import pytest
import torch
from torch import Tensor

from kdfast.options import PARTS, RowOptions

ROOT = Path(__file__).parent.parent
#: Pairs of dtypes as the library counts them.
PAIRS = {
    "fp32": (torch.float32, torch.float32), "fp32+bf16": (torch.float32, torch.bfloat16),
    "fp32+fp16": (torch.float32, torch.float16), "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
}  # fmt: skip
#: How the student's softmax at T = 1 comes about.
MODES = {"none": 0, "same": 1, "square": 2, "own": 3}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = next((found for c in (os.environ.get("CXX"), "g++", "clang++") if c and (found := shutil.which(c))), None)
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    target = tmp_path_factory.mktemp("cluster") / "device.so"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC", "-w", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *flags, str(ROOT / "tests" / "cluster_device.cpp"), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def placed(x: Tensor, dtype: torch.dtype, stride: int) -> Tensor:
    """`x` [N, V] in rows `stride` elements apart, with NaN between them: where a row starts differs from row to row."""
    room = torch.full((x.shape[0] * stride,), torch.nan, dtype=dtype)
    rows = room.as_strided(x.shape, (stride, 1))
    rows.copy_(x)
    return rows


class Walked(NamedTuple):
    loss: Tensor
    grad: Tensor
    parts: Tensor
    stats: Tensor


Walk = Callable[..., Walked]


@pytest.fixture
def walk(library: ctypes.CDLL) -> Walk:
    """(student [N, Vs], teacher [N, Vt], ...) -> what clusters leave that walk these rows."""

    def run(
        student: Tensor, teacher: Tensor, labels: Tensor | None = None, scale: Tensor | None = None, *, pair: str = "fp32",
        blocks: int = 2, clusters: int = 2, seed: int = 0, mode: str = "own", temperature: float = 1.0, soft: float = 1.0,
        hard: float = 0.0, z_loss: float = 0.0, parts: bool = False, overwrite: bool = False,
    ) -> Walked:  # fmt: skip
        n = student.shape[0]
        stride = max(student.shape[1], teacher.shape[1]) | 1
        s, t = (placed(x, dtype, stride) for x, dtype in zip((student, teacher), PAIRS[pair], strict=True))
        grad = s if overwrite else placed(torch.full_like(s, torch.nan), s.dtype, stride)
        loss, stats, metrics = (torch.full(shape, torch.nan) for shape in ((n,), (n, 4), (n, len(PARTS))))
        stats = stats.double()
        scale = torch.ones(n) if scale is None else scale
        real, long = ctypes.c_float, ctypes.c_int64

        def matrix(x: Tensor) -> Any:
            return (long * 3)(x.data_ptr(), x.stride(0), x.shape[1])

        def address(x: Tensor | None) -> ctypes.c_void_p:
            return ctypes.c_void_p(None if x is None else x.data_ptr())

        library.walk(
            list(PAIRS).index(pair), long(n), matrix(s), matrix(t), matrix(grad), address(labels), address(scale),
            address(loss), address(stats), address(metrics if parts else None), real(temperature), real(soft * temperature**2),
            real(hard), real(z_loss), blocks, clusters, ctypes.c_uint(seed), MODES[mode],
        )  # fmt: skip
        return Walked(loss, grad, metrics, stats)

    return run


def truth(
    dtype: torch.dtype, student: Tensor, teacher: Tensor, labels: Tensor | None, scale: Tensor, **options: float
) -> tuple[Tensor, Tensor]:
    """(losses of the rows, gradient of their sum) by plain PyTorch in float64, or with float32 arithmetic."""
    x = student.to(dtype).requires_grad_()
    wide = x if dtype == torch.float64 else x.float()
    rows = plain.kd_rows(wide, [teacher.to(wide.dtype)], labels, **options) * scale.to(wide.dtype)
    (grad,) = torch.autograd.grad(rows.sum(), x)
    return rows.detach().double(), grad.double()


def check(walk: Walk, student: Tensor, teacher: Tensor, labels: Tensor | None, pair: str, mode: str, **options: Any) -> None:
    """Values and gradients as near to float64 as plain PyTorch with float32 arithmetic; rows of weight 0 are 0."""
    student, teacher = (x.to(dtype) for x, dtype in zip((student, teacher), PAIRS[pair], strict=True))
    scale = torch.rand(student.shape[0]) + 0.5
    scale[2:4] = 0
    scale[6:] = 0
    how = {name: options.pop(name) for name in ("blocks", "clusters", "overwrite") if name in options}
    loss, grad, *_ = walk(student, teacher, labels, scale, pair=pair, mode=mode, **how, **options)
    exact, same = (truth(d, student, teacher, labels, scale, **options) for d in (torch.float64, student.dtype))
    plain.assert_as_good(loss.double(), same[0], exact[0], torch.float32, "value")
    plain.assert_as_good(grad.double(), same[1], exact[1], student.dtype, "gradient")
    assert (loss[scale == 0] == 0).all()
    assert (grad[scale == 0] == 0).all()


def batch(n: int, vs: int, vt: int, spread: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(n, vs) * spread, torch.randn(n, vt) * spread, torch.randint(0, vs, (n,))


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(
    ("vs", "vt"),
    [(1, 1), (2, 2), (7, 7), (8, 8), (17, 17), (1000, 1000), (4096, 4096), (4104, 4104), (33001, 33001), (5003, 4000),
     (4000, 5003)],
    ids=["V1", "V2", "V7-edge-only", "V8-one-unit", "V17", "V1000", "V4096-one-chunk", "V4104-chunk-and-unit",
         "V33001-many-chunks", "student-larger", "teacher-larger"],
)  # fmt: skip
def test_value_and_gradient(vs: int, vt: int, pair: str, walk: Walk) -> None:
    options = {"soft": 0.7, "hard": 0.3, "z_loss": 1e-3}
    student, teacher, labels = batch(11, vs, vt)
    for blocks, mode, temperature in ((1, "same", 1.0), (2, "square", 2.0), (8, "own", 3.0))[:: 2 if vs > 30000 else 1]:
        check(walk, student, teacher, labels, pair, mode, blocks=blocks, temperature=temperature, **options)


@pytest.mark.parametrize(("mode", "temperature"), [("none", 2.0), ("same", 1.0), ("square", 2.0), ("own", 1.0), ("own", 2.0)])
@pytest.mark.parametrize("spread", [3.0, 640.0])
def test_modes_and_saturated_rows(mode: str, temperature: float, spread: float, walk: Walk) -> None:
    student, teacher, labels = batch(7, 4003, 4003)
    student, teacher = student.sign() * spread, teacher.sign() * spread
    hard = 0.0 if mode == "none" else 0.3
    check(walk, student, teacher, labels if hard else None, "fp32", mode, temperature=temperature, soft=0.7, hard=hard)


def test_overwrite(walk: Walk) -> None:
    for pair in ("fp32", "bf16"):
        student, teacher, labels = batch(9, 9001, 9001)
        check(walk, student, teacher, labels, pair, "square", temperature=2.0, hard=0.5, overwrite=True)


def test_the_order_of_threads_and_copies_changes_no_bit(walk: Walk) -> None:
    """Blocks that sleep for long are left behind as far as the barriers allow."""
    student, teacher, labels = batch(11, 9001, 9001)
    first, *others = (
        walk(
            student,
            teacher,
            labels,
            pair="bf16",
            mode="square",
            temperature=2.0,
            hard=0.5,
            blocks=4,
            seed=seed,
            clusters=clusters,
        )
        for seed, clusters in ((0, 1), (1, 1), (2, 1), (3, 3))
    )
    for other in others:
        for a, b in zip(first[:2], other[:2], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_large_column_that_only_the_student_has(walk: Walk) -> None:
    """The sums over the common columns keep their digits beside it."""
    student, teacher, labels = batch(5, 1010, 1000)
    student[:, 1003] = 200
    for mode, temperature in (("same", 1.0), ("square", 2.0), ("own", 3.0)):
        check(walk, student, teacher, labels, "fp32", mode, temperature=temperature, soft=0.7, hard=0.3)


@pytest.mark.parametrize("distance", [0.3, 0.1, 0.01, 0.001])
def test_value_near_agreement(distance: float, walk: Walk) -> None:
    _, teacher, _ = batch(2, 32000, 32000)
    student = teacher + distance * torch.randn_like(teacher)
    loss = walk(student, teacher, mode="none").loss
    exact = truth(torch.float64, student, teacher, None, torch.ones(2))[0]
    assert (loss >= 0).all()
    assert ((loss / exact - 1).abs() <= 1e-3).all()


def test_excluded_ids(walk: Walk) -> None:
    student, teacher, _ = batch(3, 3001, 3001)
    student[:, ::3] = teacher[:, ::3] = -torch.inf
    teacher[:, 1] = student[:, 5] = -torch.inf  # what one side alone excludes
    teacher[:, 5] = -300.0  # beside p = 0 an infinite d adds nothing
    labels = torch.tensor([2, 4, 2999])
    loss, grad, *_ = walk(student, teacher, labels, mode="square", temperature=2.0, hard=0.5)
    assert grad.isfinite().all()
    teacher[:, 5] = -torch.inf
    exact = truth(torch.float64, student, teacher, labels, torch.ones(3), temperature=2.0, hard=0.5)
    torch.testing.assert_close(loss.double(), exact[0], rtol=1e-5, atol=0)


def test_an_infinite_divergence_without_weight(walk: Walk) -> None:
    student, teacher, labels = batch(3, 3001, 3001)
    student[:, 1000:2000] = -torch.inf
    labels = labels % 1000
    loss, grad, *_ = walk(student, teacher, labels, mode="same", soft=0.0, hard=1.0)
    x = student.double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(x, labels, reduction="none")
    torch.testing.assert_close(loss.double(), exact.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), torch.autograd.grad(exact.sum(), x)[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mask", [-1e4, -1e9, -1e10, -1e20, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.7])
def test_finite_masks_are_as_good_as_infinite_ones(temperature: float, mask: float, walk: Walk) -> None:
    """Whole threads see nothing but the mask."""
    student, teacher, _ = batch(2, 9001, 9001)
    labels = torch.tensor([2, 1999])
    results = []
    for value in (mask, -torch.inf):
        student[:, 2000:] = teacher[:, 2000:] = value
        results.append(walk(student, teacher, labels, mode="own", temperature=temperature, hard=0.5))
    for a, b in zip(results[0][:2], results[1][:2], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["none", "same", "own"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "all-excluded"])
@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
def test_a_bad_row_is_nan_and_the_others_untouched(bad: float, side: int, mode: str, walk: Walk) -> None:
    *sides, _ = batch(7, 1001, 1001)
    good = walk(*sides, mode=mode)
    sides[side][3, slice(None) if bad == -torch.inf else 500] = bad
    got = walk(*sides, mode=mode)
    assert got.loss[3].isnan()
    others = torch.arange(7) != 3
    for a, b in zip(good[:2], got[:2], strict=True):
        torch.testing.assert_close(a[others], b[others], rtol=0, atol=0)


def test_statistics_are_those_of_triton(walk: Walk) -> None:
    """Log-sum-exps of student at T and 1 and of teacher at T, beyond float32: a gradient from them rounds no large logit."""
    student, teacher, labels = batch(5, 1010, 1001)
    student, teacher = student + 640, teacher - 640
    stats = walk(student, teacher, labels, temperature=3.0, hard=0.5).stats
    s, t = student.double(), teacher.double()
    wanted = [(s[:, :1001] / 3).logsumexp(-1), s.logsumexp(-1), torch.zeros(5), (t / 3).logsumexp(-1)]
    torch.testing.assert_close(stats, torch.stack([w.double() for w in wanted], 1), rtol=0, atol=2e-6)
    assert walk(student, teacher, temperature=3.0, mode="none").stats[:, 1].isnan().all()


@pytest.mark.parametrize("label", [-1, 1001, 2**40, -(2**40)])
def test_a_label_outside_the_vocabulary_is_nan(label: int, walk: Walk) -> None:
    student, teacher, labels = batch(5, 1001, 1001)
    labels[1] = label
    loss = walk(student, teacher, labels, mode="same", hard=0.5).loss
    assert loss.isnan().tolist() == [False, True, False, False, False]


@pytest.mark.parametrize(("mode", "temperature"), [("same", 1.0), ("own", 2.0)])
@pytest.mark.parametrize(("vs", "vt"), [(1001, 1001), (1010, 1001)], ids=["V1001", "student-larger"])
@pytest.mark.parametrize("pair", PAIRS)
def test_parts(pair: str, vs: int, vt: int, mode: str, temperature: float, walk: Walk) -> None:
    student, teacher, labels = batch(9, vs, vt)
    teacher[5] = student[5, :vt]  # one row whose argmaxes agree
    labels = labels.clamp(max=vt - 1)
    student, teacher = (x.to(dtype) for x, dtype in zip((student, teacher), PAIRS[pair], strict=True))
    got = walk(student, teacher, labels, pair=pair, mode=mode, temperature=temperature, hard=0.5, parts=True).parts
    s, t, at = student.double(), teacher.double(), labels[:, None]
    log_q, log_p = s[:, :vt].log_softmax(-1), t.log_softmax(-1)
    wanted = {
        "soft": plain.kl((t / temperature).log_softmax(-1), (s[:, :vt] / temperature).log_softmax(-1)),
        "hard": -s.log_softmax(-1).gather(1, at)[:, 0],
        "z": s.logsumexp(-1) ** 2,
        "kl_at_1": plain.kl(log_p, log_q),
        "teacher_nll": -log_p.gather(1, at)[:, 0],
        "teacher_entropy": torch.special.entr(log_p.exp()).sum(-1),
        "top1_agreement": (log_p.argmax(-1) == log_q.argmax(-1)).double(),
        "student_entropy": torch.special.entr(log_q.exp()).sum(-1),
    }
    assert tuple(wanted) == PARTS
    for column, (name, value) in enumerate(wanted.items()):
        torch.testing.assert_close(got[:, column].double(), value, rtol=1e-5, atol=1e-6, msg=name)
    assert got[5, 6] == 1


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
    pytest.importorskip("kdfast._cuda", reason="kdfast._cuda is not built (KDFAST_BUILD=cuda)")
    from kdfast.backends.cuda import logits

    return logits.refusal(student, teachers, RowOptions(**options), grad)


def test_an_option_the_kernel_does_not_know_goes_to_triton() -> None:
    pytest.importorskip("kdfast._cuda", reason="the CUDA extension is not built")
    from kdfast.backends.cuda import logits

    @dataclasses.dataclass(frozen=True)
    class Later(RowOptions):
        sharpen: float = 0.0

    half = torch.zeros(3, 50257, dtype=torch.bfloat16)
    assert logits.refusal(half, [half], Later(), None) is None
    assert "does not know sharpen" in str(logits.refusal(half, [half], Later(sharpen=0.5), None))


def test_what_goes_to_triton_says_why() -> None:
    half = torch.zeros(3, 50257, dtype=torch.bfloat16)
    assert _refusal(half, half) is None
    assert _refusal(half.float(), half) is None
    assert _refusal(half, half, grad=torch.zeros_like(half), hard_weight=0.5, z_loss=0.1, temperature=2.0) is None
    assert "not jsd" in str(_refusal(half, half, divergence="jsd"))
    assert _refusal(half, half, divergence="jsd", beta=0.0) is None
    assert "one teacher" in str(_refusal(half, half, half))
    assert "student_softcap" in str(_refusal(half, half, student_softcap=30.0))
    assert "student_scale, teacher_softcap" in str(_refusal(half, half, student_scale=2.0, teacher_softcap=30.0))
    assert "label_smoothing" in str(_refusal(half, half, label_smoothing=0.1))
    assert "gradients in the student's dtype" in str(_refusal(half.float(), half, grad=half))
    assert "aligned alike" in str(_refusal(half, torch.zeros(3, 50258, dtype=torch.bfloat16)))
    assert "aligned alike" in str(_refusal(half[:, 1:], half))
    assert "no cluster holds" in str(_refusal(half, half.half()))
    assert "no cluster holds" in str(_refusal(*torch.zeros(2, 1, 1 << 20)))
