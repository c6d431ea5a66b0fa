"""Capture in one pass: the largest logit and the sums of every lane, then a second look at about k lanes.

The k-th largest of the lanes' maxima is a lower bound of the k-th largest logit, so whatever is selected stands in a lane whose
maximum reaches it. Only those lanes are read again: what reaches the bound survives and is ranked, what does not is summed. The
other lanes' sums are the rest of the tail, which is thus never the difference of two sums. Rows with more survivors than
there is room for (long ties, k near the width) are left to `selection_rows`: `done` says which are not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdfast.backends.triton.selection_rows import ordered
from kdfast.backends.triton.teachers import appended
from kdfast.backends.triton.tiles import (
    INF,
    LN2,
    LOWEST,
    SCATTERED,
    from_words,
    load_head,
    load_words,
    through_head,
    tile_columns,
)

_NO_KEY = tl.constexpr(-(1 << 63))


@triton.jit
def _add(m, totals, x, cs, T: tl.constexpr, SQUARED: tl.constexpr):
    """(maximum, sum of exp2((x - maximum) * c) for every c of `cs`) of each lane with a tile more.

    Bit j of SQUARED: cs[j] is twice cs[j - 1], so that its terms are those squared.
    """
    m_new = tl.maximum(m, tl.max(x, 1))
    far = x - m_new[:, None]
    added = ()
    e = far
    moved = m
    for j in tl.static_range(T):
        if (SQUARED >> j) & 1:
            e = e * e
            moved = moved * moved
        else:
            e = tl.exp2(far * cs[j])
            moved = tl.exp2((m - m_new) * cs[j])
        added = appended(added, totals[j] * moved + tl.sum(e, 1))
    return m_new, added


@triton.jit
def _zeros(LANES: tl.constexpr, T: tl.constexpr):
    totals = ()
    for _ in tl.static_range(T):
        totals = appended(totals, tl.zeros([LANES], tl.float32))
    return totals


@triton.jit
def _lanes(
    row_ptr, width, cap, scale, cs,
    T: tl.constexpr, SQUARED: tl.constexpr, HEAD: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Maximum and sums of each lane [LANES] over the row; the next tile is on its way while one is added."""
    m = tl.full([LANES], LOWEST, tl.float32)
    totals = _zeros(LANES, T)
    following = load_words(row_ptr, 0, width, "evict_last", LANES, VEC, RAGGED)
    for start in range(0, width, LANES * VEC):
        x = from_words(following, LANES, VEC)
        x = through_head(x, tile_columns(start, LANES, VEC, RAGGED == SCATTERED), width, cap, scale, HEAD)
        following = load_words(row_ptr, start + LANES * VEC, width, "evict_last", LANES, VEC, RAGGED)
        m, totals = _add(m, totals, x, cs, T, SQUARED)
    return m, totals


@triton.jit
def _bound(keys, k):
    """The largest key, its lower half 0, that k of the keys [LANES] reach; 0 when there are fewer than k."""
    found = tl.full([], 0, tl.uint32)
    for i in range(0, 16):
        raised = found | (tl.full([], 0x80000000, tl.uint32) >> i)
        enough = tl.sum((keys >= raised).to(tl.int32), 0) >= k
        found = tl.where(enough, raised, found)
    return found


@triton.jit
def _again(
    row_ptr, lanes_ptr, keys_ptr, count, bound, width, cap, scale, cs,
    T: tl.constexpr, SQUARED: tl.constexpr, HEAD: tl.constexpr,
    ROOM: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Keys of what reaches the bound in the listed lanes, as many as there is room for, and their number; maximum and sums of
    the rest of those lanes."""
    m = tl.full([BLOCK], LOWEST, tl.float32)
    totals = _zeros(BLOCK, T)
    survivors = tl.full([], 0, tl.int32)
    loads = count * tl.cdiv(width, LANES * VEC)
    place = tl.arange(0, VEC)[None, :]
    for begin in range(0, loads, BLOCK):
        load = begin + tl.arange(0, BLOCK)
        lane = tl.load(lanes_ptr + load % count, mask=load < loads, other=0)[:, None]
        start = (load // count * (LANES * VEC))[:, None]
        columns = start + place * LANES + lane if RAGGED == SCATTERED else start + lane * VEC + place
        end = tl.where(load < loads, width, 0)[:, None]
        x = load_head(row_ptr, columns, end, cap, scale, HEAD, "")
        key = ordered(x, 4)
        survives = (columns < end) & (key >= bound)
        of_lane = tl.sum(survives.to(tl.int32), 1)
        slot = survivors + (tl.cumsum(of_lane, 0) - of_lane)[:, None] + tl.cumsum(survives.to(tl.int32), 1) - 1
        # Ties to the lower id: it has the larger lower half.
        wide = ((key.to(tl.int64) - 0x80000000) << 32) | (0x7FFFFFFF - columns).to(tl.int64)
        tl.store(keys_ptr + slot, wide, mask=survives & (slot < ROOM))
        survivors += tl.sum(of_lane, 0)
        m, totals = _add(m, totals, tl.where(survives, -INF, x), cs, T, SQUARED)
    return survivors, m, totals


@triton.jit
def _value(key):
    """The float32 that `ordered` made a key of."""
    bits = tl.where((key >> 31) == 1, key & 0x7FFFFFFF, ~key)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def capture_kernel(
    logits_ptr, ids_ptr, logprobs_ptr, log_sums_ptr, log_tails_ptr, kept_ptr, tops_ptr, done_ptr, lanes_ptr, keys_ptr,
    rows, width, stride, k, cap, scale, cs,
    T: tl.constexpr, ONE: tl.constexpr, SQUARED: tl.constexpr, HEAD: tl.constexpr, DIGITS: tl.constexpr,
    ROOM: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Of each row: ids and log-probabilities [k], largest first; log of sum exp((x - max) / t) and the log mass of what is not
    selected for each temperature [T], of which 1 is number ONE; the last key and id selected; maxima of all and of the rest."""
    lanes_ptr += tl.program_id(0) * LANES
    keys_ptr += tl.program_id(0) * ROOM
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64)
        row_ptr = logits_ptr + at * stride
        m, totals = _lanes(row_ptr, width, cap, scale, cs, T, SQUARED, HEAD, LANES, VEC, RAGGED)
        keys = ordered(m, 4)
        bound = _bound(keys, k)
        reaches = keys >= bound
        slot = tl.cumsum(reaches.to(tl.int32), 0) - 1
        count = tl.sum(reaches.to(tl.int32), 0)
        tl.store(lanes_ptr + slot, tl.arange(0, LANES), mask=reaches)
        tl.debug_barrier()
        survivors, m_low, low = _again(
            row_ptr, lanes_ptr, keys_ptr, count, bound, width, cap, scale, cs, T, SQUARED, HEAD, ROOM, BLOCK, LANES, VEC, RAGGED
        )
        tl.debug_barrier()
        done = (survivors >= k) & (survivors <= ROOM)
        tl.store(done_ptr + row, done.to(tl.int32))
        if done:
            places = tl.arange(0, ROOM)
            key = tl.load(keys_ptr + places, mask=places < survivors, other=_NO_KEY)
            rank = tl.zeros([ROOM], tl.int32)
            for begin in range(0, survivors, RANK):
                others = begin + tl.arange(0, RANK)
                other = tl.load(keys_ptr + others, mask=others < survivors, other=_NO_KEY)
                rank += tl.sum((other[None, :] > key[:, None]).to(tl.int32), 1)
            value_key = ((key >> 32) + 0x80000000).to(tl.uint32)
            z = tl.where(places < survivors, _value(value_key), -INF)
            column = (0x7FFFFFFF - (key & 0x7FFFFFFF)).to(tl.int32)
            selected = (places < survivors) & (rank < k)
            left = tl.where(selected, -INF, z)
            m_far = tl.where(reaches, LOWEST, m)
            top = tl.max(m, 0)
            top_rest = tl.maximum(tl.maximum(tl.max(m_far, 0), tl.max(m_low, 0)), tl.max(left, 0))
            for j in tl.static_range(T):
                c = cs[j]
                log_total = tl.log2(tl.sum(totals[j] * tl.exp2((m - top) * c), 0))
                rest = tl.sum(tl.where(reaches, 0.0, totals[j] * tl.exp2((m - top_rest) * c)), 0)
                rest += tl.sum(low[j] * tl.exp2((m_low - top_rest) * c), 0) + tl.sum(tl.exp2((left - top_rest) * c), 0)
                tl.store(log_sums_ptr + at * T + j, log_total * LN2)
                tl.store(log_tails_ptr + at * T + j, ((top_rest - top) * c + tl.log2(rest) - log_total) * LN2)
                if j == ONE:
                    tl.store(ids_ptr + at * k + rank, column, mask=selected)
                    tl.store(logprobs_ptr + at * k + rank, (z - top) - LN2 * log_total, mask=selected)
            last = (places < survivors) & (rank == k - 1)
            threshold = (value_key >> (32 - 8 * DIGITS)) << (32 - 8 * DIGITS)
            tl.store(kept_ptr + at * 2, tl.sum(tl.where(last, threshold.to(tl.int32, bitcast=True), 0), 0))
            tl.store(kept_ptr + at * 2 + 1, tl.max(tl.where(last, column, -1), 0))
            tl.store(tops_ptr + at * 2, top)
            tl.store(tops_ptr + at * 2 + 1, top_rest)
        tl.debug_barrier()  # the next row writes where this one reads


@triton.jit
def order_kernel(
    ids_ptr, values_ptr, tops_ptr, log_sums_ptr, done_ptr, sorted_ids_ptr, logprobs_ptr, k,
    T: tl.constexpr, ONE: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Largest first, of ids in id order [k] and their logits, in rows that are not done."""
    at = tl.program_id(0).to(tl.int64)
    if tl.load(done_ptr + at) == 0:
        top = tl.load(tops_ptr + at * 2)
        log_sum = tl.load(log_sums_ptr + at * T + ONE)
        for begin in range(0, k, BLOCK):
            places = begin + tl.arange(0, BLOCK)
            value = tl.load(values_ptr + at * k + places, mask=places < k, other=0.0)
            key = ordered(value, 4)[:, None]
            rank = tl.zeros([BLOCK], tl.int32)
            for start in range(0, k, RANK):
                others = start + tl.arange(0, RANK)
                other = ordered(tl.load(values_ptr + at * k + others, mask=others < k, other=0.0), 4)[None, :]
                before = (other > key) | ((other == key) & (others[None, :] < places[:, None]))
                rank += tl.sum((before & (others < k)[None, :]).to(tl.int32), 1)
            ids = tl.load(ids_ptr + at * k + places, mask=places < k, other=0)
            tl.store(sorted_ids_ptr + at * k + rank, ids, mask=places < k)
            tl.store(logprobs_ptr + at * k + rank, (value - top) - log_sum, mask=places < k)
