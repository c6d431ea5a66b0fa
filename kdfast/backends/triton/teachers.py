"""One distribution out of one or several teachers, a tile at a time.

Tiles, maxima and log2 sums of teachers go as tuples: as long as there are teachers when probabilities are mixed, of
length 1 when there is one teacher or logits are mixed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdfast.backends.triton.tiles import (
    INF,
    LN2,
    LOG2E,
    LOWEST,
    body_ptr,
    closed,
    load_head,
    summed,
    through_head,
    tile_columns,
)


@triton.jit
def appended(values, value):
    return values + (value,)  # noqa: RUF005  Triton knows no starred tuple


@triton.jit
def at_row(ptrs, strides, row, F: tl.constexpr):
    """Pointers to the same row of every teacher."""
    rows = (ptrs[0] + row * strides[0],)
    for k in tl.static_range(1, tl.constexpr(F.teachers)):
        rows = appended(rows, ptrs[k] + row * strides[k])
    return rows


@triton.jit
def as_one_tile(t, columns, common, o, F: tl.constexpr):
    """`teacher_tiles` of a single teacher's tile that is loaded already."""
    return (through_head(t, columns, common, o.teacher_cap, o.teacher_scale, tl.constexpr(F.teacher_head)),)


@triton.jit
def bodies(rows, lead, F: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr):
    """`tiles.body_ptr` of every teacher's row."""
    found = (body_ptr(rows[0], lead, VEC, RAGGED),)
    for k in tl.static_range(1, tl.constexpr(F.teachers)):
        found = appended(found, body_ptr(rows[k], lead, VEC, RAGGED))
    return found


@triton.jit
def _load(t_ptr, columns, common, o, F: tl.constexpr, policy: tl.constexpr):
    return load_head(t_ptr, columns, common, o.teacher_cap, o.teacher_scale, tl.constexpr(F.teacher_head), policy)


@triton.jit
def teacher_tiles(t_ptrs, columns, common, o, weights, F: tl.constexpr, policy: tl.constexpr):
    """What the softmaxes see of a tile: a tile for each distribution."""
    t = _load(t_ptrs[0], columns, common, o, F, policy)
    tiles = (t,)
    if F.mixed:
        for k in tl.static_range(1, tl.constexpr(F.teachers)):
            tiles = appended(tiles, _load(t_ptrs[k], columns, common, o, F, policy))
    elif F.teachers > 1:
        t = weights[0] * t
        for k in tl.static_range(1, tl.constexpr(F.teachers)):
            t += weights[k] * _load(t_ptrs[k], columns, common, o, F, policy)
        tiles = (t,)
    return tiles


@triton.jit
def _one_teacher(
    t_ptr, common, o, F: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """(maximum, log2 sum at T, log2 sum at 1) of one teacher over the common columns."""
    c = o.inv_t * LOG2E
    m = tl.full([LANES], LOWEST, tl.float32)
    a = tl.zeros([LANES], tl.float32)
    b = tl.zeros([LANES], tl.float32)
    for start in range(0, common, LANES * VEC):
        columns = tile_columns(start, LANES, VEC, RAGGED)
        t = _load(t_ptr, columns, common, o, F, "evict_last")
        m, a, b = summed(m, a, b, t, c, tl.constexpr(F.teacher_at_1), tl.constexpr(F.squared))
    top = tl.max(m, 0)
    l = closed(m, a, top, c)
    l_1 = l
    if F.teacher_at_1:
        l_1 = closed(m, b, top, LOG2E)
    return top, l, l_1


@triton.jit
def mixed_sums(t_ptrs, common, o, F: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr):
    """(maxima, log2 sums at T, log2 sums at 1), one of each for every teacher."""
    m, l, l_1 = _one_teacher(t_ptrs[0], common, o, F, LANES, VEC, RAGGED)
    tops = (m,)
    sums = (l,)
    sums_1 = (l_1,)
    for k in tl.static_range(1, tl.constexpr(F.teachers)):
        m, l, l_1 = _one_teacher(t_ptrs[k], common, o, F, LANES, VEC, RAGGED)
        tops = appended(tops, m)
        sums = appended(sums, l)
        sums_1 = appended(sums_1, l_1)
    return tops, sums, sums_1


@triton.jit
def log_pair(s, tiles, m_s, l_s, m_t, l_t, weights, inv_t, F: tl.constexpr, EXACT: tl.constexpr):
    """(log2 p, log2 q, log p - log q) of a tile or of one column, from maxima and log2 sums.

    EXACT: logits less their maximum are exact wherever that is not far above them, as those of halves are.
    """
    c = inv_t * LOG2E
    of_s = s - m_s
    log2_q = of_s * c - l_s
    # t - s first: near agreement it is exact, so d keeps its relative precision.
    if F.mixed:
        # Against an id that the student excludes the teachers are summed as against its best one.
        base = tl.where(s == -INF, m_s, s)
        d = _log_mean_exp(base, tiles, m_s, l_s, m_t, l_t, weights, inv_t, F)
        log2_p = d * LOG2E + ((base - m_s) * c - l_s)
        d = tl.where(s == -INF, INF, d)
    elif EXACT:
        of_t = tiles[0] - m_t[0]
        log2_p = of_t * c - l_t[0]
        d = (of_t - of_s) * inv_t - LN2 * (l_t[0] - l_s)
    else:
        log2_p = (tiles[0] - m_t[0]) * c - l_t[0]
        d = ((tiles[0] - s) - (m_t[0] - m_s)) * inv_t - LN2 * (l_t[0] - l_s)
    return log2_p, log2_q, d


@triton.jit
def _log_mean_exp(base, tiles, m_s, l_s, m_t, l_t, weights, inv_t, F: tl.constexpr):
    """log of the weighted mean of p over q, q that of `base`."""
    top = ((tiles[0] - base) - (m_t[0] - m_s)) * inv_t - LN2 * (l_t[0] - l_s)
    top = tl.where(top == -INF, LOWEST, top)
    total = weights[0] * tl.where(tiles[0] == -INF, 0.0, 1.0)
    for k in tl.static_range(1, tl.constexpr(F.teachers)):
        d = ((tiles[k] - base) - (m_t[k] - m_s)) * inv_t - LN2 * (l_t[k] - l_s)
        raised_to = tl.maximum(top, d)
        total = total * tl.exp2((top - raised_to) * LOG2E) + weights[k] * tl.exp2((d - raised_to) * LOG2E)
        top = raised_to
    return top + LN2 * tl.log2(total)


@triton.jit
def label_nll(t_ptrs, label, inside, m_t, l_t, o, weights, F: tl.constexpr):
    """-log p of the label at T = 1; inf where the teachers lack it."""
    column = tl.maximum(label, 0)
    tiles = teacher_tiles(t_ptrs, column, tl.where(inside, column + 1, 0), o, weights, F, "")
    log_p = (tiles[0] - m_t[0]) - LN2 * l_t[0]
    if F.mixed:
        log_p = _log_mean_exp(0.0, tiles, 0.0, 0.0, m_t, l_t, weights, 1.0, F)
    return -log_p


@triton.jit
def has_distribution(l_t, F: tl.constexpr):
    """False for a teacher that is -inf throughout, whose log2 sum is -inf, and for one that is NaN."""
    good = l_t[0] > -INF
    if F.mixed:
        for k in tl.static_range(1, tl.constexpr(F.teachers)):
            good = good & (l_t[k] > -INF)
    return good
