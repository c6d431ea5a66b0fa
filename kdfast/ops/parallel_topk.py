"""Sparse targets over a vocabulary that is sliced over the ranks of a process group (`kdfast.ops.parallel` says how).

Targets list ids of the whole vocabulary and are the same on all ranks. For the loss a rank forms its slice of the dense
teacher that they stand for and the slices go the way of dense ones; capture merges what the ranks captured of theirs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdfast.ops import parallel, rows
from kdfast.options import MASS_ERROR, PARTS, Head, RowOptions


def _offset(width: int, like: Tensor, ranks: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """(first id of this rank's slice, ids of all ranks), which the device knows and the host does not wait for."""
    widths = parallel.gather(like.new_full((1,), width, dtype=torch.int64), ranks)[:, 0]
    return widths[: dist.get_rank(ranks)].sum(), widths.sum()


def _numbers(values: Sequence[float], like: Tensor) -> Tensor:
    """`[len(values)]` float64, one by one: as a tensor they would be a copy from the host, which waits for it."""
    return torch.stack([like.new_full((), x, dtype=torch.float64) for x in values])


class SparseSlices:
    """`forward` and `backward` of the `topk` contract on slices of the vocabulary; labels and ids are of the whole one."""

    def __init__(self, dense: parallel.Slices) -> None:
        self.dense = dense

    def forward(
        self, student: Tensor, targets: Sequence[Tensor], labels: Tensor | None, scale: Tensor, options: RowOptions,
        vocab_size: int, spread: bool, group: str, need_parts: bool, grad: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        ranks, mass = parallel.group_of(group), targets[3]
        begin, vocab = _offset(student.shape[1], student, ranks)
        checked = rows.values_are_checked(student.device)
        if checked and bool(vocab < vocab_size):
            raise ValueError(f"tp_group: expected slices of at least {vocab_size} ids like the targets', got {int(vocab)}")
        limit = (vocab_size - begin).clamp(0, student.shape[1])
        teachers = _teachers(student, targets, options, vocab_size, begin, limit, spread, ranks)
        if not checked:
            teachers = [torch.where(vocab < vocab_size, torch.nan, t) for t in teachers]
        dense = parallel.Slices(self.dense.kernel, limit)
        plain = dataclasses.replace(options, teacher_weights=(1.0,), teacher_softcap=0.0, teacher_scale=1.0)
        of_student = dataclasses.replace(plain, soft_weight=0.0)
        soft_only = dataclasses.replace(plain, hard_weight=0.0, z_loss=0.0)
        total, part = (None if grad is None else torch.empty_like(student, dtype=scale.dtype) for _ in range(2))
        loss, _, parts = dense.forward(student, teachers[:1], labels, scale, of_student, group, need_parts, total)
        soft = torch.zeros_like(loss)
        for m, (weight, teacher) in enumerate(zip(options.teacher_weights, teachers, strict=True)):
            share = torch.where(scale == 0, scale, scale * weight * mass[:, m])
            value, _, found = dense.forward(student, [teacher], None, share, soft_only, group, need_parts, part)
            constant = torch.where(share == 0, 0, mass[:, m].log())
            loss = loss + value + share * options.soft_scale * constant
            if need_parts:
                soft += torch.where(share == 0, 0, weight * mass[:, m] * (found[:, PARTS.index("soft")] + constant))
            if total is not None and part is not None:
                total += part
        counts = scale != 0
        if need_parts:
            is_kl_at_1 = options.temperature == 1 and options.kind == "forward_kl"
            columns = dict(zip(PARTS, parts.unbind(-1), strict=True))
            columns |= {"soft": soft, "kl_at_1": soft if is_kl_at_1 else torch.full_like(soft, torch.nan)}
            parts = torch.where(counts[:, None], torch.stack([columns[name] for name in PARTS], -1), 0)
        if grad is not None and total is not None:
            grad.copy_(total)
        return loss, loss.new_zeros(len(loss), 4, dtype=torch.float64), parts

    def backward(
        self, student: Tensor, targets: Sequence[Tensor], labels: Tensor | None, scale: Tensor, stats: Tensor,
        options: RowOptions, vocab_size: int, spread: bool, group: str, grad: Tensor,
    ) -> None:  # fmt: skip
        self.forward(student, targets, labels, scale, options, vocab_size, spread, group, False, grad)


def _teachers(
    student: Tensor, targets: Sequence[Tensor], options: RowOptions, vocab_size: int, begin: Tensor, limit: Tensor,
    spread: bool, ranks: dist.ProcessGroup,
) -> list[Tensor]:  # fmt: skip
    """This rank's slice of every target's dense teacher, as logits; -inf from `limit` on, where the targets have no ids."""
    ids, log_p, log_tail, mass = targets
    width = student.shape[1]
    beyond = torch.arange(width, device=student.device) >= limit
    z = _through(student.to(log_p.dtype), options) / options.temperature
    local = ids.long() - begin
    here = (ids >= 0) & (local >= 0) & (local < limit)
    # One column more takes what belongs to other ranks.
    at = torch.where(here, local, width)
    p = log_p.new_zeros(*log_tail.shape, width + 1)
    p = p.scatter_add_(2, at[:, None].expand_as(log_p), torch.where(here[:, None], log_p.exp(), 0))[..., :width]
    listed = p > 0
    others = ~(listed | beyond)
    rest = torch.where(others, z[:, None], -torch.inf).double().logsumexp(-1)
    gathered = parallel.gather(torch.stack([rest, others.sum(-1).double()]), ranks)
    rest, log_others = gathered[:, 0].logsumexp(0), gathered[:, 1].sum(0).log()
    outside = (ids >= vocab_size).any(-1)
    total = torch.where(ids[:, None] >= 0, log_p.exp(), 0).sum(-1) + log_tail.exp()
    none = (mass != 0) & ~((total - 1).abs() <= MASS_ERROR)
    teachers = []
    for m in range(log_tail.shape[1]):
        even = -log_others[:, m, None].to(z.dtype).expand_as(z)
        within = even if spread else torch.where(rest[:, m, None].isneginf(), even, z - rest[:, m, None].to(z.dtype))
        dense = torch.where(listed[:, m], p[:, m].log(), log_tail[:, m, None] + within)
        # A target without mass has no loss, whatever stands in for it.
        dense = torch.where((mass[:, m] == 0)[:, None], 0, options.temperature * dense).masked_fill(beyond, -torch.inf)
        teachers.append(torch.where((outside | none[:, m])[:, None], torch.nan, dense))
    return teachers


def _through(z: Tensor, options: RowOptions) -> Tensor:
    z = z * options.student_scale
    return z if options.student_softcap == 0 else options.student_softcap * torch.tanh(z / options.student_softcap)


def slices(backend: str) -> SparseSlices:
    """The sparse kernels over those of the op `parallel` in a backend."""
    return SparseSlices(parallel.slices(backend))


def merged_capture(
    logits: Tensor, captured: Sequence[Tensor], k: int, temperatures: Sequence[float], head: Head, group: str
) -> tuple[tuple[Tensor, ...], int]:
    """(capture of the whole vocabulary from each rank's own, which may hold fewer than k entries; ids in the vocabulary)."""
    ids, logprobs, log_z, log_tail, weights = captured
    ranks = parallel.group_of(group)
    begin, vocab = _offset(logits.shape[1], logits, ranks)
    vocab_size = int(vocab)  # targets say it in a number of the host's: one wait of a capture, none of a loss
    if k > vocab_size:
        raise ValueError(f"k: expected 0 < k <= {vocab_size} (the vocabulary of all ranks), got {k}")
    options = RowOptions(student_softcap=head.softcap or 0.0, student_scale=head.scale)
    z = _through(logits.gather(1, ids.long()).to(logprobs.dtype), options).double()
    lse_1 = z[:, :1] - logprobs[:, :1].double()
    at = _numbers(temperatures, logits)
    lse = log_z.double() + lse_1 / at
    pad = (0, k - ids.shape[1])
    z = torch.nn.functional.pad(z, pad, value=-math.inf)
    ids = torch.nn.functional.pad(ids.double() + begin, pad, value=vocab_size)
    packed = parallel.gather(torch.cat([z, ids, lse_1, lse, lse + log_tail.double()], -1), ranks)
    sizes = [k, k, 1, len(temperatures), len(temperatures)]
    z, ids, lse_1, lse, tail = (x.transpose(0, 1) for x in packed.split(sizes, -1))
    z, ids = z.flatten(1), ids.flatten(1)
    # Ranks come in id order and each puts ties in id order: a stable sort keeps it.
    order = z.sort(dim=-1, descending=True, stable=True).indices
    kept, dropped = order[:, :k], order[:, k:]
    lse_1, lse, tail = lse_1.logsumexp(1), lse.logsumexp(1), tail.logsumexp(1)
    left = (z.gather(1, dropped)[..., None] / at).logsumexp(1) if dropped.shape[1] else torch.full_like(tail, -math.inf)
    values = (z.gather(1, kept) - lse_1, lse - lse_1 / at, tail.logaddexp(left) - lse)
    return (ids.gather(1, kept).int(), *(v.to(logprobs.dtype) for v in values), weights), vocab_size


def with_draws(
    logits: Tensor, captured: Sequence[Tensor], k: int, temperatures: Sequence[float], draws: Tensor,
    sample_temperature: float, head: Head, group: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The first k entries of a merged capture, and ids drawn from all others: the same as from the whole vocabulary.

    Every rank draws with the first one's `draws` [N, n] and finds those that fall to its slice.
    """
    ids, logprobs, log_z, _, _ = captured
    ids, dtype = ids[:, :k], logprobs.dtype
    ranks = parallel.group_of(group)
    begin, _ = _offset(logits.shape[1], logits, ranks)
    draws = parallel.gather(draws, ranks)[0]
    options = RowOptions(student_softcap=head.softcap or 0.0, student_scale=head.scale)
    z = _through(logits.double(), options)
    lse_1 = parallel.gather(z.logsumexp(-1), ranks).logsumexp(0)[:, None]
    others = _without(z, ids, begin)
    masses = parallel.gather((others / sample_temperature).logsumexp(-1), ranks)
    total = masses.logsumexp(0)[:, None]
    at, counts = _drawn_here(others / sample_temperature - total, masses.softmax(0), draws, dist.get_rank(ranks))
    mine = torch.stack([at.double() + begin, counts, z.gather(1, at)])
    drawn, counts, z_drawn = (x.transpose(0, 1).flatten(1) for x in parallel.gather(mine, ranks).unbind(1))
    first = counts.sign().sort(dim=-1, descending=True, stable=True).indices[:, : draws.shape[1]]
    drawn, counts, z_drawn = (x.gather(1, first) for x in (drawn, counts, z_drawn))
    there = counts > 0
    logp = torch.where(there, z_drawn - lse_1, -math.inf)
    weights = counts / draws.shape[1] * (logp - torch.where(there, z_drawn / sample_temperature - total, 0)).exp()
    all_ids = torch.cat([ids, torch.where(there, drawn, -1).int()], 1)
    at_t = _numbers(temperatures, z)
    rest = torch.stack([(_without(z, all_ids, begin) / t).logsumexp(-1) for t in temperatures], -1)
    tail = parallel.gather(rest, ranks).logsumexp(0) - (log_z.double() + lse_1 / at_t)
    values = (
        torch.cat([logprobs[:, :k].double(), logp], 1),
        log_z,
        tail,
        torch.cat([logprobs[:, :k].double().exp(), weights], 1),
    )
    return all_ids, *(v.to(dtype) for v in values)


def _without(z: Tensor, ids: Tensor, begin: Tensor) -> Tensor:
    """A slice of logits that starts at id `begin`, -inf at some ids of the whole vocabulary."""
    local = ids.long() - begin
    at = torch.where((ids >= 0) & (local >= 0) & (local < z.shape[1]), local, z.shape[1])
    return torch.nn.functional.pad(z, (0, 1)).scatter(1, at, -math.inf)[:, :-1]


def _drawn_here(log_r: Tensor, shares: Tensor, draws: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(n places of a slice, how often each was drawn), from its log-probabilities [N, W] and what ranks hold, [R, N]."""
    ends = shares.cumsum(0)
    begins, n = ends[rank] - shares[rank], draws.shape[1]
    # Rounding must not push the last draw past the last rank, or the last id, that has any mass.
    last = shares[rank + 1 :].sum(0) == 0
    mine = (draws >= begins[:, None]) & ((draws < ends[rank][:, None]) | last[:, None]) & (shares[rank][:, None] > 0)
    sums = log_r.exp().cumsum(-1)
    place = torch.arange(log_r.shape[1], device=log_r.device)
    end = torch.where(log_r > -math.inf, place, 0).amax(-1, keepdim=True)
    drawn = torch.searchsorted(sums, draws - begins[:, None], right=True).minimum(end)
    counts = torch.zeros_like(sums).scatter_add_(1, drawn, mine.double())
    pad = (0, max(0, n - counts.shape[1]))
    at = counts.sign().sort(dim=-1, descending=True, stable=True).indices[:, :n]
    return torch.nn.functional.pad(at, pad), torch.nn.functional.pad(counts.gather(1, at), pad)


def row_kernel(group: str, backend: str, vocab_size: int, spread: bool) -> Any:
    """`forward` over the slices of `group` with the arguments of that of `logits`."""
    kernel = slices(backend)

    def forward(student: Tensor, targets: Any, labels: Any, scale: Tensor, options: RowOptions, *rest: Any) -> Any:
        return kernel.forward(student, targets, labels, scale, options, vocab_size, spread, group, *rest)

    return forward
