"""A progress bar on a terminal; a line now and then where the output goes to a file or rich is not installed."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from kdfast.extras import has

#: Seconds between lines where there is no terminal.
EVERY_S = 30.0


class Shown:
    """What `bar` yields on a terminal."""

    def __init__(self, progress: Any, task: Any) -> None:
        self._progress, self._task = progress, task

    def update(self, done: int, total: int | None = None, note: str = "") -> None:
        """`done` units are finished, counted from the beginning; of so many, where that shows only now. note: how it goes."""
        self._progress.update(self._task, completed=done, note=note, **({} if total is None else {"total": total}))
        speed = self._progress.tasks[0].speed
        self._progress.update(self._task, rate=f"{speed:,.1f}" if speed else "-")


class Said:
    """What `bar` yields elsewhere: nothing of work that is soon done."""

    def __init__(self, description: str, total: int | None, unit: str) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._last, self._began = time.monotonic(), (time.monotonic(), 0)

    def update(self, done: int, total: int | None = None, note: str = "") -> None:
        """As of `Shown`."""
        self._total, now = total or self._total, time.monotonic()
        if self._began[1] == 0:
            self._began = (now, done)
        if now - self._last < EVERY_S:
            return
        self._last, seconds, some = now, now - self._began[0], done - self._began[1]
        rate = f", {some / seconds:,.1f} {self._unit}/s" if some > 0 else ""
        of = "" if self._total is None else f" of {self._total:,}"
        print(f"{self._description}: {done:,}{of} {self._unit}{rate}{note and f', {note}'}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def bar(description: str, total: int | None, unit: str) -> Iterator[Shown | Said]:
    """A bar of `total` units with rate and time left, on stderr."""
    if not has("rich"):
        yield Said(description, total, unit)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield Said(description, total, unit)
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn(f"{unit}  {{task.fields[rate]}} {unit}/s"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        yield Shown(progress, progress.add_task(description, total=total, rate="-", note=""))
