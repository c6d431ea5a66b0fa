"""A progress bar on a terminal, nothing when the output is piped or rich is not installed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from kdfast.extras import has


class Shown:
    """What `bar` yields."""

    def __init__(self, progress: Any = None, task: Any = None) -> None:
        self._progress, self._task = progress, task

    def update(self, done: int, total: int | None = None) -> None:
        """`done` units are finished, counted from the beginning; of so many, where that shows only now."""
        if self._progress is not None:
            self._progress.update(self._task, completed=done, **({} if total is None else {"total": total}))
            speed = self._progress.tasks[0].speed
            self._progress.update(self._task, rate=f"{speed:,.1f}" if speed else "-")


@contextlib.contextmanager
def bar(description: str, total: int | None, unit: str) -> Iterator[Shown]:
    """A bar of `total` units with rate and time left, on stderr."""
    if not has("rich"):
        yield Shown()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield Shown()
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn(f"{unit}  {{task.fields[rate]}} {unit}/s"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        yield Shown(progress, progress.add_task(description, total=total, rate="-"))
