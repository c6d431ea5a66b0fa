"""Plain PyTorch the ops are compared with, and the one rule for tolerances."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import Head

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


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row; an id that p excludes adds nothing."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0).sum(-1)


def divergence(name: str, log_p: Tensor, log_q: Tensor, *, beta: float, skew: float, a: float, b: float) -> Tensor:
    """Each divergence as its definition reads."""

    def mixed(w: float) -> Tensor:
        return torch.logaddexp(log_p + math.log(w), log_q + math.log1p(-w))

    if name == "forward_kl":
        return kl(log_p, log_q)
    if name == "reverse_kl":
        return kl(log_q, log_p)
    if name == "jsd":
        return beta * kl(log_p, mixed(beta)) + (1 - beta) * kl(log_q, mixed(beta))
    if name == "skew_forward_kl":
        return kl(log_p, mixed(skew))
    if name == "skew_reverse_kl":
        return kl(log_q, mixed(1 - skew))
    if name == "tvd":
        return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    p, q = log_p.exp(), log_q.exp()
    if a == 0:
        return (q**b * b * (log_q - log_p) - q**b + p**b).sum(-1) / b**2
    if b == 0:
        return (p**a * a * (log_p - log_q) - p**a + q**a).sum(-1) / a**2
    return -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)).sum(-1) / (a * b)


NO_HEAD = Head()


def kd_rows(
    student: Tensor, teachers: list[Tensor], labels: Tensor | None = None, *, name: str = "forward_kl",
    temperature: float = 1.0, soft: float = 1.0, hard: float = 0.0, beta: float = 0.5, skew: float = 0.1, a: float = 1.0,
    b: float = 0.0, smoothing: float = 0.0, z_loss: float = 0.0, student_head: Head = NO_HEAD, teacher_head: Head = NO_HEAD,
    weights: list[float] | None = None, mix: str = "probs",
) -> Tensor:  # fmt: skip
    """Loss of each row before weights and masks, every option of kd_loss as its definition reads."""

    def capped(x: Tensor, head: Head) -> Tensor:
        x = x * head.scale
        return x if head.softcap is None else head.softcap * torch.tanh(x / head.softcap)

    student = capped(student, student_head)
    common = min(student.shape[-1], *(t.shape[-1] for t in teachers))
    cut = [capped(t, teacher_head)[..., :common] for t in teachers]
    share = [w / sum(weights) for w in weights] if weights else [1 / len(cut)] * len(cut)
    if mix == "logits":
        log_p = (sum(w * t for w, t in zip(share, cut, strict=True)) / temperature).log_softmax(-1)
    else:
        logs = [(t / temperature).log_softmax(-1) + math.log(w) for w, t in zip(share, cut, strict=True)]
        log_p = torch.stack(logs).logsumexp(0)
    log_q = (student[..., :common] / temperature).log_softmax(-1)
    loss = soft * temperature**2 * divergence(name, log_p, log_q, beta=beta, skew=skew, a=a, b=b)
    if labels is not None and hard:
        flat = F.cross_entropy(student.flatten(0, -2), labels.flatten(), reduction="none", label_smoothing=smoothing)
        loss = loss + hard * flat.view(labels.shape)
    return loss + z_loss * student.logsumexp(-1) ** 2 if z_loss else loss


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
    """Error against float64 at most twice that of plain PyTorch in the same dtype, plus a rounding.

    Where plain PyTorch has no finite answer only the rounding is allowed.
    """
    bound = EPS[dtype] + (2 * error(plain, truth) if bool(plain.isfinite().all()) else 0)
    assert error(ours, truth) <= bound, f"{what}: error {error(ours, truth):.2e} exceeds {bound:.2e}"
