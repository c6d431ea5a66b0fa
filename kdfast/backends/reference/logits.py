"""Knowledge distillation on logits, row by row. Contract: `kdfast.backends`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast.backends.reference import divergence
from kdfast.options import PARTS, RowOptions, weighted


def wide(tensor: Tensor) -> Tensor:
    """In the dtype of the arithmetic: float64 stays, everything else becomes float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def poison(z: Tensor) -> Tensor:
    """Rows that hold +inf become NaN: inf - inf would be NaN only in some of their outputs."""
    return torch.where(z.isposinf().any(-1, keepdim=True), torch.nan, z)


def through_head(z: Tensor, softcap: float, scale: float) -> Tensor:
    """What the softmax sees of a head's output."""
    z = z if scale == 1 else z * scale
    return z if softcap == 0 else softcap * torch.tanh(z / softcap)


def entropy(log_p: Tensor) -> Tensor:
    """Of each row, in nats; what has no probability adds nothing."""
    return -torch.where(log_p.isneginf(), 0, log_p.exp() * log_p).sum(-1)


def hard_loss(z: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each row at T = 1; NaN where the label is outside the vocabulary."""
    at_label = z.log_softmax(-1).gather(1, labels.clamp(0, z.shape[1] - 1)[:, None])[:, 0]
    return torch.where((labels >= 0) & (labels < z.shape[1]), -at_label, torch.nan)


def subtract_label(q: Tensor, labels: Tensor, amount: float = 1.0) -> Tensor:
    """q with `amount` taken from the label's column: the derivative of the cross-entropy."""
    return q.scatter_add_(1, labels.clamp(0, q.shape[1] - 1)[:, None], q.new_full((q.shape[0], 1), -amount))


def _teacher_logprobs(teachers: Sequence[Tensor], weights: Sequence[float], mix: str, temperature: float) -> Tensor:
    """log p of the one distribution all teachers make; their logits already cover the same ids."""
    if mix == "logits":
        mean = torch.stack([w * z for w, z in zip(weights, teachers, strict=True)]).sum(0)
        return (mean / temperature).log_softmax(-1)
    one_by_one = torch.stack([(z / temperature).log_softmax(-1) for z in teachers])
    logs = one_by_one.new_tensor(weights).log()[:, None, None]
    return one_by_one[0] if len(teachers) == 1 else (one_by_one + logs).logsumexp(0)


def _inputs(student: Tensor, teachers: Sequence[Tensor], options: RowOptions) -> tuple[Tensor, list[Tensor], int]:
    """Student and teachers as the softmax sees them, the teachers cut to the common ids."""
    common = min(student.shape[1], *(t.shape[1] for t in teachers))
    z_s = through_head(poison(wide(student)), options.student_softcap, options.student_scale)
    cut = [poison(wide(t)[:, :common]) for t in teachers]
    return z_s, [through_head(t, options.teacher_softcap, options.teacher_scale) for t in cut], common


def forward(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    scale: Tensor,
    options: RowOptions,
    need_parts: bool,
    grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    z_s, z_t, common = _inputs(student, teachers, options)
    temperature = options.temperature
    log_p = _teacher_logprobs(z_t, options.teacher_weights, options.teacher_mix, temperature)
    soft = divergence.value(options, log_p, (z_s[:, :common] / temperature).log_softmax(-1))
    lse = z_s.logsumexp(-1)
    row = weighted(options.soft_scale, soft)
    nll = torch.zeros_like(soft)
    if labels is not None:
        nll = hard_loss(z_s, labels)
        hard = nll
        if options.label_smoothing != 0:
            hard = (1 - options.label_smoothing) * nll + options.label_smoothing * (lse - z_s.mean(-1))
        # The NaN of a label out of range stays even when the hard loss has no weight.
        row = row + weighted(options.hard_weight, hard)
    if options.z_loss != 0:
        row = row + options.z_loss * lse**2
    counts = scale != 0
    loss = torch.where(counts, scale * row, 0)
    parts = loss.new_zeros(0)
    if need_parts:
        columns = {"soft": soft, "hard": nll, "z": lse**2, **_parts_at_1(z_s[:, :common], z_t, labels, options)}
        parts = torch.where(counts[:, None], torch.stack([columns[name] for name in PARTS], -1), 0)
    if grad is not None:
        backward(student, teachers, labels, scale, loss.new_zeros(0), options, grad)
    # Nothing is kept for backward, which is no shorter for knowing the row's sums.
    stats = torch.zeros(student.shape[0], 3 + len(teachers), dtype=torch.float64, device=student.device)
    return loss, stats, parts


def _parts_at_1(z_s: Tensor, z_t: list[Tensor], labels: Tensor | None, options: RowOptions) -> dict[str, Tensor]:
    log_q = z_s.log_softmax(-1)
    log_p = _teacher_logprobs(z_t, options.teacher_weights, options.teacher_mix, 1.0)
    teacher_nll = torch.zeros_like(log_p[:, 0])
    if labels is not None:
        common = log_p.shape[1]
        teacher_nll = -log_p.gather(1, labels.clamp(0, common - 1)[:, None])[:, 0]
        teacher_nll = torch.where(labels < common, teacher_nll, torch.inf)
    return {
        "kl_at_1": divergence.forward_kl(log_p, log_q),
        "teacher_nll": teacher_nll,
        "teacher_entropy": entropy(log_p),
        "student_entropy": entropy(log_q),
        "top1_agreement": (log_p.argmax(-1) == z_s.argmax(-1)).to(log_p.dtype),
    }


def backward(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    scale: Tensor,
    stats: Tensor,
    options: RowOptions,
    grad: Tensor,
) -> None:
    z_s, z_t, common = _inputs(student, teachers, options)
    out = torch.zeros_like(z_s)
    if options.soft_scale != 0:
        log_p = _teacher_logprobs(z_t, options.teacher_weights, options.teacher_mix, options.temperature)
        log_q = (z_s[:, :common] / options.temperature).log_softmax(-1)
        out[:, :common] = (options.soft_scale / options.temperature) * divergence.derivative(options, log_p, log_q)
    if options.z_loss != 0:
        out += 2 * options.z_loss * z_s.logsumexp(-1, keepdim=True) * z_s.softmax(-1)
    if labels is not None and options.hard_weight != 0:
        smooth = options.label_smoothing
        q = subtract_label(z_s.softmax(-1), labels, 1 - smooth)
        out += options.hard_weight * (q - smooth / z_s.shape[1])
    if options.student_softcap != 0:
        out *= 1 - (z_s / options.student_softcap) ** 2
    out *= options.student_scale
    grad.copy_(torch.where((scale != 0)[:, None], scale[:, None] * out, 0))
