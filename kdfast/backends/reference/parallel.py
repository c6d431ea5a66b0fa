"""Knowledge distillation on slices of the vocabulary: what a slice knows, before and after the ranks have talked.

Contract: `kdfast.backends`. Rows go in groups, so that temporaries stay at a few times `_ELEMENTS` whatever N x V is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kdfast.backends.reference import divergence
from kdfast.backends.reference.logits import entropy, poison, through_head, wide
from kdfast.options import RowOptions

_ELEMENTS = 1 << 22


def _groups(student: Tensor) -> Iterator[slice]:
    rows = max(1, _ELEMENTS // student.shape[1])
    for begin in range(0, student.shape[0], rows):
        yield slice(begin, begin + rows)


class _Rows:
    """Some rows of the slice, as the softmaxes see them; the soft term is over the first `common` ids of the slice, or the
    first `limit` of those where only the device knows how many."""

    def __init__(self, student: Tensor, teachers: Sequence[Tensor], options: RowOptions, limit: Tensor | None) -> None:
        self.options, self.common = options, min(student.shape[1], *(t.shape[1] for t in teachers))
        self.z_s = through_head(poison(wide(student)), options.student_softcap, options.student_scale)
        self.z_common = self.z_s[:, : self.common]
        if limit is not None:
            beyond = torch.arange(self.common, device=limit.device) >= limit
            self.z_common = self.z_common.masked_fill(beyond, -math.inf)
        cut = [poison(wide(t)[:, : self.common]) for t in teachers]
        self.z_t = [through_head(t, options.teacher_softcap, options.teacher_scale) for t in cut]
        if options.teacher_mix == "logits":
            self.z_t = [sum(w * z for w, z in zip(options.teacher_weights, self.z_t, strict=True))]  # type: ignore[list-item]

    def log_q(self, lse: Tensor, temperature: float) -> Tensor:
        return _minus(self.z_common / temperature, lse)

    def log_p(self, lses: Tensor, temperature: float) -> Tensor:
        logs = [_minus(z / temperature, lse) for z, lse in zip(self.z_t, lses.unbind(1), strict=True)]
        if len(logs) == 1:
            return logs[0]
        # Numbers one by one: as a tensor they would be a copy from the host, which waits for it.
        weighted = [log + (math.log(w) if w else -math.inf) for log, w in zip(logs, self.options.teacher_weights, strict=True)]
        return torch.stack(weighted).logsumexp(0)


def _minus(z: Tensor, lse: Tensor) -> Tensor:
    """z - lse with the float64 lse in two parts: rounding that of a logit of 640 would cost four digits."""
    high = lse.to(z.dtype)
    return (z - high[:, None]) - (lse - high).to(z.dtype)[:, None]


def lse_columns(teachers: int, options: RowOptions, need_parts: bool) -> int:
    """Columns of `log_sums`: student over all ids at 1; at T student and teachers; for parts at 1 student and teachers."""
    distributions = 1 + (1 if options.teacher_mix == "logits" else teachers)
    return 1 + distributions * (2 if need_parts else 1)


def log_sums(
    student: Tensor, teachers: Sequence[Tensor], options: RowOptions, need_parts: bool, limit: Tensor | None = None
) -> Tensor:
    """Log-sum-exps over the slice: `[N, lse_columns]` float64.

    Args:
        limit: `[]`, ids of the slice that the soft term is over, where the device knows; teachers are -inf at all others.
    """
    columns = lse_columns(len(teachers), options, need_parts)
    out = torch.empty(student.shape[0], columns, dtype=torch.float64, device=student.device)
    for rows in _groups(student):
        r = _Rows(student[rows], [t[rows] for t in teachers], options, limit)
        sides = [r.z_common, *r.z_t]
        temperatures = (options.temperature, 1.0) if need_parts else (options.temperature,)
        sums = [r.z_s.logsumexp(-1), *((z / t).logsumexp(-1) for t in temperatures for z in sides)]
        out[rows] = torch.stack(sums, -1)
    return out


#: What `row_sums` adds up over the ids of a slice. With a label outside the slice its columns are 0.
SUMS = ("value", "slope", "label_hits", "label_logit", "logits")
PART_SUMS = ("kl_at_1", "teacher_entropy", "student_entropy", "teacher_hits", "teacher_label")
#: And what it finds there: the largest value and its id, of the student and of the teachers' distribution at 1.
BESTS = ("student_best", "student_best_id", "teacher_best", "teacher_best_id")


def row_sums(
    student: Tensor, teachers: Sequence[Tensor], labels: Tensor | None, lses: Tensor, options: RowOptions, need_parts: bool,
    limit: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Sums over the slice, given the log-sum-exps over all ids: `[N, len(SUMS)]`, for parts all columns; float64.

    Args:
        labels: positions within the slice; outside [0, width) they belong to another rank.
        limit: as in `log_sums`.
    """
    names = (*SUMS, *PART_SUMS, *BESTS) if need_parts else SUMS
    out = torch.zeros(student.shape[0], len(names), dtype=torch.float64, device=student.device)
    for rows in _groups(student):
        r = _Rows(student[rows], [t[rows] for t in teachers], options, limit)
        part_labels = None if labels is None else labels[rows]
        columns = _sums(r, part_labels, lses[rows], options)
        if need_parts:
            columns |= _sums_at_1(r, part_labels, lses[rows])
        for i, name in enumerate(names):
            if name in columns:
                out[rows, i] = columns[name].double()
    return out


def _sums(r: _Rows, labels: Tensor | None, lses: Tensor, options: RowOptions) -> dict[str, Tensor]:
    log_q = r.log_q(lses[:, 1], options.temperature)
    log_p = r.log_p(lses[:, 2 : 2 + len(r.z_t)], options.temperature)
    columns = {"value": divergence.value(options, log_p, log_q)}
    if options.kind != "forward_kl":
        columns["slope"] = divergence.slope(options, log_p, log_q).sum(-1)
    if labels is not None:
        columns["label_hits"], columns["label_logit"] = _at(r.z_s, labels)
    if options.label_smoothing != 0:
        columns["logits"] = r.z_s.double().sum(-1)
    return columns


def _sums_at_1(r: _Rows, labels: Tensor | None, lses: Tensor) -> dict[str, Tensor]:
    at = 2 + len(r.z_t)
    log_q, log_p = r.log_q(lses[:, at], 1.0), r.log_p(lses[:, at + 1 :], 1.0)
    columns = {
        "kl_at_1": divergence.forward_kl(log_p, log_q),
        "teacher_entropy": entropy(log_p),
        "student_entropy": entropy(log_q),
    }
    columns["student_best"], columns["student_best_id"] = r.z_s.max(-1)
    columns["teacher_best"], columns["teacher_best_id"] = log_p.max(-1)
    if labels is not None:
        columns["teacher_hits"], columns["teacher_label"] = _at(log_p, labels)
    return columns


def _at(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(whether the label is in the slice, the value there or 0)."""
    width = values.shape[1]
    hit = (labels >= 0) & (labels < width)
    return hit, torch.where(hit, values.gather(1, labels.clamp(0, width - 1)[:, None])[:, 0], 0)


def gradient(
    student: Tensor, teachers: Sequence[Tensor], labels: Tensor | None, scale: Tensor, lses: Tensor, slope: Tensor,
    vocab: Tensor, options: RowOptions, grad: Tensor, limit: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes d(sum of loss)/d(student) of the slice into `grad`, which may be `student`.

    Args:
        lses: the first columns of `log_sums` over all ids. slope: `[N]`, of `row_sums` over all ids.
        vocab: `[]`, student ids of all ranks together. limit: as in `log_sums`.
    """
    for rows in _groups(student):
        r = _Rows(student[rows], [t[rows] for t in teachers], options, limit)
        out = torch.zeros_like(r.z_s)
        if options.soft_scale != 0:
            log_q = r.log_q(lses[rows, 1], options.temperature)
            log_p = r.log_p(lses[rows, 2 : 2 + len(r.z_t)], options.temperature)
            soft = divergence.derivative(options, log_p, log_q, slope[rows].to(log_q.dtype)[:, None])
            out[:, : r.common] = (options.soft_scale / options.temperature) * soft
        hard_weight = 0.0 if labels is None else options.hard_weight
        if hard_weight != 0 or options.z_loss != 0:
            q = _minus(r.z_s, lses[rows, 0]).exp()
            out += (hard_weight + 2 * options.z_loss * lses[rows, 0].to(q.dtype))[:, None] * q
        if labels is not None and hard_weight != 0:
            smooth = options.label_smoothing
            hit = (labels[rows] >= 0) & (labels[rows] < out.shape[1])
            amount = hit.to(out.dtype) * (-(1 - smooth) * hard_weight)
            out.scatter_add_(1, labels[rows].clamp(0, out.shape[1] - 1)[:, None], amount[:, None])
            out -= (smooth * hard_weight / vocab).to(out.dtype)
        if options.student_softcap != 0:
            out *= 1 - (r.z_s / options.student_softcap) ** 2
        out *= options.student_scale
        counts = scale[rows, None]
        grad[rows] = torch.where(counts != 0, counts * out, 0).to(grad.dtype)
