"""Sparse targets: capture, and the loss as that of the dense teacher they stand for. Contract: `kdfast.backends`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast.backends.reference import logits
from kdfast.backends.reference.logits import entropy, poison, through_head, wide
from kdfast.options import MASS_ERROR, PARTS, Head, RowOptions, weighted


def capture(
    logits: Tensor,
    k: int,
    temperatures: tuple[float, ...],
    draws: Tensor | None = None,
    sample_temperature: float = 1.0,
    head: Head = Head(),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    z = through_head(poison(wide(logits)), head.softcap or 0.0, head.scale)
    logp = z.log_softmax(-1)
    # A stable descending sort puts equal logits in id order; torch.topk promises no order among ties.
    ids = z.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    weights = logp.new_zeros(0)
    unselected = logp.scatter(1, ids, -torch.inf)
    if draws is not None:
        ids, weights = _with_drawn(logp, ids, (unselected / sample_temperature).log_softmax(-1), draws)
        unselected = logp.masked_fill(_mask(ids, logp.shape[1]), -torch.inf)
    log_z = torch.stack([(logp / t).logsumexp(-1) for t in temperatures], -1)
    log_tail = torch.stack([(unselected / t).logsumexp(-1) for t in temperatures], -1) - log_z
    logprobs = torch.where(ids >= 0, logp.gather(1, ids.clamp(min=0)), -torch.inf)
    return ids.int(), torch.where(logp[:, :1].isnan(), torch.nan, logprobs), log_z, log_tail, weights


def _with_drawn(logp: Tensor, ids: Tensor, log_r: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Ids, then those drawn from r in id order, -1 in empty slots; and their weights."""
    n = draws.shape[1]
    sums = log_r.double().exp().cumsum(-1)
    drawn = torch.searchsorted(sums, draws * sums[:, -1:], right=True)
    # Rounding must not push the last draw past the last id that can be drawn.
    drawn = drawn.minimum(
        (log_r > -torch.inf).long().mul(torch.arange(logp.shape[1], device=logp.device)).amax(-1, keepdim=True)
    )
    counts = torch.zeros_like(sums).scatter_add_(1, drawn, torch.ones_like(draws))
    counts = torch.where(log_r.isnan(), 0, counts)  # nothing is left to draw from
    order = counts.sign().sort(dim=-1, descending=True, stable=True).indices[:, :n]
    order = torch.nn.functional.pad(order, (0, n - order.shape[1]))
    found = counts.gather(1, order)
    found[:, logp.shape[1] :] = 0
    log_weight = (found / n).log() + logp.gather(1, order) - log_r.gather(1, order)
    weights = torch.where(found > 0, log_weight.exp(), 0)
    return (
        torch.cat([ids, torch.where(found > 0, order, -1)], 1),
        torch.cat([logp.gather(1, ids).exp(), weights.to(logp.dtype)], 1),
    )


def _mask(ids: Tensor, width: int) -> Tensor:
    """`[N, width]`: which columns are listed in `ids`, negative ones aside."""
    counts = torch.zeros(ids.shape[0], width, dtype=torch.int32, device=ids.device)
    return counts.scatter_add_(1, ids.long().clamp(0, width - 1), (ids >= 0).int()) > 0


def _dense(tempered: Tensor, ids: Tensor, log_p: Tensor, log_tail: Tensor, spread: bool) -> Tensor:
    """log p over the whole vocabulary of one target; NaN where an id is outside of it."""
    p = torch.zeros_like(tempered).scatter_add_(
        1, ids.long().clamp(0, tempered.shape[1] - 1), torch.where(ids >= 0, log_p, -torch.inf).to(tempered.dtype).exp()
    )
    listed = p != 0
    others = (~listed).sum(-1, keepdim=True).to(p.dtype)
    within = tempered.masked_fill(listed, -torch.inf).log_softmax(-1)
    if spread:
        within = -others.log().expand_as(p)
    within = torch.where(within.isnan(), -others.log(), within)  # the student excludes them all
    dense = torch.where(listed, p.log(), log_tail.to(p.dtype)[:, None] + within)
    return torch.where((ids >= tempered.shape[1]).any(-1, keepdim=True), torch.nan, dense)


def _terms(student: Tensor, targets: Sequence[Tensor], options: RowOptions, vocab_size: int, spread: bool) -> list[Tensor]:
    """The dense teacher of each target, as logits."""
    ids, log_p, log_tail, _ = targets
    z = through_head(poison(wide(student)), options.student_softcap, options.student_scale)
    tempered = z[:, :vocab_size] / options.temperature
    sets = range(log_p.shape[1])
    return [options.temperature * _dense(tempered, ids, log_p[:, m], log_tail[:, m], spread) for m in sets]


def _sums_to_1(targets: Sequence[Tensor], m: int) -> Tensor:
    """Which rows of a target are a distribution."""
    ids, log_p, log_tail, _ = targets
    total = torch.where(ids >= 0, log_p[:, m].exp(), 0).sum(-1) + log_tail[:, m].exp()
    return (total - 1).abs() <= MASS_ERROR


def _soft(options: RowOptions) -> RowOptions:
    return dataclasses.replace(
        options, hard_weight=0.0, z_loss=0.0, teacher_weights=(1.0,), teacher_softcap=0.0, teacher_scale=1.0
    )


def forward(
    student: Tensor,
    targets: Sequence[Tensor],
    labels: Tensor | None,
    scale: Tensor,
    options: RowOptions,
    vocab_size: int,
    spread: bool,
    need_parts: bool,
    grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    teachers, mass = _terms(student, targets, options, vocab_size, spread), wide(targets[3])
    counts, ones = scale != 0, torch.ones_like(scale)
    soft = torch.zeros_like(scale)
    for m, (weight, teacher) in enumerate(zip(options.teacher_weights, teachers, strict=True)):
        plain = dataclasses.replace(_soft(options), soft_weight=1.0, scale_by_t2=False)
        value, _, _ = logits.forward(student, [teacher], None, ones, plain, False, None)
        value = torch.where(_sums_to_1(targets, m), value, torch.nan)
        soft = soft + weight * torch.where(mass[:, m] == 0, 0, mass[:, m] * (value + mass[:, m].log()))
    # What the student does at T = 1 needs no teacher: any will do.
    rest = dataclasses.replace(_soft(options), soft_weight=0.0, hard_weight=options.hard_weight, z_loss=options.z_loss)
    row, _, at_1 = logits.forward(student, [wide(student).detach()], labels, ones, rest, True, None)
    loss = torch.where(counts, scale * (weighted(options.soft_scale, soft) + row), 0)
    parts = loss.new_zeros(0)
    if need_parts:
        ids = targets[0].long().clamp(0, vocab_size - 1)
        mixed = torch.zeros_like(ids, dtype=soft.dtype)
        for weight, teacher in zip(options.teacher_weights, teachers, strict=True):
            mixed += weight * (teacher / options.temperature).softmax(-1).gather(1, ids)
        best = ids.gather(1, torch.where(targets[0] >= 0, mixed, -1).argmax(-1, keepdim=True))[:, 0]
        z = through_head(wide(student), options.student_softcap, options.student_scale)
        columns = dict(zip(PARTS, at_1.unbind(-1), strict=True))
        kl_at_1 = soft if options.temperature == 1 and options.kind == "forward_kl" else torch.full_like(soft, torch.nan)
        unknown = torch.zeros_like(soft)
        columns |= {"soft": soft, "kl_at_1": kl_at_1, "teacher_nll": unknown, "teacher_entropy": unknown,
                    "student_entropy": entropy(z[:, :vocab_size].log_softmax(-1)),
                    "top1_agreement": (z[:, :vocab_size].argmax(-1) == best).to(soft.dtype)}  # fmt: skip
        parts = torch.where(counts[:, None], torch.stack([columns[name] for name in PARTS], -1), 0)
    # Nothing is kept for backward, which is no shorter for knowing the row's sums.
    stats = torch.zeros(student.shape[0], 4, dtype=torch.float64, device=student.device)
    if grad is not None:
        backward(student, targets, labels, scale, stats, options, vocab_size, spread, grad)
    return loss, stats, parts


def _weighted(options: RowOptions, teachers: list[Tensor]) -> enumerate[tuple[float, Tensor]]:
    return enumerate(zip(options.teacher_weights, teachers, strict=True))


def backward(
    student: Tensor,
    targets: Sequence[Tensor],
    labels: Tensor | None,
    scale: Tensor,
    stats: Tensor,
    options: RowOptions,
    vocab_size: int,
    spread: bool,
    grad: Tensor,
) -> None:
    teachers, mass = _terms(student, targets, options, vocab_size, spread), wide(targets[3])
    total, part = torch.empty_like(wide(student)), torch.empty_like(wide(student))
    rest = dataclasses.replace(_soft(options), soft_weight=0.0, hard_weight=options.hard_weight, z_loss=options.z_loss)
    logits.backward(student, [wide(student).detach()], labels, scale, stats, rest, total)
    for m, (weight, teacher) in _weighted(options, teachers):
        share = torch.where(scale == 0, scale, scale * weight * mass[:, m])
        logits.backward(student, [teacher], None, share, stats, _soft(options), part)
        total += part
    grad.copy_(total)
