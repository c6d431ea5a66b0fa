"""Knowledge distillation through linear heads on a CPU: GEMMs around the C++ row kernel. Contract: `kdfast.backends`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kdfast import _C
from kdfast.backends.compiled import logits
from kdfast.backends.compiled.products import mm
from kdfast.chunks import Chunking, Needs, RowKernel, Side, linear_rows
from kdfast.options import RowOptions

#: Vocabulary rows of a head that are worked on at a time where a product needs a float32 buffer.
_TILE = 4096


def _tiles(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    for begin in range(0, weight.shape[0], _TILE):
        tile = weight[begin : begin + _TILE]
        yield slice(begin, begin + tile.shape[0]), tile


class _Gemms:
    def grad_dtype(self, student: Side, logits_dtype: torch.dtype) -> torch.dtype:
        return torch.bfloat16 if student.weight.dtype == torch.bfloat16 and _C.pairs_of_bf16() else logits_dtype

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        if out.dtype == torch.float32:
            mm(hidden, weight.t(), out, bias=bias)
        elif hidden.dtype == weight.dtype == out.dtype:
            torch.mm(hidden, weight.t(), out=out) if bias is None else torch.addmm(bias, hidden, weight.t(), out=out)
        else:
            for columns, tile in _tiles(weight):
                room = torch.empty(hidden.shape[0], tile.shape[0])
                mm(hidden, tile.t(), room, bias=None if bias is None else bias[columns])
                out[:, columns] = room

    def grad_hidden(self, grad: Tensor, weight: Tensor, out: Tensor) -> None:
        if grad.dtype == weight.dtype == out.dtype == torch.bfloat16:
            torch.mm(grad, weight, out=out)
            return
        total = out if out.dtype == torch.float32 else torch.empty(out.shape)
        mm(grad, weight, total)
        if total is not out:
            out.copy_(total)

    def grad_weight(self, grad: Tensor, hidden: Tensor, out: Tensor, accumulate: bool) -> None:
        mm(grad.t(), hidden, out, add=accumulate)


def product(side: Side, out: Tensor) -> None:
    _Gemms().logits(side.hidden, side.weight, side.bias, out)


def forward(
    student: Side,
    teachers: Sequence[Side],
    labels: Tensor | None,
    scale: Tensor,
    options: RowOptions,
    chunking: Chunking,
    need_parts: bool,
    needs: Needs,
    kernel: RowKernel = logits.forward,
    row_inputs: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gemms = _Gemms()
    return linear_rows(kernel, gemms, student, teachers, labels, scale, options, chunking, need_parts, needs, row_inputs)
