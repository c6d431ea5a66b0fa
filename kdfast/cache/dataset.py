"""A cache as a dataset: for `torch.utils.data.DataLoader`, or as an endless, resumable stream of batches."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from kdfast.cache.batch import Batch, Staged, where_to_decode
from kdfast.cache.format import CacheError
from kdfast.cache.reader import CacheReader, Record

_OPEN_ROWS = 64  # rows that wait for a document small enough to fill them


class CacheDataset(Dataset[Record]):
    """Records by number; `DataLoader(dataset, batch_size=B, collate_fn=dataset.collate)` yields `Batch`es.

    Works in forked and in spawned workers: each reads the files itself, on one thread.
    """

    def __init__(self, reader: CacheReader | str | os.PathLike[str]) -> None:
        self.reader = reader if isinstance(reader, CacheReader) else CacheReader(reader)

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, i: int) -> Record:
        return self.reader[i]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return self.reader.batch(indices)

    @staticmethod
    def collate(batch: Batch) -> Batch:
        """What `__getitems__` returns is a batch already."""
        return batch


def pack_rows(lengths: np.ndarray, order: np.ndarray, length: int) -> list[list[int]]:
    """Documents in `order` to rows of at most `length` tokens, each to the fullest of the open rows that has room.

    Documents are kept whole; one longer than a row has a row to itself and is cut there.
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, list[int]]] = []
    for i, size in zip(order.tolist(), lengths[order].tolist(), strict=True):
        best = min((j for j, (room, _) in enumerate(open_rows) if room >= size), key=lambda j: open_rows[j][0], default=None)
        if best is None:
            rows.append([i])
            if size < length:
                open_rows.append((length - size, rows[-1]))
            if len(open_rows) > _OPEN_ROWS:
                open_rows.pop(0)
        else:
            room, row = open_rows[best]
            row.append(i)
            open_rows[best] = room - size, row
            if room == size:
                open_rows.pop(best)
    return rows


class CacheStream(IterableDataset[Batch]):
    """Batches of a cache without end, in an order that is a function of (seed, epoch) alone.

    The position is saved and restored exactly, whatever was prefetched; it counts batches that were handed out. Every rank
    gets its own batches, as many as every other rank: what is left of an epoch after the last full round is dropped.

    Args:
        reader: the cache, or its path.
        batch_size: records in a batch, or rows when packed.
        pack: tokens of a row that holds several whole documents, with `position_ids` and `document_ids`; None: one document a
            row, padded.
        shuffle, seed: every epoch is its own permutation; unshuffled it is the cache's order.
        rank, world: this process and how many there are.
        prefetch: batches that threads put together ahead, for a GPU in pinned memory.
        threads: threads that do.
        device: where batches go, in one copy each, by whoever takes them.
        decode: where targets are decoded, as in `CacheReader.batch`.
        epochs: end after this many; None: never.

    In `DataLoader` workers every worker yields its share of the batches, and the loader's order is that without workers; the
    position is then the loader's affair.

    Raises:
        CacheError: an argument is out of range, or an epoch has not one batch for every rank.
    """

    def __init__(
        self,
        reader: CacheReader | str | os.PathLike[str],
        batch_size: int,
        *,
        pack: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        prefetch: int = 2,
        threads: int = 1,
        device: torch.device | str = "cpu",
        decode: str = "auto",
        epochs: int | None = None,
    ) -> None:
        for name, value, least in (("batch_size", batch_size, 1), ("world", world, 1), ("prefetch", prefetch, 0),
                                   ("threads", threads, 1), ("pack", 1 if pack is None else pack, 1)):  # fmt: skip
            if value < least:
                raise CacheError(f"{name}: expected {least} or more, got {value}")
        if not 0 <= rank < world:
            raise CacheError(f"rank: expected 0 to {world - 1} of {world}, got {rank}")
        self.reader = reader if isinstance(reader, CacheReader) else CacheReader(reader)
        self.batch_size, self.pack, self.shuffle, self.seed = batch_size, pack, shuffle, seed
        self.rank, self.world, self.prefetch, self.threads = rank, world, prefetch, threads
        self.device, self.decode, self.epochs = device, where_to_decode(decode, device), epochs
        self._epoch = self._batch = 0
        self._plan_of: tuple[int, list[list[Any]]] = (-1, [])

    def plan(self, epoch: int) -> list[list[Any]]:
        """This rank's batches of an epoch: lists of records, or of rows of records when packed."""
        if self._plan_of[0] != epoch:
            n = len(self.reader)
            order = np.random.default_rng((self.seed, epoch)).permutation(n) if self.shuffle else np.arange(n)
            units: list[Any] = pack_rows(self.reader.lengths(), order, self.pack) if self.pack else order.tolist()
            whole = len(units) // (self.batch_size * self.world) * self.world
            if not whole:
                what = "packed rows" if self.pack else "records"
                raise CacheError(
                    f"batch_size: expected at most {len(units) // self.world} ({len(units)} {what} for {self.world} ranks),"
                    f" got {self.batch_size}"
                )
            mine = range(self.rank, whole, self.world)
            self._plan_of = epoch, [units[b * self.batch_size : (b + 1) * self.batch_size] for b in mine]
        return self._plan_of[1]

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, and what its order depends on."""
        return {"epoch": self._epoch, "batch": self._batch, "order": self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken.

        Raises:
            CacheError: the order would be another: names what differs.
        """
        own = self._order()
        different = [f"{name} {state['order'].get(name)!r} != {value!r}" for name, value in own.items()
                     if state["order"].get(name) != value]  # fmt: skip
        if different:
            raise CacheError(f"state: expected the order it was saved with (saved != now): {'; '.join(different)}")
        self._epoch, self._batch = int(state["epoch"]), int(state["batch"])

    def _order(self) -> dict[str, Any]:
        names = ("batch_size", "pack", "shuffle", "seed", "world")
        return {"records": len(self.reader), "tokens": self.reader.info.tokens, **{n: getattr(self, n) for n in names}}

    def _read(self, groups: list[Any]) -> Staged:
        """What a thread does of a batch; copies and kernels are left to the stream of whoever takes it."""
        pin = torch.device(self.device).type == "cuda"
        if self.pack:
            return self.reader.stage_packed(groups, self.pack, decode=self.decode, pin=pin)
        return self.reader.stage(groups, decode=self.decode, pin=pin)

    def _walk(self) -> Iterator[tuple[int, int, list[Any]]]:
        """(epoch, batch within it, its records) from here on."""
        epoch, batch = self._epoch, self._batch
        while self.epochs is None or epoch < self.epochs:
            plan = self.plan(epoch)
            for i in range(batch, len(plan)):
                yield epoch, i, plan[i]
            epoch, batch = epoch + 1, 0

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        walk = self._walk()
        if worker is not None:
            walk = (step for j, step in enumerate(walk) if j % worker.num_workers == worker.id)
        if not self.prefetch:
            for epoch, i, groups in walk:
                self._epoch, self._batch = epoch, i + 1
                yield self._read(groups).to(self.device).batch()
            return
        waiting: deque[tuple[int, int, Future[Staged]]] = deque()
        pool = ThreadPoolExecutor(self.threads, "kdfast-cache-reader")
        try:
            for epoch, i, groups in walk:
                waiting.append((epoch, i, pool.submit(self._read, groups)))
                if len(waiting) > self.prefetch:
                    yield self._take(waiting)
            while waiting:
                yield self._take(waiting)
        finally:
            pool.shutdown(cancel_futures=True)

    def _take(self, waiting: deque[tuple[int, int, Future[Staged]]]) -> Batch:
        epoch, i, future = waiting.popleft()
        batch = future.result().to(self.device).batch()
        self._epoch, self._batch = epoch, i + 1
        return batch
