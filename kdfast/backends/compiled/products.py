"""Who multiplies on a CPU (`csrc/cpu/linear.cpp` is ours, written because of what torch's CPU build leaves open):

operands        result     by
float32         float32    torch (MKL); ours on AVX-512 processors that are not Intel's, where MKL stays at half rate
bfloat16        float32    ours, torch has none: on AMX tiles, or AVX512_BF16 on pairs, at twice the rate of float32
float16, mixed  float32    ours, widened while packing; torch's float16 products run at 1-20 GFLOP/s
bfloat16        bfloat16   torch (oneDNN), also with AMX; not here
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kdfast import _C
from kdfast.backends.compiled.extension import address, operand, threads


@functools.cache
def _beats_mkl() -> bool:
    return _C.isa() == "avx512" and not _C.is_intel()


def mm(a: Tensor, b: Tensor, out: Tensor, *, bias: Tensor | None = None, add: bool = False) -> None:
    """out = a @ b + bias, or out += a @ b; `out` is float32 with unit stride along columns."""
    bias = None if bias is None else bias.float().contiguous()
    if _beats_mkl() or not a.dtype == b.dtype == torch.float32:
        (rows, depth), columns = a.shape, b.shape[1]
        sides = operand(a), operand(b)
        _C.matmul(rows, columns, depth, *sides, out.data_ptr(), out.stride(0), address(bias), add, threads())
    elif add:
        out.addmm_(a, b)
    elif bias is not None:
        torch.addmm(bias, a, b, out=out)
    else:
        torch.mm(a, b, out=out)
