"""`CacheReader`: records of a finished cache, one at a time or decoded straight into a padded batch."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdfast.cache import codec, record
from kdfast.cache.format import IGNORE, KEY_TOKENS, CacheError, CacheInfo, CacheMismatch, CorruptCache, read_manifest
from kdfast.cache.shard import Shard, content_keys
from kdfast.ops.targets import TopKTargets


@dataclass(frozen=True)
class Record:
    """One document of L tokens.

    input_ids int64 [L]; targets rows [L, k], entries in id order; loss_mask bool [L], True where row t counts; labels
    int64 [L] as they were given (-100 for none) or None; context_ids int64 [C] or None.
    """

    input_ids: Tensor
    targets: TopKTargets
    loss_mask: Tensor
    labels: Tensor | None
    context_ids: Tensor | None


@dataclass(frozen=True)
class Batch:
    """B documents padded at their end to the longest, Lmax.

    input_ids int64 [B, Lmax] (0 in the padding); targets [B, Lmax, k] (empty slots and a tail of 1 in the padding);
    loss_mask bool [B, Lmax], True where row t counts; labels int64 [B, Lmax], aligned with the logits, -100 where they
    do not count; attention_mask bool [B, Lmax]. context_ids and context_mask [B, Cmax] when a document has a context.
    """

    input_ids: Tensor
    targets: TopKTargets
    loss_mask: Tensor
    labels: Tensor
    attention_mask: Tensor
    context_ids: Tensor | None = None
    context_mask: Tensor | None = None


class CacheReader:
    """Opens a finished cache. Checksums are verified on every read.

    It may be handed to worker processes (a copy opens the files again) and used from several threads.

    Args:
        path: the cache's folder.
        vocab_size, tokenizer_hash, teacher: what the caller is about to use; None is not compared.

    Raises:
        CacheMismatch: one of them differs from the cache's; names both sides.
        CorruptCache: manifest, shard or index is not what was written.
        CacheError: no cache there, or an unfinished one.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        vocab_size: int | None = None,
        tokenizer_hash: str | None = None,
        teacher: str | None = None,
    ) -> None:
        self.path = Path(path)
        manifest, size = read_manifest(self.path)
        self.settings = manifest.settings
        self.info = CacheInfo.of(manifest, size)
        for name, wanted in (("vocab_size", vocab_size), ("tokenizer_hash", tokenizer_hash), ("teacher", teacher)):
            there = getattr(self.settings, name)
            if wanted is not None and wanted != there:
                raise CacheMismatch(f"{name}: the cache {self.path} was made with {there!r}, asked for {wanted!r}")
        if not manifest.complete:
            raise CacheError(
                f"{self.path}: the capture is not finished ({self.info.records} records so far); run it again to go on"
            )
        self._shards = [Shard(self.path, entry, self.settings) for entry in manifest.shards]
        self._starts = np.cumsum([0, *(entry.records for entry in manifest.shards)])
        self._layout = codec.Layout(self.settings.k, self.settings.vocab_size, self.settings.temperatures)
        self._index: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return CacheReader, (self.path,)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    def lengths(self) -> np.ndarray:
        """Tokens of every record, int64 [len(self)]: for samplers that sort or pack by length."""
        return np.concatenate([np.zeros(0, np.int64), *(s.tokens for s in self._shards)])

    def __getitem__(self, i: int) -> Record:
        """Record i (from the end when negative).

        Raises:
            IndexError: there is no such record. CorruptCache: its bytes are not what was written.
        """
        parts = self._parts(i)
        rows = self._rows((len(parts.input_ids),))
        self._decode(parts, rows)
        mask, _ = _supervision(parts, self.settings.alignment)
        return Record(
            input_ids=torch.from_numpy(parts.input_ids),
            targets=self._targets(rows),
            loss_mask=torch.from_numpy(mask),
            labels=None if parts.labels is None else torch.from_numpy(parts.labels),
            context_ids=None if parts.context_ids is None else torch.from_numpy(parts.context_ids),
        )

    def batch(self, indices: Sequence[int] | Tensor, device: torch.device | str = "cpu") -> Batch:
        """The records at `indices` as one padded batch, decoded in place and copied to `device` once.

        Raises:
            ValueError: indices is empty. IndexError: there is no such record. CorruptCache: as for one record.
        """
        parts = [self._parts(int(i)) for i in indices]
        if not parts:
            raise CacheError("indices: expected one or more record numbers, got none")
        b, longest = len(parts), max(len(p.input_ids) for p in parts)
        rows = self._rows((b, longest))
        ids, valid = np.zeros((b, longest), np.int64), np.zeros((b, longest), bool)
        mask, labels = np.zeros((b, longest), bool), np.full((b, longest), IGNORE, np.int64)
        for i, part in enumerate(parts):
            n = len(part.input_ids)
            self._decode(part, codec.Rows(*(x[i, :n] for x in rows)))
            for x, filler in zip(rows, (-1, -np.inf, 0.0, 0.0), strict=True):
                x[i, n:] = filler
            ids[i, :n], valid[i, :n] = part.input_ids, True
            mask[i, :n], labels[i, :n] = _supervision(part, self.settings.alignment)
        context, context_mask = _pad_contexts(parts)
        batch = Batch(
            *(torch.from_numpy(ids), self._targets(rows), torch.from_numpy(mask), torch.from_numpy(labels)),
            torch.from_numpy(valid),
            context,
            context_mask,
        )
        return batch if torch.device(device).type == "cpu" else _to(batch, device)

    def find(self, input_ids: Tensor) -> int | None:
        """The first record whose input ids are, or start with, `input_ids`; None when there is none.

        From 64 tokens on it looks content keys up; a shorter prefix of a longer document is searched for one by one.
        """
        ids = input_ids.detach().cpu().numpy().astype(np.int64)
        if ids.ndim != 1 or not len(ids):
            raise CacheError(f"input_ids: expected integers [L] with L >= 1, got {list(ids.shape)}")
        whole = len(ids) // KEY_TOKENS
        keys = np.frombuffer(content_keys(ids), "<u8")
        candidates: Iterator[int] | range = self._with_key(keys[max(whole, 1) - 1], max(whole, 1) - 1)
        found = next((i for i in candidates if self._starts_with(i, ids)), None)
        if found is None and not whole:
            found = next((i for i in range(len(self)) if self._starts_with(i, ids)), None)
        return found

    def check_keys(self, i: int, input_ids: Tensor) -> None:
        """Raises CorruptCache unless the keys of record i are those of its input ids."""
        shard, at = self._locate(i)
        if shard.keys[shard.key_offsets[at] : shard.key_offsets[at + 1]].tobytes() != content_keys(input_ids.numpy()):
            raise CorruptCache(f"record {i}: its content keys are not those of its input ids")

    def section_bytes(self, i: int) -> tuple[int, int, int]:
        """Bytes of record i in its id stream, its value stream, and everything else of its payload."""
        shard, at = self._locate(i)
        parts = self._parts(i)
        fixed = len(parts.input_ids) * (1 + 4 * parts.has_counts + 2 * len(self.settings.temperatures))
        values = parts.targets.size - fixed - parts.id_bytes
        return parts.id_bytes, values, int(shard.offsets[at + 1] - shard.offsets[at]) - parts.id_bytes - values

    def _with_key(self, key: np.uint64, position: int) -> Iterator[int]:
        if self._index is None:
            keys = np.concatenate([np.zeros(0, np.uint64), *(s.keys for s in self._shards)])
            counts = np.concatenate([np.zeros(0, np.int64), *(np.diff(s.key_offsets) for s in self._shards)])
            owners = np.repeat(np.arange(len(self)), counts)
            positions = np.arange(len(keys)) - np.repeat(np.cumsum(counts) - counts, counts)
            order = np.argsort(keys, kind="stable")
            self._index = keys[order], owners[order], positions[order]
        keys, owners, positions = self._index
        start, end = np.searchsorted(keys, key, "left"), np.searchsorted(keys, key, "right")
        return (int(owners[i]) for i in range(start, end) if positions[i] == position)

    def _starts_with(self, i: int, ids: np.ndarray) -> bool:
        shard, at = self._locate(i)
        return int(shard.tokens[at]) >= len(ids) and bool((self._parts(i).input_ids[: len(ids)] == ids).all())

    def _locate(self, i: int) -> tuple[Shard, int]:
        n = len(self)
        if not -n <= i < n:
            raise IndexError(f"record {i}: the cache holds {n} records")
        i %= n
        s = int(np.searchsorted(self._starts, i, "right")) - 1
        return self._shards[s], i - int(self._starts[s])

    def _parts(self, i: int) -> record.Parts:
        shard, at = self._locate(i)
        try:
            return record.unpack(shard.read(at), int(shard.tokens[at]))
        except CorruptCache as error:
            raise CorruptCache(f"record {i}: {error}") from None

    def _rows(self, lead: tuple[int, ...]) -> codec.Rows:
        n_t = len(self.settings.temperatures)
        return codec.Rows(
            np.empty((*lead, self.settings.k), np.int32),
            *(np.empty((*lead, n), np.float32) for n in (self.settings.k, n_t, n_t)),
        )

    def _decode(self, parts: record.Parts, rows: codec.Rows) -> None:
        codec.decode(self._layout, parts.targets, parts.id_bytes, parts.has_counts, rows)

    def _targets(self, rows: codec.Rows) -> TopKTargets:
        ids, logprobs, log_z, log_tail = map(torch.from_numpy, rows)
        return TopKTargets(ids, logprobs, log_z, log_tail, self.settings.temperatures, self.settings.vocab_size)


def _supervision(parts: record.Parts, alignment: str) -> tuple[np.ndarray, np.ndarray]:
    """Which rows count, and the label of each row, -100 where it does not count."""
    # The label of a document's last row lies outside the document.
    labels = np.append(parts.input_ids[1:], IGNORE) if parts.labels is None else parts.labels
    if parts.loss_mask is None:
        mask = labels != IGNORE
    else:
        mask = parts.loss_mask if parts.labels is not None else parts.loss_mask & (labels != IGNORE)
    return mask, np.where(mask, labels, IGNORE)


def _pad_contexts(parts: list[record.Parts]) -> tuple[Tensor | None, Tensor | None]:
    contexts = [np.zeros(0, np.int64) if p.context_ids is None else p.context_ids for p in parts]
    longest = max(map(len, contexts))
    if not longest:
        return None, None
    ids, mask = np.zeros((len(parts), longest), np.int64), np.zeros((len(parts), longest), bool)
    for i, context in enumerate(contexts):
        ids[i, : len(context)], mask[i, : len(context)] = context, True
    return torch.from_numpy(ids), torch.from_numpy(mask)


def _to(batch: Batch, device: torch.device | str) -> Batch:
    cuda = torch.device(device).type == "cuda"

    def move(x: Any) -> Any:
        if isinstance(x, TopKTargets):
            values = {name: move(getattr(x, name)) for name in ("ids", "logprobs", "log_z", "log_tail")}
            return dataclasses.replace(x, **values)
        return x if x is None else (x.pin_memory() if cuda else x).to(device, non_blocking=cuda)

    return Batch(**{field.name: move(getattr(batch, field.name)) for field in dataclasses.fields(batch)})
