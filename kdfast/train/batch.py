"""`Batch`: what one micro-batch of training or evaluation holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

IGNORE = -100


def token_positions(batch: Batch) -> Tensor:
    """bool `[B, L]`: tokens that are no padding, a decoder's where there is one."""
    inputs = batch.by_name
    own = inputs.get("decoder_input_ids", inputs.get("input_ids", next(iter(inputs.values()))))
    mask = inputs.get("decoder_attention_mask" if "decoder_input_ids" in inputs else "attention_mask")
    return torch.ones_like(own, dtype=torch.bool) if mask is None else mask.bool()


def tokens_of_rows(batch: Batch) -> Tensor:
    """`[B]`: of how many tokens that are no padding each row is; 1 where rows are no text and all are of one size."""
    if batch.attention_mask is not None:
        return batch.attention_mask.sum(1)
    first = next(iter(batch.by_name.values()))
    return torch.full((first.shape[0],), first.shape[1] if "input_ids" in batch.by_name else 1, device=first.device)


def check_classes(labels: Tensor, classes: int) -> None:
    """Raises where a label is neither a class nor `IGNORE`; looks at the values."""
    outside = labels[(labels != IGNORE) & ((labels < 0) | (labels >= classes))]
    if outside.numel():
        raise ValueError(f"labels: expected numbers from 0 to {classes - 1}, or {IGNORE} for none, got {int(outside[0])}")


def likeliest(logits: Tensor) -> Tensor:
    """`logits.argmax(-1)`, and -1 where one is NaN: a model that has diverged says nothing, and argmax takes its NaN."""
    return logits.argmax(-1).masked_fill(logits.isnan().any(-1), -1)


def divisor(num_items: int | Tensor, device: torch.device) -> Tensor:
    """`num_items` to divide by, 1 where it is 0. Processes share a step's items, so that it may lie between."""
    items = torch.as_tensor(num_items, device=device).float()
    return items.masked_fill(items == 0, 1)


@dataclass(frozen=True)
class Batch:
    """Inputs of both models, labels, and what a method or a task wants beside them.

    Args:
        inputs: the models' keyword arguments; a tensor is `input_ids`. A plain module gets the first by position.
        labels: aligned with the logits' leading dimensions, `IGNORE` where a row does not count; None: none are known.
        attention_mask: added to the inputs.
        soft_mask: rows on which a teacher is heard, aligned with `labels`, where that is more than the rows with a label: the
            unlabelled ones among them. None: the rows with a label.
        targets: what a cached teacher said, `TopKTargets` or `EncodedTargets`.
        extra: further tensors with a row for each row of the batch (a domain, a weight).
    """

    inputs: Mapping[str, Tensor] | Tensor
    labels: Tensor | None = None
    attention_mask: Tensor | None = None
    targets: Any = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    soft_mask: Tensor | None = None

    def __post_init__(self) -> None:
        inputs = {"input_ids": self.inputs} if isinstance(self.inputs, Tensor) else dict(self.inputs)
        if self.attention_mask is not None:
            inputs["attention_mask"] = self.attention_mask
        object.__setattr__(self, "inputs", inputs)
        object.__setattr__(self, "attention_mask", inputs.get("attention_mask"))

    @property
    def by_name(self) -> Mapping[str, Tensor]:
        """The inputs by the name of their argument."""
        assert not isinstance(self.inputs, Tensor)
        return self.inputs

    @property
    def input_ids(self) -> Tensor:
        return self.by_name["input_ids"]

    @property
    def labelled(self) -> bool:
        """Whether any row has a label; looks at the values."""
        return self.labels is not None and bool((self.labels != IGNORE).any())

    def count(self) -> int:
        """Rows that count: those a teacher is heard on, else those with a label, or all where no labels are known."""
        if self.soft_mask is not None:
            return int(self.soft_mask.sum())
        if self.labels is not None:
            return int((self.labels != IGNORE).sum())
        return next(iter(self.by_name.values())).shape[0]

    def heard(self, taught: bool, task: Any) -> Batch:
        """The same for a step: without a teacher a row without a label does not count; with one, and without any labels, every
        row does, as `task` counts them."""
        if not taught:
            return self if self.soft_mask is None else replace(self, soft_mask=None)
        mask = task.positions(self) if self.labels is None and self.soft_mask is None else None
        return self if mask is None else replace(self, soft_mask=mask)

    def share(self, num_items: int | Tensor) -> Tensor:
        """What part of an optimiser step's `num_items` this batch holds, on its device: the weight of a mean over the batch."""
        device = next(iter(self.by_name.values())).device
        if self.soft_mask is not None:
            counted = self.soft_mask.sum()
        else:
            counted = (self.labels != IGNORE).sum() if self.labels is not None else torch.tensor(self.count(), device=device)
        return counted.float() / divisor(num_items, device)

    def to(self, device: torch.device | str) -> Batch:
        def move(value: Any) -> Any:
            if isinstance(value, tuple):  # targets of several caches
                return tuple(move(v) for v in value)
            return None if value is None else value.to(device, non_blocking=True)

        moved = {name: move(value) for name, value in self.by_name.items()}
        extra = {name: move(value) for name, value in self.extra.items()}
        return Batch(moved, move(self.labels), None, move(self.targets), extra, move(self.soft_mask))

    def pin_memory(self) -> Batch:
        """The same in pinned memory, from which a copy to a GPU does not wait."""
        pinned = {name: value.pin_memory() for name, value in self.by_name.items()}
        extra = {name: value.pin_memory() for name, value in self.extra.items()}
        labels = None if self.labels is None else self.labels.pin_memory()
        soft_mask = None if self.soft_mask is None else self.soft_mask.pin_memory()
        return Batch(pinned, labels, None, self.targets, extra, soft_mask)
