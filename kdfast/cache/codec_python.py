"""The record codec in plain Python: the same floats as `csrc/cpu/codec_decode.cpp`, about a thousand times slower.

It lets the cache work on a machine without a compiler, and it is the second opinion of the tests. docs/cache-format.md is
the specification.
"""

from __future__ import annotations

import ctypes
import enum
import math
import operator

import numpy as np

from kdfast.cache import record
from kdfast.cache.codec_arrays import Collated, Index, Rows
from kdfast.cache.codec_math import (
    BLOCK,
    PLACE_BITS,
    TAIL_ALL,
    count_width,
    exact_bytes,
    exp_fixed,
    id_bytes,
    log_fixed,
    log_of,
    low_width,
    sum16,
    tail_mass,
    unpack_bits,
    xxh64,
)  # fmt: skip
from kdfast.cache.format import CorruptCache
from kdfast.options import CodecLayout as Layout

_F = np.float32


class Status(enum.IntEnum):
    """As in csrc/cpu/codec.h."""

    OK = 0
    TRUNCATED = 1
    BAD_CODE = 2
    BAD_ID = 3
    BAD_COUNT = 4
    BAD_TAIL = 5
    TRAILING = 6
    BAD_DRAWS = 7
    BAD_HEADER = 8
    BAD_CHECKSUM = 9
    NO_MEMORY = 10
    INPUT_ID = 16
    INPUT_TWICE = 17
    INPUT_VALUE = 18
    INPUT_MASS = 19
    INPUT_DRAWS = 20


class Fault(Exception):
    """A row that cannot be coded or decoded."""

    def __init__(self, status: Status) -> None:
        self.status = status


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.pos = data, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.pos:
            raise Fault(Status.TRUNCATED)
        self.pos += size
        return self.data[self.pos - size : self.pos]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")


def _read_ids(reader: _Reader, vocab: int, count: int) -> np.ndarray:
    width = low_width(vocab, count)
    sizes = (count * width + 7) // 8, (count + ((vocab - 1) >> width) + 7) // 8
    data = reader.take(sum(sizes))
    low = unpack_bits(data[: sizes[0]], width, count)
    places = np.flatnonzero(np.unpackbits(np.frombuffer(data[sizes[0] :], np.uint8), bitorder="little"))
    if len(places) != count:
        raise Fault(Status.BAD_ID)
    ids = ((places - np.arange(count)) << width) | low
    if (np.diff(ids) <= 0).any() or ids[-1] >= vocab:
        raise Fault(Status.BAD_ID)
    return ids


def _head(head: int) -> tuple[int, int, int]:
    """Width of a block's numbers, width of its patches' upper parts, number of patches."""
    width, more, patches = head & 31, head >> 5 & 31, head >> 10
    if width + more > 16 or (patches > 0) != (more > 0):
        raise Fault(Status.BAD_CODE)
    return width, more, patches


def _read_blocks(reader: _Reader, count: int) -> np.ndarray:
    blocks = []
    for start in range(0, count, BLOCK):
        n = min(BLOCK, count - start)
        width, more, patches = _head(reader.number(2))
        sizes = (n * width + 7) // 8, (patches * (more + PLACE_BITS) + 7) // 8
        data = reader.take(sum(sizes))
        values = unpack_bits(data[: sizes[0]], width, n)
        if patches:
            found = unpack_bits(data[sizes[0] :], more + PLACE_BITS, patches)
            places = found & (BLOCK - 1)
            if (np.diff(places) <= 0).any() or places[-1] >= n:
                raise Fault(Status.BAD_CODE)
            values[places] |= found >> PLACE_BITS << width
        blocks.append(values)
    return np.concatenate(blocks)


def _read_exact(reader: _Reader, count: int, n_t: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-probabilities, log_z and log_tail of a row that was stored exactly."""
    values = np.frombuffer(reader.take(exact_bytes(count, n_t)), "<f4")
    logp, log_z, log_tail = np.split(values, [count, count + n_t])
    highest = _F(1e-3)
    if not (np.isfinite(log_z).all() and (log_tail <= highest).all() and ((logp <= highest) & (logp > -np.inf)).all()):
        raise Fault(Status.BAD_CODE)
    return logp, log_z, log_tail


def _log_z(logp: np.ndarray, temperature: float, code: int) -> np.float32:
    inverse = _F(1.0 / temperature)
    top = logp.max()
    return np.float32(top * inverse + log_of(sum16(exp_fixed((logp - top) * inverse)) / tail_mass(code)[1]))


def _weights(layout: Layout, p: np.ndarray, logp: np.ndarray, draws: np.ndarray, log_z: np.float32, tail: float) -> np.ndarray:
    if draws.sum() != layout.samples or ((draws == 0).any() and not layout.mixed):
        raise Fault(Status.BAD_DRAWS)
    inverse = _F(1.0 / layout.sample_temperature)
    mass = sum16(np.where(draws > 0, exp_fixed(logp * inverse - log_z), _F(0))) + tail
    share = draws.astype(np.float32) / _F(layout.samples)
    drawn = share * _F(mass if layout.mixed else 1.0) * exp_fixed(logp - (logp * inverse - log_z))
    return np.where(draws > 0, drawn, p)


def _skip_blocks(reader: _Reader, count: int) -> None:
    for start in range(0, count, BLOCK):
        n = min(BLOCK, count - start)
        width, more, patches = _head(reader.number(2))
        reader.take((n * width + 7) // 8 + (patches * (more + PLACE_BITS) + 7) // 8)


def _skip_row(layout: Layout, reader: _Reader, has_counts: bool) -> tuple[int, int]:
    """Past a row: where it begins behind its count, and its count."""
    count, tails = _begin_row(layout, reader, has_counts)
    offset = reader.pos - 2 * len(tails)
    if count:
        reader.take(id_bytes(layout.vocab_size, count))
        if tails[0] == TAIL_ALL:
            reader.take(exact_bytes(count, len(tails)))
        else:
            _skip_blocks(reader, count)
        if layout.samples:
            _skip_blocks(reader, count)
    return offset, count


def _begin_row(layout: Layout, reader: _Reader, has_counts: bool) -> tuple[int, list[int]]:
    """Count and tail codes of a row; it is exact where it has entries and these codes are TAIL_ALL."""
    count = reader.number(count_width(layout.k)) if has_counts else layout.k
    if count > layout.k:
        raise Fault(Status.BAD_COUNT)
    tails = np.frombuffer(reader.take(2 * len(layout.temperatures)), "<u2").tolist()
    full = tails.count(TAIL_ALL)
    if full != len(tails) and (full or not count):
        raise Fault(Status.BAD_TAIL)
    return count, tails


def _read_row(layout: Layout, reader: _Reader, has_counts: bool, t: int, rows: Rows) -> None:
    count, tails = _begin_row(layout, reader, has_counts)
    rows.log_tail[t] = [log_of(tail_mass(code)[0]) if code else -math.inf for code in tails]
    rows.ids[t], rows.logprobs[t], rows.log_z[t] = -1, -math.inf, 0.0
    if rows.weights is not None:
        rows.weights[t] = 0.0
    if not count:
        return
    ids = _read_ids(reader, layout.vocab_size, count)
    if tails[0] == TAIL_ALL:
        logp, rows.log_z[t], rows.log_tail[t] = _read_exact(reader, count, len(tails))
        p = exp_fixed(logp)
        left = [float(exp_fixed(x)) if x > -np.inf else 0.0 for x in rows.log_tail[t]]
    else:
        odd = 2 * _read_blocks(reader, count) + 1
        unit = _F(tail_mass(tails[layout.temperatures.index(1.0)])[1] / float((odd * odd).sum()))
        wide = odd.astype(np.float32)
        p = wide * wide * unit
        logp = log_fixed(p)
        left = [tail_mass(code)[0] for code in tails]
        for j, temperature in enumerate(layout.temperatures):
            if temperature != 1.0:
                rows.log_z[t, j] = _log_z(logp, temperature, tails[j])
    draws = _read_blocks(reader, count) if layout.samples else None
    rows.ids[t, :count], rows.logprobs[t, :count] = ids, logp
    if draws is not None and rows.weights is not None:
        column = layout.temperatures.index(layout.sample_temperature)
        rows.weights[t, :count] = _weights(layout, p, logp, draws, rows.log_z[t, column], left[column])


def decode(layout: Layout, data: bytes, has_counts: bool, tokens: int, rows: Rows, whole: bool = True) -> tuple[Status, int]:
    """`_C.codec_decode` with arrays in the place of addresses; `whole`: nothing may follow the last row."""
    reader = _Reader(data)
    for t in range(tokens):
        try:
            _read_row(layout, reader, has_counts, t, rows)
        except Fault as fault:
            return fault.status, t
    return (Status.OK, 0) if reader.pos == len(data) or not whole else (Status.TRAILING, tokens)


def decode_batch(layout: Layout, jobs: np.ndarray, next_label: bool, rows: Rows, out: Collated) -> tuple[Status, int, int]:
    """`_C.codec_decode_batch`, job by job."""
    flat = rows.each(lambda x: x.reshape(-1, x.shape[-1]))
    for i, job in enumerate(jobs.tolist()):
        status, parts = _open(job)
        if parts is None:
            return status, i, 0
        _, _, tokens, _, _, at, room, _ = job
        n = min(tokens, room)
        here, padding = slice(at, at + n), slice(at + n, at + room)
        mine = flat.each(operator.itemgetter(here))
        status, token = decode(layout, parts.targets.tobytes(), parts.has_counts, n, mine, whole=n == tokens)
        if status:
            return status, i, token
        flat.ids[padding], flat.logprobs[padding], flat.log_z[padding], flat.log_tail[padding] = -1, -np.inf, 0.0, 0.0
        if flat.weights is not None:
            flat.weights[padding] = 0.0
        _supervise(parts, job, next_label, out)
    return Status.OK, 0, 0


def index_batch(layout: Layout, jobs: np.ndarray, next_label: bool, index: Index, out: Collated) -> tuple[Status, int, int]:
    """`_C.codec_index_batch`, job by job."""
    offsets, counts, start = index.offsets.reshape(-1), index.counts.reshape(-1), 0
    for i, job in enumerate(jobs.tolist()):
        status, parts = _open(job)
        if parts is None:
            return status, i, 0
        _, size, tokens, _, _, at, room, _ = job
        n, reader = min(tokens, room), _Reader(parts.targets.tobytes())
        for t in range(n):
            try:
                offset, counts[at + t] = _skip_row(layout, reader, parts.has_counts)
            except Fault as fault:
                return fault.status, i, t
            offsets[at + t] = start + offset
        if n == tokens and reader.pos != len(reader.data):
            return Status.TRAILING, i, n
        index.data[start : start + size] = 0
        index.data[start : start + reader.pos] = parts.targets[: reader.pos]
        offsets[at + n : at + room] = counts[at + n : at + room] = 0
        _supervise(parts, job, next_label, out)
        start += size
    index.data[start:] = 0
    return Status.OK, 0, 0


def _open(job: list[int]) -> tuple[Status, record.Parts | None]:
    """The parts of a record whose checksum and header are right."""
    address, size, tokens, contexts, wanted, *_ = job
    payload = np.frombuffer(ctypes.string_at(address, size), np.uint8)
    if xxh64(payload.tobytes()) != wanted & (2**64 - 1):
        return Status.BAD_CHECKSUM, None
    try:
        return Status.OK, record.unpack(payload, tokens, contexts)
    except CorruptCache:
        return Status.BAD_HEADER, None


def _supervise(parts: record.Parts, job: list[int], next_label: bool, out: Collated) -> None:
    """Input ids, labels, masks and context of one record to where they go in the batch."""
    ids, labels, mask, attention = (x.reshape(-1) for x in (out.input_ids, out.labels, out.loss_mask, out.attention_mask))
    _, _, tokens, _, _, at, room, context_at = job
    n = min(tokens, room)
    here, padding = slice(at, at + n), slice(at + n, at + room)
    own_mask, own_labels = record.supervision(parts, next_label)
    ids[here], labels[here], mask[here], attention[here] = parts.input_ids[:n], own_labels[:n], own_mask[:n], True
    ids[padding], labels[padding], mask[padding], attention[padding] = 0, record.IGNORE, False, False
    if out.context_ids is not None and out.context_mask is not None:
        contexts_here = slice(context_at, context_at + out.context_ids.shape[-1])
        found = np.zeros(0, np.int64) if parts.context_ids is None else parts.context_ids
        place = np.arange(out.context_ids.shape[-1])
        out.context_mask.reshape(-1)[contexts_here] = place < len(found)
        out.context_ids.reshape(-1)[contexts_here] = np.resize(np.append(found, 0), len(place)) * (place < len(found))
