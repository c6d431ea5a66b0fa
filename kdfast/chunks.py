"""Heads in row chunks: logits live a chunk at a time in a workspace, and only there.

GEMM -> row kernel, which writes the gradient over the student's logits -> gradient GEMMs, for `workspace_mb` worth
of rows at once. What differs between devices is passed in: the row kernel and the three GEMMs.
"""

from __future__ import annotations

from collections.abc import Callable
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
    """The matrix products of a head with weight `[V, D]`; logits and their gradient are float32."""

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


def linear_rows(
    kernel: RowKernel,
    gemms: Gemms,
    student: Side,
    teacher: Side,
    labels: Tensor | None,
    scale: Tensor,
    options: RowOptions,
    chunk_rows: int,
    need_parts: bool,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, parts and the gradients of hidden, weight and bias, chunk by chunk.

    Args:
        kernel: `forward` of the `logits` kernel on this device.
        gemms: the products on this device.
        chunk_rows: rows a chunk holds; the workspace is chunk_rows x (Vs + Vt) float32.
    """
    n, device = student.hidden.shape[0], student.hidden.device
    loss = torch.empty(n, device=device)
    parts = torch.empty((n, len(PARTS)) if need_parts else (0,), device=device)
    grad_hidden, grad_weight, grad_bias = grad_buffers(student, needs)
    if n == 0:
        grad_weight.zero_(), grad_bias.zero_()
        return loss, parts, grad_hidden, grad_weight, grad_bias
    room = [memory.empty((min(chunk_rows, n), side.vocab), dtype=torch.float32, device=device) for side in (student, teacher)]
    for begin in range(0, n, chunk_rows):
        rows = slice(begin, min(begin + chunk_rows, n))
        size = rows.stop - begin
        z_s, z_t = room[0][:size], room[1][:size]
        gemms.logits(student.hidden[rows], student.weight, student.bias, z_s)
        gemms.logits(teacher.hidden[rows], teacher.weight, teacher.bias, z_t)
        part_labels = None if labels is None else labels[rows]
        loss[rows], _, part = kernel(z_s, z_t, part_labels, scale[rows], options, need_parts, z_s if needs.any else None)
        if need_parts:
            parts[rows] = part
        if needs.hidden:
            gemms.grad_hidden(z_s, student.weight, grad_hidden[rows])
        if needs.weight:
            gemms.grad_weight(z_s, student.hidden[rows], grad_weight, accumulate=begin > 0)
        if needs.bias:
            torch.sum(z_s, 0, out=grad_bias) if begin == 0 else grad_bias.add_(z_s.sum(0))
    return loss, parts, grad_hidden, grad_weight, grad_bias
