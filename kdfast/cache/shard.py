"""A shard: many records in one safetensors file, with the index that finds, identifies and checks them."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdfast.cache import codec
from kdfast.cache.format import KEY_TOKENS, READABLE, CacheError, CorruptCache, Settings
from kdfast.cache.manifest import ShardEntry, digest, write_atomically

_HEADER_LENGTH = struct.Struct("<Q")
_DTYPES = {
    "checksums": "U64", "contexts": "I64", "key_offsets": "I64", "keys": "U64",
    "offsets": "I64", "payload": "U8", "tokens": "I64",
}  # fmt: skip


def content_keys(input_ids: np.ndarray) -> bytes:
    """One 8-byte key for every 64 tokens (the last may have fewer), each chained to the one before.

    Equals key_i = blake2b(key_(i-1) + ids[64 i : 64 i + 64] as little-endian int32, 8 bytes), key_(-1) = 8 zero bytes.
    """
    data = memoryview(np.ascontiguousarray(input_ids, dtype="<i4").tobytes())
    keys, key = [], bytes(8)
    for start in range(0, len(data), 4 * KEY_TOKENS):
        key = hashlib.blake2b(key + data[start : start + 4 * KEY_TOKENS], digest_size=8).digest()
        keys.append(key)
    return b"".join(keys)


class Pending(NamedTuple):
    """A record on its way into a shard."""

    payload: bytes
    tokens: int
    contexts: int
    keys: bytes
    exact_rows: int  # tokens whose values are stored as they were given


def write_shard(path: Path, settings: Settings, records: list[Pending]) -> tuple[int, str]:
    """Writes a shard and returns its size in bytes and its index digest."""
    _safetensors()  # a capture that nobody here could read should not begin
    tensors = {
        "offsets": np.cumsum([0, *(len(r.payload) for r in records)], dtype=np.int64),
        "tokens": np.array([r.tokens for r in records], np.int64),
        "contexts": np.array([r.contexts for r in records], np.int64),
        "key_offsets": np.cumsum([0, *(len(r.keys) // 8 for r in records)], dtype=np.int64),
        "keys": np.frombuffer(b"".join(r.keys for r in records), "<u8"),
        "checksums": np.array([codec.checksum(r.payload) for r in records], np.uint64),
    }
    head, index = _header(settings, tensors, sum(len(r.payload) for r in records)), [x.tobytes() for x in tensors.values()]
    write_atomically(path, [head, *index, *(r.payload for r in records)])
    return len(head) + sum(map(len, index)) + sum(len(r.payload) for r in records), digest(head, *index)


def _header(settings: Settings, tensors: dict[str, np.ndarray], payload: int) -> bytes:
    """Header of a safetensors file with the tensors in their order and the payload last, the same for the same content."""
    entries: dict[str, Any] = {"__metadata__": settings.as_metadata()}
    at = 0
    for name, array in tensors.items():
        entries[name] = {"dtype": _DTYPES[name], "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    entries["payload"] = {"dtype": _DTYPES["payload"], "shape": [payload], "data_offsets": [at, at + payload]}
    text = json.dumps(entries, allow_nan=False).encode()
    text += b" " * (-len(text) % 8)
    return _HEADER_LENGTH.pack(len(text)) + text


def _payload_span(data: memoryview) -> tuple[int, int]:
    """Where the payload lies in a safetensors file that has already passed its parser."""
    (length,) = _HEADER_LENGTH.unpack_from(data)
    start, end = json.loads(bytes(data[8 : 8 + length]))["payload"]["data_offsets"]
    return 8 + length + start, 8 + length + end


class Shard:
    """A finished shard, mapped into memory.

    Raises (all of it before a record is read):
        CorruptCache: file, header or index is not what the manifest lists, or contradicts itself.
    """

    def __init__(self, folder: Path, entry: ShardEntry, settings: Settings) -> None:
        self.path = folder / entry.name
        self._settings = settings
        tensors = self._read_index(entry)
        self.offsets, self.tokens = tensors["offsets"], tensors["tokens"]
        self.contexts, self.key_offsets = tensors["contexts"], tensors["key_offsets"]
        self.checksums, self.keys = tensors["checksums"], tensors["keys"]
        self._check_index(entry)

    def _read_index(self, entry: ShardEntry) -> dict[str, np.ndarray]:
        safetensors = _safetensors()
        try:
            size = self.path.stat().st_size
            if size != entry.bytes:
                raise CorruptCache(f"{self.path}: expected {entry.bytes} bytes, got {size}")
            with safetensors.safe_open(self.path, framework="numpy") as file:
                metadata = file.metadata() or {}
                dtypes = {name: file.get_slice(name).get_dtype() for name in sorted(file.keys())}
                if dtypes != _DTYPES:
                    raise CorruptCache(f"{self.path}: expected the tensors {_DTYPES} of a shard, got {dtypes}")
                tensors = {name: file.get_tensor(name) for name in file.keys() if name != "payload"}  # noqa: SIM118
        except FileNotFoundError:
            raise CorruptCache(f"{self.path}: the manifest lists this shard, but it is gone") from None
        except safetensors.SafetensorError as error:
            raise CorruptCache(f"{self.path}: not a safetensors file: {error}") from error
        data = np.memmap(self.path, np.uint8, mode="r").view(np.ndarray)
        start, end = _payload_span(data.data)
        if digest(data[:start], data[end:]) != entry.index_digest:
            raise CorruptCache(f"{self.path}: header or index does not match the digest in the manifest")
        # A capture that an older kdfast began holds shards of both versions.
        if metadata not in [{**self._settings.as_metadata(), "version": str(version)} for version in READABLE]:
            raise CorruptCache(f"{self.path}: the shard was made with other settings than the manifest says")
        self.payload = data[start:end]
        return tensors

    def _check_index(self, entry: ShardEntry) -> None:
        n = entry.records
        if self.keys.ndim != 1:
            raise CorruptCache(f"{self.path}: expected keys of shape [m], got {list(self.keys.shape)}")
        shapes = {"offsets": (n + 1,), "key_offsets": (n + 1,), "tokens": (n,), "contexts": (n,), "checksums": (n,)}
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise CorruptCache(f"{self.path}: expected {name} of shape {shape}, got {getattr(self, name).shape}")
        # Every token takes bytes, so a count that the payload cannot hold is refused before anything is allocated.
        least = 1 + 2 * len(self._settings.temperatures)
        sizes = np.diff(self.offsets)
        sound = (
            self.offsets[0] == 0
            and self.offsets[-1] == self.payload.size
            and (self.offsets[1:] > self.offsets[:-1]).all()
            and (self.tokens > 0).all()
            and (self.tokens <= sizes // least).all()
            and (self.contexts >= 0).all()
            and (self.contexts <= sizes).all()
            and self.tokens.sum() == entry.tokens
            and self.key_offsets[0] == 0
            and self.key_offsets[-1] == self.keys.size
            and (np.diff(self.key_offsets) == -(-self.tokens // KEY_TOKENS)).all()
        )
        if not sound:
            raise CorruptCache(f"{self.path}: the index contradicts itself or the manifest")

    def jobs(self) -> np.ndarray:
        """What `codec.decode_batch` needs to know of every record, int64 [n, 8]; the columns from `at` on are open."""
        jobs = np.zeros((len(self.tokens), len(codec.JOB)), np.int64)
        jobs[:, 0] = self.payload.ctypes.data + self.offsets[:-1]
        jobs[:, 1:5] = np.stack([np.diff(self.offsets), self.tokens, self.contexts, self.checksums.view(np.int64)], 1)
        return jobs

    def bytes_of(self, i: int) -> np.ndarray:
        """Payload of record i, nothing verified."""
        return self.payload[self.offsets[i] : self.offsets[i + 1]]

    def read(self, i: int) -> np.ndarray:
        """Payload of record i, its checksum verified."""
        payload = self.bytes_of(i)
        if codec.checksum(payload) != int(self.checksums[i]):
            raise CorruptCache(f"{self.path}: record {i} does not match its checksum; capture it again or restore the file")
        return payload


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise CacheError("the teacher cache needs safetensors: pip install 'kdfast[train]'") from error
    return safetensors
