"""One file per method: `make_loss(recipe)` returns what `DistillStep` calls."""

from __future__ import annotations

import importlib

from kdfast.train.recipe import Recipe
from kdfast.train.step import Loss


def make_loss(recipe: Recipe) -> Loss:
    """The loss of `recipe.method`."""
    loss: Loss = importlib.import_module(f"{__name__}.{recipe.method}").make_loss(recipe)
    return loss
