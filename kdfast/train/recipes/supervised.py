"""Cross-entropy on the labels: trains teachers, and students without distillation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kdfast.models.view import View
from kdfast.strict import ranged
from kdfast.train.batch import Batch
from kdfast.train.kd import hard
from kdfast.train.objective import Metrics, Objective


@dataclass(frozen=True)
class SupervisedOptions:
    """label_smoothing, z_loss: as in `kdfast.kd_loss`. workspace_mb: MiB for logits through a head."""

    label_smoothing: float = ranged(0.0, low=0.0, high=1.0)
    z_loss: float = ranged(0.0, low=0.0)
    workspace_mb: float | None = ranged(None, above=0.0)


class Supervised(Objective):
    Options = SupervisedOptions
    teacher = "none"

    def forward(self, student: View, teachers: Sequence[View], batch: Batch, num_items: int | Tensor) -> tuple[Tensor, Metrics]:
        if batch.labels is None:
            raise ValueError("data: method supervised expects labels, got a batch without")
        return hard(student, batch.labels, num_items, **self.now)
