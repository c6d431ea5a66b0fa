"""Knowledge distillation on logits, row by row. Contract: `kdfast.backends`."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.backends.reference.divergence import forward_kl
from kdfast.options import PARTS, RowOptions


def wide(tensor: Tensor) -> Tensor:
    """In the dtype of the arithmetic: float64 stays, everything else becomes float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def poison(z: Tensor) -> Tensor:
    """Rows that hold +inf become NaN: inf - inf would be NaN only in some of their outputs."""
    return torch.where(z.isposinf().any(-1, keepdim=True), torch.nan, z)


def hard_loss(z: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each row at T = 1; NaN where the label is outside the vocabulary."""
    at_label = z.log_softmax(-1).gather(1, labels.clamp(0, z.shape[1] - 1)[:, None])[:, 0]
    return torch.where((labels >= 0) & (labels < z.shape[1]), -at_label, torch.nan)


def subtract_label(q: Tensor, labels: Tensor) -> Tensor:
    """q with 1 taken from the label's column: the derivative of the cross-entropy."""
    return q.scatter_add_(1, labels.clamp(0, q.shape[1] - 1)[:, None], -torch.ones_like(q[:, :1]))


def forward(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    scale: Tensor,
    options: RowOptions,
    need_parts: bool,
    grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    common = min(student.shape[1], teacher.shape[1])
    z_s, z_t = poison(wide(student)), poison(wide(teacher)[:, :common])
    stats = torch.stack(
        [
            torch.logsumexp(z_s[:, :common] / options.temperature, -1),
            torch.logsumexp(z_t / options.temperature, -1),
            torch.logsumexp(z_s, -1),
        ],
        -1,
    ).double()
    log_q = torch.log_softmax(z_s[:, :common] / options.temperature, -1)
    log_p = torch.log_softmax(z_t / options.temperature, -1)
    soft = forward_kl(log_p, log_q)
    hard = torch.zeros_like(soft) if labels is None else hard_loss(z_s, labels)
    counts = scale != 0
    row = options.soft_scale * soft
    if labels is not None:
        # 0 * NaN is NaN: a label out of range is a bad row even when the hard loss has no weight.
        row = row + options.hard_weight * hard
    loss = torch.where(counts, scale * row, 0)
    parts = loss.new_zeros(0)
    if need_parts:
        log_p1, log_q1 = torch.log_softmax(z_t, -1), torch.log_softmax(z_s[:, :common], -1)
        entropy = -torch.where(log_p1.isneginf(), 0, log_p1.exp() * log_p1).sum(-1)
        agree = (z_t.argmax(-1) == z_s[:, :common].argmax(-1)).to(soft.dtype)
        nll = torch.zeros_like(soft)
        if labels is not None:
            nll = -log_p1.gather(1, labels.clamp(0, common - 1)[:, None])[:, 0]
            nll = torch.where(labels < common, nll, torch.inf)
        columns = {"soft": soft, "hard": hard, "kl_at_1": forward_kl(log_p1, log_q1), "teacher_nll": nll,
                   "teacher_entropy": entropy, "top1_agreement": agree}  # fmt: skip
        parts = torch.where(counts[:, None], torch.stack([columns[name] for name in PARTS], -1), 0)
    if grad is not None:
        backward(student, teacher, labels, scale, stats, options, grad)
    return loss, stats, parts


def backward(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    scale: Tensor,
    stats: Tensor,
    options: RowOptions,
    grad: Tensor,
) -> None:
    common = min(student.shape[1], teacher.shape[1])
    z_s, z_t = wide(student), wide(teacher)[:, :common]
    q = torch.softmax(z_s[:, :common] / options.temperature, -1)
    p = torch.softmax(z_t / options.temperature, -1)
    out = torch.zeros_like(z_s)
    out[:, :common] = (options.soft_scale / options.temperature) * (q - p)
    if labels is not None and options.hard_weight != 0:
        out += options.hard_weight * subtract_label(torch.softmax(z_s, -1), labels)
    grad.copy_(torch.where((scale != 0)[:, None], scale[:, None] * out, 0))
