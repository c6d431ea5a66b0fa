"""The ids that stand in a row's slots: marked in a bitmap, summed around, and compared with the student by themselves.

A bitmap of one bit a column tells any other column without comparing it with k ids. An id that is listed twice counts with the
sum of its probabilities; an id of log-probability -inf is not an entry of that target and belongs to its tail.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdfast import options
from kdfast.backends.triton.divergence import divergence
from kdfast.backends.triton.logits_tiles import NO_COLUMN
from kdfast.backends.triton.teachers import appended
from kdfast.backends.triton.tiles import (
    INF,
    LN2,
    LOG2E,
    LOWEST,
    closed,
    from_words,
    load_words,
    summed,
    through_head,
    tile_columns,
)

MASS_ERROR = tl.constexpr(options.MASS_ERROR)


@triton.jit
def marked(bits_ptr, start, columns, width, LANES: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr):
    """Which columns of a tile are marked; `.cg` reads from L2, where the atomics that set the bits took place."""
    if RAGGED:
        words = tl.load(bits_ptr + columns // 32, mask=columns < width, other=0, cache_modifier=".cg")
        bits = (words >> (columns % 32)) & 1
    else:
        first = start + tl.arange(0, LANES) * VEC  # VEC neighbours share a word
        words = tl.load(bits_ptr + first // 32, mask=first < width, other=0, cache_modifier=".cg") >> (first % 32)
        bits = words[:, None] & (1 << tl.arange(0, VEC))[None, :]
    return bits != 0


@triton.jit
def mark(bits_ptr, ids_ptr, k, vocab, K: tl.constexpr):
    """(ids, which are inside the vocabulary, which of those stand there for the first time) of a row, now marked."""
    slots = tl.arange(0, K)
    ids = tl.load(ids_ptr + slots, mask=slots < k, other=-1)
    inside = (ids >= 0) & (ids < vocab)
    before = tl.atomic_or(bits_ptr + ids // 32, 1 << (ids % 32), mask=inside)
    tl.debug_barrier()
    first = inside & (((before >> (ids % 32)) & 1) == 0)
    if tl.sum((inside & (first == 0)).to(tl.int32), 0) > 0:
        # Which slot of a repeated id was first to the bit is a race, and sums over slots would differ from run to run.
        first = inside
        for j in range(0, k - 1):
            first = first & ((slots <= j) | (ids != tl.load(ids_ptr + j)))
    return ids, inside, first


@triton.jit
def unmark(bits_ptr, ids, inside):
    tl.debug_barrier()
    tl.store(bits_ptr + ids // 32, 0, mask=inside)
    tl.debug_barrier()


@triton.jit
def rest_sums(
    s_ptr, bits_ptr, vocab, o, F: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr
):  # fmt: skip
    """(maximum, log2 sum at T, log2 sum at 1, first column of the maximum, sum at 1 of x - maximum) of the unmarked columns,
    plain sum of all."""
    c = o.inv_t * LOG2E
    m = tl.full([LANES], LOWEST, tl.float32)
    a = tl.zeros([LANES], tl.float32)
    b = tl.zeros([LANES], tl.float32)
    above = tl.zeros([LANES], tl.float32)
    plain = tl.zeros([LANES], tl.float32)
    best = tl.full([LANES], NO_COLUMN, tl.int32)
    following = load_words(s_ptr, 0, vocab, "evict_last", LANES, VEC, RAGGED)
    for start in range(0, vocab, LANES * VEC):
        columns = tile_columns(start, LANES, VEC, RAGGED)
        x = from_words(following, LANES, VEC)
        x = through_head(x, columns, vocab, o.student_cap, o.student_scale, tl.constexpr(F.student_head))
        following = load_words(s_ptr, start + LANES * VEC, vocab, "evict_last", LANES, VEC, RAGGED)
        if F.smooth:
            plain += tl.sum(tl.where(columns < vocab, x, 0.0), 1)
        x = tl.where(marked(bits_ptr, start, columns, vocab, LANES, VEC, RAGGED), -INF, x)
        if F.parts:
            m_new = tl.maximum(m, tl.max(x, 1))
            before = b if F.student_at_1 else a
            far = x - m_new[:, None]
            above = tl.exp2((m - m_new) * LOG2E) * (above + tl.where(before == 0, 0.0, m - m_new) * before)
            above += tl.sum(tl.where(far == -INF, 0.0, tl.exp2(far * LOG2E) * far), 1)
            here = tl.min(tl.where(x == m_new[:, None], columns, NO_COLUMN), 1)
            best = tl.where(m_new > m, here, best)
        m, a, b = summed(m, a, b, x, c, tl.constexpr(F.student_at_1), tl.constexpr(F.squared))
    top = tl.max(m, 0)
    l = closed(m, a, top, c)
    l_1 = l
    if F.student_at_1:
        l_1 = closed(m, b, top, LOG2E)
    if F.parts:
        sums = b if F.student_at_1 else a
        above = tl.exp2((m - top) * LOG2E) * (above + tl.where(sums == 0, 0.0, m - top) * sums)
    return top, l, l_1, tl.min(tl.where(m == top, best, NO_COLUMN), 0), tl.sum(above, 0), tl.sum(plain, 0)


@triton.jit
def _log_p(ids_ptr, log_p_ptr, ids, first, repeated, k, K: tl.constexpr):
    """A target's log-probabilities where ids stand for the first time; those of repeated ids added up."""
    log_p = tl.load(log_p_ptr + tl.arange(0, K), mask=first, other=-INF)
    if repeated:
        p = tl.zeros([K], tl.float32)
        for j in range(0, k):
            p += tl.where(ids == tl.load(ids_ptr + j), tl.exp2(tl.load(log_p_ptr + j) * LOG2E), 0.0)
        log_p = tl.where(first, LN2 * tl.log2(p), -INF)
    return log_p


@triton.jit
def _log_add(log_x, logs):
    """log of exp(log_x) + sum of exp(logs)."""
    top = tl.maximum(log_x, tl.max(logs, 0))
    top = tl.where(top == -INF, 0.0, top)
    return top + LN2 * tl.log2(tl.exp2((log_x - top) * LOG2E) + tl.sum(tl.exp2((logs - top) * LOG2E), 0))


@triton.jit
def _one_target(log_p, log_tail, weight, log_q, q, first, log_q_out, vocab, o, F: tl.constexpr):
    """(value, h of the marked columns, sum of h, h of all other columns together, log p of each of them) of one target."""
    listed = first & (log_p != -INF)
    total = tl.sum(tl.exp2(log_p * LOG2E), 0) + tl.exp2(log_tail * LOG2E)
    others = vocab - tl.sum(listed.to(tl.int32), 0)
    even = tl.where(others == 0, -INF, log_tail - LN2 * tl.log2(others.to(tl.float32)))
    if F.spread:
        log_p = tl.where(first & (log_p == -INF), even, log_p)
        listed = first
    p = tl.exp2(log_p * LOG2E)
    term, h = divergence(p, q, log_p * LOG2E, log_q * LOG2E, log_p - log_q, o.a, o.b, tl.constexpr(F.kind))
    h = tl.where(listed, weight * h, 0.0)
    value = weight * tl.sum(tl.where(listed, term, 0.0), 0)
    h_sum = tl.sum(h, 0)
    rest = 0.0
    if not F.spread:
        unlisted = tl.where(first & (listed == 0), log_q, -INF)
        log_q_rest = _log_add(log_q_out, unlisted)
        term, h_rest = divergence(
            tl.exp2(log_tail * LOG2E), tl.exp2(log_q_rest * LOG2E), log_tail * LOG2E, log_q_rest * LOG2E,
            log_tail - log_q_rest, o.a, o.b, tl.constexpr(F.kind),
        )  # fmt: skip
        h_rest = weight * h_rest
        value += weight * term
        h_sum += h_rest
        base = tl.where(log_q_rest == -INF, 0.0, log_q_rest)
        rest = h_rest * tl.exp2((log_q_out - base) * LOG2E)
        h += tl.where(unlisted == -INF, 0.0, h_rest * tl.exp2((unlisted - base) * LOG2E))
    # Not the other way round: a NaN is no distribution either.
    value = tl.where((weight == 0) | (tl.abs(total - 1) <= MASS_ERROR), value, float("nan"))
    return value, h, h_sum, rest, even


@triton.jit
def all_targets(
    ids_ptr, log_p_ptr, tail_ptr, mass_ptr, ids, inside, first, k, log_q, log_q_out, vocab, o, weights,
    F: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """As `_one_target`, weighted and summed; with the weight of each, and the slots' mean probability."""
    repeated = tl.sum((inside & (first == 0)).to(tl.int32), 0) > 0
    q = tl.where(first, tl.exp2(log_q * LOG2E), 0.0)
    log_q = tl.where(first, log_q, -INF)
    value = 0.0
    h = tl.zeros([K], tl.float32)
    h_sum = 0.0
    rest = 0.0
    mean_p = tl.zeros([K], tl.float32)
    evens = ()
    masses = ()
    for m in tl.static_range(tl.constexpr(F.teachers)):
        log_p = _log_p(ids_ptr, log_p_ptr + m * k, ids, first, repeated, k, K)
        mass = tl.load(mass_ptr + m)
        weight = weights[m] * mass
        one = _one_target(log_p, tl.load(tail_ptr + m), weight, log_q, q, first, log_q_out, vocab, o, F)
        value += one[0] + tl.where(mass > 0, weight * LN2 * tl.log2(mass), 0.0)
        h += one[1]
        h_sum += one[2]
        rest += one[3]
        mean_p += weights[m] * tl.exp2(log_p * LOG2E)
        evens = appended(evens, one[4])
        masses = appended(masses, weight)
    return value, h, h_sum, rest, q, evens, masses, mean_p
