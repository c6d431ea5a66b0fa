"""Cross-entropy on the labels: trains teachers, and students without distillation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kdfast import Part
from kdfast.text import IGNORE
from kdfast.train.recipe import Recipe
from kdfast.train.step import Loss, Metrics


def make_loss(recipe: Recipe) -> Loss:
    return _supervised


def _supervised(logits: Tensor, signal: Any, labels: Tensor, num_items: int | Tensor) -> tuple[Tensor, Metrics]:
    total = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    return total / num_items, {"hard": Part(total.detach(), torch.count_nonzero(labels != IGNORE))}
