"""`CacheReader`: records of a finished cache, one at a time or decoded straight into a padded batch."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdfast.cache import codec, codec_math, record
from kdfast.cache.background import Ahead
from kdfast.cache.batch import Batch, Plan, Staged, stage, where_to_decode
from kdfast.cache.format import KEY_TOKENS, CacheError, CacheMismatch, CorruptCache
from kdfast.cache.manifest import CacheInfo, read_manifest
from kdfast.cache.remote import local_copy
from kdfast.cache.shard import Shard, content_keys
from kdfast.ops.targets import TopKTargets

_TOKENS, _CONTEXTS, _AT, _ROOM = (codec.JOB.index(n) for n in ("tokens", "contexts", "at", "room"))


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


class Batches(Iterator[Batch]):
    """What `CacheReader.batches` returns: an iterator of batches that is closed with `close()` or a `with` block."""

    def __init__(
        self, reader: CacheReader, index_lists: Iterable[Any], prefetch: int, threads: int, device: torch.device | str,
        decode: str, pack: int | None,
    ) -> None:  # fmt: skip
        stage = reader.stage if pack is None else functools.partial(reader.stage_packed, length=pack)
        self._staged = Ahead(functools.partial(stage, decode=decode, pin=_pins(device)), index_lists, prefetch, threads)
        self._device = device

    def __next__(self) -> Batch:
        return next(self._staged).to(self._device).batch()

    def close(self) -> None:
        """Drops what was read ahead and waits for the threads."""
        self._staged.close()

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _pins(device: torch.device | str) -> bool:
    return torch.device(device).type == "cuda"


class CacheReader:
    """Opens a finished cache. Checksums are verified on every read.

    It may be handed to worker processes (a copy opens the files again) and used from several threads.

    Args:
        path: the cache's folder, or a URL that fsspec knows: it is copied once to KDFAST_CACHE_DIR (`remote.Remote`).
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
        self.path = local_copy(path)
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
        self._entries = manifest.shards
        self._shards = [Shard(self.path, entry, self.settings) for entry in manifest.shards]
        self._starts = np.cumsum([0, *(entry.records for entry in manifest.shards)])
        self._layout = codec.layout_of(self.settings)
        self._jobs = np.concatenate([np.zeros((0, len(codec.JOB)), np.int64), *(s.jobs() for s in self._shards)])
        self._index: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return CacheReader, (self.path,)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    def lengths(self) -> np.ndarray:
        """Tokens of every record, int64 [len(self)]: for samplers that sort or pack by length."""
        return self._jobs[:, _TOKENS].copy()

    def context_lengths(self) -> np.ndarray:
        """Context ids of every record, int64 [len(self)], 0 where it has none."""
        return self._jobs[:, _CONTEXTS].copy()

    def __getitem__(self, i: int) -> Record:
        """Record i (from the end when negative).

        Raises:
            IndexError: there is no such record. CorruptCache: its bytes are not what was written.
        """
        shard, at = self._locate(i)
        batch = self.batch([i])
        assert isinstance(batch.targets, TopKTargets)
        # The batch has verified and parsed the record; its labels are masked, those given need not be.
        labels, context_ids = record.given(shard.bytes_of(at), int(shard.tokens[at]), int(shard.contexts[at]))
        return Record(
            input_ids=batch.input_ids[0],
            targets=batch.targets[0],
            loss_mask=batch.loss_mask[0],
            labels=None if labels is None else torch.from_numpy(labels),
            context_ids=None if context_ids is None else torch.from_numpy(context_ids),
        )

    def batch(
        self, indices: Sequence[int] | Tensor, device: torch.device | str = "cpu", threads: int = 1, decode: str = "auto"
    ) -> Batch:
        """The records at `indices` as one padded batch, put together in place and copied to `device` once.

        Args:
            threads: how many check and decode at the same time.
            decode: where targets become floats, the same wherever it is. "host": here, all of them then travel; "device": their
                bytes travel, a third, and are decoded there; "loss": the same, but not before a loss reads them
                (`EncodedTargets`); "auto": "device" on a GPU, else "host".

        Raises:
            ValueError: indices is empty. IndexError: there is no such record. CorruptCache: as for one record.
        """
        return self.stage(indices, threads, where_to_decode(decode, device), _pins(device)).to(device).batch()

    def stage(self, indices: Sequence[int] | Tensor, threads: int = 1, decode: str = "host", pin: bool = False) -> Staged:
        """The first half of `batch`, all that a host does: `stage(...).to(device).batch()` is the batch."""
        numbers = self._numbers(indices)
        jobs = self._jobs[numbers]
        longest = int(jobs[:, _TOKENS].max())
        jobs[:, _AT], jobs[:, _ROOM] = np.arange(len(jobs)) * longest, longest
        return self._stage(Plan(jobs, (len(jobs), longest), int(jobs[:, _CONTEXTS].max())), numbers, threads, decode, pin)

    def packed(
        self,
        groups: Sequence[Sequence[int]],
        length: int,
        device: torch.device | str = "cpu",
        threads: int = 1,
        decode: str = "auto",
    ) -> Batch:
        """Rows of `length` tokens, each the records of one group end to end, with position_ids and document_ids.

        A record longer than what is left of its row is cut there; its last row keeps its label. `threads` and `decode` are
        those of `batch`.

        Raises:
            ValueError: a group is empty, a record would begin beyond the row, or a record has a context.
            IndexError, CorruptCache: as for `batch`.
        """
        return self.stage_packed(groups, length, threads, where_to_decode(decode, device), _pins(device)).to(device).batch()

    def stage_packed(
        self, groups: Sequence[Sequence[int]], length: int, threads: int = 1, decode: str = "host", pin: bool = False
    ) -> Staged:
        """The first half of `packed`, as `stage` is of `batch`."""
        counts = [len(group) for group in groups]
        numbers = self._numbers([i for group in groups for i in group])
        jobs, row = self._jobs[numbers], np.repeat(np.arange(len(groups)), counts)
        if min(counts) < 1 or jobs[:, _CONTEXTS].any():
            raise CacheError("groups: expected one or more records in each, none of them with a context")
        first = np.cumsum([0, *counts[:-1]])
        ends = jobs[:, _TOKENS].cumsum()
        start = ends - jobs[:, _TOKENS] - np.repeat((ends - jobs[:, _TOKENS])[first], counts)
        if start.max() >= length:
            raise CacheError(f"groups: expected records that begin within {length} tokens, got one at {int(start.max())}")
        last = np.append(row[1:] != row[:-1], True)
        kept = np.minimum(jobs[:, _TOKENS], length - start)
        jobs[:, _AT], jobs[:, _ROOM] = row * length + start, np.where(last, length - start, kept)
        fill = jobs[:, _ROOM]
        positions = np.arange(fill.sum()) - np.repeat(fill.cumsum() - fill, fill)
        padding = positions >= np.repeat(kept, fill)
        documents = np.where(padding, -1, np.repeat(np.arange(len(jobs)) - np.repeat(first, counts), fill))
        shape = (len(groups), length)
        extra = {"position_ids": np.where(padding, 0, positions), "document_ids": documents}
        plan = Plan(jobs, shape, extra={name: x.reshape(shape) for name, x in extra.items()})
        return self._stage(plan, numbers, threads, decode, pin)

    def batches(
        self,
        index_lists: Iterable[Any],
        *,
        prefetch: int = 2,
        threads: int = 1,
        device: torch.device | str = "cpu",
        decode: str = "auto",
        pack: int | None = None,
    ) -> Batches:
        """`(self.batch(indices, device, decode=decode) for indices in index_lists)`, read ahead by threads.

        While one batch is used the next ones are read, checked and decoded, for a GPU into pinned memory; they are copied when
        they are taken, on the stream of whoever takes them. The iterator can be closed early (`close()`, or a `with` block).

        Args:
            index_lists: record numbers of each batch, or with `pack` its groups of record numbers; may be endless. They are
                asked for in the caller's thread, up to `prefetch` + 1 ahead.
            prefetch: batches that wait at most; 0: none is read before it is taken.
            threads: how many batches are read at the same time.
            device, decode: as in `batch`.
            pack: tokens of a packed row: batches are `self.packed(groups, pack, ...)` then.

        Raises:
            CacheError: an option is out of range. While batches are taken: as `batch` and `packed`, at the batch concerned.
        """
        for name, value, least in (("prefetch", prefetch, 0), ("threads", threads, 1), ("pack", pack or pack is None, 1)):
            if value < least:
                raise CacheError(f"{name}: expected {least} or more, got {value}")
        return Batches(self, index_lists, prefetch, threads, device, where_to_decode(decode, device), pack)

    def _numbers(self, indices: Sequence[int] | Tensor) -> np.ndarray:
        numbers = np.asarray(indices, np.int64)
        if not numbers.size:
            raise CacheError("indices: expected one or more record numbers, got none")
        wrong = (numbers < -len(self)) | (numbers >= len(self))
        if wrong.any():
            raise IndexError(f"record {int(numbers[wrong][0])}: the cache holds {len(self)} records")
        return numbers % len(self)

    def _stage(self, plan: Plan, numbers: np.ndarray, threads: int, decode: str, pin: bool) -> Staged:
        if threads < 1:
            raise CacheError(f"threads: expected 1 or more, got {threads}")
        try:
            return stage(self._layout, plan, self.settings.alignment == "next", threads, decode, pin)
        except CorruptCache as error:
            shard, at = self._locate(int(numbers[error.job]))
            raise CorruptCache(f"record {int(numbers[error.job])} ({shard.path}, record {at}): {error}") from None

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

    def check_exact_rows(self) -> None:
        """Raises CorruptCache unless every shard has as many exact rows as the manifest says."""
        for entry, shard in zip(self._entries, self._shards, strict=True):
            found = sum(codec.count_exact(self._layout, job[None]) for job in shard.jobs())
            if found != entry.exact_rows:
                raise CorruptCache(f"{shard.path}: the manifest says {entry.exact_rows} exact rows, the shard has {found}")

    def section_bytes(self, i: int) -> tuple[int, int, int]:
        """Bytes of record i in its targets' ids, in their values, and everything else of its payload."""
        shard, at = self._locate(i)
        parts = self._parts(i)
        counts = (self[i].targets.ids >= 0).sum(-1).tolist()
        ids = sum(codec_math.id_bytes(self.settings.vocab_size, n) for n in counts if n)
        fixed = len(counts) * (
            (codec_math.count_width(self.settings.k) if parts.has_counts else 0) + 2 * len(self.settings.temperatures)
        )
        values = parts.targets.size - fixed - ids
        return ids, values, int(shard.offsets[at + 1] - shard.offsets[at]) - ids - values

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
            return record.unpack(shard.read(at), int(shard.tokens[at]), int(shard.contexts[at]))
        except CorruptCache as error:
            raise CorruptCache(f"record {i}: {error}") from None
