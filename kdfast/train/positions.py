"""Whether rows are as short as the position embeddings of the models want them, known before the first step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from kdfast.models.positions import positions_of
from kdfast.train.data import Source, sizes_of


def check_positions(models: Iterable[tuple[str, nn.Module | None]], rows: Source | None, inputs: Any) -> None:
    """Raises where a row is longer than a model has positions.

    Args:
        models: with what the recipe calls them. rows: training or validation data. inputs: the task, and whether its data are
            a cache, for the remedy.
    """
    longest = max((int(size.max()) for size in ([] if rows is None else sizes_of(rows)) if len(size)), default=0)
    for name, model in models:
        most = None if model is None else positions_of(model)
        if most is not None and most < longest:
            raise ValueError(
                f"data: a row has {longest} tokens, expected at most the {most} positions of the {name};"
                f" {_shorter(inputs)}, or take a model with more"
            )


def _shorter(inputs: Any) -> str:
    """What makes rows shorter."""
    if getattr(inputs, "caches", ()) and inputs.task.cache_is_data:
        return "capture shorter documents"
    return f"lower data.{'sequence_length' if hasattr(inputs.task.data, 'sequence_length') else 'max_length'}"
