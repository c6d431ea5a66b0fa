"""Stopping a run between two steps."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

#: The event of the block that the main thread is in, whatever blocks lie within it.
_outermost: threading.Event | None = None
#: A terminal tells every process, and a launcher tells them once more: for so long it is one and the same request.
_SAME_REQUEST_S = 3.0


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Within the block SIGINT and SIGTERM set an event; another one, seconds later, interrupts at once.

    A block within a block has its event: what is told to a run within a run is told to whoever began it.
    """
    global _outermost
    if threading.current_thread() is not threading.main_thread():
        yield threading.Event()
        return
    if _outermost is not None:
        yield _outermost
        return

    stop = _outermost = threading.Event()
    first = 0.0

    def told(number: int, frame: Any) -> None:
        nonlocal first
        if stop.is_set() and time.monotonic() - first > _SAME_REQUEST_S:
            raise KeyboardInterrupt
        first = first if stop.is_set() else time.monotonic()
        stop.set()

    before = {number: signal.signal(number, told) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        _outermost = None
        for number, handler in before.items():
            signal.signal(number, handler)


class Anybody:
    """`anybody(own)`: whether any process says so. Asked on the host, so that no process waits for its device."""

    def __init__(self) -> None:
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._group: Any = dist.new_group(backend="gloo") if several else None

    def __call__(self, own: bool) -> bool:
        if self._group is None:
            return own
        told = torch.tensor(int(own))
        dist.all_reduce(told, group=self._group)
        return bool(told)
