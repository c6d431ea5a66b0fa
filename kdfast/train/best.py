"""The model of the best evaluation, in `best` beside the last one; `best.json` says which it is."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from kdfast.files import read_json
from kdfast.train.tasks.task import Evaluation, Task

FOLDER, FILE = "best", "best.json"


def kept(folder: Path) -> dict[str, Any] | None:
    """Step and scores of the model that is kept in a run's folder; None: none is."""
    file = folder / FILE
    return read_json(file) if file.is_file() and (folder / FOLDER).is_dir() else None


def described(folder: Path, task: Task[Any]) -> str:
    """Which model a run has kept, and its scores, in a line; why none, where it has none."""
    before = kept(folder)
    if before is None:
        return f"{folder / FOLDER}: none kept; keep_best takes the evaluations of steps that are still to come"
    scores = Evaluation({name: value for name, value in before.items() if name != "step"})
    return f"{folder / FOLDER}: the model after step {before['step']}, validation {task.headline(scores)}"


def beats(folder: Path, evaluation: dict[str, Any], name: str, sign: int) -> bool:
    """Whether a model with this evaluation is better than the one that is kept, by the score `name` times `sign`.

    Scores that are not finite beat nothing: a model that has diverged may still name a class, the first, and be right.
    """
    if not all(math.isfinite(evaluation[score]) for score in (name, "nll") if score in evaluation):
        return False
    before = kept(folder)
    return before is None or sign * evaluation[name] > sign * before[name]


def forget_beyond(folder: Path, steps: int) -> str:
    """Removes what is kept of a step that a run of `steps` steps does not have, and says so."""
    before = kept(folder)
    if before is None or before["step"] <= steps:
        return ""
    shutil.rmtree(folder / FOLDER)
    (folder / FILE).unlink()
    return f"{folder / FOLDER}: was of step {before['step']}, which a run of {steps} does not have; removed"
