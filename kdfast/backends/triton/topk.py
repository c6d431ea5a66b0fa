"""Top-k capture and the ghost-bucket loss. Contract: `kdfast.backends`.

The loss marks the entries of a row in a bitmap of one bit a column, so that both passes know an unselected column
without comparing it with k ids. An id that is listed twice counts twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.backends.triton import tiles
from kdfast.backends.triton.divergence import forward_kl
from kdfast.backends.triton.selection import capture
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

__all__ = ["backward", "capture", "forward"]


@triton.jit
def _marked(bits_ptr, start, columns, width, LANES: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr):
    """Which columns of a tile are entries; `.cg` reads from L2, where the atomics that set the bits took place."""
    if RAGGED:
        words = tl.load(bits_ptr + columns // 32, mask=columns < width, other=0, cache_modifier=".cg")
    else:
        first = start + tl.arange(0, LANES) * VEC  # VEC neighbours share a word
        words = tl.load(bits_ptr + first // 32, mask=first < width, other=0, cache_modifier=".cg")[:, None]
    return ((words >> (columns % 32)) & 1) == 1


@triton.jit
def _rest(
    s_ptr,
    bits_ptr,
    vocab,
    c,
    AT_1: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """(maximum, log2 sum at T, log2 sum at 1, first column of the maximum) of the student's unselected columns."""
    m = tl.full([LANES], LOWEST, tl.float32)
    a = tl.zeros([LANES], tl.float32)
    b = tl.zeros([LANES], tl.float32)
    best = tl.full([LANES], 2147483647, tl.int32)
    for start in range(0, vocab, LANES * VEC):
        columns = tile_columns(start, LANES, VEC, RAGGED)
        x = load_tile(s_ptr, columns, vocab, "evict_last")
        x = tl.where(_marked(bits_ptr, start, columns, vocab, LANES, VEC, RAGGED), -INF, x)
        m_new = raised(m, x)
        a = add_exp2(a, m, m_new, x, c)
        if AT_1:
            b = add_exp2(b, m, m_new, x, LOG2E)
        if PARTS:
            here = tl.min(tl.where(x == m_new[:, None], columns, 2147483647), 1)
            best = tl.where(m_new > m, here, best)
        m = m_new
    top = tl.max(m, 0)
    l = closed(m, a, top, c)
    l_1 = l
    if AT_1:
        l_1 = closed(m, b, top, LOG2E)
    return top, l, l_1, tl.min(tl.where(m == top, best, 2147483647), 0)


@triton.jit
def _buckets(logprobs, valid, log_z, log_tail, log_q, log_q_tail, inv_t):
    """Terms and derivatives of the entries, then of the ghost bucket."""
    log_p = logprobs * inv_t - log_z
    p = tl.where(valid, tl.exp2(log_p * LOG2E), 0.0)
    q = tl.where(valid, tl.exp2(log_q * LOG2E), 0.0)
    term, diff = forward_kl(p, q, log_p - log_q)
    tail_p = tl.exp2(log_tail * LOG2E)
    tail_q = tl.exp2(log_q_tail * LOG2E)
    tail_term, tail_diff = forward_kl(tail_p, tail_q, log_tail - log_q_tail)
    return tl.sum(term, 0) + tail_term, diff, tail_diff


@triton.jit
def _write_grad(
    s_ptr, g_ptr, bits_ptr, width, vocab, ids, inside, z, diff, tail_diff, m_u, l_u, m_h, l_h, label,
    soft_weight, hard_weight, c, HARD: tl.constexpr, EXTRA: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """The gradient of a row; `z` are the student's logits at the entries, read before anything is written."""
    l_u = tl.where(l_u == -INF, 0.0, l_u)  # nothing is unselected, or it is -inf throughout
    in_row = tl.cdiv(vocab, LANES * VEC)
    for i in range(0, in_row):
        start = (in_row - 1 - i) * (LANES * VEC)
        columns = tile_columns(start, LANES, VEC, RAGGED)
        x = load_tile(s_ptr, columns, vocab, "evict_first")
        g = (soft_weight * tail_diff) * tl.exp2((x - m_u) * c - l_u)
        g = tl.where(_marked(bits_ptr, start, columns, vocab, LANES, VEC, RAGGED), 0.0, g)
        if HARD:
            q = tl.exp2((x - m_h) * LOG2E - l_h)
            g += hard_weight * tl.where(columns == label, q - 1, q)
        tl.store(g_ptr + columns, g.to(g_ptr.dtype.element_ty), mask=columns < vocab, eviction_policy="evict_first")
    if EXTRA:
        extra_grad(s_ptr, g_ptr, vocab, width, label, m_h, l_h, hard_weight, HARD, LANES, VEC, RAGGED)
    g = soft_weight * diff
    if HARD:
        q = tl.exp2((z - m_h) * LOG2E - l_h)
        g += hard_weight * tl.where(ids == label, q - 1, q)
    tl.debug_barrier()  # the tiles' stores to these columns come first
    tl.store(g_ptr + ids, g.to(g_ptr.dtype.element_ty), mask=inside)


@triton.jit
def forward_kernel(
    student_ptr, grad_ptr, ids_ptr, logprobs_ptr, log_z_ptr, log_tail_ptr, labels_ptr, scale_ptr, bits_ptr,
    loss_ptr, stats_ptr, parts_ptr, rows, width, vocab, words, k, student_stride, grad_stride,
    temperature, inv_t, soft_scale, hard_weight,
    UNIT_T: tl.constexpr, LABELS: tl.constexpr, HARD: tl.constexpr, PARTS: tl.constexpr, GRAD: tl.constexpr,
    EXTRA: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    bits_ptr += tl.program_id(0).to(tl.int64) * words
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64)
        scale = tl.load(scale_ptr + row)
        if scale == 0:
            zero_outputs(loss_ptr + at, stats_ptr + at * 3, parts_ptr + at * 7, PARTS)
            if GRAD:
                zero_row(grad_ptr + at * grad_stride, width, LANES, VEC, RAGGED)
        else:
            slots = tl.arange(0, K)
            ids = tl.load(ids_ptr + at * k + slots, mask=slots < k, other=-1)
            inside = (ids >= 0) & (ids < vocab)
            tl.atomic_or(bits_ptr + ids // 32, 1 << (ids % 32), mask=inside)
            tl.debug_barrier()
            _forward_row(
                student_ptr + at * student_stride, grad_ptr + at * grad_stride, logprobs_ptr + at * k, bits_ptr,
                labels_ptr + at, loss_ptr + at, stats_ptr + at * 3, parts_ptr + at * 7,
                ids, inside, k, tl.load(log_z_ptr + row), tl.load(log_tail_ptr + row),
                scale, width, vocab, temperature, inv_t, soft_scale, hard_weight,
                UNIT_T, LABELS, HARD, PARTS, GRAD, EXTRA, K, LANES, VEC, RAGGED,
            )  # fmt: skip
            tl.debug_barrier()
            tl.store(bits_ptr + ids // 32, 0, mask=inside)
            tl.debug_barrier()


@triton.jit
def _forward_row(
    s_ptr, g_ptr, logprobs_ptr, bits_ptr, label_ptr, loss_ptr, stats_ptr, parts_ptr,
    ids, inside, k, log_z, log_tail, scale, width, vocab, temperature, inv_t, soft_scale, hard_weight,
    UNIT_T: tl.constexpr, LABELS: tl.constexpr, HARD: tl.constexpr, PARTS: tl.constexpr, GRAD: tl.constexpr,
    EXTRA: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    c = inv_t * LOG2E
    slots = tl.arange(0, K)
    logprobs = tl.load(logprobs_ptr + slots, mask=slots < k, other=-INF)
    label = -1
    if LABELS:
        wide = tl.load(label_ptr)  # compared before it is narrowed, or a huge label would come back in range
        label = tl.where((wide >= 0) & (wide < width), wide, -1).to(tl.int32)
    has_label = label >= 0
    s_label = tl.load(s_ptr + label, mask=has_label, other=0.0).to(tl.float32)
    z = tl.load(s_ptr + ids, mask=inside, other=-INF).to(tl.float32)

    m_u, l_u, l_u1, best_u = _rest(s_ptr, bits_ptr, vocab, c, HARD and not UNIT_T, PARTS, LANES, VEC, RAGGED)
    top = tl.maximum(m_u, tl.max(z, 0))
    l = tl.log2(tl.exp2((m_u - top) * c + l_u) + tl.sum(tl.exp2((z - top) * c), 0))
    m_h = top
    l_h = l
    if HARD and not UNIT_T:
        l_h = tl.log2(tl.exp2((m_u - top) * LOG2E + l_u1) + tl.sum(tl.exp2((z - top) * LOG2E), 0))
    if HARD and EXTRA:
        m_h, l_h = with_extra(s_ptr, vocab, width, top, l_h, LANES, VEC, RAGGED)
    log_q_tail = (m_u - top) * inv_t + LN2 * (l_u - l)
    tl.store(stats_ptr, joined(m_u, l_u, temperature))
    tl.store(stats_ptr + 1, joined(top, l, temperature))
    tl.store(stats_ptr + 2, joined(m_h, l_h, 1.0) if HARD or (UNIT_T and not EXTRA) else NAN)

    soft, diff, tail_diff = _buckets(logprobs, inside, log_z, log_tail, (z - top) * inv_t - LN2 * l, log_q_tail, inv_t)
    # A student that is -inf throughout has no distribution; an id outside the vocabulary names no column.
    soft = tl.where((l > -INF) & (tl.max(ids, 0) < vocab), soft, NAN)
    loss = soft_scale * soft
    hard = (m_h - s_label) + LN2 * l_h
    if HARD:
        loss += tl.where(hard_weight == 0, 0.0, hard_weight * hard)
    if LABELS:
        loss = tl.where(has_label, loss, NAN)
        hard = tl.where(has_label, hard, NAN)
    tl.store(loss_ptr, scale * loss)
    if PARTS:
        tl.store(parts_ptr, soft)
        tl.store(parts_ptr + 1, hard if LABELS else 0.0)
        lse = m_h + LN2 * l_h
        tl.store(parts_ptr + 2, lse * lse)
        tl.store(parts_ptr + 3, soft if UNIT_T else NAN)
        tl.store(parts_ptr + 4, 0.0)
        tl.store(parts_ptr + 5, 0.0)
        best_z = tl.min(tl.where(z == top, ids, 2147483647), 0)
        best_s = tl.minimum(best_z, tl.where(m_u == top, best_u, 2147483647))
        slot = tl.min(tl.where(logprobs == tl.max(logprobs, 0), slots, K), 0)
        best_t = tl.sum(tl.where(slots == slot, ids, 0), 0)
        tl.store(parts_ptr + 6, tl.where(best_s == best_t, 1.0, 0.0))
    if GRAD:
        _write_grad(
            s_ptr, g_ptr, bits_ptr, width, vocab, ids, inside, z, diff, tail_diff, m_u, l_u, m_h, l_h, label,
            scale * soft_scale * inv_t, scale * hard_weight, c, HARD, EXTRA, LANES, VEC, RAGGED,
        )  # fmt: skip


@triton.jit
def backward_kernel(
    student_ptr, grad_ptr, ids_ptr, logprobs_ptr, log_z_ptr, log_tail_ptr, labels_ptr, scale_ptr, bits_ptr, stats_ptr,
    rows, width, vocab, words, k, student_stride, grad_stride, temperature, inv_t, soft_scale, hard_weight,
    HARD: tl.constexpr, EXTRA: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    bits_ptr += tl.program_id(0).to(tl.int64) * words
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64)
        scale = tl.load(scale_ptr + row)
        s_ptr = student_ptr + at * student_stride
        g_ptr = grad_ptr + at * grad_stride
        if scale == 0:
            zero_row(g_ptr, width, LANES, VEC, RAGGED)
        else:
            slots = tl.arange(0, K)
            ids = tl.load(ids_ptr + at * k + slots, mask=slots < k, other=-1)
            logprobs = tl.load(logprobs_ptr + at * k + slots, mask=slots < k, other=-INF)
            inside = (ids >= 0) & (ids < vocab)
            tl.atomic_or(bits_ptr + ids // 32, 1 << (ids % 32), mask=inside)
            z = tl.load(s_ptr + ids, mask=inside, other=-INF).to(tl.float32)
            lse_u = tl.load(stats_ptr + at * 3)
            lse = tl.load(stats_ptr + at * 3 + 1)
            # -inf: nothing is unselected, or it is -inf throughout.
            m_u, l_u = split(tl.where(lse_u == -INF, 0.0, lse_u), temperature)
            m, l = split(lse, temperature)
            m_h = 0.0
            l_h = 0.0
            label = -1
            if HARD:
                m_h, l_h = split(tl.load(stats_ptr + at * 3 + 2), 1.0)
                label = tl.load(labels_ptr + at).to(tl.int32)
            _, diff, tail_diff = _buckets(
                logprobs, inside, tl.load(log_z_ptr + row), tl.load(log_tail_ptr + row),
                (z - m) * inv_t - LN2 * l, (lse_u - lse).to(tl.float32), inv_t,
            )  # fmt: skip
            tl.debug_barrier()
            _write_grad(
                s_ptr, g_ptr, bits_ptr, width, vocab, ids, inside, z, diff, tail_diff, m_u, l_u, m_h, l_h, label,
                scale * soft_scale * inv_t, scale * hard_weight, inv_t * LOG2E, HARD, EXTRA, LANES, VEC, RAGGED,
            )  # fmt: skip
            tl.debug_barrier()
            tl.store(bits_ptr + ids // 32, 0, mask=inside)
            tl.debug_barrier()


def _bitmaps(programs: int, vocab: int, device: torch.device) -> Tensor:
    """One cleared bit a column for every program; a program clears again what it set."""
    return torch.zeros(programs, triton.cdiv(vocab, 32), dtype=torch.int32, device=device)


def forward(
    student: Tensor,
    targets: Sequence[Tensor],
    labels: Tensor | None,
    scale: Tensor,
    options: RowOptions,
    vocab_size: int,
    need_parts: bool,
    grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    ids, logprobs, log_z, log_tail = targets
    rows, width = student.shape
    vocab = min(width, vocab_size)
    loss = torch.empty(rows, dtype=torch.float32, device=student.device)
    stats = torch.empty(rows, 3, dtype=torch.float64, device=student.device)
    parts = torch.empty((rows, len(PARTS)) if need_parts else 0, dtype=torch.float32, device=student.device)
    if rows == 0:
        return loss, stats, parts
    out = student if grad is None else grad
    size = tiles.launch_for(vocab, student, out, heavy=need_parts)
    programs = tiles.grid(rows, student.device, size.warps)
    bits = _bitmaps(programs[0], vocab, student.device)
    with tiles.on(student):
        forward_kernel[programs](
            student, out, ids.contiguous(), logprobs.contiguous(), log_z.contiguous(), log_tail.contiguous(),
            scale if labels is None else labels.contiguous(), scale.contiguous(), bits, loss, stats, parts,
            rows, width, vocab, bits.shape[1], ids.shape[1], student.stride(0), out.stride(0),
            options.temperature, 1 / options.temperature, options.soft_scale, options.hard_weight,
            UNIT_T=options.temperature == 1, LABELS=labels is not None,
            HARD=need_parts or options.hard_weight != 0,
            PARTS=need_parts, GRAD=grad is not None, EXTRA=width > vocab, K=triton.next_power_of_2(max(ids.shape[1], 1)),
            **size.shape, **size.options,
        )  # fmt: skip
    return loss, stats, parts


def backward(
    student: Tensor,
    targets: Sequence[Tensor],
    labels: Tensor | None,
    scale: Tensor,
    stats: Tensor,
    options: RowOptions,
    vocab_size: int,
    grad: Tensor,
) -> None:
    ids, logprobs, log_z, log_tail = targets
    rows, width = student.shape
    vocab = min(width, vocab_size)
    if rows == 0:
        return
    size = tiles.launch_for(vocab, student, grad)
    programs = tiles.grid(rows, student.device, size.warps)
    bits = _bitmaps(programs[0], vocab, student.device)
    with tiles.on(student):
        backward_kernel[programs](
            student, grad, ids.contiguous(), logprobs.contiguous(), log_z.contiguous(), log_tail.contiguous(),
            scale if labels is None else labels.contiguous(), scale.contiguous(), bits, stats,
            rows, width, vocab, bits.shape[1], ids.shape[1], student.stride(0), grad.stride(0),
            options.temperature, 1 / options.temperature, options.soft_scale, options.hard_weight,
            HARD=labels is not None and options.hard_weight != 0, EXTRA=width > vocab,
            K=triton.next_power_of_2(max(ids.shape[1], 1)), **size.shape, **size.options,
        )  # fmt: skip
