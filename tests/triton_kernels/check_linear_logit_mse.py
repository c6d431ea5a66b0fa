"""Logit matching on the GPU backend against the float64 reference. Run by `test_triton_interpreted`."""

from __future__ import annotations

import plain
import pytest
import torch
from torch import Tensor

from kdfast.backends.reference import linear_logit_mse as reference
from kdfast.backends.triton import linear_logit_mse
from kdfast.chunks import Needs, Side

ALL = Needs(True, True, False)


def sides(distance: float, student_dim: int, teacher_dim: int, dtype: torch.dtype, device: str) -> tuple[Side, Side]:
    h, w = torch.randn(70, student_dim, device=device), torch.randn(300, student_dim, device=device)
    turn = torch.linalg.qr(torch.randn(teacher_dim, student_dim, device=device, dtype=torch.float64)).Q
    equal = student_dim == teacher_dim
    h_t, w_t = (h, w) if equal else ((h.double() @ turn.T).float(), (w.double() @ turn.T).float())
    student = Side((h + distance * torch.randn_like(h)).to(dtype), (w + distance * torch.randn_like(w)).to(dtype), None)
    return student, Side(h_t.to(dtype), w_t.to(dtype), None)


def wide(side: Side) -> Side:
    return Side(side.hidden.double(), side.weight.double(), None)


def errors(student: Side, teacher: Side, mask: Tensor | None, center: bool, method: str) -> list[float]:
    exact = reference.forward(wide(student), wide(teacher), mask, center, method, ALL)
    got = linear_logit_mse.forward(student, teacher, mask, center, method, ALL)
    return [plain.error(mine, truth) for mine, truth in zip(got, exact, strict=True)]


@pytest.mark.parametrize("center", [False, True], ids=["plain", "centred"])
@pytest.mark.parametrize("sizes", [(24, 24), (16, 24)], ids=["equal", "unequal"])
@pytest.mark.parametrize("distance", [1.0, 1e-2, 1e-4])
def test_nothing_read_back_and_still_exact(distance: float, sizes: tuple[int, int], center: bool, device: str) -> None:
    student, teacher = sides(distance, *sizes, torch.float32, device)
    mask = torch.arange(70, device=device) % 3 != 0
    assert max(errors(student, teacher, mask, center, "gram")) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("method", ["gram", "logits"])
def test_half_precision(method: str, dtype: torch.dtype, device: str) -> None:
    student, teacher = sides(0.5, 16, 24, dtype, device)
    assert max(errors(student, teacher, None, False, method)) <= plain.EPS[dtype]


def test_the_users_tf32_setting_is_put_back(device: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        errors(*sides(1.0, 16, 16, torch.float32, device), None, False, "gram")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
