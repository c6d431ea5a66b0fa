"""The one module that DDP or FSDP wraps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.models.heads import LinearHead, find_head
from kdfast.models.view import View, look
from kdfast.train.batch import Batch
from kdfast.train.objective import Metric, Objective


class DistillStep(nn.Module):
    """loss, metrics = objective(look(student, batch), teachers' views, batch): the loss is formed inside the wrapped module.

    So a head, which may be tied to the embedding, is used inside the root group of FSDP and inside DDP's forward, and
    its gradient is synchronised with everything else. Scores of an evaluation go the same way (`score=True`).

    Args:
        student: the model. objective: the method, or the methods of each phase. task: what is scored.
    """

    def __init__(self, student: nn.Module, objective: Objective | Sequence[Objective] | None, task: Any = None) -> None:
        super().__init__()
        self.student, self.task = student, task
        given = [] if objective is None else [objective] if isinstance(objective, Objective) else list(objective)
        self.objectives = nn.ModuleList(given)
        self.phase = 0
        self.head: LinearHead | None = None

    def name_head(self) -> DistillStep:
        """Looks for the student's head once, before anything is wrapped, where the task wants losses through it."""
        if self.task is not None and self.task.through_head:
            self.head = find_head(self.student, self.task.example(self.student))
        return self

    @property
    def objective(self) -> Objective:
        return self.objectives[self.phase]  # type: ignore[return-value]

    def forward(
        self, batch: Batch, teachers: Sequence[View] | None = None, num_items: int | Tensor = 1, *, score: bool = False
    ) -> Any:
        if score:
            found = self.task.score(look(self.student, batch.by_name, head=self.head), batch)
            return {**found, **self.task.score_written(self.student, batch)}
        view = look(self.student, batch.by_name, self.objective.needs_of_student(), self.head)
        loss, metrics = self.objective(view, teachers or (), batch, num_items)
        if view.auxiliary is not None:
            # The model's own loss is a mean over this batch: of the step's mean it has the batch's share.
            share = batch.share(num_items)
            loss = loss + share * view.auxiliary
            metrics["auxiliary"] = Metric(view.auxiliary.detach() * share, share)
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise ValueError(
                f"student.freeze: the loss of {type(self.objective).__name__} depends on nothing that trains; leave out"
                " what the method is to move"
            )
        return loss, metrics


def step_in(module: nn.Module) -> DistillStep | None:
    """The `DistillStep` that is `module`, or that a wrapper holds."""
    inner = getattr(module, "module", module)
    return inner if isinstance(inner, DistillStep) else None
