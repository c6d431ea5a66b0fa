"""Where the teacher's signal comes from: a live model, or a cache of its targets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from kdfast import topk_targets
from kdfast.cache import CacheReader, check_alignment
from kdfast.train.data import Batch
from kdfast.train.models import logits_of


class Signal(Protocol):
    """What a teacher says about a batch; None when there is no teacher."""

    def __call__(self, batch: Batch) -> Any: ...


class LiveTeacher:
    """Logits of a module in evaluation mode, without gradients."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def __call__(self, batch: Batch) -> torch.Tensor:
        return logits_of(self.model, batch.input_ids, batch.attention_mask)


class CachedTeacher:
    """A cache as training data and teacher at once: each batch carries its targets.

    Raises:
        CacheMismatch: the tokenizer is not the one the cache was made with.
        ValueError: the temperature was not captured.
    """

    def __init__(self, path: str | Path, *, tokenizer_hash: str | None = None, temperature: float = 1.0) -> None:
        self.reader = CacheReader(path, tokenizer_hash=tokenizer_hash)
        self.path = self.reader.path
        captured = self.reader.info.temperatures
        if not any(abs(t - temperature) <= 1e-6 * t for t in captured):
            listed = ", ".join(f"{t:g}" for t in captured)
            raise ValueError(f"temperature: {temperature:g} is not in the cache {path}, which holds {listed}; capture it too")

    def __len__(self) -> int:
        return len(self.reader)

    def batch(self, indices: Sequence[int]) -> Batch:
        read = self.reader.batch(list(indices))
        mask = None if bool(read.attention_mask.all()) else read.attention_mask
        return Batch(read.input_ids, read.labels, mask, read.targets)

    def __call__(self, batch: Batch) -> Any:
        return batch.targets


def alignment_line(signal: Any, batch: Batch) -> str:
    """The alignment guard's three numbers for a printed line; raises when another shift fits the labels better.

    Raises:
        AlignmentError: the teacher's targets are shifted against the labels, or say less than chance.
    """
    if isinstance(signal, torch.Tensor):
        signal = topk_targets(signal, min(64, signal.shape[-1]))
    return f"alignment: {check_alignment(signal, batch.labels)}"
