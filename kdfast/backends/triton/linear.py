"""Knowledge distillation through linear heads: torch's GEMMs around the Triton row kernel. Contract: `kdfast.backends`.

Logits are float32 by default whatever the heads are: bfloat16 and float16 products accumulate and leave in float32. The
row kernel writes gradients for bfloat16 heads in bfloat16, where several chunks of them wait for one product; float16
would lose 1/N to underflow, so there they stay as the logits were.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast.backends.triton import logits
from kdfast.chunks import Chunking, Needs, RowKernel, Side, linear_rows
from kdfast.options import RowOptions

#: Rows of a weight gradient that are added at a time where the GEMM cannot add to float32 by itself.
_SLAB = 8192


@functools.cache
def _leaves_in_float32(device: torch.device, accumulate: bool) -> bool:
    """Whether half products on this device can be written, or added, to float32: asked by trying one tile."""
    half = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
    wide = torch.zeros(16, 16, device=device)
    try:
        if accumulate:
            torch.addmm(wide, half, half, out_dtype=torch.float32, out=wide)
        else:
            torch.mm(half, half, out_dtype=torch.float32, out=wide)
    except (RuntimeError, TypeError):  # the operator, or this combination of dtypes, is not there
        return False
    return True


def mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b with float32 accumulation; `out` is float32."""
    if a.dtype != b.dtype or a.dtype == torch.float32:
        torch.mm(a.float(), b.float(), out=out)
    elif _leaves_in_float32(a.device, accumulate=False):
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float(), out=out)


def _add_mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out += a @ b; `out` is float32."""
    if a.dtype == b.dtype == torch.float32:
        out.addmm_(a, b)
    elif a.dtype == b.dtype and _leaves_in_float32(a.device, accumulate=True):
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        room = out.new_empty(min(_SLAB, out.shape[0]), out.shape[1])
        for begin in range(0, out.shape[0], _SLAB):
            slab = a[begin : begin + _SLAB]
            mm(slab, b, room[: slab.shape[0]])
            out[begin : begin + _SLAB] += room[: slab.shape[0]]


class _Gemms:
    def grad_dtype(self, student: Side, logits_dtype: torch.dtype) -> torch.dtype:
        return torch.bfloat16 if student.weight.dtype == torch.bfloat16 else logits_dtype

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        if out.dtype == hidden.dtype:
            torch.mm(hidden, weight.t(), out=out)
        elif out.dtype == torch.float32:
            mm(hidden, weight.t(), out)
        else:
            for begin in range(0, weight.shape[0], _SLAB):
                slab = weight[begin : begin + _SLAB]
                room = out.new_empty(out.shape[0], slab.shape[0], dtype=torch.float32)
                mm(hidden, slab.t(), room)
                out[:, begin : begin + _SLAB] = room
        if bias is not None:
            out.add_(bias)

    def grad_hidden(self, grad: Tensor, weight: Tensor, out: Tensor) -> None:
        if grad.dtype == weight.dtype == out.dtype:
            torch.mm(grad, weight, out=out)
            return
        total = out.new_zeros(out.shape, dtype=torch.float32)
        for begin in range(0, weight.shape[0], _SLAB):
            columns = slice(begin, begin + _SLAB)
            total.addmm_(grad[:, columns].float(), weight[columns].float())
        out.copy_(total)

    def grad_weight(self, grad: Tensor, hidden: Tensor, out: Tensor, accumulate: bool) -> None:
        product = _add_mm if accumulate else mm
        product(grad.t(), hidden, out)


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
