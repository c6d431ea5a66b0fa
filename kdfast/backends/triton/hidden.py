"""Losses between hidden states in Triton. Contract: `kdfast.backends`.

With a projection the difference, the mask, the loss and its gradient are formed in the epilogue of the product: the
projected states themselves never reach memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.backends.triton.precision import tf32_allowed
from kdfast.backends.triton.tiles import grid, on
from kdfast.chunks import Needs, grad_hidden_dtype, without_ignored

#: Columns of a row in flight; wider rows are walked.
BLOCK, WARPS = 4096, 8
#: Tile of a projection: rows, outputs, inputs.
PROJECT_TILE, PROJECT_WARPS = (64, 128, 32), 8


@triton.jit
def mse_kernel(
    student_ptr, teacher_ptr, grad_ptr, scale_ptr, loss_ptr, rows, width, student_stride, teacher_stride,
    BLOCK: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
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


@triton.jit
def project_kernel(
    student_ptr, projection_ptr, bias_ptr, teacher_ptr, grad_ptr, scale_ptr, loss_ptr,
    rows, width, inputs, student_stride, projection_stride, teacher_stride, tiles,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """grad = 2 * scale / width * (student @ projection.T + bias - teacher); loss_ptr [rows, tiles] gets each tile's share."""
    m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    scale = tl.load(scale_ptr + m, mask=m < rows, other=0.0)
    counts = (m < rows) & (scale != 0)
    total = tl.zeros([BM, BN], tl.float32)
    for begin in range(0, inputs, BK):
        k = begin + tl.arange(0, BK)
        h_keep = counts[:, None] & (k < inputs)[None, :]
        w_keep = (n < width)[None, :] & (k < inputs)[:, None]
        h = tl.load(student_ptr + m[:, None] * student_stride + k[None, :], mask=h_keep, other=0.0)
        w = tl.load(projection_ptr + n.to(tl.int64)[None, :] * projection_stride + k[:, None], mask=w_keep, other=0.0)
        if WIDEN:
            h, w = h.to(tl.float32), w.to(tl.float32)
        total = tl.dot(h, w, total, input_precision=PRECISION)
    if BIAS:
        total += tl.load(bias_ptr + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
    keep = counts[:, None] & (n < width)[None, :]
    t = tl.load(teacher_ptr + m[:, None] * teacher_stride + n[None, :], mask=keep, other=0.0).to(tl.float32)
    d = tl.where(keep, total - t, 0.0)
    inside = (m < rows)[:, None] & (n < width)[None, :]
    g = 2.0 / width * scale[:, None] * d
    tl.store(grad_ptr + m[:, None] * width + n[None, :], g.to(grad_ptr.dtype.element_ty), mask=inside)
    tl.store(loss_ptr + m * tiles + tl.program_id(1), scale * (tl.sum(d * d, 1) / width), mask=m < rows)


def _row_loss(kernel, student: Tensor, teacher: Tensor, scale: Tensor, need_hidden: bool) -> tuple[Tensor, Tensor]:
    n, width = student.shape
    loss = torch.empty(n, device=student.device)
    grad = torch.empty(student.shape if need_hidden else (0,), dtype=student.dtype, device=student.device)
    if n:
        with on(student):
            kernel[grid(n, student.device, WARPS)](
                student, teacher, grad, scale, loss, n, width, student.stride(0), teacher.stride(0),
                BLOCK=min(BLOCK, triton.next_power_of_2(width)), GRAD=need_hidden, num_warps=WARPS, enable_fp_fusion=True,
            )  # fmt: skip
    return loss, grad


def cosine(student: Tensor, teacher: Tensor, scale: Tensor, need_hidden: bool) -> tuple[Tensor, Tensor]:
    return _row_loss(cosine_kernel, student, teacher, scale, need_hidden)


def mse(
    student: Tensor, projection: Tensor | None, bias: Tensor | None, teacher: Tensor, scale: Tensor, needs: Needs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_hidden, grad_weight, grad_bias = (torch.empty(0, device=student.device) for _ in range(3))
    if projection is None:
        return *_row_loss(mse_kernel, student, teacher, scale, needs.hidden), grad_weight, grad_bias
    n, width = student.shape[0], projection.shape[0]
    # float16 would lose 1/N to underflow.
    grad = torch.empty(n, width, dtype=grad_hidden_dtype(student), device=student.device)
    tiles = triton.cdiv(width, PROJECT_TILE[1])
    shares = torch.empty(n, tiles, device=student.device)
    weight = projection if projection.stride(-1) == 1 else projection.contiguous()
    if n:
        _project(student, weight, bias, teacher, grad, scale, shares)
    if needs.hidden:
        grad_hidden = _product(grad, weight)
    if needs.weight:
        grad_weight = _product(grad.t(), without_ignored(student, scale)).float()
    if needs.bias:
        grad_bias = grad.sum(0, dtype=torch.float32)
    return shares.sum(1), grad_hidden.to(grad_hidden_dtype(student)), grad_weight, grad_bias


def _project(
    student: Tensor, weight: Tensor, bias: Tensor | None, teacher: Tensor, grad: Tensor, scale: Tensor, shares: Tensor
) -> None:
    bm, bn, bk = PROJECT_TILE
    n, width = grad.shape
    precision = "tf32" if student.is_cuda and tf32_allowed() else "ieee"
    with on(student):
        project_kernel[(triton.cdiv(n, bm), shares.shape[1])](
            student, weight, scale if bias is None else bias, teacher, grad, scale, shares,
            n, width, weight.shape[1], student.stride(0), weight.stride(0), teacher.stride(0), shares.shape[1],
            # The interpreter would multiply the bits of bfloat16 as integers.
            BIAS=bias is not None, PRECISION=precision, WIDEN=not student.is_cuda, BM=bm, BN=bn, BK=bk,
            num_warps=PROJECT_WARPS, enable_fp_fusion=True,
        )  # fmt: skip


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b if a.dtype == b.dtype else a.float() @ b.float()
