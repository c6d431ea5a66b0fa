"""An objective as somebody else would write it: one file, named by a recipe as `my_objective:MyObjective`.

Environment variables make it tell what happens to it: `SHAPES_IN` a folder for the shapes of parameters, `ROWS_IN` a file for
the rows that are trained on, `KILLED_AT` a step at which the process gets SIGKILL.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kdfast.models.view import Needs, View
from kdfast.train import Batch, Metric, Objective
from kdfast.train.kd import distillation
from kdfast.train.objective import Metrics, Setting


@dataclass(frozen=True)
class MyOptions:
    weight: float = 1.0


class MyObjective(Objective):
    """Distillation of logits, and of the last hidden state through a projection that is learned."""

    Options = MyOptions

    def __init__(self, options: MyOptions, setting: Setting) -> None:
        super().__init__(options, setting)
        self.projection = nn.Linear(setting.student.config.n_embd, setting.teachers[0].model.config.n_embd)
        self._student = [setting.student]  # no submodule

    def needs_of_student(self) -> Needs:
        return Needs(layers=(-1,))

    def needs_of_teacher(self) -> Needs:
        return Needs(layers=(-1,))

    def prepare(self, inputs: Any, folder: Path, say: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "prepared", "a") as file:
            file.write("once more\n")

    def begin_step(self, step: int, steps: int) -> None:
        super().begin_step(step, steps)
        if os.environ.get("KILLED_AT") == str(step):
            os.kill(os.getpid(), signal.SIGKILL)
        folder = os.environ.get("SHAPES_IN")
        if folder:
            named = [*self._student[0].named_parameters(), *self.named_parameters()]
            shapes = {n: [type(p).__name__, list(p.shape), list(getattr(p, "_local_tensor", p).shape)] for n, p in named}
            (Path(folder) / f"{os.environ['RANK']}.json").write_text(json.dumps(shapes))

    def forward(self, student: View, teachers: Sequence[View], batch: Batch, num_items: int | Tensor) -> tuple[Tensor, Metrics]:
        if "ROWS_IN" in os.environ:
            with open(os.environ["ROWS_IN"], "a") as file:
                file.write(json.dumps(batch.input_ids.tolist()) + "\n")
        loss, metrics = distillation(
            student, teachers, batch.labels, num_items, temperature=2.0, soft_weight=0.7, hard_weight=0.3
        )
        assert batch.labels is not None
        counted = batch.labels != -100
        gap = (self.projection(student.layers[-1]) - teachers[0].layers[-1])[counted].square().mean(-1)
        mine = {"my_gap": Metric(gap.detach().sum(), counted.sum(), "exp")}
        return loss + self.options.weight * gap.sum() / num_items, {**metrics, **mine}
