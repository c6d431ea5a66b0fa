"""The kernels that select the k largest logits of a row, and sum all of them and the others, where `capture_rows` has not.

Histograms of 8-bit digits of an order-preserving integer narrow down the k-th largest logit; one pass in id order then collects
what is above it and the first of its ties.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdfast.backends.triton.tiles import INF, LN2, LOG2E, LOWEST, load_head, tile_columns


@triton.jit
def ordered(x, DIGITS: tl.constexpr):
    """float32 as uint32 in the same order; -0 equals +0; only the first DIGITS bytes are kept."""
    bits = tl.where(x == 0, 0.0, x).to(tl.uint32, bitcast=True)
    key = tl.where((bits >> 31) == 1, ~bits, bits | 0x80000000)
    return (key >> (32 - 8 * DIGITS)) << (32 - 8 * DIGITS)


@triton.jit
def narrow_digit(
    row_ptr, width, found, need, cap, scale, SHIFT: tl.constexpr, HEAD: tl.constexpr, DIGITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One more digit of the threshold; `need` keys with the digits in `found` belong to the k largest."""
    bins = tl.arange(0, 512)
    counts = tl.zeros([512], tl.int32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = load_head(row_ptr, columns, width, cap, scale, HEAD, "evict_last")
        key = ordered(x, DIGITS)
        in_race = columns < width
        if SHIFT < 24:
            in_race = in_race & ((key >> (SHIFT + 8)) == (found >> (SHIFT + 8)))
        # Keys that left the race, and columns that are not there, go to the bins above 255.
        counts += tl.histogram(tl.where(in_race, ((key >> SHIFT) & 255).to(tl.int32), 256), 512)
    counts = tl.where(bins < 256, counts, 0)
    at_least = tl.cumsum(counts, 0, reverse=True)
    chosen = tl.max(tl.where(at_least >= need, bins, 0), 0)
    need -= tl.sum(tl.where(bins > chosen, counts, 0), 0)
    return found | (chosen.to(tl.uint32) << SHIFT), need


@triton.jit
def find_threshold(row_ptr, width, k, cap, scale, HEAD: tl.constexpr, DIGITS: tl.constexpr, BLOCK: tl.constexpr):
    """(the k-th largest key of a row, how many of those that equal it belong to the k largest)."""
    found = tl.full([], 0, tl.uint32)
    need = k
    for digit in tl.static_range(DIGITS):
        found, need = narrow_digit(row_ptr, width, found, need, cap, scale, 24 - 8 * digit, HEAD, DIGITS, BLOCK)
    return found, need


@triton.jit
def select_kernel(
    logits_ptr, ids_ptr, values_ptr, kept_ptr, tops_ptr, done_ptr, width, stride, k, cap, scale,
    HEAD: tl.constexpr, DIGITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Ids and values of the k largest in id order; the threshold and its last id taken; maxima of all and of the rest."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(done_ptr + row) == 0:
        row_ptr = logits_ptr + row * stride
        threshold, need = find_threshold(row_ptr, width, k, cap, scale, HEAD, DIGITS, BLOCK)
        taken = tl.full([], 0, tl.int32)
        ties = tl.full([], 0, tl.int32)
        last_tie = tl.full([], -1, tl.int32)
        top = tl.full([BLOCK], LOWEST, tl.float32)
        top_rest = tl.full([BLOCK], LOWEST, tl.float32)
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < width
            x = load_head(row_ptr, columns, width, cap, scale, HEAD, "")
            key = ordered(x, DIGITS)
            tie = inside & (key == threshold)
            tie_rank = ties + tl.cumsum(tie.to(tl.int32), 0)
            take_tie = tie & (tie_rank <= need)
            take = (inside & (key > threshold)) | take_tie
            slot = taken + tl.cumsum(take.to(tl.int32), 0) - 1
            tl.store(ids_ptr + row * k + slot, columns, mask=take)
            tl.store(values_ptr + row * k + slot, x, mask=take)
            ties += tl.sum(tie.to(tl.int32), 0)
            taken += tl.sum(take.to(tl.int32), 0)
            last_tie = tl.maximum(last_tie, tl.max(tl.where(take_tie, columns, -1), 0))
            top = tl.maximum(top, x)
            top_rest = tl.maximum(top_rest, tl.where(take, -INF, x))
        tl.store(kept_ptr + row * 2, threshold.to(tl.int32, bitcast=True))
        tl.store(kept_ptr + row * 2 + 1, last_tie)
        tl.store(tops_ptr + row * 2, tl.max(top, 0))
        tl.store(tops_ptr + row * 2 + 1, tl.max(top_rest, 0))


@triton.jit
def sums_kernel(
    logits_ptr, kept_ptr, tops_ptr, done_ptr, log_sums_ptr, log_tails_ptr, width, stride, inv_t, cap, scale,
    T: tl.constexpr, NUMBER: tl.constexpr,
    HEAD: tl.constexpr, DIGITS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """log of sum exp((x - max) / t), and the log mass of the unselected columns at t, the temperature of this NUMBER of T."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(done_ptr + row) == 0:
        threshold = tl.load(kept_ptr + row * 2).to(tl.uint32, bitcast=True)
        last_tie = tl.load(kept_ptr + row * 2 + 1)
        top = tl.load(tops_ptr + row * 2)
        top_rest = tl.load(tops_ptr + row * 2 + 1)
        c = inv_t * LOG2E
        total = tl.zeros([LANES], tl.float32)
        rest = tl.zeros([LANES], tl.float32)
        for start in range(0, width, LANES * VEC):
            columns = tile_columns(start, LANES, VEC, RAGGED)
            x = load_head(logits_ptr + row * stride, columns, width, cap, scale, HEAD, "evict_last")
            key = ordered(x, DIGITS)
            taken = (key > threshold) | ((key == threshold) & (columns <= last_tie))
            total += tl.sum(tl.exp2((x - top) * c), 1)
            rest += tl.sum(tl.where(taken, 0.0, tl.exp2((x - top_rest) * c)), 1)
        log_sum = LN2 * tl.log2(tl.sum(total, 0))
        tl.store(log_sums_ptr + row * T + NUMBER, log_sum)
        tl.store(log_tails_ptr + row * T + NUMBER, (top_rest - top) * inv_t + LN2 * tl.log2(tl.sum(rest, 0)) - log_sum)
