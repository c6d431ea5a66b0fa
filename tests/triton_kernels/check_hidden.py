"""Triton losses between hidden states against the float64 reference. Run by `test_triton_interpreted`."""

from __future__ import annotations

import plain
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.backends.reference import hidden as reference
from kdfast.backends.triton import hidden
from kdfast.chunks import Needs

ALL = Needs(True, True, True)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])


def rows(n: int, width: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(n, width, device=device).to(dtype)


def scale_of(n: int, device: str) -> Tensor:
    """Row 1 does not count."""
    scale = torch.rand(n, device=device) + 0.5
    scale[1] = 0
    return scale


def assert_close(got: tuple[Tensor, ...], exact: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    loss, *grads = got
    assert plain.error(loss, exact[0]) <= 2e-6
    for mine, truth in zip(grads, exact[1:], strict=True):
        assert mine.shape == truth.shape
        if mine.numel():
            assert plain.error(mine, truth) <= plain.EPS[dtype] + 2e-6


@DTYPES
@pytest.mark.parametrize("width", [1, 37, 4099], ids=["D1", "ragged", "several-blocks"])
@pytest.mark.parametrize("name", ["mse", "cosine"])
def test_rows(name: str, width: int, dtype: torch.dtype, device: str) -> None:
    student, teacher, scale = rows(5, width, dtype, device), rows(5, width, dtype, device), scale_of(5, device)
    if name == "cosine" and width == 1:
        teacher = -student  # two numbers point the same or the opposite way: 0 or 2
    student[1], teacher[1] = torch.nan, torch.inf
    wide = student.double(), teacher.double()
    if name == "mse":
        got = hidden.mse(student, None, None, teacher, scale, ALL)[:2]
        exact = reference.mse(wide[0], None, None, wide[1], scale.double(), Needs(True, False, False))[:2]
    else:
        got = hidden.cosine(student, teacher, scale, True)
        exact = reference.cosine(*wide, scale.double(), True)
    if name == "cosine" and width == 1:
        assert plain.error(got[0], exact[0]) <= 2e-6
        assert got[1].abs().max() <= 1e-3
    else:
        assert_close(got, exact, dtype)
    assert (got[1][1] == 0).all()


@pytest.mark.parametrize("distance", [1e-1, 1e-3, 1e-5])
def test_cosine_near_agreement(distance: float, device: str) -> None:
    teacher = rows(4, 300, torch.float32, device)
    student, scale = 1.7 * teacher + distance * rows(4, 300, torch.float32, device), torch.ones(4, device=device)
    exact = reference.cosine(student.double(), teacher.double(), scale.double(), True)
    got = hidden.cosine(student, teacher, scale, True)
    # Without the device's fused product (the interpreter has none) the part across is rounded once more.
    assert plain.error(got[0], exact[0]) <= 1e-6 + 1e-9 / distance
    assert plain.error(got[1], exact[1]) <= 1e-6 + 2e-7 / distance


@pytest.mark.parametrize("name", ["zero", "nan", "inf"])
def test_cosine_of_special_rows(name: str, device: str) -> None:
    student, teacher = rows(3, 40, torch.float32, device), rows(3, 40, torch.float32, device)
    student[0, :] = 0 if name == "zero" else student[0]
    student[0, 7] = {"zero": 0.0, "nan": torch.nan, "inf": torch.inf}[name]
    loss, grad = hidden.cosine(student, teacher, torch.ones(3, device=device), True)
    assert loss[1:].isfinite().all()
    if name == "zero":
        assert loss[0] == 1
        assert (grad[0] == 0).all()
    else:
        assert loss[0].isnan()


@DTYPES
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("n", "inputs", "width"), [(5, 16, 24), (70, 33, 150)], ids=["one-tile", "ragged-tiles"])
def test_projected_mse(n: int, inputs: int, width: int, bias: bool, dtype: torch.dtype, device: str) -> None:
    student, teacher, scale = rows(n, inputs, dtype, device), rows(n, width, dtype, device), scale_of(n, device)
    weight = rows(width, inputs, dtype, device) / inputs**0.5
    offset = rows(1, width, dtype, device)[0] if bias else None
    student[1], teacher[1] = torch.nan, torch.nan
    exact = plain_projected(student, weight, offset, teacher, scale, torch.float64)
    eager = plain_projected(student, weight, offset, teacher, scale, dtype)
    got = hidden.mse(student, weight, offset, teacher, scale, ALL)
    assert got[2].dtype == got[3].dtype == torch.float32
    for name, mine, other, truth in zip(("loss", "hidden", "projection", "bias"), got, eager, exact, strict=False):
        plain.assert_as_good(mine, other, truth, dtype, name)
    assert (got[1][1] == 0).all()


@pytest.mark.parametrize("stride", [0, 1, 2])
def test_a_bias_of_any_stride(stride: int, device: str) -> None:
    student, teacher, scale = rows(5, 16, torch.float32, device), rows(5, 24, torch.float32, device), scale_of(5, device)
    weight, bias = rows(24, 16, torch.float32, device), torch.randn(24 * 2, device=device).as_strided((24,), (stride,))
    got, want = (hidden.mse(student, weight, b, teacher, scale, ALL) for b in (bias, bias.clone()))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def plain_projected(
    student: Tensor, weight: Tensor, bias: Tensor | None, teacher: Tensor, scale: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """Row losses and gradients of hidden, projection and bias by autograd in `dtype`, rows that do not count zeroed."""
    counts = (scale != 0)[:, None]
    h, t = (torch.where(counts, x, 0).to(dtype) for x in (student, teacher))
    leaves = [x.detach().to(dtype).requires_grad_() for x in (h, weight, bias) if x is not None]
    row = torch.where(counts[:, 0], scale * F.mse_loss(F.linear(*leaves), t, reduction="none").mean(-1), 0)
    return [row.detach(), *torch.autograd.grad(row.sum(), leaves)]


def test_what_is_not_needed_is_left_out(device: str) -> None:
    student, weight = rows(5, 16, torch.float32, device), rows(24, 16, torch.float32, device)
    teacher, scale = rows(5, 24, torch.float32, device), torch.ones(5, device=device)
    got = hidden.mse(student, weight, None, teacher, scale, Needs(False, False, False))
    assert [x.numel() for x in got] == [5, 0, 0, 0]
    assert hidden.cosine(student, student.flip(0), scale, False)[1].numel() == 0
    assert hidden.cosine(student[:0], student[:0], scale[:0], True)[1].shape == (0, 16)
    assert hidden.mse(student[:0], weight, None, teacher[:0], scale[:0], Needs(True, True, True))[2].abs().sum() == 0
