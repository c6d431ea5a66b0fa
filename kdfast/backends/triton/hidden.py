"""Losses between hidden states in Triton. Contract: `kdfast.backends`.

A projection is the vendor's product, in float32 and for some rows at a time, so that the row kernel finds what it reads in L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.backends.triton.linear import beside, mm
from kdfast.backends.triton.tiles import grid, on
from kdfast.chunks import Needs, grad_hidden_dtype, rows_per_chunk, without_ignored

#: Columns of a row in flight; wider rows are walked.
BLOCK, WARPS = 4096, 8
#: Bytes of projected states in flight: about half of an H100's L2, and still a product that fills the device.
PROJECTED_BYTES = 32 << 20


@triton.jit
def mse_kernel(
    student_ptr, bias_ptr, teacher_ptr, grad_ptr, scale_ptr, loss_ptr, rows, width, student_stride, teacher_stride,
    BLOCK: tl.constexpr, BIAS: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    """student [rows, width] (+ bias [width]) against teacher [rows, width]: loss [rows], contiguous grad [rows, width]."""
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        scale = tl.load(scale_ptr + row)
        # A row that does not count may hold anything, NaN included, so it is not read.
        counted = tl.where(scale != 0, width, 0)
        total = tl.zeros([BLOCK], tl.float32)
        for begin in range(0, width, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            keep = at < counted
            s = tl.load(student_ptr + row * student_stride + at, mask=keep, other=0.0).to(tl.float32)
            t = tl.load(teacher_ptr + row * teacher_stride + at, mask=keep, other=0.0).to(tl.float32)
            if BIAS:
                s += tl.load(bias_ptr + at, mask=keep, other=0.0).to(tl.float32)
            d = s - t
            total += d * d
            if GRAD:
                g = 2.0 * scale / width * d
                tl.store(grad_ptr + row * width + at, g.to(grad_ptr.dtype.element_ty), mask=at < width)
        tl.store(loss_ptr + row, scale * (tl.sum(total, 0) / width))


@triton.jit
def cosine_kernel(
    student_ptr, teacher_ptr, grad_ptr, scale_ptr, loss_ptr, rows, width, student_stride, teacher_stride,
    BLOCK: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    """1 - cos = sin^2 / (1 + cos) with sin^2 from the teacher's part across the student, which does not cancel.

    That part is made orthogonal to the student twice: once leaves an error of one rounding of the teacher. The second
    and third look at a row find it in the caches.
    """
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        scale = tl.load(scale_ptr + row)
        # A row that does not count may hold anything, NaN included, so it is not read.
        counted = tl.where(scale != 0, width, 0)
        a = tl.zeros([BLOCK], tl.float32)
        b = tl.zeros([BLOCK], tl.float32)
        c = tl.zeros([BLOCK], tl.float32)
        for begin in range(0, width, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            keep = at < counted
            s = tl.load(student_ptr + row * student_stride + at, mask=keep, other=0.0).to(tl.float32)
            t = tl.load(teacher_ptr + row * teacher_stride + at, mask=keep, other=0.0).to(tl.float32)
            a += s * s
            b += t * t
            c += s * t
        ss = tl.sum(a, 0)
        tt = tl.sum(b, 0)
        st = tl.sum(c, 0)
        zero = (ss == 0) | (tt == 0)
        ss = tl.where(zero, 1.0, ss)
        tt = tl.where(zero, 1.0, tt)
        along = st / ss
        a = tl.zeros([BLOCK], tl.float32)
        b = tl.zeros([BLOCK], tl.float32)
        for begin in range(0, width, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            keep = at < counted
            s = tl.load(student_ptr + row * student_stride + at, mask=keep, other=0.0).to(tl.float32)
            t = tl.load(teacher_ptr + row * teacher_stride + at, mask=keep, other=0.0).to(tl.float32)
            p = tl.fma(-along, s, t)
            a += p * p
            b += p * s
        ps = tl.sum(b, 0)
        again = ps / ss
        norms = tl.sqrt_rn(ss) * tl.sqrt_rn(tt)
        if GRAD:
            factor = tl.where(zero, 0.0, -scale / norms)
            for begin in range(0, width, BLOCK):
                at = begin + tl.arange(0, BLOCK)
                keep = at < counted
                s = tl.load(student_ptr + row * student_stride + at, mask=keep, other=0.0).to(tl.float32)
                t = tl.load(teacher_ptr + row * teacher_stride + at, mask=keep, other=0.0).to(tl.float32)
                g = factor * tl.fma(-again, s, tl.fma(-along, s, t))
                tl.store(grad_ptr + row * width + at, g.to(grad_ptr.dtype.element_ty), mask=at < width)
        cos = st / norms
        sin2 = tl.maximum(tl.sum(a, 0) - again * ps, 0.0) / tt
        loss = tl.where(cos > 0, sin2 / (1.0 + cos), 1.0 - tl.maximum(cos, -1.0))
        loss = tl.where(zero, 1.0, loss)
        # x - x is NaN where x is: an infinite row is a bad row, like a NaN.
        sums = ss + tt + st
        tl.store(loss_ptr + row, tl.where(scale == 0, 0.0, scale * (loss + (sums - sums))))


def _options(width: int) -> dict[str, int | bool]:
    return {"BLOCK": min(BLOCK, triton.next_power_of_2(width)), "num_warps": WARPS, "enable_fp_fusion": True}


def cosine(student: Tensor, teacher: Tensor, scale: Tensor, need_hidden: bool) -> tuple[Tensor, Tensor]:
    n, width = student.shape
    loss = torch.empty(n, device=student.device)
    grad = torch.empty(student.shape if need_hidden else (0,), dtype=student.dtype, device=student.device)
    if n:
        with on(student):
            cosine_kernel[grid(n, student.device, WARPS)](
                student, teacher, grad, scale, loss, n, width, student.stride(0), teacher.stride(0), GRAD=need_hidden,
                **_options(width),
            )  # fmt: skip
    return loss, grad


def _mse_rows(
    student: Tensor, bias: Tensor | None, teacher: Tensor, scale: Tensor, loss: Tensor, grad: Tensor, need_grad: bool
) -> None:
    """Writes the loss of every row, and the gradient with respect to what is compared with the teacher."""
    n, width = student.shape
    if n:
        with on(student):
            mse_kernel[grid(n, student.device, WARPS)](
                student, scale if bias is None else bias, teacher, grad, scale, loss, n, width, student.stride(0),
                teacher.stride(0), BIAS=bias is not None, GRAD=need_grad, **_options(width),
            )  # fmt: skip


def mse(
    student: Tensor, projection: Tensor | None, bias: Tensor | None, teacher: Tensor, scale: Tensor, needs: Needs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_hidden, grad_weight, grad_bias = (torch.empty(0, device=student.device) for _ in range(3))
    n = student.shape[0]
    loss = torch.empty(n, device=student.device)
    if projection is None:
        if needs.hidden:
            grad_hidden = torch.empty(student.shape, dtype=student.dtype, device=student.device)
        _mse_rows(student, None, teacher, scale, loss, grad_hidden, needs.hidden)
        return loss, grad_hidden, grad_weight, grad_bias
    width = projection.shape[0]
    # float16 would lose 1/N to underflow.
    grad = torch.empty((n, width) if needs.any else (0, width), dtype=grad_hidden_dtype(student), device=student.device)
    bias = None if bias is None else bias.contiguous()
    some = rows_per_chunk(n, 4 * width, PROJECTED_BYTES)
    projected = torch.empty(some, width, device=student.device)
    for begin in range(0, n, some):
        rows = slice(begin, min(begin + some, n))
        out = projected[: rows.stop - begin]
        mm(student[rows], projection.t(), out)
        _mse_rows(out, bias, teacher[rows], scale[rows], loss[rows], grad[rows], needs.any)
    if needs.hidden:
        grad_hidden = _product(grad, projection)
    if needs.weight:
        grad_weight = _product(grad.t(), without_ignored(student, scale)).float()
    if needs.bias:
        grad_bias = grad.sum(0, dtype=torch.float32)
    return loss, grad_hidden.to(grad_hidden_dtype(student)), grad_weight, grad_bias


def _product(grad: Tensor, operand: Tensor) -> Tensor:
    if grad.dtype == operand.dtype:
        return grad @ operand
    with beside(operand):
        return grad.float() @ operand.float()
