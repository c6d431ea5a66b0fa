"""A cache as a dataset: for `torch.utils.data.DataLoader`, or as an endless, resumable stream of batches."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from kdfast.cache.background import Ahead
from kdfast.cache.batch import Batch, Staged, where_to_decode
from kdfast.cache.format import CacheError
from kdfast.cache.reader import CacheReader, Record

# What a stream keeps in shared memory: its position, how often that was set, and a number for every worker.
_EPOCH, _BATCH, _JUMPS, _WORKERS_AT = range(4)
_MOST_WORKERS = 1024
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

    Iterating goes on from the position: with `epochs` = 1 every `for batch in stream` is the next epoch. So it is in a
    `DataLoader(stream, batch_size=None, num_workers=n)`, whose order is the same for every n. A pass that is broken off
    (`break`) is over: the next iteration is the next pass, as of any loader, and only `load_state_dict` goes on within one. To
    go on in the same process keep the iterator, `batches = iter(stream)`; or leave `epochs` out: a stream without end has no
    pass to break off and goes on with the next batch (in a loader with workers, who are ahead, with the next epoch). A loader
    for accelerate takes whole batches: `DataLoaderConfiguration(dispatch_batches=False)`.

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
        epochs: epochs of a pass, after which an iteration ends; None: never.

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
                                   ("threads", threads, 1), ("pack", 1 if pack is None else pack, 1),
                                   ("epochs", 1 if epochs is None else epochs, 1)):  # fmt: skip
            if value < least:
                raise CacheError(f"{name}: expected {least} or more, got {value}")
        if not 0 <= rank < world:
            raise CacheError(f"rank: expected 0 to {world - 1} of {world}, got {rank}")
        self.reader = reader if isinstance(reader, CacheReader) else CacheReader(reader)
        self.batch_size, self.pack, self.shuffle, self.seed = batch_size, pack, shuffle, seed
        self.rank, self.world, self.prefetch, self.threads = rank, world, prefetch, threads
        self.device, self.decode, self.epochs = device, where_to_decode(decode, device), epochs
        # In shared memory, so that workers follow their parent and the parent knows what they began.
        self._shared = torch.zeros(_WORKERS_AT + _MOST_WORKERS, dtype=torch.int64).share_memory_()
        self._loaded = False
        self._plan_of: tuple[int, list[list[Any]]] = (-1, [])

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._shared.share_memory_()  # a copy has a position of its own; in a worker's it is its parent's already

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

    def __len__(self) -> int:
        """Batches of a pass, that which the position lies in or begins; a `TypeError` for a stream without end."""
        if self.epochs is None:
            raise TypeError("CacheStream: a stream without end has no length; pass epochs")
        first = self._next()[0] // self.epochs * self.epochs
        return sum(len(self.plan(e)) for e in range(first, first + self.epochs))

    @property
    def epoch(self) -> int:
        """The pass of the position, which the next iteration goes on with: what `set_epoch` counts."""
        return self._next()[0] // (self.epochs or 1)

    def set_epoch(self, epoch: int) -> None:
        """The next batch is the first of a pass; after `load_state_dict`, that pass's next one.

        A pass is what one iteration gives: an epoch, or `epochs` of them. So a loop over epochs, or a loader that counts its
        iterations as that of accelerate does, sets the order of its own number.

        Raises:
            CacheError: below 0, or not the epoch of a state that was loaded and has not been used yet.
        """
        if epoch < 0:
            raise CacheError(f"epoch: expected 0 or more, got {epoch}")
        if not self._loaded or self._shared[_WORKERS_AT:].any():
            self._jump(epoch * (self.epochs or 1), 0)
        elif (at := self.epoch) != epoch:
            raise CacheError(
                f"epoch: expected {at}, that of the state that was loaded, got {epoch}; begin the loop over epochs (or set the"
                f" loader's epoch, `loader.set_epoch`) at stream.epoch"
            )

    def state_dict(self, after: Batch | None = None) -> dict[str, Any]:
        """Where the stream is, and what its order depends on.

        Args:
            after: the last batch that was used, for whoever takes batches before they are used: workers of a `DataLoader`, or
                the loader of accelerate, which is one ahead. Without it the position is behind the last batch handed out.

        Raises:
            CacheError: batches come from workers, and `after` is not given.
        """
        if after is None:
            if get_worker_info() is not None or self._shared[_WORKERS_AT:].any():
                raise CacheError(
                    "state: a DataLoader's workers are ahead of what was used; call state_dict(batch) with the last batch used"
                )
            epoch, batch = self._next()
        elif after.place is None:
            raise CacheError("after: expected a batch of a CacheStream, got one of a CacheReader")
        else:
            epoch, batch = after.place
        return {"epoch": epoch, "batch": batch, "batches": len(self.plan(epoch)), "order": self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken; an iterator of this process that is under way goes on there too.

        Another number of ranks or another batch size will do where the position falls between their batches.

        Raises:
            CacheError: the order would be another (names what differs), or the position lies within a batch.
        """
        own, saved = self._order(), state["order"]
        free = ("world", "batch_size")
        different = [
            f"{n} {saved.get(n)!r} != {value!r}" for n, value in own.items() if n not in free and saved.get(n) != value
        ]
        if different:
            raise CacheError(f"state: expected the order it was saved with (saved != now): {'; '.join(different)}")
        epoch, batch = int(state["epoch"]), int(state["batch"])
        if any(saved[n] != own[n] for n in free):
            batch = self._mapped(epoch, batch, state)
        if not 0 <= batch <= len(self.plan(epoch)):
            raise CacheError(f"state: expected a batch from 0 to {len(self.plan(epoch))} of epoch {epoch}, got {batch}")
        self._jump(epoch, batch)
        self._loaded = True

    def _mapped(self, epoch: int, batch: int, state: dict[str, Any]) -> int:
        """A position that was saved with other ranks or batches: as many records (packed: rows) of the epoch are done."""
        if batch == state.get("batches"):
            return len(self.plan(epoch))
        saved, round_ = state["order"], self.batch_size * self.world
        done = batch * saved["batch_size"] * saved["world"]
        if done % round_:
            raise CacheError(
                f"state: saved after {done} {'rows' if self.pack else 'records'} of epoch {epoch} ({saved['world']} ranks with"
                f" batches of {saved['batch_size']}), which {self.world} ranks with batches of {self.batch_size} do not reach"
                f" in whole rounds of {round_}; resume with world * batch_size a divisor of {done},"
                f" or with set_epoch({epoch + 1})"
            )
        return done // round_

    def _order(self) -> dict[str, Any]:
        names = ("batch_size", "pack", "shuffle", "seed", "world")
        return {"records": len(self.reader), "tokens": self.reader.info.tokens, **{n: getattr(self, n) for n in names}}

    def _jump(self, epoch: int, batch: int) -> None:
        self._shared[_WORKERS_AT:] = 0
        self._shared[_EPOCH], self._shared[_BATCH] = epoch, batch
        self._shared[_JUMPS] += 1

    def _next(self, token: int = 0, worker: int = -1) -> tuple[int, int]:
        """(epoch, batch) where the next iteration begins: the position, or behind the passes that workers began.

        Args:
            token, worker: a worker that begins a pass, and its loader's token (`_begin`).
        """
        at = int(self._shared[_EPOCH]), int(self._shared[_BATCH])
        passes = [(i, x >> 32, x & 0xFFFFFFFF) for i, x in enumerate(self._shared[_WORKERS_AT:].tolist()) if x]
        # Others with the same token begin this pass too, and so does this one.
        epochs = [begun if named == token and i != worker else self._end(begun) or begun + 1 for i, named, begun in passes]
        return max(at, (max(epochs, default=0), 0))

    def _end(self, epoch: int) -> int | None:
        """Where a pass that begins in an epoch ends."""
        return None if self.epochs is None else (epoch // self.epochs + 1) * self.epochs

    def _begin(self, worker: Any) -> tuple[int, int]:
        """Where this worker begins its pass; all workers of one iteration of a loader begin at the same place.

        A loader draws a seed for every iteration, the same for its workers. Each notes it beside the epoch it begins with, in
        a number of its own: notes with another seed are of passes before, and so is its own (workers that persist keep their
        seed). One number is written at once, so no lock is needed.
        """
        if worker.id >= _MOST_WORKERS:
            raise CacheError(f"num_workers: expected at most {_MOST_WORKERS}, got {worker.num_workers}")
        # Another loader may draw the same seed, with other workers.
        token = ((worker.seed - worker.id) * _MOST_WORKERS + worker.num_workers) % 0x7FFFFFFE + 1
        start = self._next(token, worker.id)
        self._shared[_WORKERS_AT + worker.id] = token << 32 | start[0]
        return start

    def _walk(self, epoch: int, batch: int) -> Iterator[tuple[int, int, list[Any]]]:
        """(epoch, batch within it, its records) from there to the end of the pass."""
        end = self._end(epoch)
        while end is None or epoch < end:
            plan = self.plan(epoch)
            for i in range(batch, len(plan)):
                yield epoch, i, plan[i]
            epoch, batch = epoch + 1, 0

    def _read(self, step: tuple[int, int, list[Any]]) -> tuple[int, int, Staged]:
        """What a thread does of a batch; copies and kernels are left to the stream of whoever takes it."""
        epoch, i, groups = step
        pin = torch.device(self.device).type == "cuda"
        if self.pack:
            return epoch, i, self.reader.stage_packed(groups, self.pack, decode=self.decode, pin=pin)
        return epoch, i, self.reader.stage(groups, decode=self.decode, pin=pin)

    def _batch(self, step: tuple[int, int, Staged]) -> Batch:
        epoch, i, staged = step
        return dataclasses.replace(staged.to(self.device).batch(), place=(epoch, i + 1))

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        # A worker says at once that its pass has begun, whether or not its first batch is ever asked for.
        return self._own() if worker is None else self._share(worker, self._begin(worker))

    def _share(self, worker: Any, start: tuple[int, int]) -> Iterator[Batch]:
        steps = (step for j, step in enumerate(self._walk(*start)) if j % worker.num_workers == worker.id)
        with Ahead(self._read, steps, self.prefetch, self.threads) as ahead:
            for step in ahead:
                yield self._batch(step)

    def _own(self) -> Iterator[Batch]:
        """From the position to the end of its pass; from another position when that was changed meanwhile."""
        first, done = self._next()
        over = self._end(first)
        if over is not None and not self._loaded and (done or first % (self.epochs or 1)):
            self._jump(over, 0)  # behind what is left of a pass that was broken off
        while True:
            start = self._next()
            self._jump(*start)
            jumps, end = int(self._shared[_JUMPS]), self._end(start[0])
            with Ahead(self._read, self._walk(*start), self.prefetch, self.threads) as ahead:
                for step in ahead:
                    batch = self._batch(step)
                    self._shared[_EPOCH], self._shared[_BATCH] = batch.place or start
                    self._loaded = False
                    yield batch
                    if self._shared[_JUMPS] != jumps:
                        break
                else:
                    assert end is not None  # a pass without end does not come here
                    self._jump(end, 0)
                    self._loaded = False
                    return
