"""`Objective`: what a method is. One file of `recipes/` holds one, with its options beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from kdfast.models.view import Needs, View
from kdfast.train.batch import Batch
from kdfast.train.schedule import values_at


class Metric(NamedTuple):
    """A sum and a count on the device; logged as their quotient, or as its exponential (`show="exp"`: a perplexity)."""

    total: Tensor
    count: Tensor  # type: ignore[assignment]
    show: str = "mean"


Metrics = dict[str, Metric]


class Setting(NamedTuple):
    """What an objective is built for: the student, its teachers (`kdfast.train.teachers`), and the task.

    recipe: the run's. phase: the part of it that the objective is of, where there is a recipe. bar: makes a progress bar for
    what `prepare` does (`kdfast.train.loop.Bar`), or None. earlier: the objectives of the phases before this one, whose
    parameters it may share. autocast: makes the context that models run in. device: of the run.
    """

    student: nn.Module
    teachers: Sequence[Any]
    task: Any
    recipe: Any = None
    bar: Any = None
    earlier: Sequence[Any] = ()
    phase: Any = None
    autocast: Callable[[], Any] = contextlib.nullcontext
    device: torch.device = torch.device("cpu")


class Prepared(NamedTuple):
    """What takes the place of the run's own in the phase of a method: the rows it trains on, the teachers it hears.

    whole: how many rows there will be, where `check: true` prepared fewer.
    """

    train: Any = None
    teachers: Sequence[Any] | None = None
    whole: int | None = None


class Objective(nn.Module):
    """A loss from what is seen of student and teachers.

    A subclass names its options (a frozen dataclass whose fields are the keys under `method:`), and writes `forward`. It may
    say what it needs to see, have parameters of its own (trained, clipped, saved, resumed and sharded with the student's, left
    out of the exported student), and prepare something before the first step.
    """

    Options: ClassVar[type]
    #: "required", "none" or "optional".
    teacher: ClassVar[str] = "required"
    #: Whether `prepare` has the teachers write targets, for rows without one (`data.unlabelled`).
    writes: ClassVar[bool] = False
    #: Its own students teach the next ones, with a teacher or without.
    students_teach: ClassVar[bool] = False

    def __init__(self, options: Any, setting: Setting) -> None:
        super().__init__()
        self.options = options
        self.now: dict[str, Any] = values_at(options, 1, 1)
        #: `counts` of the whole optimiser step by name, over its micro-batches and processes; empty outside of one.
        self.of_step: dict[str, Tensor] = {}

    def needs_of_student(self) -> Needs:
        return Needs()

    def needs_of_teacher(self) -> Needs | None:
        """None: no pass of the teachers is needed in a step, as what they said was kept by `prepare`."""
        return Needs()

    def hears_teachers(self) -> bool:
        """Whether what the teachers say of a row counts, and not their layers alone: a head of random weights says nothing."""
        return True

    def begin_step(self, step: int, steps: int) -> None:
        """Sets `self.now`, the options with their schedules at `step` (1-based) of `steps`."""
        self.now = values_at(self.options, step, steps)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Of what terms are means where that is not the rows that count: how many of each, by name, are in a batch."""
        return {}

    def share(self, name: str, batch: Batch, num_items: int | Tensor) -> Tensor:
        """What part of the step's `counts` of that name `batch` holds: the weight of a mean over it. Outside a step of the
        trainer, where nobody has counted, that of its rows.
        """
        if name not in self.of_step:
            return batch.share(num_items)
        return self.counts(batch)[name].float() / self.of_step[name]

    def prepare(self, inputs: Any, folder: Any, say: Any) -> Prepared | None:
        """Work before the first step (decoding, prototypes), kept in `folder` and found there when resumed."""
        return None

    def conclude(self, student: nn.Module, say: Any) -> None:
        """Work after the last step, in evaluation mode, before the run is marked as finished."""

    def export(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Files of the method's own beside the exported student; `weights` are the method's parameters by name, whole."""

    def forward(self, student: View, teachers: Sequence[View], batch: Batch, num_items: int | Tensor) -> tuple[Tensor, Metrics]:
        """The loss, divided by `num_items` (the rows of the whole optimiser step that count), and metrics."""
        raise NotImplementedError(f"{type(self).__name__}.forward")


@dataclass(frozen=True)
class NoOptions:
    """A method without options."""
