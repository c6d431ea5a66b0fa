"""The record encoder in plain Python, for machines without a compiler.

It chooses levels in float64, so its bytes may differ from the C++ encoder's; both keep the limit, and either language
decodes both to the same floats.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kdfast.cache.codec_math import (
    BLOCK,
    MAX_LEVEL,
    MAX_PATCHES,
    PLACE_BITS,
    TAIL_ALL,
    count_width,
    low_width,
    pack_bits,
    tail_code,
    tail_mass,
)  # fmt: skip
from kdfast.cache.codec_python import Fault, Status
from kdfast.options import CodecLayout as Layout

_MASS_SLACK = 1e-2  # how far entries and tail may be from 1: half-precision teachers, not mistakes
_TRIALS = 4
_DRAWN_LEVEL = 8.0  # level of the least likely drawn entry, at least, where its p matters


class _Row:
    """One token on its way: entries in id order, and what the teacher said at every temperature."""

    def __init__(self, layout: Layout, ids: Any, logprobs: Any, log_z: Any, log_tail: Any, draws: Any) -> None:
        self.layout = layout
        if (ids < -1).any() or (ids >= layout.vocab_size).any():
            raise Fault(Status.INPUT_ID)
        if not (logprobs[ids >= 0] <= np.float32(1e-3)).all():
            raise Fault(Status.INPUT_VALUE)
        kept = np.flatnonzero((ids >= 0) & (logprobs > -math.inf))
        kept = kept[np.argsort(ids[kept], kind="stable")]
        self.ids, self.logp = ids[kept].astype(np.int64), logprobs[kept].astype(np.float64)
        self.draws = None if draws is None else draws[kept]
        if (np.diff(self.ids) == 0).any():
            raise Fault(Status.INPUT_TWICE)
        if self.draws is not None and len(kept):
            exact = bool((self.draws == 0).any())
            if self.draws.sum() != layout.samples or (exact and not layout.mixed):
                raise Fault(Status.INPUT_DRAWS)
        if not np.isfinite(log_z).all() or not (log_tail <= np.float32(1e-3)).all():
            raise Fault(Status.INPUT_VALUE)
        temperatures = np.array(layout.temperatures)
        self.log_z, self.log_tail = log_z, log_tail
        self.values = logprobs[kept]
        self.p = np.exp(np.clip(self.logp / temperatures[:, None] - log_z[:, None].astype(np.float64), -87, 88))
        self.tail = np.exp(log_tail.astype(np.float64))
        rest = self.p.sum(1)
        if not (np.abs(rest + self.tail - 1) <= _MASS_SLACK).all():
            raise Fault(Status.INPUT_MASS)
        self.codes = [tail_code(float(t), float(r), not len(kept)) for t, r in zip(self.tail, rest, strict=True)]

    def kl(self, levels: np.ndarray) -> float:
        """KL(exact || decoded) over entries and tail, the worst over the temperatures."""
        worst = 0.0
        for p, tail, temperature, code in zip(self.p, self.tail, self.layout.temperatures, self.codes, strict=True):
            rest = tail_mass(code)[1]
            odd = 2.0 * levels + 1
            q = np.exp(np.maximum(np.log(odd / odd.max()) * (2 / temperature), -87))
            ratio = q / q.sum() * rest / p
            worst = max(worst, float((p * (ratio - 1 - np.log(ratio))).sum()) + self.tail_kl(tail, code))
        return worst

    @staticmethod
    def tail_kl(tail: float, code: int) -> float:
        coded = tail_mass(code)[0]
        return tail * math.log(tail / coded) - tail + coded if tail > 0 else 0.0

    def quantise(self, max_kl: float, values_bits: int) -> tuple[np.ndarray | None, float]:
        """Levels, and their KL error; None where no levels keep it within `max_kl`: the row is stored exactly."""
        root = np.sqrt(self.p[self.layout.temperatures.index(1.0)])
        if not len(root):
            return np.zeros(0, np.int64), 0.0
        if values_bits:
            levels = np.minimum(root / root.max() * 2**values_bits, 2**values_bits - 1).astype(np.int64)
            return levels, self.kl(levels)
        least = 1.0
        if self.draws is not None and len(self.layout.temperatures) > 1:
            # At a temperature other than that of the draws a drawn entry's target is a power of its p, which takes a relative
            # precision whatever p is. Drawn at 1 and used at 1, p cancels from its weight.
            least = _DRAWN_LEVEL / min(root[self.draws > 0].min(initial=1.0), 1.0)
        limit = max_kl - rounding(max_kl, float(np.abs(self.log_z).max()))
        if max(map(self.tail_kl, self.tail, self.codes)) > limit or least > MAX_LEVEL:  # no levels mend a tail
            return None, 0.0
        # A uniform error of one level in sqrt(p) costs about 1 / (6 scale^2) an entry: KL falls as scale^-2, with noise.
        scale, trial = math.sqrt((len(root) + 1) / (6 * limit)), 0
        while True:
            scale = min(max(scale, least), MAX_LEVEL + 1.0)
            levels = np.minimum(root * scale, MAX_LEVEL).astype(np.int64)
            kl, trial = self.kl(levels), trial + 1
            if kl <= limit and (trial >= _TRIALS or kl >= 0.85 * limit or scale == least):
                return levels, kl
            if scale > MAX_LEVEL and trial >= _TRIALS:
                return None, 0.0
            scale *= min(max(math.sqrt(kl / (0.95 * limit)), 0.5), 8.0) if trial < _TRIALS else 1.09

    def write(self, levels: np.ndarray | None, has_counts: bool) -> bytes:
        count, k, vocab = len(self.ids), self.layout.k, self.layout.vocab_size
        out = count.to_bytes(count_width(k), "little") if has_counts else b""
        out += np.array(self.codes if levels is not None else [TAIL_ALL] * len(self.codes), "<u2").tobytes()
        if not count:
            return out
        width = low_width(vocab, count)
        high = np.zeros(count + ((vocab - 1) >> width), np.uint8)
        high[(self.ids >> width) + np.arange(count)] = 1
        out += pack_bits(self.ids, width) + np.packbits(high, bitorder="little").tobytes()
        if levels is None:
            out += b"".join(x.astype("<f4").tobytes() for x in (self.values, self.log_z, self.log_tail))
        else:
            out += _blocks(levels)
        return out if self.draws is None else out + _blocks(self.draws)


def _blocks(values: np.ndarray) -> bytes:
    out = b""
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK]
        longest = int(block.max()).bit_length()
        best = (len(block) * longest + 7) // 8, longest, np.zeros(0, np.int64)
        for width in range(longest - 1, -1, -1):
            places = np.flatnonzero(block >> width)
            size = (len(block) * width + 7) // 8 + (len(places) * (longest - width + PLACE_BITS) + 7) // 8
            if len(places) <= MAX_PATCHES and size < best[0]:
                best = size, width, places
        _, width, places = best
        more = longest - width if len(places) else 0
        out += (width | more << 5 | len(places) << 10).to_bytes(2, "little") + pack_bits(block, width)
        out += pack_bits(places | block[places] >> width << PLACE_BITS, more + PLACE_BITS)
    return out


def rounding(kl: float, largest_log_z: float) -> float:
    """What float32 adds to a KL of `kl` between what is measured here and what a reader computes: log-probabilities at T are
    as large as log_z is, each is off by e, and a KL is a quadratic form in what it is off by."""
    e = math.ldexp(20 + largest_log_z, -21)
    return e * (math.sqrt(2 * kl) + e)


def _empty(layout: Layout) -> _Row:
    """A row that says nothing, in the place of one that does not count and is no distribution."""
    k, n_t = layout.k, len(layout.temperatures)
    floats = np.zeros(k, np.float32), np.zeros(n_t, np.float32), np.zeros(n_t, np.float32)
    return _Row(layout, np.full(k, -1, np.int32), *floats, np.zeros(k, np.int32) if layout.samples else None)


def encode(
    layout: Layout, arrays: tuple[Any, ...], max_kl: float, values_bits: int, kl: np.ndarray
) -> tuple[Status, int, bytes, bool, int]:
    """`_C.codec_encode` with arrays (ids, logprobs, log_z, log_tail, draws, counted) in the place of addresses."""
    ids, logprobs, log_z, log_tail, draws, counted = arrays
    gaps, rows, exact = bool((ids < 0).any() or not (logprobs >= np.float32(-3e38)).all()), [], 0
    for t in range(len(ids)):
        try:
            row = _Row(layout, ids[t], logprobs[t], log_z[t], log_tail[t], None if draws is None else draws[t])
        except Fault as fault:
            if counted is None or counted[t]:
                return fault.status, t, b"", False, 0
            row, gaps = _empty(layout), True
        levels, kl[t] = row.quantise(max_kl, values_bits)
        exact += levels is None
        rows.append((row, levels))
    return Status.OK, 0, b"".join(row.write(levels, gaps) for row, levels in rows), gaps, exact
