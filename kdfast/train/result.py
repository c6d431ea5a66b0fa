"""What a finished run gives back."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from kdfast.train.tasks.task import Evaluation


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
