"""`CacheWriter`: documents and their targets to shards, resumable at the last finished shard."""

from __future__ import annotations

import dataclasses
import fcntl
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np
from torch import Tensor

from kdfast.cache import codec, record, shard
from kdfast.cache.background import Background
from kdfast.cache.draws import draws_of, without_rare
from kdfast.cache.format import (
    IGNORE,
    KL_EDGES,
    LEFTOVER,
    MANIFEST,
    SHARD_NAME,
    CacheError,
    CacheFull,
    CacheMismatch,
    Settings,
)
from kdfast.cache.manifest import Manifest, ShardEntry, read_manifest, write_atomically
from kdfast.cache.remote import writable
from kdfast.ops.codec import EncodedTargets
from kdfast.ops.targets import TopKTargets

_T = TypeVar("_T")

_RECORD_INDEX_BYTES = 40  # of a record in the tensors of a shard's index, without its keys
_ENTRY_BYTES = 1024  # of a shard in the manifest, at most
_INDEX_BYTES = 4096  # header of a shard, its entry and the manifest without entries, at most


class CacheWriter:
    """Writes a teacher cache; opened on an unfinished one with the same settings, goes on after its last finished shard.

        with CacheWriter(path, vocab_size=V, k=64, teacher="name", tokenizer_hash="...") as w:
            for document in documents[len(w) :]:
                w.add(document, topk_targets(teacher(document), 64))

    Leaving the block finishes the cache; leaving it by an exception keeps the finished shards and drops the records
    after them, so that a later writer goes on from `len(w)`.

    Args:
        path: the cache's folder; made when missing.
        vocab_size, k, teacher, tokenizer_hash, temperatures, max_kl, values_bits, alignment, kind, samples,
            sample_temperature: see `Settings`.
        records_per_shard: a shard is finished at this many records (None: no limit).
        shard_bytes: or at this size.
        max_bytes: limit of the whole cache; the record that would pass it raises CacheFull and what came before stands.
        queue: records that wait for a thread that encodes and writes them, so that `add` returns at once; 0: no thread.
            An error then comes with a later `add`, `flush` or `close`, and drops what was waiting.

    Raises:
        CacheMismatch: the path holds an unfinished cache with other settings; names both sides.
        CacheError: the cache is finished already, another writer has it open, the folder holds something else, or a
            setting is out of range.
        OSError: the folder cannot be written to.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        vocab_size: int,
        k: int,
        teacher: str,
        tokenizer_hash: str,
        temperatures: Sequence[float] = (1.0,),
        values_bits: int | None = None,
        max_kl: float = 5e-5,
        alignment: str = "next",
        kind: str = "topk",
        samples: int = 0,
        sample_temperature: float = 1.0,
        records_per_shard: int | None = None,
        shard_bytes: int = 64 << 20,
        max_bytes: int | None = None,
        queue: int = 0,
    ) -> None:
        self.path = writable(path)
        settings = Settings(
            vocab_size, k, teacher, tokenizer_hash, tuple(map(float, temperatures)), max_kl, values_bits, alignment, kind,
            samples, float(sample_temperature),
        )  # fmt: skip
        if records_per_shard is not None and records_per_shard < 1:
            raise CacheError(f"records_per_shard: expected 1 or more, got {records_per_shard}")
        self._records_per_shard, self._shard_bytes, self._max_bytes = records_per_shard, shard_bytes, max_bytes
        self._layout = codec.layout_of(settings)
        self._clear()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock: int | None = lock_folder(self.path)
        try:
            self._manifest = self._open(settings)
        except BaseException:
            self._unlock()
            raise
        self._background = Background(queue) if queue else None
        self.full = False  # a record was refused because of `max_bytes`

    def _open(self, settings: Settings) -> Manifest:
        fresh = not (self.path / MANIFEST).exists()
        if not fresh:
            manifest, _ = read_manifest(self.path)
            if manifest.complete:
                raise CacheError(f"{self.path}: the cache is finished already; read it, or write to another path")
            different = settings.differences(manifest.settings)
            if different:
                raise CacheMismatch(
                    f"{self.path}: holds an unfinished cache with other settings (asked for != there):"
                    f" {'; '.join(different)}. Use these, or another path"
                )
        else:
            manifest = Manifest(settings)
        self._remove_leftovers(manifest, fresh)
        self._group = manifest.group_size or 1
        self._save(manifest)
        return manifest

    def _remove_leftovers(self, manifest: Manifest, fresh: bool) -> None:
        """Removes what a killed writer left; without a manifest nothing but its temporary file is known to be ours."""
        known = {MANIFEST, *(s.name for s in manifest.shards)}
        for path in sorted(self.path.iterdir()):
            ours = path.name == f"{MANIFEST}.tmp" if fresh else LEFTOVER.fullmatch(path.name) or SHARD_NAME.fullmatch(path.name)
            if ours and path.name not in known:
                path.unlink()
            elif fresh:
                raise CacheError(f"{self.path}: expected an empty folder or an unfinished cache, found {path.name!r}")

    def __len__(self) -> int:
        """Records that are safe on disk: where to go on after an interruption."""
        return sum(s.records for s in self._manifest.shards)

    def last_input_ids(self) -> np.ndarray | None:
        """Input ids, int64 [L], of the last record that is safe on disk; None where there is none yet.

        Raises:
            CorruptCache: its shard or record is not what was written.
        """
        if not self._manifest.shards:
            return None
        entry = self._manifest.shards[-1]
        held, last = shard.Shard(self.path, entry, self.settings), entry.records - 1
        return record.unpack(held.read(last), int(held.tokens[last]), int(held.contexts[last])).input_ids

    @property
    def settings(self) -> Settings:
        return self._manifest.settings

    def begin_groups(self, size: int) -> None:
        """From here on shards end only after a multiple of `size` records, so that no group straddles a resume point.

        Raises:
            CacheMismatch: the records already there were written in groups of another size.
        """
        before = self._manifest.group_size
        if before is not None and before != size:
            raise CacheMismatch(
                f"{self.path}: was captured so far in groups of {before} documents, asked for {size}; use {before},"
                " or another path (another size would round differently)"
            )
        self._group = size
        if before is None:
            self._manifest = self._save(dataclasses.replace(self._manifest, group_size=size))

    def add(
        self,
        input_ids: Tensor,
        targets: TopKTargets | EncodedTargets,
        loss_mask: Tensor | None = None,
        labels: Tensor | None = None,
        context_ids: Tensor | None = None,
    ) -> None:
        """Adds one document of L tokens.

        Args:
            input_ids: `[L]` integers in [0, vocab_size).
            targets: rows `[L, k]`; row t is the teacher's distribution after input_ids[: t + 1] (alignment `next`), or
                at position t (`same`). A row that does not count may hold anything: one that is no distribution is stored
                as an empty row.
            loss_mask: `[L]` bool, True where row t counts; by default where a label is known.
            labels: `[L]` integers, the label of row t in [0, vocab_size) or -100 for none. By default input_ids[t + 1]
                with `next`; needed with `same`.
            context_ids: `[C]` integers, the source of an encoder-decoder.

        Raises:
            CacheError: an argument does not fit; nothing was added. CacheFull: `max_bytes` would be passed; likewise.
            OSError: a shard was due and could not be written; the finished ones are safe.
        """
        if self._lock is None:
            raise CacheError(f"{self.path}: the writer is closed")
        settings = self.settings
        ids = _integers("input_ids", input_ids, 0, settings.vocab_size)
        targets = targets.decode()
        self._check(targets, len(ids))
        exact_first = settings.k - settings.samples if settings.kind == "mixed" else 0
        if settings.samples:
            targets = without_rare(targets, settings.samples, settings.sample_temperature, exact_first)
        rows = self._rows(targets)
        mask = None
        if loss_mask is not None:
            mask = loss_mask.detach().cpu().numpy()
            if mask.shape != ids.shape or mask.dtype != np.bool_:
                raise CacheError(f"loss_mask: expected bool [{len(ids)}], got {loss_mask.dtype} {list(mask.shape)}")
        label = None if labels is None else _integers("labels", labels, IGNORE, settings.vocab_size)
        if label is None and settings.alignment == "same":
            raise CacheError("labels: expected a tensor because alignment is 'same', got None")
        if label is not None and (label.shape != ids.shape or ((label < 0) & (label != IGNORE)).any()):
            raise CacheError(f"labels: expected [{len(ids)}] with values in [0, {settings.vocab_size}) or {IGNORE}")
        context = None if context_ids is None else _integers("context_ids", context_ids, 0, 1 << 32)
        counted = record.counted(ids, mask, label, settings.alignment == "next")
        draws = None
        if settings.samples:
            draws = draws_of(targets, settings.samples, settings.sample_temperature, exact_first, counted)

        def work() -> None:
            self._append(ids, rows, draws, counted, mask, label, context)

        if self._background is None:
            work()
        else:
            # The caller may reuse its memory while the record waits.
            rows = rows.each(np.copy)
            ids, mask = ids.copy(), None if mask is None else mask.copy()
            self._background.put(work)

    def _append(
        self, ids: np.ndarray, rows: codec.Rows, draws: np.ndarray | None, counted: np.ndarray, mask: np.ndarray | None,
        labels: np.ndarray | None, context: np.ndarray | None,
    ) -> None:  # fmt: skip
        settings = self.settings
        coded = codec.encode(self._layout, rows, settings.max_kl, settings.values_bits, draws, counted)
        payload = record.pack(ids, coded.data, coded.has_counts, mask, labels, context)
        written = sum(s.bytes + _ENTRY_BYTES for s in self._manifest.shards)
        if self._max_bytes is not None and written + self._bytes + len(payload) + _INDEX_BYTES > self._max_bytes:
            self.full = True
            raise CacheFull(
                f"max_bytes: the next record would pass {self._max_bytes:,} bytes; {len(self) + len(self._pending)} records"
                " fit. Close the writer to use them, or allow more"
            )
        contexts = 0 if context is None else len(context)
        self._pending.append(shard.Pending(payload, len(ids), contexts, shard.content_keys(ids), coded.exact))
        self._kl.append(coded.kl)
        self._bytes += len(payload) + _RECORD_INDEX_BYTES + len(self._pending[-1].keys)
        full = self._bytes >= self._shard_bytes or len(self._pending) >= (self._records_per_shard or 1 << 62)
        if full and len(self._pending) % self._group == 0:
            self._finish_shard()

    def _check(self, targets: TopKTargets, tokens: int) -> None:
        settings = self.settings
        expected = (settings.vocab_size, settings.temperatures, (tokens, settings.k))
        got = (targets.vocab_size, tuple(targets.temperatures), tuple(targets.ids.shape))
        for name, a, b in zip(("vocab_size", "temperatures", "ids"), expected, got, strict=True):
            if a != b:
                raise CacheError(f"targets.{name}: expected {'shape ' if name == 'ids' else ''}{a}, got {b}")
        if (targets.weights is not None) != (settings.samples > 0):
            wanted = "weights, because entries are drawn" if settings.samples else "none, because entries are exact"
            raise CacheError(f"targets.weights: expected {wanted} with kind {settings.kind!r}")

    @staticmethod
    def _rows(targets: TopKTargets) -> codec.Rows:
        fields = (targets.ids, targets.logprobs, targets.log_z, targets.log_tail)
        return codec.Rows(
            *(
                np.ascontiguousarray(x.detach().cpu().numpy(), dtype)
                for x, dtype in zip(fields, ("<i4", "<f4", "<f4", "<f4"), strict=True)
            )
        )

    def flush(self) -> None:
        """Finishes the current shard, so that every record so far is safe.

        Raises:
            OSError: it cannot be written; the finished shards are safe, the records after them are still held.
        """
        if self._background is not None:
            self._background.wait()
        self._finish_shard()

    def _finish_shard(self) -> None:
        if not self._pending:
            return
        name = f"shard-{len(self._manifest.shards):05d}.safetensors"
        path = self.path / name

        def write() -> tuple[int, str]:
            return shard.write_shard(path, self.settings, self._pending)

        size, index_digest = self._guard(name, write)
        kl = np.concatenate(self._kl)
        entry = ShardEntry(
            name=name,
            records=len(self._pending),
            tokens=len(kl),
            bytes=size,
            index_digest=index_digest,
            kl_sum=float(kl.sum(dtype=np.float64)),
            kl_max=float(kl.max()),
            kl_histogram=tuple(np.bincount(np.searchsorted(KL_EDGES, kl), minlength=len(KL_EDGES) + 1).tolist()),
            exact_rows=sum(r.exact_rows for r in self._pending),
        )
        self._manifest = self._save(dataclasses.replace(self._manifest, shards=(*self._manifest.shards, entry)))
        self._clear()

    def close(self) -> None:
        """Finishes the cache. A closed writer takes no more records; closing twice does nothing."""
        if self._lock is None:
            return
        try:
            try:
                self.flush()
            except CacheFull:  # of a record that waited: what came before it is the cache
                self._finish_shard()
            self._manifest = self._save(dataclasses.replace(self._manifest, complete=True))
        finally:
            self._stop()

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._stop()

    def _stop(self) -> None:
        if self._background is not None:
            self._background.stop()
        self._unlock()

    def _clear(self) -> None:
        self._pending: list[shard.Pending] = []
        self._kl: list[np.ndarray] = []
        self._bytes = 0

    def _save(self, manifest: Manifest) -> Manifest:
        self._guard(MANIFEST, lambda: write_atomically(self.path / MANIFEST, [manifest.to_bytes()]))
        return manifest

    def _guard(self, name: str, write: Callable[[], _T]) -> _T:
        try:
            return write()
        except OSError as error:
            safe = len(self) if hasattr(self, "_manifest") else 0
            raise OSError(
                error.errno, f"cannot write {self.path / name}: {os.strerror(error.errno or 0)}; {safe} records are safe,"
                " make room or allow writing and run again to go on from there"
            ) from error  # fmt: skip

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def lock_folder(folder: Path) -> int:
    """A descriptor that holds the one lock on a cache's folder until it is closed."""
    # The lock is on the folder itself: it leaves no file behind and dies with the process.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CacheError(f"{folder}: another writer has this cache open; wait for it, or write to another path") from None
    return descriptor


def _integers(name: str, tensor: Tensor, least: int, limit: int) -> np.ndarray:
    if tensor.ndim != 1 or tensor.is_floating_point() or not tensor.numel():
        raise CacheError(f"{name}: expected integers [L] with L >= 1, got {tensor.dtype} {list(tensor.shape)}")
    values = tensor.detach().cpu().numpy().astype(np.int64)
    if values.min() < least or values.max() >= limit:
        bad = int(values.min() if values.min() < least else values.max())
        raise CacheError(f"{name}: expected values in [{least}, {limit}), got {bad}")
    return values
