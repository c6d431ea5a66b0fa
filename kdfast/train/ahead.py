"""Batches read, decoded and pinned by a thread while the last step runs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.train.batch import Batch


class Read(NamedTuple):
    """One step's micro-batches of this process, the rows of them that count, and an objective's `counts`, all counted before
    they leave the host.
    """

    batches: list[Batch]
    items: int
    counts: dict[str, int]

    @classmethod
    def of(cls, batches: list[Batch], counts: Callable[[Batch], dict[str, Tensor]] | None = None) -> Read:
        found = [] if counts is None else [counts(batch) for batch in batches]
        totals = {name: sum(int(one[name]) for one in found) for one in found[:1] for name in one}
        return cls(batches, sum(batch.count() for batch in batches), totals)

    def to(self, device: torch.device) -> Read:
        return self._replace(batches=[batch.to(device) for batch in self.batches])


class Ahead:
    """`[read(step) for step in steps]`, each on `device`, up to `depth` steps before it is asked for.

    `waited` are the seconds the run stood still for data since it was last taken.
    """

    def __init__(self, read: Callable[[int], Read], device: torch.device, depth: int) -> None:
        self._read, self._device, self._depth = read, device, depth
        self._waited = 0.0

    def steps(self, start: int, end: int) -> Generator[tuple[int, Read], None, None]:
        """(step, what it reads) for start .. end - 1; the thread ends with the iterator."""
        pool = ThreadPoolExecutor(1, "kdfast-ahead") if self._depth else None
        waiting: deque[tuple[int, Future[Read]]] = deque()
        try:
            for step in range(start, end):
                if pool is None:
                    began = time.perf_counter()
                    found = self._staged(step)
                else:
                    last = waiting[-1][0] + 1 if waiting else step
                    for later in range(last, min(step + self._depth + 1, end)):
                        waiting.append((later, pool.submit(self._staged, later)))
                    began = time.perf_counter()
                    found = waiting.popleft()[1].result()
                found = found.to(self._device)
                self._waited += time.perf_counter() - began
                yield step, found
        finally:
            if pool is not None:
                pool.shutdown(cancel_futures=True)

    def take_waited(self) -> float:
        waited, self._waited = self._waited, 0.0
        return waited

    def _staged(self, step: int) -> Read:
        found = self._read(step)
        pinned = self._device.type == "cuda"
        return found._replace(batches=[batch.pin_memory() for batch in found.batches]) if pinned else found
