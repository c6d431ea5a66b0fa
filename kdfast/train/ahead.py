"""Batches read, decoded and pinned by a thread while the last step runs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from kdfast.train.batch import Batch


class Ahead:
    """`[read(step) for step in steps]`, each list of batches on `device`, up to `depth` steps before it is asked for.

    `waited` are the seconds the run stood still for data since it was last taken.
    """

    def __init__(self, read: Callable[[int], list[Batch]], device: torch.device, depth: int) -> None:
        self._read, self._device, self._depth = read, device, depth
        self._waited = 0.0

    def steps(self, start: int, end: int) -> Generator[tuple[int, list[Batch]], None, None]:
        """(step, its batches) for start .. end - 1; the thread ends with the iterator."""
        pool = ThreadPoolExecutor(1, "kdfast-ahead") if self._depth else None
        waiting: deque[tuple[int, Future[list[Batch]]]] = deque()
        try:
            for step in range(start, end):
                if pool is None:
                    began = time.perf_counter()
                    batches = self._staged(step)
                else:
                    last = waiting[-1][0] + 1 if waiting else step
                    for later in range(last, min(step + self._depth + 1, end)):
                        waiting.append((later, pool.submit(self._staged, later)))
                    began = time.perf_counter()
                    batches = waiting.popleft()[1].result()
                batches = [batch.to(self._device) for batch in batches]
                self._waited += time.perf_counter() - began
                yield step, batches
        finally:
            if pool is not None:
                pool.shutdown(cancel_futures=True)

    def take_waited(self) -> float:
        waited, self._waited = self._waited, 0.0
        return waited

    def _staged(self, step: int) -> list[Batch]:
        batches = self._read(step)
        return [batch.pin_memory() for batch in batches] if self._device.type == "cuda" else batches
