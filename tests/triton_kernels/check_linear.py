"""Linear heads around the Triton row kernel against the float64 reference. Run by `test_triton_interpreted`."""

from __future__ import annotations

import plain
import pytest
import torch
from torch import Tensor

from kdfast.backends.reference import linear as reference
from kdfast.backends.triton import linear
from kdfast.chunks import Needs, Side
from kdfast.options import RowOptions


def side(n: int, vocab: int, width: int, dtype: torch.dtype, device: str, bias: bool) -> Side:
    make = lambda *shape: (torch.randn(*shape, device=device) / shape[-1] ** 0.5 * 3).to(dtype)  # noqa: E731
    return Side(make(n, width), make(vocab, width), make(vocab) if bias else None)


def wide(s: Side) -> Side:
    return Side(s.hidden.double(), s.weight.double(), None if s.bias is None else s.bias.double())


def outputs(kernel: object, student: Side, teacher: Side, labels: Tensor, scale: Tensor, chunk: int) -> tuple[Tensor, ...]:
    options = RowOptions(2.0, 0.7, 0.3)
    return kernel.forward(student, teacher, labels, scale, options, chunk, False, Needs(True, True, True))  # type: ignore


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("chunk", [64, 3], ids=["one-chunk", "ragged-chunks"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_against_reference(chunk: int, bias: bool, dtype: torch.dtype, device: str) -> None:
    student, teacher = side(10, 300, 32, dtype, device, bias), side(10, 310, 48, dtype, device, bias)
    labels, scale = torch.randint(0, 300, (10,), device=device), torch.rand(10, device=device)
    exact = outputs(reference, wide(student), wide(teacher), labels, scale.double(), chunk)
    got = outputs(linear, student, teacher, labels, scale, chunk)
    loss, _, grad_hidden, grad_weight, grad_bias = got
    assert plain.error(loss, exact[0]) <= 2e-6
    assert grad_weight.dtype == torch.float32
    tolerance = plain.EPS[torch.bfloat16] if dtype == torch.bfloat16 else 2e-6
    for mine, truth in ((grad_hidden, exact[2]), (grad_weight, exact[3])):
        assert plain.error(mine, truth) <= tolerance
    if bias:
        assert plain.error(grad_bias, exact[4]) <= 2e-6


def test_nothing_needed_leaves_nothing(device: str) -> None:
    student, teacher = side(4, 30, 8, torch.float32, device, False), side(4, 30, 8, torch.float32, device, False)
    scale = torch.ones(4, device=device)
    kept = linear.forward(student, teacher, None, scale, RowOptions(), 64, False, Needs(False, False, False))
    assert [x.numel() for x in kept[2:]] == [0, 0, 0]
    assert kept[0].isfinite().all()
