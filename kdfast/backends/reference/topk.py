"""Top-k capture and the ghost-bucket loss. Contract: `kdfast.backends`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast.backends.reference.divergence import forward_kl
from kdfast.backends.reference.logits import hard_loss, poison, subtract_label, wide
from kdfast.options import PARTS, RowOptions


def capture(logits: Tensor, k: int, temperatures: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logp = poison(wide(logits)).log_softmax(-1)
    # A stable descending sort puts equal logits in id order; torch.topk promises no order among ties.
    ids = wide(logits).sort(dim=-1, descending=True, stable=True).indices[:, :k]
    unselected = logp.scatter(1, ids, -torch.inf)
    log_z = torch.stack([(logp / t).logsumexp(-1) for t in temperatures], -1)
    log_tail = torch.stack([(unselected / t).logsumexp(-1) for t in temperatures], -1) - log_z
    return ids.int(), logp.gather(1, ids), log_z, log_tail


def _selected(ids: Tensor, vocab_size: int, width: int) -> tuple[Tensor, Tensor]:
    """(entries that count, mask [N, width] of the ids they name)."""
    valid = ids >= 0
    mask = torch.zeros(ids.shape[0], width, dtype=torch.bool, device=ids.device)
    rows = torch.arange(ids.shape[0], device=ids.device)[:, None].expand_as(ids)
    inside = valid & (ids < vocab_size)
    mask[rows[inside], ids[inside].long()] = True
    return valid, mask


def _log_tail(tempered: Tensor, mask: Tensor) -> Tensor:
    """Log mass of the unselected ids."""
    return tempered.log_softmax(-1).masked_fill(mask, -torch.inf).logsumexp(-1)


def forward(
    student: Tensor,
    targets: Sequence[Tensor],
    labels: Tensor | None,
    scale: Tensor,
    options: RowOptions,
    vocab_size: int,
    need_parts: bool,
    grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    ids, logprobs, log_z, log_tail = targets
    z = poison(wide(student))
    tempered = z[:, :vocab_size] / options.temperature
    valid, mask = _selected(ids, vocab_size, vocab_size)
    log_sums = [tempered.masked_fill(mask, -torch.inf).logsumexp(-1), tempered.logsumexp(-1), z.logsumexp(-1)]
    stats = torch.stack(log_sums, -1).double()
    log_q = tempered.log_softmax(-1).gather(1, ids.long().clamp(0, vocab_size - 1))
    log_p = (logprobs / options.temperature - log_z[:, None]).masked_fill(~valid, -torch.inf)
    buckets_p = torch.cat([log_p, log_tail[:, None]], -1)
    buckets_q = torch.cat([log_q.masked_fill(~valid, -torch.inf), _log_tail(tempered, mask)[:, None]], -1)
    soft = forward_kl(buckets_p, buckets_q)
    soft = torch.where((ids >= vocab_size).any(-1), torch.nan, soft)
    row = options.soft_scale * soft
    hard = torch.zeros_like(soft) if labels is None else hard_loss(z, labels)
    if labels is not None:
        row = row + options.hard_weight * hard
    counts = scale != 0
    loss = torch.where(counts, scale * row, 0)
    parts = loss.new_zeros(0)
    if need_parts:
        best = ids.gather(1, log_p.argmax(-1, keepdim=True))[:, 0]
        agree = (tempered.argmax(-1) == best).to(soft.dtype)
        kl_at_1 = soft if options.temperature == 1 else torch.full_like(soft, torch.nan)
        unknown = torch.zeros_like(soft)
        columns = {"soft": soft, "hard": hard, "z": z.logsumexp(-1) ** 2, "kl_at_1": kl_at_1, "teacher_nll": unknown,
                   "teacher_entropy": unknown, "top1_agreement": agree}  # fmt: skip
        parts = torch.where(counts[:, None], torch.stack([columns[name] for name in PARTS], -1), 0)
    if grad is not None:
        backward(student, targets, labels, scale, stats, options, vocab_size, grad)
    return loss, stats, parts


def backward(
    student: Tensor,
    targets: Sequence[Tensor],
    labels: Tensor | None,
    scale: Tensor,
    stats: Tensor,
    options: RowOptions,
    vocab_size: int,
    grad: Tensor,
) -> None:
    ids, logprobs, log_z, log_tail = targets
    z = wide(student)
    tempered = z[:, :vocab_size] / options.temperature
    valid, mask = _selected(ids, vocab_size, vocab_size)
    q = tempered.softmax(-1)
    p = torch.zeros_like(q).scatter_add_(
        1,
        ids.long().clamp(0, vocab_size - 1),
        torch.where(valid, (logprobs / options.temperature - log_z[:, None]).exp(), 0),
    )
    q_tail = _log_tail(tempered, mask).exp()[:, None]
    within_tail = tempered.masked_fill(mask, -torch.inf).softmax(-1)  # NaN where nothing is left over, and unused there
    out = torch.zeros_like(z)
    soft = torch.where(mask, q - p, within_tail * (q_tail - log_tail[:, None].exp()))
    out[:, :vocab_size] = (options.soft_scale / options.temperature) * soft
    if labels is not None and options.hard_weight != 0:
        out += options.hard_weight * subtract_label(torch.softmax(z, -1), labels)
    grad.copy_(torch.where((scale != 0)[:, None], scale[:, None] * out, 0))
