"""What the record codec computes with: packed integers, XXH64, and exp and log of which every operation is fixed.

docs/cache-format.md is the specification; `csrc/cpu/codec_math.h` and `csrc/checksum.h` are the same in C++.
"""

from __future__ import annotations

import math
import struct

import numpy as np

MAX_LEVEL, BLOCK, PLACE_BITS, MAX_PATCHES = 65535, 64, 6, 63
TAIL_NONE, TAIL_ALL, TAIL_LEAST, TAIL_MANTISSA = 0, 65535, -96, 9
_F = np.float32
_EXP = [_F(c) for c in (0.0013950476422905922, 0.00836888886988163, 0.04166620597243309, 0.166665181517601, 0.5)]
_LOG = [
    _F(c)
    for c in (
        -0.07634081691503525, 0.1276140958070755, -0.13160260021686554, 0.14201785624027252,
        -0.16623352468013763, 0.20001225173473358, -0.250008225440979, 0.3333333134651184,
    )
]  # fmt: skip


def exp_fixed(x: np.ndarray) -> np.ndarray:
    """exp of float32 values clamped to [-87, 88], by the operations of the specification."""
    x = np.clip(x, _F(-87), _F(88))
    n = (x * _F(1.44269504) + _F(12582912)) - _F(12582912)
    r = (x - n * _F(0.693359375)) - n * _F(-2.12194440e-4)
    y = np.full_like(r, _EXP[0])
    for c in _EXP[1:]:
        y = y * r + c
    y = (y * (r * r) + r) + _F(1)
    return y * ((n.astype(np.int32) + 127) << 23).view(np.float32)


def log_fixed(x: np.ndarray) -> np.ndarray:
    """log of normal float32 values above 0, by the operations of the specification."""
    shifted = np.ascontiguousarray(x).view(np.uint32) - np.uint32(0x3F3504F3)
    n = (shifted.view(np.int32) >> 23).astype(np.float32)
    f = ((shifted & np.uint32(0x007FFFFF)) + np.uint32(0x3F3504F3)).view(np.float32) - _F(1)
    y = np.full_like(f, _LOG[0])
    for c in _LOG[1:]:
        y = y * f + c
    f2 = f * f
    return n * _F(0.693145752) + (n * _F(1.42860677e-6) + ((y * f) * f2 - f2 * _F(0.5) + f))


def log_of(x: float) -> np.float32:
    return np.float32(log_fixed(np.array([x], np.float32))[0])


def sum16(x: np.ndarray) -> float:
    """Float64 sum of entry i in partial sum i mod 16, then a tree."""
    wide = np.zeros((-(-len(x) // 16), 16))
    wide.reshape(-1)[: len(x)] = x
    sums = np.zeros(16)
    for part in wide:
        sums += part
    while len(sums) > 1:
        sums = sums[: len(sums) // 2] + sums[len(sums) // 2 :]
    return float(sums[0])


def tail_mass(code: int) -> tuple[float, float]:
    """Mass of the tail and of the entries."""
    if code == TAIL_NONE:
        return 0.0, 1.0
    if code == TAIL_ALL:
        return 1.0, 0.0
    odds = math.ldexp(1 + (code & 511) / 512, (code >> TAIL_MANTISSA) + TAIL_LEAST)
    return odds / (1.0 + odds), 1.0 / (1.0 + odds)


def tail_code(tail: float, rest: float, empty: bool) -> int:
    if empty:
        return TAIL_ALL
    if not tail > 0:
        return TAIL_NONE
    (bits,) = struct.unpack("<Q", struct.pack("<d", tail / rest if rest > 0 else math.inf))
    code = ((bits + (1 << 42)) >> 43) - ((1023 + TAIL_LEAST) << TAIL_MANTISSA)
    return min(max(code, 1), TAIL_ALL - 1)


def count_width(k: int) -> int:
    """Bytes of a row's count."""
    return 1 if k < 256 else 2 if k < 65536 else 4


def low_width(vocab: int, count: int) -> int:
    return (vocab // count).bit_length() - 1


def id_bytes(vocab: int, count: int) -> int:
    """Bytes that the ids of a row take."""
    width = low_width(vocab, count)
    return (count * width + 7) // 8 + (count + ((vocab - 1) >> width) + 7) // 8


def exact_bytes(count: int, n_t: int) -> int:
    """Bytes of the values of a row that is stored exactly."""
    return 4 * (count + 2 * n_t)


def unpack_bits(data: bytes, width: int, count: int) -> np.ndarray:
    """`count` numbers of `width` bits, lowest bit first."""
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=count * width, bitorder="little").reshape(count, width)
    return bits.astype(np.int64) @ (1 << np.arange(width, dtype=np.int64))


def pack_bits(values: np.ndarray, width: int) -> bytes:
    bits = (np.asarray(values, np.int64)[:, None] >> np.arange(width)) & 1
    return np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little").tobytes()


_P = (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5)
_U64 = 2**64 - 1


def _rotate(x: int, bits: int) -> int:
    return (x << bits | x >> (64 - bits)) & _U64


def _round(total: int, word: int) -> int:
    return _rotate((total + word * _P[1]) & _U64, 31) * _P[0] & _U64


def xxh64(data: bytes) -> int:
    """XXH64 with seed 0, as its public specification defines it."""
    whole, at = len(data) // 32 * 32, 0
    value = _P[4]
    if whole:
        sums = [(_P[0] + _P[1]) & _U64, _P[1], 0, -_P[0] & _U64]
        for stripe in struct.iter_unpack("<4Q", data[:whole]):
            sums = [_round(s, w) for s, w in zip(sums, stripe, strict=True)]
        value = sum(_rotate(s, r) for s, r in zip(sums, (1, 7, 12, 18), strict=True)) & _U64
        for s in sums:
            value = ((value ^ _round(0, s)) * _P[0] + _P[3]) & _U64
        at = whole
    value = (value + len(data)) & _U64
    while len(data) - at >= 8:
        value = (_rotate(value ^ _round(0, int.from_bytes(data[at : at + 8], "little")), 27) * _P[0] + _P[3]) & _U64
        at += 8
    if len(data) - at >= 4:
        word = int.from_bytes(data[at : at + 4], "little")
        value = (_rotate(value ^ (word * _P[0] & _U64), 23) * _P[1] + _P[2]) & _U64
        at += 4
    for byte in data[at:]:
        value = _rotate(value ^ (byte * _P[4] & _U64), 11) * _P[0] & _U64
    value = (value ^ value >> 33) * _P[1] & _U64
    value = (value ^ value >> 29) * _P[2] & _U64
    return value ^ value >> 32
