"""`TopKTargets`: what a teacher said, kept to its k most likely ids, or to some that were drawn."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def column_of(temperature: float, captured: tuple[float, ...]) -> int:
    """Position of a temperature among those captured; raises `ValueError`, which lists them, where it is not there."""
    for i, t in enumerate(captured):
        if abs(t - temperature) <= 1e-6 * t:
            return i
    there = ", ".join(f"{t:g}" for t in captured)
    raise ValueError(
        f"temperature: {temperature:g} was not captured; the targets hold {there}: use one of these or capture again"
    )


@dataclass(frozen=True)
class TopKTargets:
    """A teacher's distribution over V ids as k entries and one bucket for everything else.

    Equals, for logits `[..., V]` and every T in `temperatures`, with S the set of selected ids:

        logp = logits.log_softmax(-1)
        logprobs, ids = logp.topk(k)                                   # natural log, T = 1, full softmax
        log_z = (logp / T).logsumexp(-1)                               # over the whole vocabulary
        log_tail = (logp / T)[v not in S].logsumexp(-1) - log_z        # log mass of the unselected ids at T

    so the probability of entry i at T is exp(logprobs_i / T - log_z), exactly, and all entries plus
    exp(log_tail) sum to 1.

    Args:
        ids: `[..., k]` int32; -1 marks an empty slot.
        logprobs: `[..., k]` float32, natural log at T = 1 (-inf in an empty slot).
        log_z: `[..., n_T]` float32.
        log_tail: `[..., n_T]` float32; -inf when nothing is left over.
        temperatures: the n_T captured temperatures, in the order of the last dimension of log_z and log_tail.
        vocab_size: the teacher's V.
        weights: `[..., k]` float32, or None when every entry is exact. Where entries were drawn: a weight for each, such that
            weights * p_T / p, with p = exp(logprobs) and p_T the probability at T, has the teacher's distribution at T as its
            mean over draws. An entry that was not left to chance has weight p; 0 in an empty slot.
    """

    ids: Tensor
    logprobs: Tensor
    log_z: Tensor
    log_tail: Tensor
    temperatures: tuple[float, ...]
    vocab_size: int
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        if self.ids.shape != self.logprobs.shape:
            raise ValueError(
                f"targets: expected ids and logprobs of one shape, got {list(self.ids.shape)} and {list(self.logprobs.shape)}"
            )
        if self.ids.dtype != torch.int32:
            raise ValueError(f"targets.ids: expected dtype int32, got {self.ids.dtype}")
        if self.vocab_size < 1:
            raise ValueError(f"targets.vocab_size: expected a number above 0, got {self.vocab_size}")
        if not all(0 < t < math.inf for t in self.temperatures):
            raise ValueError(f"targets.temperatures: expected finite numbers above 0, got {self.temperatures}")
        per_t = (*self.ids.shape[:-1], len(self.temperatures))
        for name in ("log_z", "log_tail"):
            if tuple(getattr(self, name).shape) != per_t:
                raise ValueError(f"targets.{name}: expected shape {list(per_t)}, got {list(getattr(self, name).shape)}")
        if self.weights is not None and self.weights.shape != self.ids.shape:
            raise ValueError(f"targets.weights: expected shape {list(self.ids.shape)}, got {list(self.weights.shape)}")

    def __repr__(self) -> str:
        """Shapes in the place of numbers."""
        drawn = "" if self.weights is None else ", drawn"
        shape = f"shape={list(self.ids.shape[:-1])}, k={self.k}, temperatures={self.temperatures}"
        return f"TopKTargets({shape}, vocab_size={self.vocab_size}{drawn}, device={str(self.ids.device)!r})"

    @property
    def k(self) -> int:
        return self.ids.shape[-1]

    def column(self, temperature: float) -> int:
        """Position of a captured temperature in `log_z` and `log_tail`.

        Raises:
            ValueError: it was not captured; lists those that were.
        """
        return column_of(temperature, self.temperatures)

    def _map(self, change: Any) -> TopKTargets:
        weights = None if self.weights is None else change(self.weights)
        return dataclasses.replace(
            self, ids=change(self.ids), logprobs=change(self.logprobs), log_z=change(self.log_z),
            log_tail=change(self.log_tail), weights=weights,
        )  # fmt: skip

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TopKTargets:
        """The same targets on another device."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TopKTargets:
        """The same targets where a GPU can fetch them by itself; needs one."""
        return self._map(lambda x: x.pin_memory())

    def decode(self) -> TopKTargets:
        """Themselves: what `EncodedTargets.decode` gives, so that whoever reads entries takes both."""
        return self

    def __getitem__(self, index: Any) -> TopKTargets:
        """Indexes the leading dimensions."""
        if isinstance(index, tuple) and len(index) >= self.ids.ndim:
            raise ValueError(f"targets: expected at most {self.ids.ndim - 1} indices (leading dimensions), got {len(index)}")
        return self._map(lambda x: x[index])
