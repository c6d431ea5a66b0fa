"""Heads in row chunks: logits live a chunk at a time in a workspace, and only there.

GEMM -> row kernel, which writes the gradient over the student's logits -> gradient GEMMs, for `workspace_mb` worth
of rows at once. What differs between devices is passed in: the row kernel and the three GEMMs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kdfast import memory
from kdfast.options import PARTS, RowOptions

_MIB = 1 << 20
#: Chunks are whole multiples of this many rows, so that the GEMMs see full tiles.
_ROW_MULTIPLE = 256
DEFAULT_WORKSPACE_MB = {"cpu": 256, "cuda": 1024}


def rows_per_chunk(n: int, bytes_per_row: int, workspace_mb: float | None, device: str) -> int:
    """Rows whose logits fit `workspace_mb` MiB: a multiple of 256 where that many fit, at least one.

    Chunks are evened out, so that the last one is not a sliver that wastes its GEMM.
    """
    budget = (DEFAULT_WORKSPACE_MB.get(device, 256) if workspace_mb is None else workspace_mb) * _MIB
    fit = max(1, int(budget // bytes_per_row))
    if fit >= n:
        return max(n, 1)
    even = -(-n // -(-n // fit))
    if fit < _ROW_MULTIPLE:
        return even
    return min(-(-even // _ROW_MULTIPLE) * _ROW_MULTIPLE, fit // _ROW_MULTIPLE * _ROW_MULTIPLE)


class Gemms(Protocol):
    """The matrix products of a head with weight `[V, D]`, to and from logits in the dtype of the workspace."""

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """out = hidden @ weight.T + bias."""

    def grad_hidden(self, grad: Tensor, weight: Tensor, out: Tensor) -> None:
        """out = grad @ weight, in the dtype of `out`."""

    def grad_weight(self, grad: Tensor, hidden: Tensor, out: Tensor, accumulate: bool) -> None:
        """out = grad.T @ hidden, or out += it; `out` is float32."""


@dataclass(frozen=True)
class Side:
    """Hidden states `[N, D]` and the head `[V, D]` (+ bias `[V]`) that turns them into logits."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]


@dataclass(frozen=True)
class Needs:
    """Which gradients are wanted; a frozen head or hidden skips its GEMM."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def any(self) -> bool:
        return self.hidden or self.weight or self.bias


def grad_hidden_dtype(hidden: Tensor) -> torch.dtype:
    """float32 for float16: a gradient formed at scale 1 would underflow before the loss scale reaches it."""
    return torch.float32 if hidden.dtype == torch.float16 else hidden.dtype


def grad_buffers(student: Side, needs: Needs, empty: Callable[..., Tensor] = memory.empty) -> tuple[Tensor, Tensor, Tensor]:
    """Empty gradients of hidden, weight (float32, or float64 beside float64) and bias; size 0 where not needed."""
    accumulator = torch.float64 if student.weight.dtype == torch.float64 else torch.float32
    hidden, weight = student.hidden, student.weight
    return (
        empty(hidden.shape if needs.hidden else (0,), dtype=grad_hidden_dtype(hidden), device=hidden.device),
        empty(weight.shape if needs.weight else (0,), dtype=accumulator, device=weight.device),
        empty((student.vocab,) if needs.bias else (0,), dtype=accumulator, device=weight.device),
    )


RowKernel = Callable[..., tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Chunking:
    """How the rows are cut.

    Args:
        rows: rows a chunk holds; the workspace is rows x (sum of all vocabularies) logits.
        dtype: of the logits in the workspace.
        row_index: `[M]` ascending positions of the rows to compute, None for all; the others get loss and gradient 0.
    """

    rows: int
    dtype: torch.dtype
    row_index: Tensor | None

    def parts(self, n: int) -> list[slice | Tensor]:
        """What selects the rows of each chunk."""
        if self.row_index is not None:
            return list(self.row_index.split(self.rows)) if self.row_index.numel() else []
        return [slice(begin, min(begin + self.rows, n)) for begin in range(0, n, self.rows)]


def linear_rows(
    kernel: RowKernel,
    gemms: Gemms,
    student: Side,
    teachers: Sequence[Side],
    labels: Tensor | None,
    scale: Tensor,
    options: RowOptions,
    chunking: Chunking,
    need_parts: bool,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, parts and the gradients of hidden, weight and bias, chunk by chunk.

    Args:
        kernel: `forward` of the `logits` kernel on this device.
        gemms: the products on this device.
    """
    n, device = student.hidden.shape[0], student.hidden.device
    chunks = chunking.parts(n)
    computed = n if chunking.row_index is None else chunking.row_index.numel()
    new = torch.empty if computed == n else torch.zeros
    loss = new(n, device=device)
    parts = new((n, len(PARTS)) if need_parts else (0,), device=device)
    grad_hidden, grad_weight, grad_bias = grad_buffers(student, needs)
    if computed < n:
        grad_hidden.zero_()
    if not chunks:
        grad_weight.zero_(), grad_bias.zero_()
        return loss, parts, grad_hidden, grad_weight, grad_bias
    size = min(chunking.rows, computed)
    room = [memory.empty((size, side.vocab), dtype=chunking.dtype, device=device) for side in (student, *teachers)]
    for number, rows in enumerate(chunks):
        hidden = student.hidden[rows]
        z_s, *z_t = (r[: hidden.shape[0]] for r in room)
        gemms.logits(hidden, student.weight, student.bias, z_s)
        for teacher, z in zip(teachers, z_t, strict=True):
            gemms.logits(teacher.hidden[rows], teacher.weight, teacher.bias, z)
        part_labels = None if labels is None else labels[rows]
        loss[rows], _, part = kernel(z_s, z_t, part_labels, scale[rows], options, need_parts, z_s if needs.any else None)
        if need_parts:
            parts[rows] = part
        if needs.hidden and isinstance(rows, slice):
            gemms.grad_hidden(z_s, student.weight, grad_hidden[rows])
        elif needs.hidden:
            grad = torch.empty_like(hidden, dtype=grad_hidden.dtype)
            gemms.grad_hidden(z_s, student.weight, grad)
            grad_hidden[rows] = grad
        if needs.weight:
            gemms.grad_weight(z_s, hidden, grad_weight, accumulate=number > 0)
        if needs.bias:
            torch.sum(z_s, 0, dtype=grad_bias.dtype, out=grad_bias) if number == 0 else grad_bias.add_(z_s.sum(0))
    return loss, parts, grad_hidden, grad_weight, grad_bias
