"""The kernel that decodes rows of the teacher cache; docs/cache-format.md, section 4, is the specification.

Float32 operations stand as they do there, one by one, so that the floats are those of every other decoder: the kernel must be
compiled without fused multiply-adds. Whatever the bytes say, nothing is read beyond the data and nothing is written beyond the
row; what no writer produces makes the row NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdfast.backends.triton.tiles import INF

_BLOCK = tl.constexpr(64)  # numbers that share a width
_PATCHES = tl.constexpr(16)  # patches that are applied together
_TAIL_ALL = tl.constexpr(65535)
_SQRT_HALF = tl.constexpr(0x3F3504F3)
_HIGHEST = tl.constexpr(float.fromhex("0x1.0624dep-10"))  # the float32 nearest to 1e-3


@triton.jit
def exp_fixed(x):
    x = tl.minimum(tl.maximum(x, -87.0), 88.0)
    n = (x * 1.44269504 + 12582912.0) - 12582912.0
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    y = 0.0013950476422905922 * r + 0.00836888886988163
    y = y * r + 0.04166620597243309
    y = y * r + 0.166665181517601
    y = y * r + 0.5
    y = (y * (r * r) + r) + 1.0
    return y * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def log_fixed(x):
    shifted = x.to(tl.int32, bitcast=True) - _SQRT_HALF
    n = (shifted >> 23).to(tl.float32)
    f = ((shifted & 0x007FFFFF) + _SQRT_HALF).to(tl.float32, bitcast=True) - 1.0
    y = -0.07634081691503525 * f + 0.1276140958070755
    y = y * f + -0.13160260021686554
    y = y * f + 0.14201785624027252
    y = y * f + -0.16623352468013763
    y = y * f + 0.20001225173473358
    y = y * f + -0.250008225440979
    y = y * f + 0.3333333134651184
    g = f * f
    return n * 0.693145752 + (n * 1.42860677e-6 + ((y * f) * g - g * 0.5 + f))


@triton.jit
def add16(sums, x):
    """[16] float64 sums with 64 float32 added, entry i to sum i mod 16 in the order of i: the zeros added with it are exact."""
    wide = tl.reshape(x.to(tl.float64), [4, 16])
    part = tl.arange(0, 4)[:, None]
    for i in tl.static_range(4):
        sums += tl.sum(tl.where(part == i, wide, 0.0), 0)
    return sums


@triton.jit
def total16(sums):
    """The upper half onto the lower half, until one is left; a sum of two has no order."""
    sums = tl.sum(tl.reshape(sums, [2, 8]), 0)
    sums = tl.sum(tl.reshape(sums, [2, 4]), 0)
    sums = tl.sum(tl.reshape(sums, [2, 2]), 0)
    return tl.sum(sums, 0)


@triton.jit
def tail_code(row_ptr, column, end):
    low = tl.load(row_ptr + 2 * column, mask=2 * column < end, other=0).to(tl.int32)
    return low | (tl.load(row_ptr + 2 * column + 1, mask=2 * column + 1 < end, other=0).to(tl.int32) << 8)


@triton.jit
def tail_mass(code):
    """(what is left, what the entries hold together), float64."""
    bits = (code.to(tl.int64) << 43) + ((1023 - 96) << 52)
    odds = tl.where(code == 0, 0.0, bits.to(tl.float64, bitcast=True))
    return odds / (1.0 + odds), 1.0 / (1.0 + odds)


@triton.jit
def number(row_ptr, at, width, place, end, there):
    """Number `place` of those packed at `width` bits from byte `at` on."""
    bit = place * width
    byte = at + (bit >> 3)
    word = tl.load(row_ptr + byte, mask=there & (byte < end), other=0).to(tl.uint32)
    for i in tl.static_range(1, 4):
        more = tl.load(row_ptr + byte + i, mask=there & (byte + i < end), other=0)
        word |= more.to(tl.uint32) << (8 * i)
    return ((word >> (bit & 7).to(tl.uint32)).to(tl.int32)) & ((1 << width) - 1)


@triton.jit
def float_at(row_ptr, at, end, there):
    word = tl.load(row_ptr + at, mask=there & (at < end), other=0).to(tl.uint32)
    for i in tl.static_range(1, 4):
        more = tl.load(row_ptr + at + i, mask=there & (at + i < end), other=0)
        word |= more.to(tl.uint32) << (8 * i)
    return word.to(tl.float32, bitcast=True)


@triton.jit
def bit_at(row_ptr, at, bit, end, there):
    byte = tl.load(row_ptr + at + (bit >> 3), mask=there & (at + (bit >> 3) < end), other=0).to(tl.int32)
    return (byte >> (bit & 7)) & 1


@triton.jit
def read_ids(row_ptr, at, end, ids_ptr, count, vocab, BITS: tl.constexpr):
    """Writes the ids; returns where what follows begins, and whether something is wrong."""
    width = 0
    for i in tl.static_range(1, 25):
        width += ((vocab // count) >> i != 0).to(tl.int32)
    high_at = at + (count * width + 7) // 8
    bytes_high = (count + ((vocab - 1) >> width) + 7) // 8
    found = 0
    wrong = (high_at + bytes_high > end).to(tl.int32)
    for start in range(0, 8 * bytes_high, BITS):
        bit = start + tl.arange(0, BITS)
        inside = bit < 8 * bytes_high
        one = bit_at(row_ptr, high_at, bit, end, inside)
        rank = found + tl.cumsum(one, 0) - 1
        keep = (one != 0) & (rank < count)
        low = number(row_ptr, at, width, rank, end, keep)
        ids = ((bit - rank) << width) | low
        tl.store(ids_ptr + rank, ids, mask=keep)
        # Ids that share their upper part stand at neighbouring bits; among them the lower parts have to rise.
        twin = keep & (bit > 0)
        twin = twin & (bit_at(row_ptr, high_at, bit - 1, end, twin) != 0)
        below = number(row_ptr, at, width, rank - 1, end, twin)
        wrong |= tl.max(((twin & (low <= below)) | (keep & (ids >= vocab))).to(tl.int32), 0)
        found += tl.sum(one, 0)
    return high_at + bytes_high, wrong | (found != count).to(tl.int32)


@triton.jit
def read_block(row_ptr, at, end, n):
    """n numbers [64], where what follows begins, and whether something is wrong."""
    lane = tl.arange(0, _BLOCK)
    head = tail_code(row_ptr + at, 0, end - at)
    width, more, patches = head & 31, (head >> 5) & 31, head >> 10
    patches_at = at + 2 + (n * width + 7) // 8
    after = patches_at + (patches * (more + 6) + 7) // 8
    wrong = ((width + more > 16) | ((patches != 0) != (more != 0)) | (after > end)).to(tl.int32)
    values = number(row_ptr, at + 2, width, lane, end, lane < n)
    for start in range(0, patches, _PATCHES):
        j = start + tl.arange(0, _PATCHES)
        there = j < patches
        patch = number(row_ptr, patches_at, more + 6, j, end, there)
        place = patch & 63
        before = number(row_ptr, patches_at, more + 6, j - 1, end, there & (j > 0)) & 63
        wrong |= tl.max((there & ((place >= n) | ((j > 0) & (place <= before)))).to(tl.int32), 0)
        hit = (lane[:, None] == place[None, :]) & there[None, :]
        values |= tl.sum(tl.where(hit, ((patch >> 6) << width)[None, :], 0), 1)
    return values, after, wrong


@triton.jit
def read_numbers(row_ptr, at, end, count, out_ptr, LEVELS: tl.constexpr):
    """Writes levels q as 2 q + 1, or draws, as float32, which holds them exactly.

    Returns where what follows begins; whether something is wrong; the sum of (2 q + 1)^2, or of draws; whether one is 0.
    """
    lane = tl.arange(0, _BLOCK)
    total = tl.full([], 0, tl.int64)
    wrong = tl.full([], 0, tl.int32)
    zero = tl.full([], 0, tl.int32)
    for start in range(0, count, _BLOCK):
        values, at, bad = read_block(row_ptr, at, end, tl.minimum(count - start, _BLOCK))
        inside = start + lane < count
        wrong |= bad
        zero |= tl.max((inside & (values == 0)).to(tl.int32), 0)
        if LEVELS:
            values = 2 * values + 1
            total += tl.sum(tl.where(inside, values.to(tl.int64) * values.to(tl.int64), 0), 0)
        else:
            total += tl.sum(tl.where(inside, values.to(tl.int64), 0), 0)
        tl.store(out_ptr + start + lane, values.to(tl.float32), mask=inside)
    return at, wrong, total, zero


@triton.jit
def read_exact(row_ptr, at, end, count, out_ptr, N_T: tl.constexpr):
    """Writes the log-probabilities of a row that was stored exactly; returns where what follows begins, and whether it or its
    log_z and log_tail are none."""
    wrong = (at + 4 * (count + 2 * N_T) > end).to(tl.int32)
    for start in range(0, count, _BLOCK):
        i = start + tl.arange(0, _BLOCK)
        logp = float_at(row_ptr, at + 4 * i, end, i < count)
        wrong |= tl.max(((i < count) & (((logp <= _HIGHEST) & (logp > -INF)) == 0)).to(tl.int32), 0)
        tl.store(out_ptr + i, logp, mask=i < count)
    for j in tl.static_range(N_T):
        log_z = float_at(row_ptr, at + 4 * (count + j), end, True)
        log_tail = float_at(row_ptr, at + 4 * (count + N_T + j), end, True)
        wrong |= ((((log_z < INF) & (log_z > -INF)) & (log_tail <= _HIGHEST)) == 0).to(tl.int32)
    return at + 4 * (count + 2 * N_T), wrong


@triton.jit
def exact_weights(logprobs_ptr, weights_ptr, count):
    """As `write_probabilities` leaves them, of a row that was stored exactly."""
    for start in range(0, count, _BLOCK):
        at = start + tl.arange(0, _BLOCK)
        draws = tl.load(weights_ptr + at, mask=at < count, other=1.0)
        p = exp_fixed(tl.load(logprobs_ptr + at, mask=at < count, other=0.0))
        tl.store(weights_ptr + at, tl.where(draws > 0, draws, -p), mask=at < count)


@triton.jit
def write_probabilities(logprobs_ptr, weights_ptr, count, unit, DRAWN: tl.constexpr):
    """2 q + 1 to logp, in place; returns the largest. An entry without draws gets the weight -p: the sign tells it apart."""
    top = tl.full([], -INF, tl.float32)
    for start in range(0, count, _BLOCK):
        at = start + tl.arange(0, _BLOCK)
        inside = at < count
        odd = tl.load(logprobs_ptr + at, mask=inside, other=1.0)
        p = (odd * odd) * unit
        logp = log_fixed(p)
        tl.store(logprobs_ptr + at, logp, mask=inside)
        if DRAWN:
            draws = tl.load(weights_ptr + at, mask=inside, other=1.0)
            tl.store(weights_ptr + at, tl.where(draws > 0, draws, -p), mask=inside)
        top = tl.maximum(top, tl.max(tl.where(inside, logp, -INF), 0))
    return top


@triton.jit
def log_z_of(logprobs_ptr, count, top, inverse, rest):
    sums = tl.zeros([16], tl.float64)
    for start in range(0, count, _BLOCK):
        at = start + tl.arange(0, _BLOCK)
        logp = tl.load(logprobs_ptr + at, mask=at < count, other=0.0)
        sums = add16(sums, tl.where(at < count, exp_fixed((logp - top) * inverse), 0.0))
    return top * inverse + log_fixed((total16(sums) / rest).to(tl.float32))


@triton.jit
def write_weights(logprobs_ptr, weights_ptr, count, samples, inverse, z, tail, MIXED: tl.constexpr):
    """Draws to weights, in place."""
    begin = tl.full([], 1.0, tl.float32)
    if MIXED:
        sums = tl.zeros([16], tl.float64)
        for start in range(0, count, _BLOCK):
            at = start + tl.arange(0, _BLOCK)
            logp = tl.load(logprobs_ptr + at, mask=at < count, other=0.0)
            draws = tl.load(weights_ptr + at, mask=at < count, other=0.0)
            sums = add16(sums, tl.where(draws > 0, exp_fixed(logp * inverse - z), 0.0))
        begin = (total16(sums) + tail).to(tl.float32)
    for start in range(0, count, _BLOCK):
        at = start + tl.arange(0, _BLOCK)
        logp = tl.load(logprobs_ptr + at, mask=at < count, other=0.0)
        draws = tl.load(weights_ptr + at, mask=at < count, other=0.0)
        share = tl.div_rn(draws, tl.zeros_like(draws) + samples)
        drawn = (share * begin) * exp_fixed(logp - (logp * inverse - z))
        tl.store(weights_ptr + at, tl.where(draws > 0, drawn, -draws), mask=at < count)


@triton.jit
def fill(ids_ptr, logprobs_ptr, weights_ptr, begin, k, id, logprob, weight, DRAWN: tl.constexpr):
    """The slots from `begin` on."""
    for start in range(begin, k, _BLOCK):
        at = start + tl.arange(0, _BLOCK)
        tl.store(ids_ptr + at, tl.zeros([_BLOCK], tl.int32) + id, mask=at < k)
        tl.store(logprobs_ptr + at, tl.zeros([_BLOCK], tl.float32) + logprob, mask=at < k)
        if DRAWN:
            tl.store(weights_ptr + at, tl.zeros([_BLOCK], tl.float32) + weight, mask=at < k)


@triton.jit
def read_row(row_ptr, end, ids_ptr, logprobs_ptr, weights_ptr, count, vocab, samples, F: tl.constexpr, BITS: tl.constexpr):
    """Writes ids, levels as 2 q + 1 (or, of an exact row, log-probabilities) and draws.

    Returns whether something is wrong, the sum of (2 q + 1)^2, and where the values of an exact row are (else 0).
    """
    N_T: tl.constexpr = len(F.inverses)
    full = tl.full([], 0, tl.int32)
    for j in tl.static_range(N_T):
        full += (tail_code(row_ptr, j, end) == _TAIL_ALL).to(tl.int32)
    at, wrong = read_ids(row_ptr, 2 * N_T, end, ids_ptr, count, vocab, BITS)
    wrong |= ((full != 0) & (full != N_T)).to(tl.int32)
    total = tl.full([], 1, tl.int64)
    values_at = tl.full([], 0, tl.int32)
    if full == N_T:
        values_at += at
        at, bad = read_exact(row_ptr, at, end, count, logprobs_ptr, N_T)
        wrong |= bad
    else:
        at, bad, total, _ = read_numbers(row_ptr, at, end, count, logprobs_ptr, True)
        wrong |= bad
    if F.drawn:
        at, bad_draws, draws, exact = read_numbers(row_ptr, at, end, count, weights_ptr, False)
        wrong |= bad_draws | (draws != samples).to(tl.int32)
        if not F.mixed:
            wrong |= exact
    return wrong, total, values_at


@triton.jit
def write_exact(
    row_ptr, values_at, end, logprobs_ptr, log_z_ptr, log_tail_ptr, weights_ptr, count, samples, F: tl.constexpr
):  # fmt: skip
    """Everything but ids and log-probabilities of a row that was stored exactly."""
    N_T: tl.constexpr = len(F.inverses)
    z_at = values_at + 4 * count
    for j in tl.static_range(N_T):
        tl.store(log_z_ptr + j, float_at(row_ptr, z_at + 4 * j, end, True))
        tl.store(log_tail_ptr + j, float_at(row_ptr, z_at + 4 * (N_T + j), end, True))
    if F.drawn:
        exact_weights(logprobs_ptr, weights_ptr, count)
        tl.debug_barrier()
        z = float_at(row_ptr, z_at + 4 * F.column, end, True)
        log_tail = float_at(row_ptr, z_at + 4 * (N_T + F.column), end, True)
        tail = tl.where(log_tail > -INF, exp_fixed(log_tail), 0.0).to(tl.float64)
        write_weights(logprobs_ptr, weights_ptr, count, samples, F.inverses[F.column], z, tail, F.mixed)


@triton.jit
def write_row(row_ptr, end, logprobs_ptr, log_z_ptr, log_tail_ptr, weights_ptr, count, total, samples, F: tl.constexpr):
    """Everything but ids, from what `read_row` left."""
    N_T: tl.constexpr = len(F.inverses)
    tail, rest = tail_mass(tail_code(row_ptr, F.one, end))
    unit = (rest / total.to(tl.float64)).to(tl.float32)
    top = write_probabilities(logprobs_ptr, weights_ptr, count, unit, F.drawn)
    tl.debug_barrier()
    z = tl.full([], 0.0, tl.float32)
    for j in tl.static_range(N_T):
        code = tail_code(row_ptr, j, end)
        tail, rest = tail_mass(code)
        log_z = tl.full([], 0.0, tl.float32)
        if j != F.one:
            log_z = log_z_of(logprobs_ptr, count, top, F.inverses[j], rest)
        if j == F.column:
            z = log_z
        tl.store(log_z_ptr + j, log_z)
        tl.store(log_tail_ptr + j, tl.where(code == 0, -INF, log_fixed(tail.to(tl.float32))))
    if F.drawn:
        tail, rest = tail_mass(tail_code(row_ptr, F.column, end))
        write_weights(logprobs_ptr, weights_ptr, count, samples, F.inverses[F.column], z, tail, F.mixed)


@triton.jit
def decode_kernel(
    data_ptr, offsets_ptr, counts_ptr, ids_ptr, logprobs_ptr, log_z_ptr, log_tail_ptr, weights_ptr, size, k, vocab, samples,
    F: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """One row: its sections, as far as they can be wrong; then its floats; then the slots that are left."""
    N_T: tl.constexpr = len(F.inverses)
    row = tl.program_id(0).to(tl.int64)
    ids_ptr += row * k
    logprobs_ptr += row * k
    weights_ptr += row * k
    log_z_ptr += row * N_T
    log_tail_ptr += row * N_T
    count = tl.load(counts_ptr + row)
    offset = tl.load(offsets_ptr + row)
    there = (count > 0) & (count <= k) & (offset >= 0) & (offset <= size)
    wrong = ((count != 0) & (there == 0)).to(tl.int32)
    if there:
        row_ptr = data_ptr + offset
        # No row is as long as the bound, which keeps what follows in 32 bits.
        end = tl.minimum(size - offset, 1 << 30).to(tl.int32)
        wrong, total, values_at = read_row(row_ptr, end, ids_ptr, logprobs_ptr, weights_ptr, count, vocab, samples, F, BITS)
        tl.debug_barrier()  # what one thread wrote, another reads or writes over
        if wrong == 0:
            if values_at != 0:
                write_exact(
                    row_ptr, values_at, end, logprobs_ptr, log_z_ptr, log_tail_ptr, weights_ptr, count, samples, F
                )  # fmt: skip
            else:
                write_row(row_ptr, end, logprobs_ptr, log_z_ptr, log_tail_ptr, weights_ptr, count, total, samples, F)
    nothing = tl.where(wrong != 0, float("nan"), 0.0)
    if (wrong != 0) | (count == 0):
        for j in tl.static_range(N_T):
            tl.store(log_z_ptr + j, nothing)
            tl.store(log_tail_ptr + j, nothing)
    begin = tl.where(wrong != 0, 0, count)
    id = tl.where(wrong != 0, 0, -1)
    fill(ids_ptr, logprobs_ptr, weights_ptr, begin, k, id, tl.where(wrong != 0, float("nan"), -INF), nothing, F.drawn)
