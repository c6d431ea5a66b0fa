"""Sparse targets: capture (`selection`) and loss (`topk_rows`). Contract: `kdfast.backends`.

Bytes a row of the loss, V columns: V read for the sums, V read again and V written for the gradient; an even tail reads
the row once more for its value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kdfast.backends.triton import logits, tiles
from kdfast.backends.triton.logits import Scalars
from kdfast.backends.triton.selection import capture
from kdfast.backends.triton.topk_rows import backward_kernel, forward_kernel
from kdfast.options import PARTS, RowOptions

__all__ = ["backward", "capture", "forward"]


@dataclass(frozen=True)
class Flags(logits.Flags):
    """What a kernel is compiled for; `teachers` are the targets.

    Args:
        spread: their tails lie evenly on the ids that are not listed.
    """

    spread: bool = False

    @property
    def ahead(self) -> bool:
        """Even tails need the registers."""
        return not self.spread

    @property
    def heavy(self) -> int:
        dense = super().heavy
        return 2 if self.spread and (self.teachers > 1 or dense) else dense

    @classmethod
    def of_targets(cls, options: RowOptions, labels: bool, parts: bool, grad: bool, extra: bool, spread: bool) -> Flags:
        dense = logits.Flags.of(options, labels, parts, grad, extra)
        return cls(**{**dense.__dict__, "mixed": False, "teacher_head": 0}, spread=spread)


def _inputs(student: Tensor, grad: Tensor, targets: Sequence[Tensor], labels: Tensor | None, scale: Tensor) -> tuple[Any, ...]:
    """The tensors of a kernel in the order of its arguments, up to the bitmaps."""
    tables = (t.contiguous() for t in targets)
    return student, grad, *tables, scale if labels is None else labels.contiguous(), scale.contiguous()


def _bitmaps(programs: int, vocab: int, device: torch.device) -> Tensor:
    """One cleared bit a column for every program; a program clears again what it set."""
    return torch.zeros(programs, triton.cdiv(vocab, 32), dtype=torch.int32, device=device)


def _slots(targets: Sequence[Tensor]) -> int:
    return triton.next_power_of_2(max(targets[0].shape[1], 1))


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
    rows, width = student.shape
    loss = torch.empty(rows, dtype=torch.float32, device=student.device)
    stats = torch.empty(rows, 4, dtype=torch.float64, device=student.device)
    parts = torch.empty((rows, len(PARTS)) if need_parts else 0, dtype=torch.float32, device=student.device)
    if rows == 0:
        return loss, stats, parts
    out = student if grad is None else grad
    flags = Flags.of_targets(options, labels is not None, need_parts, grad is not None, width > vocab_size, spread)
    size = tiles.launch_for(vocab_size, student, out, heavy=flags.heavy)
    programs = tiles.grid(rows, student.device, size.warps)
    bits = _bitmaps(programs[0], vocab_size, student.device)
    with tiles.on(student):
        forward_kernel[programs](
            *_inputs(student, out, targets, labels, scale), bits, loss, stats, parts,
            rows, width, vocab_size, bits.shape[1], targets[0].shape[1], student.stride(0), out.stride(0),
            Scalars.of(options), options.teacher_weights, F=flags, K=_slots(targets), **size.shape, **size.options,
        )  # fmt: skip
    return loss, stats, parts


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
    rows, width = student.shape
    if rows == 0:
        return
    flags = Flags.of_targets(options, labels is not None, False, True, width > vocab_size, spread)
    size = tiles.launch_for(vocab_size, student, grad, heavy=flags.heavy)
    programs = tiles.grid(rows, student.device, size.warps)
    bits = _bitmaps(programs[0], vocab_size, student.device)
    with tiles.on(student):
        backward_kernel[programs](
            *_inputs(student, grad, targets, labels, scale), bits, stats,
            rows, width, vocab_size, bits.shape[1], targets[0].shape[1], student.stride(0), grad.stride(0),
            Scalars.of(options), options.teacher_weights, F=flags, K=_slots(targets), **size.shape, **size.options,
        )  # fmt: skip
