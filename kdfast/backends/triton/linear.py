"""Knowledge distillation through linear heads: torch's GEMMs around the Triton row kernel. Contract: `kdfast.backends`.

Logits are float32 by default whatever the heads are: bfloat16 and float16 products accumulate and leave in float32. The row
kernel writes gradients for half heads in the heads' dtype, where several chunks of them wait for one product. float16 would
lose 1/N to underflow, so there each row is written in a unit of its own (`_units`): normal numbers reach down to 2^-27 of the
largest that can be, as precise as in TF32. Where a loss has no such largest, gradients stay as the logits were and their
products run in TF32, at half the rate.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast.backends.triton import logits
from kdfast.backends.triton.precision import tf32_products
from kdfast.chunks import Chunking, Needs, RowKernel, Side, linear_rows
from kdfast.options import RowOptions

_HALVES = (torch.bfloat16, torch.float16)
#: Rows of a weight gradient that are added at a time where the GEMM cannot add to float32 by itself.
_SLAB = 8192
#: Gradients in float16 are at most this: half its largest number, for rounding and targets a little above 1.
_TOP = 2.0**15
#: Largest gradient of a row of scale 1 for which float16 has digits enough below `_TOP`: gradients are often of order 1.
_LARGEST = 64.0
#: Log-sum-exps of float16 heads are below this: beyond it their logits are infinite in plain PyTorch.
_LARGEST_LSE = 2.0**16


@functools.cache
def _leaves_in_float32(device: torch.device, accumulate: bool, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether half products on this device can be written, or added, to float32: asked by trying one tile."""
    half = torch.zeros(16, 16, dtype=dtype, device=device)
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
    halves = a.dtype in _HALVES and b.dtype in _HALVES
    if halves and a.dtype == b.dtype and _leaves_in_float32(a.device, False, a.dtype):
        torch.mm(a, b, out_dtype=torch.float32, out=out)
        return
    with tf32_products() if halves else contextlib.nullcontext():
        torch.mm(a.float(), b.float(), out=out)


def _add_mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out += a @ b; `out` is float32."""
    if a.dtype == b.dtype == torch.float32:
        out.addmm_(a, b)
    elif a.dtype == b.dtype and a.dtype in _HALVES and _leaves_in_float32(a.device, True, a.dtype):
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        room = out.new_empty(min(_SLAB, out.shape[0]), out.shape[1])
        for begin in range(0, out.shape[0], _SLAB):
            slab = a[begin : begin + _SLAB]
            mm(slab, b, room[: slab.shape[0]])
            out[begin : begin + _SLAB] += room[: slab.shape[0]]


def beside(operand: Tensor) -> contextlib.AbstractContextManager[None]:
    """For products of gradients with `operand`: TF32 beside a half. What float32 heads multiply in is the user's choice."""
    return tf32_products() if operand.dtype in _HALVES else contextlib.nullcontext()


class _Gemms:
    def __init__(self, scaled: bool = False) -> None:
        self.scaled = scaled  # gradients of float16 heads are written in units

    def grad_dtype(self, student: Side, logits_dtype: torch.dtype) -> torch.dtype:
        dtype = student.weight.dtype
        return dtype if dtype == torch.bfloat16 or (self.scaled and dtype == torch.float16) else logits_dtype

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
        if grad.dtype == weight.dtype and out.dtype == torch.float32:
            mm(grad, weight, out)
            return
        total = out.new_zeros(out.shape, dtype=torch.float32)
        with beside(weight):
            for begin in range(0, weight.shape[0], _SLAB):
                columns = slice(begin, begin + _SLAB)
                total.addmm_(grad[:, columns].float(), weight[columns].float())
        out.copy_(total)

    def grad_weight(self, grad: Tensor, hidden: Tensor, out: Tensor, accumulate: bool) -> None:
        product = _add_mm if accumulate else mm
        with beside(hidden):
            product(grad.t(), hidden, out)


def largest_gradient(options: RowOptions) -> float:
    """What a gradient of a float16 head's logits in a row of scale 1 cannot exceed; infinite where nothing bounds it.

    With respect to tempered logits it is h - q * sum(h) of `divergence`: q - p for forward KL, half of two signs for TVD.
    Against a mixture that holds a share w of q, log(q / M) is at most -log(w), and q * log(M / q) at most M / e.
    """
    soft = 0.0
    if options.soft_weight != 0:
        share = options.coefficients[1]
        match options.kind:
            case "forward_kl" | "tvd":
                soft = 1.0
            case "jsd" | "skew_forward_kl":
                soft = 3.0
            case "skew_reverse_kl":
                soft = 2.0 * (2.0 - math.log(share))
            case _:
                return math.inf
    soft *= abs(options.soft_scale / options.temperature) * max(1.0, sum(abs(w) for w in options.teacher_weights))
    z = 2 * abs(options.z_loss) * _LARGEST_LSE
    return (soft + abs(options.hard_weight) + z) * abs(options.student_scale)


def _units(scale: Tensor, largest: float) -> Tensor:
    """`[N]` powers of two: a row's gradients in its unit are at most `_TOP`, and of that order where they are the largest."""
    power = (scale.abs().float().view(torch.int32) & 0x7F800000).view(torch.float32)  # scale / power is from 1 to 2
    # Rows that do not count have none; those of infinite scale are infinite with any.
    return power.clamp(2.0**-90, 2.0**90) * (2.0 ** (math.ceil(math.log2(max(largest, 2.0**-20))) + 1) / _TOP)


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
    half = student.weight.dtype == torch.float16 and needs.any
    scaled = half and (largest := largest_gradient(options)) <= _LARGEST
    units = _units(scale, largest) if scaled else None
    return linear_rows(
        kernel, _Gemms(scaled), student, teachers, labels, scale, options, chunking, need_parts, needs, row_inputs, units
    )
