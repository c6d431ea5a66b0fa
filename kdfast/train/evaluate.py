"""A model's scores on held-out data, through the module that training wrapped."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.files import json_line, written
from kdfast.models.view import look
from kdfast.train.data import Source, batches
from kdfast.train.tasks.task import Evaluation


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Source, *, batch_size: int = 16, limit: int = 0, task: Any = None, share: tuple[int, int] = (0, 1)
) -> Evaluation:
    """The scores of `task` on the first `limit` rows of `data` (0 = all), in evaluation mode, which is then put back.

    Args:
        model: a `DistillStep`, wrapped or not, or a bare model, which becomes one.
        task: what is scored; None: a causal language model.
        share: (rank, world): this process reads its part of the batches, and the sums of all are added up.

    Raises:
        ValueError: no position has a label.
    """
    from kdfast.train.step import DistillStep, step_in
    from kdfast.train.tasks.causal_lm import CausalLM

    with _modes_kept(model):
        if step_in(model) is None:
            task = task or CausalLM(None, CausalLM.Data())
            model = DistillStep(model, None, task).name_head()
        step = step_in(model)
        assert step is not None
        task = task or step.task
        device = _device_of(step.student)
        n = min(limit, len(data)) if limit else len(data)
        rank, world = share
        model.eval()
        scores: list[dict[str, Tensor]] = []
        starts = list(range(0, n, batch_size))
        # Every process takes part in every round: a sharded model gathers its weights together.
        for turn in range(0, len(starts), world):
            mine = turn + rank
            start = starts[mine] if mine < len(starts) else starts[turn]
            batch = data.batch(range(start, min(start + batch_size, n))).to(device)
            found = model(batch, score=True)
            if mine < len(starts):
                scores.append({name: value.cpu() for name, value in found.items()})
    if world > 1:
        scores = _gathered(scores)
    return task.summary(scores)


@torch.no_grad()
def predict(model: nn.Module, rows: Source, task: Any, file: Path, *, batch_size: int = 16) -> bool:
    """Writes what `model` says of each row (`ClassTask.shown` and `said`), a line of JSON each, in their order; whether any has
    a label.
    """
    device, labelled = _device_of(model), False
    with _modes_kept(model), written(file) as part, open(part, "w", encoding="utf-8") as lines:
        model.eval()
        number = itertools.count()
        for batch in batches(rows, batch_size):
            labelled |= batch.labelled
            batch = batch.to(device)
            for line in task.said(look(model, batch.by_name), batch):
                row = next(number)
                lines.write(json_line({"row": row, **task.shown(row), **line}))
    return labelled


def _device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters lie; a rule, which has none, stays on the CPU."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextlib.contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    """Each module is in training or not afterwards as before: its own mode, and none of what is made around a bare model within
    the block, a teacher, whose dropout that would wake.
    """
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training


def _gathered(scores: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    import torch.distributed as dist

    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, [{k: v.tolist() for k, v in s.items()} for s in scores])
    return [{k: torch.tensor(v, dtype=torch.float64) for k, v in s.items()} for part in everybody for s in part]
