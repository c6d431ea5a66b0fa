"""The record codec in plain Python: the same bytes and floats as `csrc/cpu/codec_*.cpp`, about a thousand times slower.

It lets the cache work on a machine without a compiler, and it is the second opinion of the tests. Arithmetic is float64
in the same order, with the same functions of the C library, so that both round alike. docs/cache-format.md is the spec.
"""

from __future__ import annotations

import functools
import math

import numpy as np

OK, TRUNCATED, BAD_CODE, BAD_ID, BAD_VALUE, BAD_COUNT, BAD_TAIL, TRAILING = range(8)
INPUT_ID, INPUT_TWICE, INPUT_VALUE, INPUT_MASS = range(16, 20)

MAX_LEVEL = 65535
ESCAPE, RAW_BITS, MAX_PREFIX = 20, 24, 16
TAIL_NONE, TAIL_ALL, TAIL_ZERO, TAIL_SCALE = 0, 65535, 32768, 1024.0
_QUARTER_POWERS = (1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429)
_STEPS = 64
_MASS_SLACK = 1e-2
_MAX_LOG_MASS = 50.0
_INF = math.inf


@functools.lru_cache(maxsize=4096)
def _log_level(q: int) -> float:
    return math.log(2.0 * q + 1.0)


@functools.lru_cache(maxsize=4096)
def _power(q: int, temperature: float) -> float:
    return math.exp(2.0 * _log_level(q) / temperature)


def _log_sum(levels: list[int], temperature: float) -> float:
    """log of the sum over entries of (2q + 1)^(2/T)."""
    if temperature == 1.0:
        return math.log(float(sum((2 * q + 1) ** 2 for q in levels)))
    total = 0.0
    for q in levels:
        total += _power(q, temperature)
    return math.log(total)


def _tail_of(code: int) -> tuple[float, float]:
    """log of the tail's mass, and log of what it leaves to the entries."""
    if code == TAIL_NONE:
        return -_INF, 0.0
    if code == TAIL_ALL:
        return 0.0, -_INF
    x = (code - TAIL_ZERO) / TAIL_SCALE
    log_rest = -math.log(1.0 + math.exp(x))
    return x + log_rest, log_rest


def _tail_code(log_tail: float, log_rest: float, empty: bool) -> int:
    if empty:
        return TAIL_ALL
    if log_tail == -_INF:
        return TAIL_NONE
    if log_rest == -_INF:
        return TAIL_ALL - 1
    return int(min(max(math.floor((log_tail - log_rest) * TAIL_SCALE + 0.5) + TAIL_ZERO, 1), TAIL_ALL - 1))


class _BitWriter:
    def __init__(self) -> None:
        self.data = bytearray()
        self._word = self._used = 0

    def put(self, value: int, bits: int) -> None:
        self._word |= value << self._used
        self._used += bits
        while self._used >= 8:
            self.data.append(self._word & 255)
            self._word >>= 8
            self._used -= 8

    def flush(self) -> bytes:
        if self._used:
            self.put(0, 8 - self._used)
        return bytes(self.data)


def _gap_bits(gap: int, rice: int) -> int:
    n = gap >> rice
    return ESCAPE + RAW_BITS if n >= ESCAPE else n + 1 + rice


def _put_gap(out: _BitWriter, gap: int, rice: int) -> None:
    n = gap >> rice
    if n >= ESCAPE:
        out.put(gap << ESCAPE, ESCAPE + RAW_BITS)
    else:
        out.put(1 << n, n + 1)
        out.put(gap & ((1 << rice) - 1), rice)


def _value_bits(value: int, order: int) -> int:
    return 2 * ((value >> order) + 1).bit_length() - 1 + order


def _put_value(out: _BitWriter, value: int, order: int) -> None:
    n = ((value >> order) + 1).bit_length() - 1
    out.put(1 << n, n + 1)
    out.put(value - (((1 << n) - 1) << order), n + order)


class _Row:
    """One token on its way: entries in id order, what the teacher said at every temperature, and the levels tried."""

    def __init__(self, k: int, vocab: int, temperatures: list[float]) -> None:
        self.k, self.vocab, self.temperatures = k, vocab, temperatures
        self.one = temperatures.index(1.0)

    def load(self, ids: list[int], logprobs: list[float], log_z: list[float], log_tail: list[float]) -> int:
        entries = []
        for i, logp in zip(ids, logprobs, strict=True):
            if i < -1 or i >= self.vocab:
                return INPUT_ID
            if i < 0:
                continue
            if not logp <= np.float32(1e-3):
                return INPUT_VALUE
            if logp > -_INF:
                entries.append((i, logp))
        entries.sort()
        self.ids = [i for i, _ in entries]
        if len(set(self.ids)) < len(self.ids):
            return INPUT_TWICE
        self.root = [math.exp(0.5 * logp) for _, logp in entries]
        self.p: list[list[float]] = []
        self.tail_p, self.self_, self.mass, self.codes = [], [], [], []
        for temperature, z, tail in zip(self.temperatures, log_z, log_tail, strict=True):
            if not math.isfinite(z) or not tail <= np.float32(1e-3):
                return INPUT_VALUE
            rest = own = 0.0
            row = []
            for _, logp in entries:
                log_p = min(logp / temperature - z, _MAX_LOG_MASS)
                p = math.exp(log_p)
                row.append(p)
                rest += p
                own += p * log_p
            tail_p = math.exp(tail)
            if entries and not abs(rest + tail_p - 1.0) <= _MASS_SLACK:
                return INPUT_MASS
            self.p.append(row)
            self.tail_p.append(tail_p)
            self.mass.append(rest + tail_p)
            self.self_.append(own + (tail_p * tail if tail_p > 0 else 0.0))
            self.codes.append(_tail_code(tail, math.log(rest) if rest > 0 else -_INF, not entries))
        return OK

    def _kl_at(self, levels_per_unit: float, cap: int) -> float:
        self.levels = [int(min(u * levels_per_unit, float(cap))) for u in self.root]
        scale = _tail_of(self.codes[self.one])[1] - _log_sum(self.levels, 1.0)
        worst = 0.0
        for j, temperature in enumerate(self.temperatures):
            log_tail, log_rest = _tail_of(self.codes[j])
            log_z = 0.0 if j == self.one else _log_sum(self.levels, temperature) + scale / temperature - log_rest
            cross = self.tail_p[j] * log_tail if self.tail_p[j] > 0 else 0.0
            for p, q in zip(self.p[j], self.levels, strict=True):
                cross += p * ((2.0 * _log_level(q) + scale) / temperature - log_z)
            worst = max(worst, self.self_[j] - cross - self.mass[j] + 1.0)
        return worst

    def quantise(self, max_kl: float, values_bits: int) -> float:
        if not self.ids:
            return 0.0
        if values_bits:
            return self._kl_at(math.ldexp(1.0, values_bits) / max(self.root), (1 << values_bits) - 1)
        guess = math.sqrt((len(self.ids) + 1.0) / (6 * max_kl))
        first = math.floor(4 * math.log2(max(guess, 1.0))) - 8
        kl = 0.0
        for step in range(min(max(first, 0), _STEPS), _STEPS + 1):
            kl = self._kl_at(math.ldexp(_QUARTER_POWERS[step & 3], step >> 2), MAX_LEVEL)
            if kl <= max_kl:
                break
        return kl

    def write(self, id_out: _BitWriter, value_out: _BitWriter) -> int:
        if not self.ids:
            return 0
        gaps = [self.ids[0]] + [b - a - 1 for a, b in zip(self.ids, self.ids[1:], strict=False)]
        base = min(self.levels)
        values = [q - base for q in self.levels]
        mean = (self.ids[-1] // len(gaps)).bit_length()
        rice = min(range(max(mean - 2, 0), mean + 1), key=lambda m: sum(_gap_bits(g, m) for g in gaps))
        order = min(range(8), key=lambda m: sum(_value_bits(v, m) for v in values))
        for gap in gaps:
            _put_gap(id_out, gap, rice)
        _put_value(value_out, base, 0)
        for value in values:
            _put_value(value_out, value, order)
        return rice | order << 5


def encode(
    k: int, vocab: int, temperatures: list[float], tokens: int, ids: np.ndarray, logprobs: np.ndarray,
    log_z: np.ndarray, log_tail: np.ndarray, max_kl: float, values_bits: int, kl: np.ndarray,
) -> tuple[int, int, bytes, int, bool]:  # fmt: skip
    """`_C.codec_encode` with arrays in the place of addresses."""
    id_out, value_out, row = _BitWriter(), _BitWriter(), _Row(k, vocab, temperatures)
    heads, counts, tails = bytearray(), [], []
    for t in range(tokens):
        status = row.load(ids[t].tolist(), logprobs[t].tolist(), log_z[t].tolist(), log_tail[t].tolist())
        if status != OK:
            return status, t, b"", 0, False
        kl[t] = row.quantise(max_kl, values_bits)
        heads.append(row.write(id_out, value_out))
        counts.append(len(row.ids))
        tails += row.codes
    has_counts = any(count < k for count in counts)
    id_bytes, value_bytes = id_out.flush(), value_out.flush()
    fixed = bytes(heads) + (np.array(counts, "<u4").tobytes() if has_counts else b"") + np.array(tails, "<u2").tobytes()
    return OK, 0, fixed + id_bytes + value_bytes, len(id_bytes), has_counts


class _BitReader:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def window(self) -> int:
        byte = self._at >> 3
        return int.from_bytes(self._data[byte : byte + 8], "little") >> (self._at & 7)

    def skip(self, bits: int) -> None:
        self._at += bits

    def overrun(self) -> bool:
        return self._at > 8 * len(self._data)

    def at_end(self) -> bool:
        return (self._at + 7) // 8 == len(self._data)


def _zeros(window: int) -> int:
    return (window & -window).bit_length() - 1 if window else 63


def _read_gap(reader: _BitReader, rice: int) -> int:
    window = reader.window()
    n = _zeros(window)
    if n >= ESCAPE:
        reader.skip(ESCAPE + RAW_BITS)
        return (window >> ESCAPE) & ((1 << RAW_BITS) - 1)
    reader.skip(n + 1 + rice)
    return (n << rice) + ((window >> (n + 1)) & ((1 << rice) - 1))


def _read_value(reader: _BitReader, order: int) -> int:
    window = reader.window()
    n = _zeros(window)
    if n > MAX_PREFIX:
        return MAX_LEVEL + 1
    reader.skip(2 * n + 1 + order)
    return (((1 << n) - 1) << order) + ((window >> (n + 1)) & ((1 << (n + order)) - 1))


def _read_row(id_in: _BitReader, value_in: _BitReader, head: int, count: int, vocab: int) -> tuple[int, list[int], list[int]]:
    rice, order = head & 31, head >> 5
    base = _read_value(value_in, 0)
    if rice > RAW_BITS or base > MAX_LEVEL:
        return BAD_CODE, [], []
    ids, levels, at = [], [], 0
    for _ in range(count):
        at += _read_gap(id_in, rice)
        ids.append(at)
        at += 1
        levels.append(base + _read_value(value_in, order))
    if id_in.overrun() or value_in.overrun():
        return TRUNCATED, [], []
    if at > vocab:
        return BAD_ID, [], []
    return (BAD_VALUE if max(levels) > MAX_LEVEL else OK), ids, levels


def decode(
    k: int, vocab: int, temperatures: list[float], tokens: int, data: bytes, id_bytes: int, has_counts: bool,
    ids: np.ndarray, logprobs: np.ndarray, log_z: np.ndarray, log_tail: np.ndarray,
) -> tuple[int, int]:  # fmt: skip
    """`_C.codec_decode` with arrays in the place of addresses."""
    n_t = len(temperatures)
    tails_at = tokens * (5 if has_counts else 1)
    fixed = tails_at + 2 * n_t * tokens
    if fixed + id_bytes > len(data):
        return TRUNCATED, 0
    counts = np.frombuffer(data, "<u4", tokens, tokens).tolist() if has_counts else [k] * tokens
    tails = np.frombuffer(data, "<u2", tokens * n_t, tails_at).reshape(tokens, n_t).tolist()
    id_in, value_in = _BitReader(data[fixed : fixed + id_bytes]), _BitReader(data[fixed + id_bytes :])
    one = temperatures.index(1.0)
    ids[:], logprobs[:], log_z[:] = -1, -_INF, 0.0
    for t, count in enumerate(counts):
        if count > k:
            return BAD_COUNT, t
        if any((code == TAIL_ALL) != (count == 0) for code in tails[t]):
            return BAD_TAIL, t
        log_tail[t] = [_tail_of(code)[0] for code in tails[t]]
        if not count:
            continue
        status, row_ids, levels = _read_row(id_in, value_in, data[t], count, vocab)
        if status != OK:
            return status, t
        scale = _tail_of(tails[t][one])[1] - _log_sum(levels, 1.0)
        ids[t, :count] = row_ids
        logprobs[t, :count] = [2.0 * _log_level(q) + scale for q in levels]
        for j, temperature in enumerate(temperatures):
            if j != one:
                log_z[t, j] = _log_sum(levels, temperature) + scale / temperature - _tail_of(tails[t][j])[1]
    return (OK, 0) if id_in.at_end() and value_in.at_end() else (TRAILING, tokens)
