"""A progress bar on a terminal, nothing when the output is piped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Shown:
    """What `bar` yields."""

    def __init__(self, progress: Progress | None, task: TaskID | None) -> None:
        self._progress, self._task = progress, task

    def update(self, done: int) -> None:
        """`done` units are finished, counted from the beginning."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done)
            speed = self._progress.tasks[0].speed
            self._progress.update(self._task, rate=f"{speed:,.1f}" if speed else "-")


@contextlib.contextmanager
def bar(description: str, total: int, unit: str) -> Iterator[Shown]:
    """A bar of `total` units with rate and time left, on stderr."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Shown(None, None)
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn(f"{unit}  {{task.fields[rate]}} {unit}/s"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        yield Shown(progress, progress.add_task(description, total=total, rate="-"))
