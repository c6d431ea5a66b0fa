"""Heads in row chunks: logits live a chunk at a time in a workspace, and only there.

GEMM -> row kernel, which writes the gradient over the student's logits -> gradient GEMMs, for `workspace_mb` worth
of rows at once. What differs between devices is passed in: the row kernel and the three GEMMs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kdfast import memory
from kdfast.options import PARTS, RowOptions

_MIB = 1 << 20
#: Chunks are whole multiples of this many rows, so that the GEMMs see full tiles.
_ROW_MULTIPLE = 256
#: Rows the weight's gradient GEMM should see: with fewer, reading and writing its float32 sum costs more than the product.
#: The second where the workspace is at least `_LARGE` bytes.
_BATCH_ROWS, _LARGE_BATCH_ROWS, _LARGE = 2048, 4096, 2048 * _MIB


@functools.cache
def _default_workspace_mb(device: torch.device) -> int:
    """256 on a CPU; on a GPU a twentieth of its memory, from 1024 to 4096."""
    if device.type != "cuda":
        return 256
    return min(max(torch.cuda.get_device_properties(device).total_memory // _MIB // 20, 1024), 4096)


def workspace_bytes(workspace_mb: float | None, device: torch.device) -> int:
    """Bytes of `workspace_mb` MiB; None: the default of the device."""
    return int((_default_workspace_mb(device) if workspace_mb is None else workspace_mb) * _MIB)


def rows_per_chunk(n: int, bytes_per_row: int, budget: int) -> int:
    """Rows whose logits fit `budget` bytes: a multiple of 256 where that many fit, at least one.

    Chunks are evened out, so that the last one is not a sliver that wastes its GEMM.
    """
    fit = max(1, budget // bytes_per_row)
    if fit >= n:
        return max(n, 1)
    even = -(-n // -(-n // fit))
    if fit < _ROW_MULTIPLE:
        return even
    return min(-(-even // _ROW_MULTIPLE) * _ROW_MULTIPLE, fit // _ROW_MULTIPLE * _ROW_MULTIPLE)


def cut(n: int, logit_bytes: int, grad_bytes: int, budget: int) -> tuple[int, int]:
    """(rows of a chunk, rows of gradient that wait for the weight's GEMM), both together within `budget` bytes.

    Args:
        logit_bytes: of one row of logits, all sides.
        grad_bytes: of one row of waiting gradient; 0 when it takes the place of the student's logits.
    """
    if grad_bytes == 0 or n * (logit_bytes + grad_bytes) <= budget:
        rows = rows_per_chunk(n, logit_bytes + grad_bytes, budget)
        return rows, rows
    waiting = min(n, _LARGE_BATCH_ROWS if budget >= _LARGE else _BATCH_ROWS, max(1, budget // 2 // grad_bytes))
    rows = min(waiting, rows_per_chunk(n, logit_bytes, budget - waiting * grad_bytes))
    even = waiting // -(-waiting // rows)  # as many chunks as it takes, of one size
    if even >= _ROW_MULTIPLE:
        rows = even // _ROW_MULTIPLE * _ROW_MULTIPLE
    return rows, waiting // rows * rows


class Gemms(Protocol):
    """The matrix products of a head with weight `[V, D]`, to and from logits in the dtype of the workspace."""

    def grad_dtype(self, student: Side, logits_dtype: torch.dtype) -> torch.dtype:
        """In which gradients of the student's logits enter their products; `logits_dtype`: they take the logits' place."""

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


def without_ignored(hidden: Tensor, scale: Tensor) -> Tensor:
    """Hidden states whose rows that do not count are 0: their gradients are, but 0 * NaN would reach the head's.

    Costs a pass over `[N, D]` on a GPU, where nobody asks the device whether there are any; nothing on a CPU without any.
    """
    if scale.device.type == "cpu" and bool((scale != 0).all()):
        return hidden
    return torch.where((scale != 0)[:, None], hidden, 0)


RowKernel = Callable[..., tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Chunking:
    """How the rows are cut.

    Args:
        workspace_mb: MiB for logits and waiting gradients; None: the default of the device.
        dtype: of the logits in the workspace.
        row_index: `[M]` ascending positions of the rows to compute, None for all; the others get loss and gradient 0.
    """

    workspace_mb: float | None
    dtype: torch.dtype
    row_index: Tensor | None

    def select(self, begin: int, end: int) -> slice | Tensor:
        """What picks the computed rows `begin` to `end` out of all rows."""
        return slice(begin, end) if self.row_index is None else self.row_index[begin:end]


class _Room:
    """The workspace: logits of one chunk for every side, and gradients that wait for the weight's GEMM."""

    def __init__(self, gemms: Gemms, student: Side, teachers: Sequence[Side], n: int, chunking: Chunking, need_grad: bool):
        dtype, device = chunking.dtype, student.hidden.device
        grad_dtype = gemms.grad_dtype(student, dtype)
        waits = need_grad and grad_dtype != dtype
        vocabs = [side.vocab for side in (student, *teachers)]
        budget = workspace_bytes(chunking.workspace_mb, device)
        in_place = not waits or grad_dtype.itemsize == dtype.itemsize
        grad_bytes = 0 if in_place else student.vocab * grad_dtype.itemsize
        self.rows, self.batch = cut(n, sum(vocabs) * dtype.itemsize, grad_bytes, budget)
        self.logits = [memory.empty((self.rows, vocab), dtype=dtype, device=device) for vocab in vocabs]
        self.grads = self.logits[0].view(grad_dtype if waits else dtype)
        if not in_place:
            self.grads = memory.empty((self.batch, student.vocab), dtype=grad_dtype, device=device)


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
    row_inputs: Sequence[Tensor] = (),
    units: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, parts and the gradients of hidden, weight and bias, chunk by chunk.

    Args:
        kernel: `forward` of the `logits` kernel on this device, or of one that compares with other things than logits.
        gemms: the products on this device.
        row_inputs: tensors `[N, ...]` whose rows the kernel gets after the teachers' logits.
        units: `[N]` powers of two, None for 1: what the gradients of a row's logits are written in, where the dtype they are
            written in has no range for them as they are.
    """
    n, device, index = student.hidden.shape[0], student.hidden.device, chunking.row_index
    computed = n if index is None else index.numel()
    new = torch.empty if computed == n else torch.zeros
    loss = new(n, device=device)
    parts = new((n, len(PARTS)) if need_parts else (0,), device=device)
    grad_hidden, grad_weight, grad_bias = grad_buffers(student, needs)
    if computed < n:
        grad_hidden.zero_()
    if computed == 0:
        grad_weight.zero_(), grad_bias.zero_()
        return loss, parts, grad_hidden, grad_weight, grad_bias
    room = _Room(gemms, student, teachers, computed, chunking, needs.any)
    waiting, relative = 0, None
    if units is not None:
        largest = units.max()
        # What one row's unit is of the largest enters through the hidden states: products sum over rows of all units.
        scale, relative = scale / units, (units / largest).to(student.hidden.dtype)[:, None]
    for begin in range(0, computed, room.rows):
        end = min(begin + room.rows, computed)
        rows = chunking.select(begin, end)
        hidden = student.hidden[rows]
        z_s, *z_t = (z[: end - begin] for z in room.logits)
        gemms.logits(hidden, student.weight, student.bias, z_s)
        for teacher, z in zip(teachers, z_t, strict=True):
            gemms.logits(teacher.hidden[rows], teacher.weight, teacher.bias, z)
        grad = room.grads[waiting : waiting + end - begin] if needs.any else None
        part_labels = None if labels is None else labels[rows]
        compared = [*z_t, *(x[rows] for x in row_inputs)]
        loss[rows], _, part = kernel(z_s, compared, part_labels, scale[rows], options, need_parts, grad)
        if need_parts:
            parts[rows] = part
        if grad is None:
            continue
        if needs.hidden:
            _grad_hidden(gemms, grad, student, grad_hidden, rows)
        waiting += end - begin
        if waiting == room.batch or end == computed:
            first = end - waiting
            batch, accumulate = room.grads[:waiting], first > 0
            some = chunking.select(first, end)
            if needs.weight:
                counted = without_ignored(student.hidden[some], scale[some])
                counted = counted if relative is None else counted * relative[some]
                gemms.grad_weight(batch, counted, grad_weight, accumulate)
            if needs.bias and relative is not None:
                gemms.grad_weight(batch, relative[some], grad_bias[:, None], accumulate)
            elif needs.bias:
                sums = batch.sum(0, dtype=grad_bias.dtype)
                grad_bias.add_(sums) if accumulate else grad_bias.copy_(sums)
            waiting = 0
    if units is not None:
        loss *= units
        for grad, unit in ((grad_hidden, units[:, None]), (grad_weight, largest), (grad_bias, largest)):
            if grad.numel():
                grad *= unit
    return loss, parts, grad_hidden, grad_weight, grad_bias


def logit_chunks(
    product: Callable[[Side, Tensor], None], side: Side, workspace_mb: float | None, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """The logits of some rows after the other, each in the place of those before: (rows, logits).

    Args:
        product: of the `linear` kernel on this device.
    """
    n, device = side.hidden.shape[0], side.hidden.device
    rows = rows_per_chunk(n, side.vocab * dtype.itemsize, workspace_bytes(workspace_mb, device))
    room = memory.empty((rows, side.vocab), dtype=dtype, device=device)
    for begin in range(0, n, rows):
        some = slice(begin, min(begin + rows, n))
        out = room[: some.stop - begin]
        product(Side(side.hidden[some], side.weight, side.bias), out)
        yield some, out


def _grad_hidden(gemms: Gemms, grad: Tensor, student: Side, out: Tensor, rows: slice | Tensor) -> None:
    if isinstance(rows, slice):
        gemms.grad_hidden(grad, student.weight, out[rows])
        return
    some = torch.empty((grad.shape[0], out.shape[1]), dtype=out.dtype, device=out.device)
    gemms.grad_hidden(grad, student.weight, some)
    out[rows] = some
