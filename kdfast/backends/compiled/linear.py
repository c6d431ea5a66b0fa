"""Knowledge distillation through linear heads on a CPU: torch's GEMMs around the C++ row kernel. Contract: `kdfast.backends`.

The GEMMs stay torch's own (oneDNN or MKL): nothing written here would beat them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kdfast.backends.compiled import logits
from kdfast.chunks import Chunking, Needs, Side, linear_rows
from kdfast.options import RowOptions

#: Vocabulary rows of a half-precision head that are widened to float32 at a time.
_TILE = 4096


def _tiles(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The weight in float32: itself, or tile by tile through one buffer."""
    if weight.dtype == torch.float32:
        yield slice(None), weight
        return
    room = torch.empty(min(_TILE, weight.shape[0]), weight.shape[1])
    for begin in range(0, weight.shape[0], _TILE):
        tile = weight[begin : begin + _TILE]
        yield slice(begin, begin + tile.shape[0]), room[: tile.shape[0]].copy_(tile)


class _Float32Gemms:
    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        wide = hidden.float()
        for columns, tile in _tiles(weight):
            torch.mm(wide, tile.t(), out=out[:, columns])
        if bias is not None:
            out.add_(bias)

    def grad_hidden(self, grad: Tensor, weight: Tensor, out: Tensor) -> None:
        if weight.dtype == torch.float32:
            torch.mm(grad, weight, out=out)
            return
        total = torch.zeros(out.shape)
        for columns, tile in _tiles(weight):
            total.addmm_(grad[:, columns], tile)
        out.copy_(total)

    def grad_weight(self, grad: Tensor, hidden: Tensor, out: Tensor, accumulate: bool) -> None:
        wide = hidden.float()
        if accumulate:
            out.addmm_(grad.t(), wide)
        else:
            torch.mm(grad.t(), wide, out=out)


def forward(
    student: Side,
    teachers: Sequence[Side],
    labels: Tensor | None,
    scale: Tensor,
    options: RowOptions,
    chunking: Chunking,
    need_parts: bool,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gemms = _Float32Gemms()
    return linear_rows(logits.forward, gemms, student, teachers, labels, scale, options, chunking, need_parts, needs)
