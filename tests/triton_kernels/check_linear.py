"""Linear heads around the Triton row kernel against the float64 reference. Run by `test_triton_interpreted`."""

from __future__ import annotations

import plain
import pytest
import torch
from torch import Tensor

from kdfast.backends.reference import linear as reference
from kdfast.backends.triton import linear
from kdfast.chunks import Chunking, Needs, Side
from kdfast.options import RowOptions

OPTIONS = RowOptions(temperature=2.0, soft_weight=0.7, hard_weight=0.3)
EVERYTHING = Needs(True, True, True)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])


def side(n: int, vocab: int, width: int, dtype: torch.dtype, device: str, bias: bool) -> Side:
    make = lambda *shape: (torch.randn(*shape, device=device) / shape[-1] ** 0.5 * 3).to(dtype)  # noqa: E731
    return Side(make(n, width), make(vocab, width), make(vocab) if bias else None)


def wide(s: Side) -> Side:
    return Side(s.hidden.double(), s.weight.double(), None if s.bias is None else s.bias.double())


def compare(
    student: Side, teachers: list[Side], labels: Tensor, scale: Tensor, chunking: Chunking, options: RowOptions = OPTIONS
) -> None:
    arguments = (labels, scale.double(), options, Chunking(None, torch.float64, chunking.row_index), False, EVERYTHING)
    loss, _, *grads = reference.forward(wide(student), [wide(t) for t in teachers], *arguments)
    got, _, *got_grads = linear.forward(student, teachers, labels, scale, options, chunking, False, EVERYTHING)
    half = torch.bfloat16 in (student.weight.dtype, chunking.dtype)
    assert plain.error(got, loss) <= (4e-3 if chunking.dtype == torch.bfloat16 else 2e-6)
    assert got_grads[1].dtype == torch.float32
    for name, mine, truth in zip(("hidden", "weight", "bias"), got_grads, grads, strict=True):
        if mine.numel():
            # Logits rounded to bfloat16 move the probabilities by more than a rounding of the result.
            tolerance = 2e-2 if chunking.dtype == torch.bfloat16 else plain.EPS[torch.bfloat16] if half else 2e-6
            assert plain.error(mine, truth) <= tolerance, name


@DTYPES
@pytest.mark.parametrize("workspace_mb", [64, 0.008], ids=["one-chunk", "ragged-chunks"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_against_reference(workspace_mb: float, bias: bool, dtype: torch.dtype, device: str) -> None:
    student, teacher = side(10, 300, 32, dtype, device, bias), side(10, 310, 48, dtype, device, bias)
    if not bias:
        student = Side(student.hidden, student.weight, torch.zeros(300, device=device, dtype=dtype))
    labels, scale = torch.randint(0, 300, (10,), device=device), torch.rand(10, device=device)
    compare(student, [teacher], labels, scale, Chunking(workspace_mb, torch.float32, None))


@DTYPES
def test_bfloat16_logits(dtype: torch.dtype, device: str) -> None:
    student, teacher = side(10, 300, 32, dtype, device, True), side(10, 300, 48, dtype, device, False)
    labels, scale = torch.randint(0, 300, (10,), device=device), torch.rand(10, device=device)
    compare(student, [teacher], labels, scale, Chunking(0.005, torch.bfloat16, None))


@pytest.mark.parametrize("divergence", ["jsd", "tvd"])
def test_teachers_and_row_index(divergence: str, device: str) -> None:
    student = side(12, 200, 16, torch.bfloat16, device, True)
    teachers = [side(12, 200, 24, torch.bfloat16, device, False), side(12, 190, 16, torch.bfloat16, device, True)]
    labels, scale = torch.randint(0, 190, (12,), device=device), torch.rand(12, device=device)
    index = torch.tensor([0, 1, 3, 4, 7, 9, 10], device=device)
    options = RowOptions(divergence=divergence, temperature=2.0, hard_weight=0.3, teacher_weights=(0.25, 0.75))
    scale[[2, 5, 6, 8, 11]] = 0
    compare(student, teachers, labels, scale, Chunking(0.008, torch.float32, index), options)


def test_nothing_needed_leaves_nothing(device: str) -> None:
    student, teacher = side(4, 30, 8, torch.float32, device, False), side(4, 30, 8, torch.float32, device, False)
    scale, chunking = torch.ones(4, device=device), Chunking(None, torch.float32, None)
    kept = linear.forward(student, [teacher], None, scale, RowOptions(), chunking, False, Needs(False, False, False))
    assert [x.numel() for x in kept[2:]] == [0, 0, 0]
    assert kept[0].isfinite().all()
