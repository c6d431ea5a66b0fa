"""Whether rows are as short as the position embeddings of the models want them, known before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from kdfast.models.positions import positions_of
from kdfast.train.data import Source, sizes_of


def shorter(task: Any, captured: bool = False) -> str:
    """What makes rows shorter, as an error says it; `captured`: a cache is the training data."""
    if captured and task.cache_is_data:
        return "capture shorter documents"
    return f"lower data.{'sequence_length' if hasattr(task.data, 'sequence_length') else 'max_length'}"


def check_positions(models: Mapping[str, nn.Module | None], rows: Source | None, key: str) -> None:
    """Raises where a row is longer than a model has positions.

    Args:
        models: by what the recipe calls them. rows: training or validation data. key: what makes them shorter.
    """
    longest = max((int(size.max()) for size in ([] if rows is None else sizes_of(rows)) if len(size)), default=0)
    for name, model in models.items():
        most = None if model is None else positions_of(model)
        if most is not None and most < longest:
            raise ValueError(
                f"data: a row has {longest} tokens, expected at most the {most} positions of the {name}; {key}, or take a"
                " model with more"
            )
