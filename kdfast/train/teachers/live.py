"""A model that says something about each batch, without gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.models.heads import LinearHead, find_head
from kdfast.models.load import from_function, load_folder, load_weights
from kdfast.models.view import NOTHING, Needs, View, look
from kdfast.train.batch import Batch


class LiveTeacher:
    """`look(model, batch.inputs)` in evaluation mode; seen through its head once `name_head` found one."""

    info = None  # of a cache

    def __init__(self, model: nn.Module, weight: float = 1.0) -> None:
        self.model, self.weight = model.eval().requires_grad_(False), weight
        self.head: LinearHead | None = None
        #: Weights that its folder lacked, which are random.
        self.missing: Sequence[str] = ()
        #: The function that made it, where nothing else says what its weights are.
        self.made_by: str | None = None

    @classmethod
    def load(cls, spec: Any, key: str, kind: str) -> LiveTeacher:
        """From a recipe's `teacher:` (key is what an error calls it)."""
        if spec.function:
            model = from_function(spec.function, spec.arguments, f"{key}.function")
            found = cls(model, spec.weight)
            if spec.weights:
                load_weights(model, spec.weights, f"{key}.weights")
            else:
                found.made_by = spec.function
            return found
        missing: list[str] = []
        model = load_folder(spec.path, f"{key}.path", kind=kind, dtype=spec.dtype, missing=missing)
        found = cls(model, spec.weight)
        found.missing = missing
        return found

    def name_head(self, example: Mapping[str, Tensor]) -> None:
        self.head = find_head(self.model, example)

    def to(self, device: torch.device) -> None:
        self.model.to(device)

    @torch.no_grad()
    def __call__(self, batch: Batch, needs: Needs = NOTHING) -> View:
        return look(self.model, batch.by_name, needs, self.head)
