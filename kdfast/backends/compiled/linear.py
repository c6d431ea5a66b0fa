"""Knowledge distillation through linear heads on a CPU: GEMMs around the C++ row kernel. Contract: `kdfast.backends`.

Who multiplies (`csrc/cpu/linear.cpp` is ours, written because of what torch's CPU build leaves open):

    operands        result     by
    float32         float32    torch (MKL); ours on AVX-512 processors that are not Intel's, where MKL stays at half rate
    bfloat16        float32    ours: torch has no such product. AVX512_BF16 multiplies pairs, at twice the rate of float32
    float16, mixed  float32    ours, widened while packing; torch's float16 products run at 1-20 GFLOP/s
    bfloat16        bfloat16   torch (oneDNN), also with AMX
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kdfast import _C
from kdfast.backends.compiled import logits
from kdfast.backends.compiled.extension import address, operand, threads
from kdfast.chunks import Chunking, Needs, RowKernel, Side, linear_rows
from kdfast.options import RowOptions

#: Vocabulary rows of a head that are worked on at a time where a product needs a float32 buffer.
_TILE = 4096


@functools.cache
def _beats_mkl() -> bool:
    return _C.isa() == "avx512" and not _C.is_intel()


def _mm(a: Tensor, b: Tensor, out: Tensor, *, bias: Tensor | None = None, add: bool = False) -> None:
    """out = a @ b + bias, or out += a @ b; `out` is float32 with unit stride along columns."""
    bias = None if bias is None else bias.float()
    if _beats_mkl() or not a.dtype == b.dtype == torch.float32:
        (rows, depth), columns = a.shape, b.shape[1]
        sides = operand(a), operand(b)
        _C.matmul(rows, columns, depth, *sides, address(out), out.stride(0), address(bias), add, threads())
    elif add:
        out.addmm_(a, b)
    elif bias is not None:
        torch.addmm(bias, a, b, out=out)
    else:
        torch.mm(a, b, out=out)


def _tiles(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    for begin in range(0, weight.shape[0], _TILE):
        tile = weight[begin : begin + _TILE]
        yield slice(begin, begin + tile.shape[0]), tile


class _Gemms:
    def grad_dtype(self, student: Side, logits_dtype: torch.dtype) -> torch.dtype:
        return torch.bfloat16 if student.weight.dtype == torch.bfloat16 and _C.pairs_of_bf16() else logits_dtype

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        if out.dtype == torch.float32:
            _mm(hidden, weight.t(), out, bias=bias)
        elif hidden.dtype == weight.dtype == out.dtype:
            torch.mm(hidden, weight.t(), out=out) if bias is None else torch.addmm(bias, hidden, weight.t(), out=out)
        else:
            for columns, tile in _tiles(weight):
                room = torch.empty(hidden.shape[0], tile.shape[0])
                _mm(hidden, tile.t(), room, bias=None if bias is None else bias[columns])
                out[:, columns] = room

    def grad_hidden(self, grad: Tensor, weight: Tensor, out: Tensor) -> None:
        if grad.dtype == weight.dtype == out.dtype == torch.bfloat16:
            torch.mm(grad, weight, out=out)
            return
        total = out if out.dtype == torch.float32 else torch.empty(out.shape)
        _mm(grad, weight, total)
        if total is not out:
            out.copy_(total)

    def grad_weight(self, grad: Tensor, hidden: Tensor, out: Tensor, accumulate: bool) -> None:
        _mm(grad.t(), hidden, out, add=accumulate)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gemms = _Gemms()
    return linear_rows(kernel, gemms, student, teachers, labels, scale, options, chunking, need_parts, needs)
