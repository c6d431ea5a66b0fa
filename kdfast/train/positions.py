"""Whether rows are as short as the position embeddings of the models want them, known before the first step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from kdfast.models.positions import positions_of
from kdfast.train.data import Source, sizes_of
from kdfast.train.documents import Documents
from kdfast.train.tasks.task import Task


def check_positions(
    models: Iterable[tuple[str, nn.Module | None]], rows: Source | None, task: Task[Any] | None = None, captured: bool = False
) -> None:
    """Raises where a row is longer than a model has positions.

    Args:
        models: with what the recipe calls them. rows: training or validation data.
        task: of the data (None: texts with classes), and whether they were captured, for the remedy.
    """
    longest = max((int(size.max()) for size in ([] if rows is None else sizes_of(rows)) if len(size)), default=0)
    for name, model in models:
        most = None if model is None else positions_of(model)
        if most is not None and most < longest:
            raise ValueError(
                f"data: a row has {longest} tokens, expected at most the {most} positions of the {name};"
                f" {_shorter(task, isinstance(rows, Documents), captured)}, or take a model with more"
            )


def _shorter(task: Task[Any] | None, documents: bool, captured: bool) -> str:
    """What makes rows shorter."""
    if task is not None and captured and task.cache_is_data:
        return "capture shorter documents"
    if task is not None and hasattr(task.data, "sequence_length"):
        return "lower data.sequence_length"
    # Documents are a corpus beside the task's own rows.
    return "lower method.corpus.sequence_length" if documents else "lower data.max_length"
