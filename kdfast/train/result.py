"""What a finished run gives back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from kdfast.train.tasks.task import Evaluation, Task


class Result(NamedTuple):
    """A finished run. `seconds` is time spent in training steps; `evaluation` is None without validation data.

    `main_process` is False on every process of a distributed run but the first, which should keep quiet; `headline` is the
    evaluation in a few words.
    """

    out: Path
    model: Path
    steps: int
    seconds: float
    evaluation: Evaluation | None
    main_process: bool = True
    headline: str = ""

    @classmethod
    def of(cls, folder: Path, task: Task[Any], steps: int, seconds: float, evaluation: Evaluation | None, main: bool) -> Result:
        """The result of the run in `folder`; `main`: on its first process."""
        headline = "" if evaluation is None else task.headline(evaluation)
        return cls(folder, folder / "model", steps, seconds, evaluation, main, headline)
