"""The teacher cache on disk: names, typed errors, the manifest. docs/cache-format.md is the specification."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = "kdfast-cache"
VERSION = 1
MANIFEST = "manifest.json"
SHARD_NAME = re.compile(r"shard-\d{5,9}\.safetensors")
LEFTOVER = re.compile(r"(shard-\d{5,9}\.safetensors|manifest\.json)\.tmp")
ALIGNMENTS = ("next", "same")
MAX_VOCAB = 1 << 24
KEY_TOKENS = 64
IGNORE = -100

#: Edges of the histogram of the KL error of single tokens, nats; one bin below and one above them.
KL_EDGES = np.power(10.0, np.arange(-8, -1.75, 0.25))

_DIGEST = re.compile(rb'"digest": "([0-9a-f]{32})"')


class CacheError(ValueError):
    """A teacher cache cannot be written or used as asked."""


class CorruptCache(CacheError):
    """The bytes on disk are not those that were written."""


class CacheMismatch(CacheError):
    """The cache is sound but was made with other settings than asked for."""


class AlignmentError(CacheError):
    """The targets do not belong to the labels they are trained against."""


@dataclass(frozen=True)
class Settings:
    """What is the same for every record of a cache.

    Args:
        vocab_size: the teacher's V, at most 2^24.
        k: entries a token, 0 < k <= V.
        teacher: any text that identifies the teacher.
        tokenizer_hash: any text that identifies the tokenizer.
        temperatures: at which log_z and log_tail are kept; 1 must be among them.
        max_kl: limit of KL(exact || decoded) of a token over entries and tail, nats, at every temperature.
        values_bits: bits of a value before entropy coding, in the place of max_kl.
        alignment: `next`: row t predicts token t + 1; `same`: row t predicts position t.
        kind: `topk`, the only one so far.

    Raises:
        ValueError: a value is out of range.
    """

    vocab_size: int
    k: int
    teacher: str
    tokenizer_hash: str
    temperatures: tuple[float, ...] = (1.0,)
    max_kl: float = 5e-5
    values_bits: int | None = None
    alignment: str = "next"
    kind: str = "topk"

    def __post_init__(self) -> None:
        if not 0 < self.vocab_size <= MAX_VOCAB:
            raise CacheError(f"vocab_size: expected 1 to {MAX_VOCAB}, got {self.vocab_size}")
        if not 0 < self.k <= self.vocab_size:
            raise CacheError(f"k: expected 0 < k <= {self.vocab_size} (the vocabulary), got {self.k}")
        if not all(t > 0 and math.isfinite(t) for t in self.temperatures) or len(set(self.temperatures)) < len(
            self.temperatures
        ):
            raise CacheError(f"temperatures: expected distinct finite numbers above 0, got {self.temperatures}")
        if 1.0 not in self.temperatures:
            raise CacheError(f"temperatures: expected 1.0 among them (values are kept at T = 1), got {self.temperatures}")
        if not 0 < self.max_kl < math.inf:
            raise CacheError(f"max_kl: expected nats above 0, got {self.max_kl}")
        if self.values_bits is not None and not 1 <= self.values_bits <= 16:
            raise CacheError(f"values_bits: expected 1 to 16 or None, got {self.values_bits}")
        if self.alignment not in ALIGNMENTS:
            raise CacheError(f"alignment: expected one of {', '.join(ALIGNMENTS)}, got {self.alignment!r}")
        if self.kind != "topk":
            raise CacheError(f"kind: this version of kdfast knows topk, got {self.kind!r}")

    def as_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "temperatures": list(self.temperatures)}

    def as_metadata(self) -> dict[str, str]:
        """As the text values of a safetensors header."""
        own = {name: json.dumps(value) for name, value in self.as_json().items()}
        return {"format": FORMAT, "version": str(VERSION), **own}

    def differences(self, other: Settings) -> list[str]:
        """`name: mine != theirs` for every field that differs."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self))
        return [f"{name} {a!r} != {b!r}" for name, a, b in pairs if a != b]


@dataclass(frozen=True)
class ShardEntry:
    """One finished shard in the manifest; `index_digest` covers every byte of the file outside its payload."""

    name: str
    records: int
    tokens: int
    bytes: int
    index_digest: str
    kl_sum: float
    kl_max: float
    kl_histogram: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`: settings, finished shards, and whether the capture came to its end."""

    settings: Settings
    shards: tuple[ShardEntry, ...] = ()
    complete: bool = False
    group_size: int | None = None

    def to_bytes(self) -> bytes:
        body = {
            "format": FORMAT,
            "version": VERSION,
            "complete": self.complete,
            "group_size": self.group_size,
            "settings": self.settings.as_json(),
            "shards": [dataclasses.asdict(s) for s in self.shards],
            "digest": "0" * 32,
        }
        blank = json.dumps(body, indent=1).encode()
        return _DIGEST.sub(b'"digest": "' + digest(blank).encode() + b'"', blank)

    @classmethod
    def from_bytes(cls, data: bytes, where: Path) -> Manifest:
        """Checks the digest, then every field.

        Raises:
            CorruptCache: digest or structure is wrong. CacheError: a newer version wrote it.
        """
        found = _DIGEST.findall(data)
        if len(found) != 1 or digest(_DIGEST.sub(b'"digest": "' + b"0" * 32 + b'"', data)) != found[0].decode():
            raise CorruptCache(f"{where}: the manifest does not match its own digest; copy it again from its source")
        try:
            body = json.loads(data)
            if body["format"] != FORMAT:
                raise CorruptCache(f"{where}: expected format {FORMAT!r}, got {body['format']!r}")
            if body["version"] != VERSION:
                raise CacheError(f"{where}: this kdfast reads format version {VERSION}, the cache has {body['version']!r}")
            settings = dict(body["settings"], temperatures=tuple(body["settings"]["temperatures"]))
            shards = tuple(ShardEntry(**dict(s, kl_histogram=tuple(s["kl_histogram"]))) for s in body["shards"])
            manifest = cls(Settings(**settings), shards, bool(body["complete"]), body["group_size"])
        except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CorruptCache(f"{where}: the manifest lacks or mistypes a field: {error!r}") from error
        _check_shards(manifest.shards, where)
        return manifest


def _check_shards(shards: tuple[ShardEntry, ...], where: Path) -> None:
    for shard in shards:
        # A name from a file must not lead out of the cache's folder.
        if not isinstance(shard.name, str) or not SHARD_NAME.fullmatch(shard.name):
            raise CorruptCache(f"{where}: expected a shard name like shard-00000.safetensors, got {shard.name!r}")
        sizes = (shard.records, shard.tokens, shard.bytes, *shard.kl_histogram)
        if not all(isinstance(n, int) and n >= 0 for n in sizes) or len(shard.kl_histogram) != len(KL_EDGES) + 1:
            raise CorruptCache(f"{where}: the counts of {shard.name} are not whole numbers >= 0")
    if len({s.name for s in shards}) < len(shards):
        raise CorruptCache(f"{where}: a shard is listed twice")


@dataclass(frozen=True)
class CacheInfo:
    """What is known of a cache without reading its records.

    kl_mean, kl_max: measured KL(exact || decoded) of a token over its entries and the tail, nats, the worst of the
    temperatures. bytes: everything on disk. kl_histogram: tokens between the edges `KL_EDGES`, one bin below, one above.
    """

    settings: Settings
    records: int
    tokens: int
    shards: int
    bytes: int
    kl_mean: float
    kl_max: float
    kl_histogram: tuple[int, ...]
    complete: bool

    vocab_size = property(lambda self: self.settings.vocab_size)
    k = property(lambda self: self.settings.k)
    kind = property(lambda self: self.settings.kind)
    teacher = property(lambda self: self.settings.teacher)
    tokenizer_hash = property(lambda self: self.settings.tokenizer_hash)
    temperatures = property(lambda self: self.settings.temperatures)
    alignment = property(lambda self: self.settings.alignment)

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens if self.tokens else 0.0

    @classmethod
    def of(cls, manifest: Manifest, manifest_bytes: int) -> CacheInfo:
        shards = manifest.shards
        tokens = sum(s.tokens for s in shards)
        histograms = np.array([[0] * (len(KL_EDGES) + 1), *(s.kl_histogram for s in shards)], np.int64)
        return cls(
            settings=manifest.settings,
            records=sum(s.records for s in shards),
            tokens=tokens,
            shards=len(shards),
            bytes=sum(s.bytes for s in shards) + manifest_bytes,
            kl_mean=sum(s.kl_sum for s in shards) / tokens if tokens else 0.0,
            kl_max=max((s.kl_max for s in shards), default=0.0),
            kl_histogram=tuple(histograms.sum(0).tolist()),
            complete=manifest.complete,
        )

    def as_json(self) -> dict[str, Any]:
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "settings"}
        return {**self.settings.as_json(), **own, "bytes_per_token": self.bytes_per_token}


def digest(*parts: Any) -> str:
    """blake2b of the parts in turn, 16 bytes, as hexadecimal digits."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(part)
    return state.hexdigest()


def read_manifest(folder: Path) -> tuple[Manifest, int]:
    """The manifest of a cache and its size in bytes.

    Raises:
        CacheError: there is none. CorruptCache: it is not what was written.
    """
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise CacheError(
            f"{folder}: no teacher cache here (it has no {MANIFEST}); make one with `kdfast cache build`"
        ) from None
    return Manifest.from_bytes(data, path), len(data)


def write_atomically(path: Path, parts: Iterable[Any]) -> None:
    """Writes `path` so that it is found whole or not at all, whatever happens meanwhile."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
