"""`manifest.json`: which shards a cache has, what they hold, and how well; and files that are found whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdfast.cache.format import FORMAT, KL_EDGES, MANIFEST, READABLE, SHARD_NAME, VERSION, CacheError, CorruptCache, Settings
from kdfast.files import write_parts

_DIGEST = re.compile(rb'"digest": "([0-9a-f]{32})"')


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
    exact_rows: int = 0  # version 1 has none


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
        blank = json.dumps(body, indent=1, allow_nan=False).encode()
        return _DIGEST.sub(b'"digest": "' + digest(blank).encode() + b'"', blank)

    @classmethod
    def from_bytes(cls, data: bytes, where: Path | str) -> Manifest:
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
            if body["version"] not in READABLE:
                versions = " and ".join(map(str, READABLE))
                raise CacheError(f"{where}: this kdfast reads format versions {versions}, the cache has {body['version']!r}")
            settings = dict(body["settings"], temperatures=tuple(body["settings"]["temperatures"]))
            shards = tuple(ShardEntry(**dict(s, kl_histogram=tuple(s["kl_histogram"]))) for s in body["shards"])
            manifest = cls(Settings(**settings), shards, bool(body["complete"]), body["group_size"])
        except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CorruptCache(f"{where}: the manifest lacks or mistypes a field: {error!r}") from error
        _check_shards(manifest.shards, where)
        return manifest


def _check_shards(shards: tuple[ShardEntry, ...], where: Path | str) -> None:
    for shard in shards:
        # A name from a file must not lead out of the cache's folder.
        if not isinstance(shard.name, str) or not SHARD_NAME.fullmatch(shard.name):
            raise CorruptCache(f"{where}: expected a shard name like shard-00000.safetensors, got {shard.name!r}")
        sizes = (shard.records, shard.tokens, shard.bytes, shard.exact_rows, *shard.kl_histogram)
        if not all(isinstance(n, int) and n >= 0 for n in sizes) or len(shard.kl_histogram) != len(KL_EDGES) + 1:
            raise CorruptCache(f"{where}: the counts of {shard.name} are not whole numbers >= 0")
    if len({s.name for s in shards}) < len(shards):
        raise CorruptCache(f"{where}: a shard is listed twice")


@dataclass(frozen=True)
class CacheInfo:
    """What is known of a cache without reading its records.

    kl_mean, kl_max: measured KL(exact || decoded) of a token over its entries and the tail, nats, the worst of the
    temperatures. bytes: everything on disk. kl_histogram: tokens between the edges `KL_EDGES`, one bin below, one above.
    exact_rows: tokens whose values are stored as they were given, because no levels keep `max_kl` for them.
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
    exact_rows: int = 0

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
            exact_rows=sum(s.exact_rows for s in shards),
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
        parts = any(folder.glob("part-*-of-*"))
        remedy = "join the parts that lie in it with `kdfast cache merge`" if parts else "make one with `kdfast cache build`"
        raise CacheError(f"{folder}: no teacher cache here (it has no {MANIFEST}); {remedy}") from None
    return Manifest.from_bytes(data, path), len(data)


def is_unfinished(folder: Path) -> bool:
    """Whether a capture into this folder was begun and did not come to its end.

    Raises:
        CorruptCache: the manifest is not what was written.
    """
    return (folder / MANIFEST).is_file() and not read_manifest(folder)[0].complete


def write_atomically(path: Path, parts: Iterable[Any]) -> None:
    """Writes `path` so that it is found whole or not at all, under the temporary name that the format prescribes.

    Two processes must not write one file: whoever calls holds the lock on the cache's folder.
    """
    write_parts(path, parts, path.with_name(path.name + ".tmp"))
