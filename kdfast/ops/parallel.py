"""Losses over a vocabulary that is sliced over the ranks of a process group: which id is whose, and what ranks exchange.

Rank r's slices begin at id r * C on every side, where C is the longest slice of rank 0. All slices have C ids but those of
the last rank, which may be shorter, each side's by itself: a vocabulary that C does not divide, or a smaller one. That is
how `torch.chunk` and DTensor cut one vocabulary. Lengths travel with the first exchange and are checked there.

A row costs two exchanges, each a gather of a few float64 numbers from every rank: log-sum-exps of the slices, then, with
those of the whole vocabulary known, sums over the slices. All ranks add in rank order and so hold the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdfast import dispatch
from kdfast.ops import rows
from kdfast.options import PARTS, RowOptions, weighted

#: Row statistics that backward needs: log-sum-exps (student at 1, student at T, teachers at T), slope, offset, vocabulary.
STATS_BESIDE_TEACHERS = 5


def name_of(group: Any) -> str:
    """The name by which ops know a process group.

    Raises:
        ValueError: torch.distributed is not running, or `group` is no process group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("tp_group: expected torch.distributed to be initialised, got no default process group")
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"tp_group: expected a torch.distributed.ProcessGroup, got {type(group).__name__}")
    return group.group_name


def group_of(name: str) -> dist.ProcessGroup:
    """The process group of a name."""
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def size(group: str) -> int:
    """Ranks of a group."""
    return dist.get_world_size(group_of(group))


def all_reduce(tensor: Tensor, group: str) -> None:
    """tensor = its sum over the ranks, in place."""
    dist.all_reduce(tensor, group=group_of(group))


def gather(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`[...]` of every rank as `[ranks, ...]`."""
    flat = tensor.contiguous().view(-1)
    out = flat.new_empty(dist.get_world_size(group) * flat.numel())
    dist.all_gather_into_tensor(out, flat, group=group)
    return out.view(-1, *tensor.shape)


def equal_slices(vocab: int, ranks: int) -> str:
    """What to do about slices that do not begin at the same ids on every side, the longest of which has `vocab` ids."""
    step = -(-vocab // ranks)
    return (
        f"cut every side at multiples of {step} = ceil({vocab} / {ranks}), so that rank r holds ids r * {step} to"
        f" (r + 1) * {step} - 1, and pad a side that is too short for {ranks} slices to {step * ranks} ids with logits of -inf"
        " (a head's rows of weight 0 and bias -inf)"
    )


class Slices:
    """`forward` and `backward` of the `logits` contract on slices of the vocabulary; labels are ids of the whole one.

    Between the exchanges a backend's module of the op `parallel` works on its slice, of which `limit` `[]` says how many ids
    the soft term is over where that is not the width of the teachers.
    """

    def __init__(self, kernel: Any, limit: Tensor | None = None) -> None:
        self.kernel, self.limit = kernel, limit

    def forward(
        self, student: Tensor, teachers: Sequence[Tensor], labels: Tensor | None, scale: Tensor, options: RowOptions,
        group: str, need_parts: bool, grad: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        ranks = group_of(group)
        lses, lengths = self._log_sums(student, teachers, options, need_parts, ranks)
        offset = dist.get_rank(ranks) * lengths[0].max()
        vocab = lengths[:, 0].sum()
        local = None if labels is None else labels - offset.long()
        names = (*self.kernel.SUMS, *self.kernel.PART_SUMS, *self.kernel.BESTS) if need_parts else self.kernel.SUMS
        gathered = gather(self.kernel.row_sums(student, teachers, local, lses, options, need_parts, self.limit), ranks)
        sums = dict(zip(names, gathered.sum(0).unbind(-1), strict=True))
        dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        counts = scale != 0
        loss, nll = _row_losses(sums, lses[:, 0], vocab, labels is not None, options)
        loss = torch.where(counts, scale * loss.to(dtype), 0)
        parts = loss.new_zeros(0)
        if need_parts:
            found = dict(zip(names, gathered.unbind(-1), strict=True))
            columns = _parts(sums, found, lengths[0].max(), nll, lses[:, 0], labels is not None)
            parts = torch.where(counts[:, None], torch.stack([columns[p] for p in PARTS], -1).to(dtype), 0)
        known = 2 + (1 if options.teacher_mix == "logits" else len(teachers))
        stats = torch.cat(
            [lses[:, :known], sums["slope"][:, None], offset.expand(len(loss), 1), vocab.expand(len(loss), 1)], -1
        )
        if grad is not None:
            self.backward(student, teachers, labels, scale, stats, options, group, grad)
        missing = len(teachers) + STATS_BESIDE_TEACHERS - stats.shape[1]
        return loss, torch.nn.functional.pad(stats, (0, missing)), parts

    def backward(
        self, student: Tensor, teachers: Sequence[Tensor], labels: Tensor | None, scale: Tensor, stats: Tensor,
        options: RowOptions, group: str, grad: Tensor,
    ) -> None:  # fmt: skip
        if not len(stats):
            return
        known = 2 + (1 if options.teacher_mix == "logits" else len(teachers))
        slope, offset, vocab = stats[:, known], stats[0, known + 1], stats[0, known + 2]
        local = None if labels is None else labels - offset.long()
        self.kernel.gradient(student, teachers, local, scale, stats[:, :known], slope, vocab, options, grad, self.limit)

    def _log_sums(
        self, student: Tensor, teachers: Sequence[Tensor], options: RowOptions, need_parts: bool, ranks: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        """Log-sum-exps over the whole vocabulary, and the lengths of all slices `[ranks, sides]`."""
        own = self.kernel.log_sums(student, teachers, options, need_parts, self.limit)
        widths = [x.shape[1] for x in (student, *teachers)]
        lengths = torch.cat([own.new_full((1,), w) for w in widths])
        packed = gather(torch.cat([own.flatten(), lengths]), ranks)
        lengths = packed[:, own.numel() :]
        lses = packed[:, : own.numel()].view(-1, *own.shape).logsumexp(0)
        full = lengths[0].max()
        fits = (lengths[:-1] == full).all() & (lengths[-1] <= full).all()
        if not rows.values_are_checked(own.device):
            return torch.where(fits, lses, torch.nan), lengths
        if not bool(fits):
            raise ValueError(
                f"tp_group: expected slices of {int(full)} ids on every rank, fewer only on the last, got lengths"
                f" {lengths.long().tolist()} (a row per rank: student, teachers);"
                f" {equal_slices(int(lengths.sum(0).max()), len(lengths))}"
            )
        return lses, lengths


def _row_losses(
    sums: dict[str, Tensor], lse: Tensor, vocab: Tensor, labelled: bool, options: RowOptions
) -> tuple[Tensor, Tensor]:
    """(loss, student's cross-entropy without smoothing) of each row."""
    loss, nll = weighted(options.soft_scale, sums["value"]), torch.zeros_like(lse)
    if labelled:
        hard = nll = torch.where(sums["label_hits"] > 0, lse - sums["label_logit"], torch.nan)
        if options.label_smoothing != 0:
            hard = (1 - options.label_smoothing) * nll + options.label_smoothing * (lse - sums["logits"] / vocab)
        # The NaN of a label out of range stays even when the hard loss has no weight.
        loss = loss + weighted(options.hard_weight, hard)
    if options.z_loss != 0:
        loss = loss + options.z_loss * lse**2
    return loss, nll


def _parts(
    sums: dict[str, Tensor], found: dict[str, Tensor], stride: Tensor, nll: Tensor, lse: Tensor, labelled: bool
) -> dict[str, Tensor]:
    teacher_nll = torch.zeros_like(nll)
    if labelled:
        teacher_nll = torch.where(sums["teacher_hits"] > 0, -sums["teacher_label"], math.inf)
    best = []
    for side in ("student", "teacher"):
        rank = found[f"{side}_best"].argmax(0)
        best.append(rank * stride + found[f"{side}_best_id"].gather(0, rank[None])[0])
    return {
        "soft": sums["value"],
        "hard": nll,
        "z": lse**2,
        "kl_at_1": sums["kl_at_1"],
        "teacher_nll": teacher_nll,
        "teacher_entropy": sums["teacher_entropy"],
        "student_entropy": sums["student_entropy"],
        "top1_agreement": best[0] == best[1],
    }


def slices(backend: str) -> Slices:
    """The kernels of the op `parallel` in a backend, with the exchanges between them."""
    return Slices(dispatch.kernel("parallel", backend))


def row_kernel(group: str, like: Tensor) -> Any:
    """`forward` of the `logits` contract over the slices of `group`."""
    kernel = slices(dispatch.choose("parallel", like.device, like.dtype))

    def forward(student: Tensor, teachers: Any, labels: Any, scale: Tensor, options: RowOptions, *rest: Any) -> Any:
        return kernel.forward(student, teachers, labels, scale, options, group, *rest)

    return forward
