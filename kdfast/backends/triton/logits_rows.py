"""The kernels of `logits`: one program walks whole rows.

Forward: a pass for maxima and sums, then one backwards over the row (what was read last is still in L2) for the value
and, with forward KL, the gradient. The gradient of the other divergences needs the row's sum of h first, so it takes a
pass of its own, the same that the backward kernel makes. While a tile is worked on the next one is on its way. `F` are
the constants of `logits.Flags`, `o` the numbers of `logits.Scalars`, `lead` the columns before a row's body (see `tiles`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdfast.backends.triton.logits_tiles import NO_COLUMN, at_1_weights, gradient_tile, halves, load_student, value_tile
from kdfast.backends.triton.teachers import (
    appended,
    as_one_tile,
    at_row,
    bodies,
    has_distribution,
    label_nll,
    mixed_sums,
    teacher_tiles,
)
from kdfast.backends.triton.tiles import (
    INF,
    LN2,
    LOG2E,
    LOWEST,
    N_PARTS,
    PHASED,
    SCATTERED,
    body_ptr,
    body_width,
    closed,
    edge_columns,
    extra_grad,
    from_words,
    joined,
    lead_of,
    load_words,
    split,
    summed,
    through_head,
    tile_columns,
    with_extra,
    zero_outputs,
    zero_row,
)


@triton.jit
def load_label(label_ptr, width, F: tl.constexpr):
    """The label, -1 when there is none inside the vocabulary."""
    label = -1
    if F.labels:
        wide = tl.load(label_ptr)  # compared before it is narrowed, or a huge label would come back in range
        label = tl.where((wide >= 0) & (wide < width), wide, -1).to(tl.int32)
    return label


@triton.jit
def _sums(
    s_ptr, t_ptrs, lead, common, o, weights, F: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr
):  # fmt: skip
    """(maximum, log2 sum at T, log2 sum at 1, plain sum) of the student over the common columns, then the teachers'."""
    c = o.inv_t * LOG2E
    m_s = tl.full([LANES], LOWEST, tl.float32)
    m_t = m_s
    a_s = tl.zeros([LANES], tl.float32)
    b_s, a_t, b_t, plain = a_s, a_s, a_s, a_s
    body = body_width(lead, common, VEC, RAGGED)
    s_body = body_ptr(s_ptr, lead, VEC, RAGGED)
    t_body = bodies(t_ptrs, lead, F, VEC, RAGGED)
    if F.ahead:
        s_next = load_words(s_body, 0, body, "evict_last", LANES, VEC, RAGGED)
        t_next = load_words(t_body[0], 0, body, "evict_last", LANES, VEC, RAGGED)
    for start in range(0, body, LANES * VEC):
        columns = tile_columns(start, LANES, VEC, RAGGED == SCATTERED)
        if F.ahead:
            s_now, t_now = from_words(s_next, LANES, VEC), from_words(t_next, LANES, VEC)
            s = through_head(s_now, columns, body, o.student_cap, o.student_scale, tl.constexpr(F.student_head))
            t = as_one_tile(t_now, columns, body, o, F)[0]
            s_next = load_words(s_body, start + LANES * VEC, body, "evict_last", LANES, VEC, RAGGED)
            t_next = load_words(t_body[0], start + LANES * VEC, body, "evict_last", LANES, VEC, RAGGED)
        else:
            s = load_student(s_body, columns, body, o, F, "evict_last")
            if not F.mixed:
                t = teacher_tiles(t_body, columns, body, o, weights, F, "evict_last")[0]
        if F.smooth:
            plain += tl.sum(tl.where(columns < body, s, 0.0), 1)
        m_s, a_s, b_s = summed(m_s, a_s, b_s, s, c, tl.constexpr(F.student_at_1), tl.constexpr(F.squared))
        if not F.mixed:
            m_t, a_t, b_t = summed(m_t, a_t, b_t, t, c, tl.constexpr(F.teacher_at_1), tl.constexpr(F.squared))
    if RAGGED == PHASED:
        columns = edge_columns(lead, body, LANES)
        s = load_student(s_ptr, columns, common, o, F, "evict_last")
        if F.smooth:
            plain += tl.sum(tl.where(columns < common, s, 0.0), 1)
        m_s, a_s, b_s = summed(m_s, a_s, b_s, s, c, tl.constexpr(F.student_at_1), tl.constexpr(F.squared))
        if not F.mixed:
            t = teacher_tiles(t_ptrs, columns, common, o, weights, F, "evict_last")[0]
            m_t, a_t, b_t = summed(m_t, a_t, b_t, t, c, tl.constexpr(F.teacher_at_1), tl.constexpr(F.squared))
    top_s = tl.max(m_s, 0)
    l_s = closed(m_s, a_s, top_s, c)
    l_s1 = l_s
    if F.student_at_1:
        l_s1 = closed(m_s, b_s, top_s, LOG2E)
    if F.mixed:
        tops, sums, sums_1 = mixed_sums(t_ptrs, common, o, F, LANES, VEC, RAGGED)
    else:
        top_t = tl.max(m_t, 0)
        l_t = closed(m_t, a_t, top_t, c)
        l_t1 = l_t
        if F.teacher_at_1:
            l_t1 = closed(m_t, b_t, top_t, LOG2E)
        tops = (top_t,)
        sums = (l_t,)
        sums_1 = (l_t1,)
    return top_s, l_s, l_s1, tl.sum(plain, 0), tops, sums, sums_1


@triton.jit
def weights_at_1(scale, lse, width, o, F: tl.constexpr):
    """What `grad_at_1` multiplies: q, the label's column, every column."""
    of_q = scale * o.hard_weight
    if not F.hard:
        of_q = of_q * 0
    of_label = of_q
    flat = 0.0
    if F.smooth:
        of_label = of_q * (1 - o.smoothing)
        flat = of_q * o.smoothing / width
    if F.z:
        of_q += scale * (2 * o.z_loss * lse)
    return (of_q, of_label, flat)


@triton.jit
def weighted_soft(soft, o, F: tl.constexpr):
    """The soft term; without weight none even if it is infinite, but the NaN of a bad row stays."""
    return o.soft_scale * soft if F.soft else tl.where(soft == soft, 0.0, soft)


@triton.jit
def _gradient_row(
    s_ptr, t_ptrs, g_ptr, label, scale, lead, width, common, o, weights, m_s, l_s, m_h, l_h, h_sum, m_t, l_t,
    F: tl.constexpr, EXACT: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    soft_weight = scale * o.soft_scale * o.inv_t
    weights_1 = weights_at_1(scale, m_h + LN2 * l_h, width, o, F)
    at_1 = at_1_weights(weights_1, m_s, l_s, m_h, l_h, F)
    body = body_width(lead, common, VEC, RAGGED)
    s_body = body_ptr(s_ptr, lead, VEC, RAGGED)
    t_body = bodies(t_ptrs, lead, F, VEC, RAGGED)
    g_body = body_ptr(g_ptr, lead, VEC, RAGGED)
    for start in range(0, body, LANES * VEC):
        columns = tile_columns(start, LANES, VEC, RAGGED == SCATTERED)
        s = load_student(s_body, columns, body, o, F, "evict_first")
        tiles = teacher_tiles(t_body, columns, body, o, weights, F, "evict_first")
        gradient_tile(
            g_body, s, tiles, start, columns, body, label - lead, m_s, l_s, m_h, l_h, h_sum, m_t, l_t, soft_weight, at_1, o,
            weights, F, EXACT, LANES * VEC,
        )  # fmt: skip
    if RAGGED == PHASED:
        columns = edge_columns(lead, body, LANES)
        s = load_student(s_ptr, columns, common, o, F, "evict_first")
        tiles = teacher_tiles(t_ptrs, columns, common, o, weights, F, "evict_first")
        gradient_tile(
            g_ptr, s, tiles, 0, columns, common, label, m_s, l_s, m_h, l_h, h_sum, m_t, l_t, soft_weight, at_1, o,
            weights, F, EXACT, 0,
        )  # fmt: skip
    if F.extra:
        grad_beyond(s_ptr, g_ptr, common, width, label, m_h, l_h, weights_1, o, F, LANES, VEC, RAGGED)


@triton.jit
def grad_beyond(
    s_ptr, g_ptr, common, width, label, m_h, l_h, weights_1, o,
    F: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    extra_grad(
        s_ptr, g_ptr, common, width, label, m_h, l_h, weights_1, o.student_cap, o.student_scale,
        tl.constexpr(F.grad_at_1), tl.constexpr(F.smooth), tl.constexpr(F.student_head), LANES, VEC, RAGGED,
    )  # fmt: skip


@triton.jit
def forward_kernel(
    student_ptr, teacher_ptrs, grad_ptr, labels_ptr, scale_ptr, loss_ptr, stats_ptr, parts_ptr,
    rows, width, common, student_stride, teacher_strides, grad_stride, o, weights,
    F: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64)
        scale = tl.load(scale_ptr + row)
        stats_at = stats_ptr + at * F.stats
        if scale == 0:
            zero_outputs(loss_ptr + at, stats_at, parts_ptr + at * N_PARTS, tl.constexpr(F.stats), tl.constexpr(F.parts))
            if F.grad:
                zero_row(grad_ptr + at * grad_stride, width, LANES, VEC, RAGGED)
        else:
            _forward_row(
                student_ptr + at * student_stride, at_row(teacher_ptrs, teacher_strides, at, F), grad_ptr + at * grad_stride,
                lead_of(at * student_stride, common, VEC, RAGGED), labels_ptr + at, loss_ptr + at, stats_at,
                parts_ptr + at * N_PARTS, scale, width, common, o, weights, F, LANES, VEC, RAGGED,
            )  # fmt: skip


@triton.jit
def _forward_row(
    s_ptr, t_ptrs, g_ptr, lead, label_ptr, loss_ptr, stats_ptr, parts_ptr, scale, width, common, o, weights,
    F: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = halves(s_ptr, t_ptrs[0], F)
    label = load_label(label_ptr, width, F)
    inside = label >= 0
    # Read before the second pass, whose gradient may take the place of the student.
    s_label = load_student(s_ptr, tl.maximum(label, 0), tl.where(inside, width, 0), o, F, "")
    m_s, l_s, l_s1, plain, m_t, l_t, l_t1 = _sums(s_ptr, t_ptrs, lead, common, o, weights, F, LANES, VEC, RAGGED)
    m_h = m_s
    l_h = l_s1
    if F.extra_at_1:
        m_h, l_h, rest = with_extra(
            s_ptr, common, width, m_s, l_s1, o.student_cap, o.student_scale, tl.constexpr(F.student_head), LANES, VEC, RAGGED
        )
        plain += rest
    lse = m_h + LN2 * l_h

    soft, h_sum, kl_1, entropy, student_entropy, agree = _value_pass(
        s_ptr, t_ptrs, g_ptr, label, scale, lead, width, common, o, weights, m_s, l_s, l_s1, m_h, l_h, m_t, l_t, l_t1,
        F, EXACT, LANES, VEC, RAGGED,
    )  # fmt: skip
    if F.own_gradient_pass:
        _gradient_row(
            s_ptr, t_ptrs, g_ptr, label, scale, lead, width, common, o, weights, m_s, l_s, m_h, l_h, h_sum, m_t, l_t,
            F, EXACT, LANES, VEC, RAGGED,
        )  # fmt: skip
    _store_stats(stats_ptr, m_s, l_s, m_h, l_h, h_sum, m_t, l_t, o, F)

    # A row that is -inf throughout has no distribution.
    soft = tl.where((l_s > -INF) & has_distribution(l_t, F), soft, float("nan"))
    loss = weighted_soft(soft, o, F)
    nll = lse - s_label
    if F.hard:
        hard = nll
        if F.smooth:
            hard = (1 - o.smoothing) * nll + o.smoothing * (lse - plain / width)
        loss += o.hard_weight * hard
    if F.labels:
        loss = tl.where(inside, loss, float("nan"))
    if F.z:
        loss += o.z_loss * lse * lse
    tl.store(loss_ptr, scale * loss)
    if F.parts:
        tl.store(parts_ptr, soft)
        tl.store(parts_ptr + 1, tl.where(inside, nll, float("nan")) if F.labels else 0.0)
        tl.store(parts_ptr + 2, lse * lse)
        tl.store(parts_ptr + 3, kl_1 if F.own_kl_at_1 else soft)
        teacher_nll = 0.0
        if F.labels:
            teacher_nll = label_nll(t_ptrs, label, inside & (label < common), m_t, l_t1, o, weights, F)
        tl.store(parts_ptr + 4, teacher_nll)
        tl.store(parts_ptr + 5, entropy)
        tl.store(parts_ptr + 6, agree)
        tl.store(parts_ptr + 7, student_entropy)


@triton.jit
def _value_pass(
    s_ptr, t_ptrs, g_ptr, label, scale, lead, width, common, o, weights, m_s, l_s, l_s1, m_h, l_h, m_t, l_t, l_t1,
    F: tl.constexpr, EXACT: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """(divergence, sum of h, KL at 1, teacher's and student's entropy, whether the argmaxes agree); writes the gradient of
    forward KL."""
    soft_weight = scale * o.soft_scale * o.inv_t
    weights_1 = weights_at_1(scale, m_h + LN2 * l_h, width, o, F)
    at_1 = at_1_weights(weights_1, m_s, l_s, m_h, l_h, F)
    zeros = tl.zeros([LANES], tl.float32)
    none = tl.full([LANES], NO_COLUMN, tl.int32)
    # Divergence, sum of h, KL at 1, both entropies; first columns of the maxima, the teachers' largest log2 p.
    sums = (zeros, zeros, zeros, zeros, zeros)
    best = (none, none, tl.full([LANES], -INF, tl.float32))
    body = body_width(lead, common, VEC, RAGGED)
    s_body = body_ptr(s_ptr, lead, VEC, RAGGED)
    t_body = bodies(t_ptrs, lead, F, VEC, RAGGED)
    g_body = body_ptr(g_ptr, lead, VEC, RAGGED)
    if RAGGED == PHASED:
        edge = edge_columns(lead, body, LANES)
        s_edge = load_student(s_ptr, edge, common, o, F, "evict_first")
        t_edge = teacher_tiles(t_ptrs, edge, common, o, weights, F, "evict_first")
        sums, best = value_tile(
            sums, best, g_ptr, s_edge, t_edge, 0, edge, common, 0, label, m_s, l_s, l_s1, m_h, l_h, m_t, l_t, l_t1,
            soft_weight, at_1, o, weights, F, EXACT, 0,
        )  # fmt: skip
    last = tl.maximum(tl.cdiv(body, LANES * VEC) - 1, 0) * (LANES * VEC)
    if F.ahead:
        s_next = load_words(s_body, last, body, "evict_first", LANES, VEC, RAGGED)
        t_next = load_words(t_body[0], last, body, "evict_first", LANES, VEC, RAGGED)
    for before in range(0, body, LANES * VEC):
        start = last - before
        columns = tile_columns(start, LANES, VEC, RAGGED == SCATTERED)
        if F.ahead:
            s_now, t_now = from_words(s_next, LANES, VEC), from_words(t_next, LANES, VEC)
            s = through_head(s_now, columns, body, o.student_cap, o.student_scale, tl.constexpr(F.student_head))
            tiles = as_one_tile(t_now, columns, body, o, F)
            end = tl.where(start > 0, body, 0)  # before the first tile there is nothing
            following = tl.maximum(start - LANES * VEC, 0)
            s_next = load_words(s_body, following, end, "evict_first", LANES, VEC, RAGGED)
            t_next = load_words(t_body[0], following, end, "evict_first", LANES, VEC, RAGGED)
        else:
            s = load_student(s_body, columns, body, o, F, "evict_first")
            tiles = teacher_tiles(t_body, columns, body, o, weights, F, "evict_first")
        sums, best = value_tile(
            sums, best, g_body, s, tiles, start, columns, body, lead, label - lead, m_s, l_s, l_s1, m_h, l_h, m_t, l_t, l_t1,
            soft_weight, at_1, o, weights, F, EXACT, LANES * VEC,
        )  # fmt: skip
    best_s, best_t, top_t = best
    if F.teachers > 1:
        best_t = tl.where(top_t == tl.max(top_t, 0), best_t, NO_COLUMN)
    agree = tl.where(tl.min(best_s, 0) == tl.min(best_t, 0), 1.0, 0.0)
    if F.extra_in_value_pass:
        grad_beyond(s_ptr, g_ptr, common, width, label, m_h, l_h, weights_1, o, F, LANES, VEC, RAGGED)
    return tl.sum(sums[0], 0), tl.sum(sums[1], 0), tl.sum(sums[2], 0), tl.sum(sums[3], 0), tl.sum(sums[4], 0), agree


@triton.jit
def _store_stats(stats_ptr, m_s, l_s, m_h, l_h, h_sum, m_t, l_t, o, F: tl.constexpr):
    """Log-sum-exps of the student at T and at 1, sum of h, log-sum-exps of the teachers; NaN where nothing needs it."""
    tl.store(stats_ptr, joined(m_s, l_s, o.temperature))
    tl.store(stats_ptr + 1, joined(m_h, l_h, 1.0) if F.at_1 else float("nan"))
    tl.store(stats_ptr + 2, h_sum)
    for k in tl.static_range(tl.constexpr(F.teachers)):
        if k == 0 or F.mixed:
            tl.store(stats_ptr + 3 + k, joined(m_t[k], l_t[k], o.temperature))
        else:
            tl.store(stats_ptr + 3 + k, float("nan"))


@triton.jit
def backward_kernel(
    student_ptr, teacher_ptrs, grad_ptr, labels_ptr, scale_ptr, stats_ptr,
    rows, width, common, student_stride, teacher_strides, grad_stride, o, weights,
    F: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64)
        scale = tl.load(scale_ptr + row)
        g_ptr = grad_ptr + at * grad_stride
        if scale == 0:
            zero_row(g_ptr, width, LANES, VEC, RAGGED)
        else:
            stats_at = stats_ptr + at * F.stats
            m_s, l_s = split(tl.load(stats_at), o.temperature)
            m_h = 0.0
            l_h = 0.0
            if F.at_1:
                m_h, l_h = split(tl.load(stats_at + 1), 1.0)
            m, l = split(tl.load(stats_at + 3), o.temperature)
            m_t = (m,)
            l_t = (l,)
            if F.mixed:
                for k in tl.static_range(1, tl.constexpr(F.teachers)):
                    m, l = split(tl.load(stats_at + 3 + k), o.temperature)
                    m_t = appended(m_t, m)
                    l_t = appended(l_t, l)
            _gradient_row(
                student_ptr + at * student_stride, at_row(teacher_ptrs, teacher_strides, at, F), g_ptr,
                load_label(labels_ptr + at, width, F), scale, lead_of(at * student_stride, common, VEC, RAGGED),
                width, common, o, weights, m_s, l_s, m_h, l_h, tl.load(stats_at + 2).to(tl.float32), m_t, l_t,
                F, halves(student_ptr, teacher_ptrs[0], F), LANES, VEC, RAGGED,
            )  # fmt: skip
