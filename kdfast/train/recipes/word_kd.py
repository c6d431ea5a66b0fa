"""Word-level distillation: soft_weight * T^2 * KL(teacher_T || student_T) + hard_weight * CE(student, labels).

Teacher-forced over the gold prefix, from a live teacher's logits or from cached top-k targets.
Sources: Hinton, Vinyals, Dean 2015, arXiv 1503.02531; Kim and Rush 2016, arXiv 1606.07947, section 3.1.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kdfast import EncodedTargets, TopKTargets
from kdfast.losses import KDLoss, TopKKDLoss
from kdfast.train.recipe import Recipe
from kdfast.train.step import Loss, Metrics


def make_loss(recipe: Recipe) -> Loss:
    options = {
        "temperature": recipe.temperature,
        "soft_weight": recipe.soft_weight,
        "hard_weight": recipe.hard_weight,
        "return_parts": True,
    }
    dense, sparse = KDLoss(**options), TopKKDLoss(**options)

    def word_kd(logits: Tensor, signal: Any, labels: Tensor, num_items: int | Tensor) -> tuple[Tensor, Metrics]:
        loss = sparse if isinstance(signal, TopKTargets | EncodedTargets) else dense
        value, parts = loss(logits, signal, labels, num_items=num_items)
        return value, parts._asdict()

    return word_kd
