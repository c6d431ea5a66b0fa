"""Targets to bytes and back, by the C++ codec where it is built and by the Python one where it is not."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from kdfast.cache import codec_python
from kdfast.cache.format import CacheError, CorruptCache

_native: ModuleType | None
try:
    _native = importlib.import_module("kdfast._C")
except ImportError:
    _native = None

_DECODE_FAULTS = {
    codec_python.TRUNCATED: "it ends before its last code",
    codec_python.BAD_CODE: "it holds a code that no writer produces",
    codec_python.BAD_ID: "it holds an id outside the vocabulary",
    codec_python.BAD_VALUE: "it holds a value out of range",
    codec_python.BAD_COUNT: "it claims more entries than k",
    codec_python.BAD_TAIL: "its tail contradicts its number of entries",
    codec_python.TRAILING: "bytes follow its last code",
}
_ENCODE_FAULTS = {
    codec_python.INPUT_ID: "targets.ids: expected ids in [-1, vocab_size)",
    codec_python.INPUT_TWICE: "targets.ids: expected distinct ids, got one twice",
    codec_python.INPUT_VALUE: "targets: expected logprobs and log_tail <= 0 without NaN",
    codec_python.INPUT_MASS: "targets: expected exp(logprobs / T - log_z) and exp(log_tail) to sum to 1 at every temperature",
}


@dataclass(frozen=True)
class Layout:
    """What is the same for every record of a cache; one of the temperatures is 1."""

    k: int
    vocab_size: int
    temperatures: tuple[float, ...]


class Rows(NamedTuple):
    """Contiguous arrays of L tokens: ids int32 [L, k], logprobs float32 [L, k], log_z and log_tail float32 [L, n_T]."""

    ids: np.ndarray
    logprobs: np.ndarray
    log_z: np.ndarray
    log_tail: np.ndarray


class Encoded(NamedTuple):
    """The bytes of a record's targets, what is needed to decode them, and the KL error of every token (float32 [L])."""

    data: bytes
    id_bytes: int
    has_counts: bool
    kl: np.ndarray


def native() -> bool:
    """Whether the C++ codec is built."""
    return _native is not None


def encode(layout: Layout, rows: Rows, max_kl: float, values_bits: int | None) -> Encoded:
    """Rows as bytes with a KL error of at most `max_kl` nats a token, or with `values_bits` bits a value.

    Raises:
        CacheError: the targets are not a distribution over ids of the vocabulary; names the row.
    """
    tokens = len(rows.ids)
    kl = np.empty(tokens, np.float32)
    arrays: tuple[Any, ...] = rows
    out: Any = kl
    run: Any = codec_python.encode
    if _native is not None:
        run, arrays, out = _native.codec_encode, tuple(a.ctypes.data for a in rows), kl.ctypes.data
    temperatures = list(layout.temperatures)
    status, row, data, id_bytes, has_counts = run(
        layout.k, layout.vocab_size, temperatures, tokens, *arrays, max_kl, values_bits or 0, out
    )
    if status:
        raise CacheError(f"{_ENCODE_FAULTS[status]}; row {row} of the record is at fault")
    return Encoded(data, id_bytes, has_counts, kl)


def decode(layout: Layout, data: np.ndarray, id_bytes: int, has_counts: bool, rows: Rows) -> None:
    """Writes the rows that `data` (uint8) holds to `rows`, whose length says how many there are.

    Raises:
        CorruptCache: the bytes are not what an encoder wrote; nothing outside `rows` was touched.
    """
    temperatures = list(layout.temperatures)
    fixed = (layout.k, layout.vocab_size, temperatures, len(rows.ids))
    if _native is not None:
        addresses = (a.ctypes.data for a in rows)
        status, row = _native.codec_decode(*fixed, data.ctypes.data, data.size, id_bytes, has_counts, *addresses)
    else:
        status, row = codec_python.decode(*fixed, data.tobytes(), id_bytes, has_counts, *rows)
    if status:
        raise CorruptCache(f"targets of a record are corrupt at token {row}: {_DECODE_FAULTS[status]}")
