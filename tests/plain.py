"""Plain PyTorch the ops are compared with, and the one rule for tolerances."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

#: Room beside twice plain PyTorch's own error: a few roundings of the result in its dtype.
EPS = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-12}


def rows(student: Tensor, teacher: Tensor, labels: Tensor | None, *, temperature: float, soft: float, hard: float) -> Tensor:
    """Loss of each row before weights and masks."""
    common = min(student.shape[-1], teacher.shape[-1])
    log_q = F.log_softmax(student[..., :common] / temperature, -1)
    log_p = F.log_softmax(teacher[..., :common] / temperature, -1)
    loss = soft * temperature**2 * F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    if labels is not None and hard:
        flat = F.cross_entropy(student.flatten(0, -2), labels.flatten(), reduction="none")
        loss = loss + hard * flat.view(labels.shape)
    return loss


def mean(loss: Tensor, labels: Tensor | None) -> Tensor:
    """Mean over the rows that count."""
    if labels is None:
        return loss.mean()
    counts = labels != -100
    return torch.where(counts, loss, 0).sum() / counts.sum()


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(value, gradient) in float64 of a loss evaluated in `dtype`."""
    x = at.to(dtype).detach().requires_grad_()
    value = loss(x)
    (grad,) = torch.autograd.grad(value, x)
    return value.detach().double(), grad.double()


def error(a: Tensor, truth: Tensor) -> float:
    """Relative error in the Euclidean norm."""
    return float((a.double() - truth).norm() / truth.norm().clamp(min=1e-30))


def assert_as_good(ours: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype, what: str) -> None:
    """Error against float64 at most twice that of plain PyTorch in the same dtype, plus a rounding."""
    bound = 2 * error(plain, truth) + EPS[dtype]
    assert error(ours, truth) <= bound, f"{what}: error {error(ours, truth):.2e} exceeds {bound:.2e}"
