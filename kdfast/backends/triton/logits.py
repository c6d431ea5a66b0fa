"""Knowledge distillation on logits, two passes over a row. Contract: `kdfast.backends`.

Bytes a row, student and teacher of V columns: 2V read, 2V read again (backwards, so that what was read last is still
in L2), V written. `stats[:, 2]` is NaN when no option needs the student's log-sum-exp at T = 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.backends.triton import tiles
from kdfast.backends.triton.divergence import forward_kl
from kdfast.backends.triton.tiles import (
    INF,
    LN2,
    LOG2E,
    LOWEST,
    NAN,
    add_exp2,
    closed,
    extra_grad,
    joined,
    load_tile,
    raised,
    split,
    tile_columns,
    with_extra,
    zero_outputs,
    zero_row,
)
from kdfast.options import PARTS, RowOptions


@triton.jit
def _maxima_and_sums(
    s_ptr, t_ptr, common, c, AT_1: tl.constexpr, TEACHER_AT_1: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """(maximum, log2 sum at T, log2 sum at 1) of the student and of the teacher over the common columns."""
    m_s = tl.full([LANES], LOWEST, tl.float32)
    m_t = tl.full([LANES], LOWEST, tl.float32)
    a_s = tl.zeros([LANES], tl.float32)
    a_t = tl.zeros([LANES], tl.float32)
    b_s = tl.zeros([LANES], tl.float32)
    b_t = tl.zeros([LANES], tl.float32)
    for start in range(0, common, LANES * VEC):
        columns = tile_columns(start, LANES, VEC, RAGGED)
        s = load_tile(s_ptr, columns, common, "evict_last")
        t = load_tile(t_ptr, columns, common, "evict_last")
        m = raised(m_s, s)
        a_s = add_exp2(a_s, m_s, m, s, c)
        if AT_1:
            b_s = add_exp2(b_s, m_s, m, s, LOG2E)
        m_s = m
        m = raised(m_t, t)
        a_t = add_exp2(a_t, m_t, m, t, c)
        if TEACHER_AT_1:
            b_t = add_exp2(b_t, m_t, m, t, LOG2E)
        m_t = m
    top_s = tl.max(m_s, 0)
    top_t = tl.max(m_t, 0)
    l_s = closed(m_s, a_s, top_s, c)
    l_t = closed(m_t, a_t, top_t, c)
    l_s1 = l_s
    l_t1 = l_t
    if AT_1:
        l_s1 = closed(m_s, b_s, top_s, LOG2E)
    if TEACHER_AT_1:
        l_t1 = closed(m_t, b_t, top_t, LOG2E)
    return top_s, l_s, l_s1, top_t, l_t, l_t1


@triton.jit
def _pair(s, t, m_s, l_s, m_t, l_t, inv_t):
    """(p, q, log p - log q) of a tile, from maxima and log2 sums."""
    c = inv_t * LOG2E
    q = tl.exp2((s - m_s) * c - l_s)
    p = tl.exp2((t - m_t) * c - l_t)
    # t - s first: near agreement it is exact, so d keeps its relative precision.
    return p, q, ((t - s) - (m_t - m_s)) * inv_t - LN2 * (l_t - l_s)


@triton.jit
def forward_kernel(
    student_ptr, teacher_ptr, grad_ptr, labels_ptr, scale_ptr, loss_ptr, stats_ptr, parts_ptr,
    rows, width, common, student_stride, teacher_stride, grad_stride, temperature, inv_t, soft_scale, hard_weight,
    UNIT_T: tl.constexpr, LABELS: tl.constexpr, HARD: tl.constexpr, PARTS: tl.constexpr, GRAD: tl.constexpr,
    EXTRA: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64)
        scale = tl.load(scale_ptr + row)
        if scale == 0:
            zero_outputs(loss_ptr + at, stats_ptr + at * 3, parts_ptr + at * 6, PARTS)
            if GRAD:
                zero_row(grad_ptr + at * grad_stride, width, LANES, VEC, RAGGED)
        else:
            _forward_row(
                student_ptr + at * student_stride, teacher_ptr + at * teacher_stride, grad_ptr + at * grad_stride,
                labels_ptr + at, loss_ptr + at, stats_ptr + at * 3, parts_ptr + at * 6,
                scale, width, common, temperature, inv_t, soft_scale, hard_weight,
                UNIT_T, LABELS, HARD, PARTS, GRAD, EXTRA, LANES, VEC, RAGGED,
            )  # fmt: skip


@triton.jit
def _forward_row(
    s_ptr, t_ptr, g_ptr, label_ptr, loss_ptr, stats_ptr, parts_ptr,
    scale, width, common, temperature, inv_t, soft_scale, hard_weight,
    UNIT_T: tl.constexpr, LABELS: tl.constexpr, HARD: tl.constexpr, PARTS: tl.constexpr, GRAD: tl.constexpr,
    EXTRA: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    label = -1
    if LABELS:
        wide = tl.load(label_ptr)  # compared before it is narrowed, or a huge label would come back in range
        label = tl.where((wide >= 0) & (wide < width), wide, -1).to(tl.int32)
    inside = label >= 0
    # Read before the second pass, whose gradient may take the place of the student.
    s_label = tl.load(s_ptr + label, mask=inside, other=0.0).to(tl.float32)
    m_s, l_s, l_s1, m_t, l_t, l_t1 = _maxima_and_sums(
        s_ptr, t_ptr, common, inv_t * LOG2E, (HARD or PARTS) and not UNIT_T, PARTS and not UNIT_T,
        LANES, VEC, RAGGED,
    )  # fmt: skip
    m_h = m_s
    l_h = l_s1
    if HARD and EXTRA:
        m_h, l_h = with_extra(s_ptr, common, width, m_s, l_s1, LANES, VEC, RAGGED)
    tl.store(stats_ptr, joined(m_s, l_s, temperature))
    tl.store(stats_ptr + 1, joined(m_t, l_t, temperature))
    tl.store(stats_ptr + 2, joined(m_h, l_h, 1.0) if HARD or ((UNIT_T or PARTS) and not EXTRA) else NAN)

    soft = tl.zeros([LANES], tl.float32)
    kl_1 = tl.zeros([LANES], tl.float32)
    entropy = tl.zeros([LANES], tl.float32)
    best_s = tl.full([LANES], 2147483647, tl.int32)
    best_t = tl.full([LANES], 2147483647, tl.int32)
    tiles_in_row = tl.cdiv(common, LANES * VEC)
    for i in range(0, tiles_in_row):
        columns = tile_columns((tiles_in_row - 1 - i) * (LANES * VEC), LANES, VEC, RAGGED)
        s = load_tile(s_ptr, columns, common, "evict_first")
        t = load_tile(t_ptr, columns, common, "evict_first")
        p, q, d = _pair(s, t, m_s, l_s, m_t, l_t, inv_t)
        term, diff = forward_kl(p, q, d)
        soft += tl.sum(term, 1)
        if PARTS:
            if not UNIT_T:
                p, q_1, d = _pair(s, t, m_s, l_s1, m_t, l_t1, 1.0)
                term, _ = forward_kl(p, q_1, d)
                kl_1 += tl.sum(term, 1)
            log_p = (t - m_t) - LN2 * l_t1
            entropy -= tl.sum(tl.where(p == 0, 0.0, p * log_p), 1)
            best_s = tl.minimum(best_s, tl.min(tl.where(s == m_s, columns, 2147483647), 1))
            best_t = tl.minimum(best_t, tl.min(tl.where(t == m_t, columns, 2147483647), 1))
        if GRAD:
            g = (scale * soft_scale * inv_t) * diff
            if HARD:
                if not UNIT_T or EXTRA:
                    q = tl.exp2((s - m_h) * LOG2E - l_h)
                g += (scale * hard_weight) * tl.where(columns == label, q - 1, q)
            tl.store(g_ptr + columns, g.to(g_ptr.dtype.element_ty), mask=columns < common, eviction_policy="evict_first")
    if GRAD and EXTRA:
        extra_grad(s_ptr, g_ptr, common, width, label, m_h, l_h, scale * hard_weight, HARD, LANES, VEC, RAGGED)

    kl = tl.sum(soft, 0)
    # A row that is -inf throughout has no distribution; its log2 sums are -inf.
    kl = tl.where((l_s > -INF) & (l_t > -INF), kl, NAN)
    loss = soft_scale * kl
    hard = (m_h - s_label) + LN2 * l_h
    if HARD:
        loss += tl.where(hard_weight == 0, 0.0, hard_weight * hard)
    if LABELS:
        loss = tl.where(inside, loss, NAN)
        hard = tl.where(inside, hard, NAN)
    tl.store(loss_ptr, scale * loss)
    if PARTS:
        nll = 0.0
        if LABELS:
            t_label = tl.load(t_ptr + label, mask=inside & (label < common), other=-INF).to(tl.float32)
            nll = (m_t - t_label) + LN2 * l_t1
        tl.store(parts_ptr, kl)
        tl.store(parts_ptr + 1, hard if LABELS else 0.0)
        tl.store(parts_ptr + 2, kl if UNIT_T else tl.sum(kl_1, 0))
        tl.store(parts_ptr + 3, nll)
        tl.store(parts_ptr + 4, tl.sum(entropy, 0))
        tl.store(parts_ptr + 5, tl.where(tl.min(best_s, 0) == tl.min(best_t, 0), 1.0, 0.0))


@triton.jit
def backward_kernel(
    student_ptr, teacher_ptr, grad_ptr, labels_ptr, scale_ptr, stats_ptr,
    rows, width, common, student_stride, teacher_stride, grad_stride, temperature, inv_t, soft_scale, hard_weight,
    HARD: tl.constexpr, EXTRA: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64)
        scale = tl.load(scale_ptr + row)
        g_ptr = grad_ptr + at * grad_stride
        if scale == 0:
            zero_row(g_ptr, width, LANES, VEC, RAGGED)
        else:
            s_ptr = student_ptr + at * student_stride
            t_ptr = teacher_ptr + at * teacher_stride
            m_s, l_s = split(tl.load(stats_ptr + at * 3), temperature)
            m_t, l_t = split(tl.load(stats_ptr + at * 3 + 1), temperature)
            m_h = 0.0
            l_h = 0.0
            label = -1
            if HARD:
                m_h, l_h = split(tl.load(stats_ptr + at * 3 + 2), 1.0)
                label = tl.load(labels_ptr + at).to(tl.int32)
            for start in range(0, common, LANES * VEC):
                columns = tile_columns(start, LANES, VEC, RAGGED)
                s = load_tile(s_ptr, columns, common, "evict_first")
                t = load_tile(t_ptr, columns, common, "evict_first")
                p, q, d = _pair(s, t, m_s, l_s, m_t, l_t, inv_t)
                _, diff = forward_kl(p, q, d)
                g = (scale * soft_scale * inv_t) * diff
                if HARD:
                    q = tl.exp2((s - m_h) * LOG2E - l_h)
                    g += (scale * hard_weight) * tl.where(columns == label, q - 1, q)
                tl.store(g_ptr + columns, g.to(g_ptr.dtype.element_ty), mask=columns < common, eviction_policy="evict_first")
            if EXTRA:
                extra_grad(s_ptr, g_ptr, common, width, label, m_h, l_h, scale * hard_weight, HARD, LANES, VEC, RAGGED)


def forward(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    scale: Tensor,
    options: RowOptions,
    need_parts: bool,
    grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    (teacher,) = teachers
    rows, width = student.shape
    common = min(width, teacher.shape[1])
    loss = torch.empty(rows, dtype=torch.float32, device=student.device)
    stats = torch.empty(rows, 3, dtype=torch.float64, device=student.device)
    parts = torch.empty((rows, len(PARTS)) if need_parts else 0, dtype=torch.float32, device=student.device)
    if rows == 0:
        return loss, stats, parts
    out = student if grad is None else grad
    size = tiles.launch_for(common, student, teacher, out, heavy=need_parts)
    with tiles.on(student):
        forward_kernel[tiles.grid(rows, student.device, size.warps)](
            student, teacher, out, scale if labels is None else labels.contiguous(), scale.contiguous(), loss, stats, parts,
            rows, width, common, student.stride(0), teacher.stride(0), out.stride(0),
            options.temperature, 1 / options.temperature, options.soft_scale, options.hard_weight,
            UNIT_T=options.temperature == 1, LABELS=labels is not None,
            HARD=labels is not None and (need_parts or options.hard_weight != 0),
            PARTS=need_parts, GRAD=grad is not None, EXTRA=width > common,
            **size.shape, **size.options,
        )  # fmt: skip
    return loss, stats, parts


def backward(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    scale: Tensor,
    stats: Tensor,
    options: RowOptions,
    grad: Tensor,
) -> None:
    (teacher,) = teachers
    rows, width = student.shape
    common = min(width, teacher.shape[1])
    if rows == 0:
        return
    size = tiles.launch_for(common, student, teacher, grad)
    with tiles.on(student):
        backward_kernel[tiles.grid(rows, student.device, size.warps)](
            student, teacher, grad, scale if labels is None else labels.contiguous(), scale.contiguous(), stats,
            rows, width, common, student.stride(0), teacher.stride(0), grad.stride(0),
            options.temperature, 1 / options.temperature, options.soft_scale, options.hard_weight,
            HARD=labels is not None and options.hard_weight != 0, EXTRA=width > common,
            **size.shape, **size.options,
        )  # fmt: skip
