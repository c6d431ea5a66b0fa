"""The kernels of the loss from sparse targets: one program walks whole rows.

On the columns that stand in no slot the soft term's gradient is one factor times the student's softmax, or with an even tail
(`F.spread`) that of a constant teacher; those that do are worked on by themselves, and written last. `F` are the constants of
`topk.Flags`, `o` the numbers of `logits.Scalars`, `weights` one for each target.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdfast.backends.triton.divergence import FORWARD_KL, divergence
from kdfast.backends.triton.logits_rows import grad_beyond, load_label, weighted_soft, weights_at_1
from kdfast.backends.triton.logits_tiles import NO_COLUMN, load_student
from kdfast.backends.triton.tiles import (
    INF,
    LN2,
    LOG2E,
    N_PARTS,
    back_through_head,
    from_words,
    grad_at_1,
    joined,
    load_words,
    split,
    through_head,
    tile_columns,
    with_extra,
    zero_outputs,
    zero_row,
)
from kdfast.backends.triton.topk_entries import all_targets, mark, marked, rest_sums, unmark


@triton.jit
def _even_tile(x, here, top, l, evens, masses, o, F: tl.constexpr):
    """(terms, h, q) of a tile whose columns `here` have an even teacher."""
    log2_q = (x - top) * (o.inv_t * LOG2E) - l
    q = tl.where(here, tl.exp2(log2_q), 0.0)
    terms = tl.zeros_like(x)
    h = tl.zeros_like(x)
    for m in tl.static_range(tl.constexpr(F.teachers)):
        log2_p = tl.zeros_like(x) + evens[m] * LOG2E
        term, slope = divergence(
            tl.exp2(log2_p), q, log2_p, log2_q, evens[m] - LN2 * log2_q, o.a, o.b, tl.constexpr(F.kind)
        )  # fmt: skip
        terms += tl.where(here, masses[m] * term, 0.0)
        h += tl.where(here, masses[m] * slope, 0.0)
    return terms, h, q


@triton.jit
def _even_sums(
    s_ptr, bits_ptr, vocab, top, l, evens, masses, o,
    F: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """(value, sum of h) of the unmarked columns."""
    value = tl.zeros([LANES], tl.float32)
    h_sum = tl.zeros([LANES], tl.float32)
    for start in range(0, vocab, LANES * VEC):
        columns = tile_columns(start, LANES, VEC, RAGGED)
        x = load_student(s_ptr, columns, vocab, o, F, "evict_last")
        here = (columns < vocab) & (marked(bits_ptr, start, columns, vocab, LANES, VEC, RAGGED) == 0)
        even = _even_tile(x, here, top, l, evens, masses, o, F)
        value += tl.sum(even[0], 1)
        h_sum += tl.sum(even[1], 1)
    return tl.sum(value, 0), tl.sum(h_sum, 0)


@triton.jit
def _write_grad(
    s_ptr, g_ptr, bits_ptr, width, vocab, ids, first, z, told, scale, label, top, l, m_u, l_u, m_h, l_h, h_sum, o,
    F: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """The gradient of a row; `told` is what `all_targets` found, `z` the student's logits there, read before any write."""
    h = told[1]
    rest = told[3]
    q = told[4]
    soft_weight = scale * o.soft_scale * o.inv_t
    weights_1 = weights_at_1(scale, m_h + LN2 * l_h, width, o, F)
    TILE: tl.constexpr = LANES * VEC
    c = o.inv_t * LOG2E
    if F.kind == FORWARD_KL:
        h_sum = h_sum * 0.0
    share = tl.where(l_u == -INF, 0.0, tl.exp2((m_u - top) * c + (l_u - l)))  # of the unmarked columns in the softmax
    rest = soft_weight * (rest - share * h_sum) if F.soft else 0.0
    l_u = tl.where(l_u == -INF, 0.0, l_u)  # nothing is unmarked, or it is -inf throughout
    # At T = 2 the softmax at 1 is the square of e below, times this.
    of_square = weights_1[0] * tl.exp2((m_u - m_h) * LOG2E + (2 * l_u - l_h))
    last = (tl.cdiv(vocab, TILE) - 1) * TILE
    if F.ahead:
        following = load_words(s_ptr, last, vocab, "evict_first", LANES, VEC, RAGGED)
    for before in range(0, vocab, TILE):
        start = last - before
        columns = tile_columns(start, LANES, VEC, RAGGED)
        if F.ahead:
            x = from_words(following, LANES, VEC)
            x = through_head(x, columns, vocab, o.student_cap, o.student_scale, tl.constexpr(F.student_head))
            end = tl.where(start > 0, vocab, 0)  # before the first tile there is nothing
            following = load_words(s_ptr, tl.maximum(start - TILE, 0), end, "evict_first", LANES, VEC, RAGGED)
        else:
            x = load_student(s_ptr, columns, vocab, o, F, "evict_first")
        taken = marked(bits_ptr, start, columns, vocab, LANES, VEC, RAGGED)
        if F.spread and F.soft:
            even = _even_tile(x, (columns < vocab) & (taken == 0), top, l, told[5], told[6], o, F)
            g = soft_weight * (even[1] - even[2] * h_sum)
        elif F.soft == 0:
            g = tl.zeros_like(x)
        else:
            e = tl.exp2((x - m_u) * c - l_u)
            g = tl.where(taken, 0.0, rest * e)
        if F.grad_at_1:
            if F.squared and F.soft and not F.spread:
                g += of_square * (e * e)
            else:
                g += weights_1[0] * tl.exp2((x - m_h) * LOG2E - l_h)
            if F.smooth:
                g -= weights_1[2]
            if (label >= start) & (label < start + TILE):
                g -= tl.where(columns == label, weights_1[1], 0.0)
        g = back_through_head(g, x, o.student_cap, o.student_scale, tl.constexpr(F.student_head))
        tl.store(g_ptr + columns, g.to(g_ptr.dtype.element_ty), mask=columns < vocab, eviction_policy="evict_first")
    if F.extra:
        grad_beyond(s_ptr, g_ptr, vocab, width, label, m_h, l_h, weights_1, o, F, LANES, VEC, RAGGED)
    g = tl.zeros_like(z)
    if F.soft:
        g = soft_weight * (h - q * h_sum)
    if F.grad_at_1:
        g += grad_at_1(tl.exp2((z - m_h) * LOG2E - l_h), ids, label, weights_1, tl.constexpr(F.smooth))
    g = back_through_head(g, z, o.student_cap, o.student_scale, tl.constexpr(F.student_head))
    tl.debug_barrier()  # the tiles' stores to these columns come first
    tl.store(g_ptr + ids, g.to(g_ptr.dtype.element_ty), mask=first)


@triton.jit
def forward_kernel(
    student_ptr, grad_ptr, ids_ptr, log_p_ptr, log_tail_ptr, mass_ptr, labels_ptr, scale_ptr, bits_ptr,
    loss_ptr, stats_ptr, parts_ptr, rows, width, vocab, words, k, student_stride, grad_stride, o, weights,
    F: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    bits_ptr += tl.program_id(0).to(tl.int64) * words
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64)
        scale = tl.load(scale_ptr + row)
        if scale == 0:
            zero_outputs(loss_ptr + at, stats_ptr + at * 4, parts_ptr + at * N_PARTS, 4, tl.constexpr(F.parts))
            if F.grad:
                zero_row(grad_ptr + at * grad_stride, width, LANES, VEC, RAGGED)
        else:
            ids, inside, first = mark(bits_ptr, ids_ptr + at * k, k, vocab, K)
            _forward_row(
                student_ptr + at * student_stride, grad_ptr + at * grad_stride, ids_ptr + at * k,
                log_p_ptr + at * F.teachers * k, log_tail_ptr + at * F.teachers, mass_ptr + at * F.teachers, bits_ptr,
                labels_ptr + at, loss_ptr + at, stats_ptr + at * 4, parts_ptr + at * N_PARTS,
                ids, inside, first, k, scale, width, vocab, o, weights, F, K, LANES, VEC, RAGGED,
            )  # fmt: skip
            unmark(bits_ptr, ids, inside)


@triton.jit
def _forward_row(
    s_ptr, g_ptr, ids_ptr, log_p_ptr, tail_ptr, mass_ptr, bits_ptr, label_ptr, loss_ptr, stats_ptr, parts_ptr,
    ids, inside, first, k, scale, width, vocab, o, weights,
    F: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    c = o.inv_t * LOG2E
    label = load_label(label_ptr, width, F)
    s_label = load_student(s_ptr, tl.maximum(label, 0), tl.where(label >= 0, width, 0), o, F, "")
    z = load_student(s_ptr, tl.where(first, ids, vocab), vocab, o, F, "")

    m_u, l_u, l_u1, best_u, above_u, plain = rest_sums(s_ptr, bits_ptr, vocab, o, F, LANES, VEC, RAGGED)
    top = tl.maximum(m_u, tl.max(z, 0))
    l = tl.log2(tl.exp2((m_u - top) * c + l_u) + tl.sum(tl.exp2((z - top) * c), 0))
    m_h = top
    l_h = l
    if F.student_at_1:
        l_h = tl.log2(tl.exp2((m_u - top) * LOG2E + l_u1) + tl.sum(tl.exp2((z - top) * LOG2E), 0))
    if F.parts:
        far = z - top
        above = tl.sum(tl.where(far == -INF, 0.0, tl.exp2(far * LOG2E) * far), 0)
        sum_u = tl.exp2(l_u1)
        above += tl.exp2((m_u - top) * LOG2E) * (above_u + tl.where(sum_u == 0, 0.0, m_u - top) * sum_u)
        tl.store(parts_ptr + 7, l_h * LN2 - above / tl.exp2(l_h))
    if F.extra_at_1:
        m_h, l_h, more = with_extra(
            s_ptr, vocab, width, top, l_h, o.student_cap, o.student_scale, tl.constexpr(F.student_head), LANES, VEC, RAGGED
        )
        plain += more
    log_q_out = (m_u - top) * o.inv_t + LN2 * (l_u - l)
    told = all_targets(
        ids_ptr, log_p_ptr, tail_ptr, mass_ptr, ids, inside, first, k, (z - top) * o.inv_t - LN2 * l, log_q_out, vocab, o,
        weights, F, K,
    )  # fmt: skip
    soft = told[0]
    h_sum = told[2]
    if F.parts:
        best_z = tl.min(tl.where(first & (z == top), ids, NO_COLUMN), 0)
        best_s = tl.minimum(best_z, tl.where(m_u == top, best_u, NO_COLUMN))
        mean_p = tl.where(first, told[7], -1.0)
        best_t = tl.min(tl.where(mean_p == tl.max(mean_p, 0), ids, NO_COLUMN), 0)
        tl.store(parts_ptr + 6, tl.where(best_s == best_t, 1.0, 0.0))
    if F.spread:
        value, more = _even_sums(s_ptr, bits_ptr, vocab, top, l, told[5], told[6], o, F, LANES, VEC, RAGGED)
        soft += value
        h_sum += more
    tl.store(stats_ptr, joined(m_u, l_u, o.temperature))
    tl.store(stats_ptr + 1, joined(top, l, o.temperature))
    tl.store(stats_ptr + 2, joined(m_h, l_h, 1.0) if F.at_1 else float("nan"))
    tl.store(stats_ptr + 3, h_sum)

    # A student that is -inf throughout has no distribution; an id outside the vocabulary names no column.
    soft = tl.where((l > -INF) & (tl.max(ids, 0) < vocab), soft, float("nan"))
    loss = weighted_soft(soft, o, F)
    lse = m_h + LN2 * l_h
    nll = lse - s_label
    if F.hard:
        hard = nll
        if F.smooth:
            hard = (1 - o.smoothing) * nll + o.smoothing * (lse - plain / width)
        loss += o.hard_weight * hard
    if F.labels:
        loss = tl.where(label >= 0, loss, float("nan"))
    if F.z:
        loss += o.z_loss * lse * lse
    tl.store(loss_ptr, scale * loss)
    if F.parts:
        tl.store(parts_ptr, soft)
        tl.store(parts_ptr + 1, tl.where(label >= 0, nll, float("nan")) if F.labels else 0.0)
        tl.store(parts_ptr + 2, lse * lse)
        tl.store(parts_ptr + 3, float("nan") if F.own_kl_at_1 else soft)
        tl.store(parts_ptr + 4, 0.0)
        tl.store(parts_ptr + 5, 0.0)
    if F.grad:
        _write_grad(
            s_ptr, g_ptr, bits_ptr, width, vocab, ids, first, z, told, scale, label, top, l, m_u, l_u, m_h, l_h, h_sum, o,
            F, LANES, VEC, RAGGED,
        )  # fmt: skip


@triton.jit
def backward_kernel(
    student_ptr, grad_ptr, ids_ptr, log_p_ptr, log_tail_ptr, mass_ptr, labels_ptr, scale_ptr, bits_ptr, stats_ptr,
    rows, width, vocab, words, k, student_stride, grad_stride, o, weights,
    F: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr,
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
            ids, inside, first = mark(bits_ptr, ids_ptr + at * k, k, vocab, K)
            z = load_student(s_ptr, tl.where(first, ids, vocab), vocab, o, F, "")
            lse_u = tl.load(stats_ptr + at * 4)
            lse = tl.load(stats_ptr + at * 4 + 1)
            m_u, l_u = split(tl.where(lse_u == -INF, 0.0, lse_u), o.temperature)
            l_u = tl.where(lse_u == -INF, -INF, l_u)
            top, l = split(lse, o.temperature)
            m_h = 0.0
            l_h = 0.0
            if F.at_1:
                m_h, l_h = split(tl.load(stats_ptr + at * 4 + 2), 1.0)
            told = all_targets(
                ids_ptr + at * k, log_p_ptr + at * F.teachers * k, log_tail_ptr + at * F.teachers, mass_ptr + at * F.teachers,
                ids, inside, first, k, (z - top) * o.inv_t - LN2 * l, (lse_u - lse).to(tl.float32), vocab, o, weights, F, K,
            )  # fmt: skip
            tl.debug_barrier()
            _write_grad(
                s_ptr, g_ptr, bits_ptr, width, vocab, ids, first, z, told, scale, load_label(labels_ptr + at, width, F),
                top, l, m_u, l_u, m_h, l_h, tl.load(stats_ptr + at * 4 + 3).to(tl.float32), o, F, LANES, VEC, RAGGED,
            )  # fmt: skip
            unmark(bits_ptr, ids, inside)
