"""Losses between hidden states in C++ (`csrc/cpu/hidden.cpp`). Contract: `kdfast.backends`.

Rows of a projection go through in chunks, so that the projected states stay in the caches; `products` says who multiplies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast import _C, memory
from kdfast.backends.compiled.extension import address, matrix, threads
from kdfast.backends.compiled.products import mm
from kdfast.chunks import Needs, grad_hidden_dtype, without_ignored

#: Bytes of projected states a chunk holds (packing the projection again for smaller ones costs more than the caches give), and
#: the rows below which a GEMM runs badly.
_CHUNK_BYTES, _MIN_ROWS = 4 << 20, 256


def _rows(cosine: bool, student: Tensor, teacher: Tensor, bias: Tensor | None, scale: Tensor, grad: Tensor | None) -> Tensor:
    loss = torch.empty(student.shape[0])
    _C.hidden(
        cosine, student.shape[0], matrix(student), matrix(teacher), matrix(grad), address(bias),
        address(scale), address(loss), threads(),
    )  # fmt: skip
    return loss


def _direct(cosine: bool, student: Tensor, teacher: Tensor, scale: Tensor, need_hidden: bool) -> tuple[Tensor, Tensor]:
    grad = memory.empty(student.shape if need_hidden else (0,), dtype=student.dtype, device=student.device)
    return _rows(cosine, student, teacher, None, scale, grad if need_hidden else None), grad


def cosine(student: Tensor, teacher: Tensor, scale: Tensor, need_hidden: bool) -> tuple[Tensor, Tensor]:
    return _direct(True, student, teacher, scale, need_hidden)


def mse(
    student: Tensor, projection: Tensor | None, bias: Tensor | None, teacher: Tensor, scale: Tensor, needs: Needs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if projection is None:
        return *_direct(False, student, teacher, scale, needs.hidden), torch.empty(0), torch.empty(0)
    n, width = student.shape[0], projection.shape[0]
    shape = student.shape if needs.hidden else (0,)
    grad_hidden = memory.empty(shape, dtype=grad_hidden_dtype(student), device=student.device)
    grad_weight = torch.zeros(projection.shape if needs.weight else (0,))
    grad_bias = torch.zeros(width if needs.bias else 0)
    loss = torch.empty(n)
    weight, offset = projection.float(), None if bias is None else bias.float().contiguous()
    chunk = max(_MIN_ROWS, _CHUNK_BYTES // (4 * width))
    room = torch.empty(min(n, chunk), width)
    for begin in range(0, n, chunk):
        rows = slice(begin, begin + chunk)
        wide = student[rows].float()
        wide = without_ignored(wide, scale[rows])
        projected = room[: wide.shape[0]]
        mm(wide, weight.t(), projected)
        loss[rows] = _rows(False, projected, teacher[rows], offset, scale[rows], projected if needs.any else None)
        if needs.hidden:
            if grad_hidden.dtype == torch.float32:
                mm(projected, weight, grad_hidden[rows])
            else:
                grad_hidden[rows] = projected @ weight
        if needs.weight:
            mm(projected.t(), wide, grad_weight, add=True)
        if needs.bias:
            grad_bias += projected.sum(0)
    return loss, grad_hidden, grad_weight, grad_bias
