"""Text files to packed sequences, and the order in which a run visits them.

The order is a function of (seed, position) alone, so a resumed run needs no iterator state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor

from kdfast import EncodedTargets, TopKTargets
from kdfast.text import IGNORE
from kdfast.text.packing import pack
from kdfast.text.specials import Specials


class Batch(NamedTuple):
    """What one step trains on: all `[B, L]`, labels aligned with the logits, `IGNORE` where a position does not count."""

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None = None
    targets: TopKTargets | EncodedTargets | None = None

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.input_ids.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            None if self.attention_mask is None else self.attention_mask.to(device, non_blocking=True),
            None if self.targets is None else self.targets.to(device, non_blocking=True),
        )


class Source(Protocol):
    """Training or evaluation data: a number of sequences, and any of them as a batch."""

    def __len__(self) -> int: ...
    def batch(self, indices: Sequence[int]) -> Batch: ...


class Sequences:
    """Packed sequences `[n, L]`; position t is labelled with token t + 1, the last one with nothing."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return self.ids.shape[0]

    def batch(self, indices: Sequence[int]) -> Batch:
        ids = self.ids[torch.as_tensor(indices)].long()
        return Batch(ids, next_labels(ids))

    @property
    def digest(self) -> str:
        """Hash of the token ids and their packing."""
        return hashlib.blake2b(str(tuple(self.ids.shape)).encode() + self.ids.numpy().tobytes(), digest_size=16).hexdigest()


def next_labels(ids: Tensor) -> Tensor:
    """Labels of a causal language model: the next id, `IGNORE` at the end."""
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORE)], 1)


class Order:
    """An endless seeded walk over `n` items: every epoch is its own permutation."""

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed = n, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def take(self, start: int, count: int) -> list[int]:
        """The items at positions start .. start + count - 1 of the walk."""
        out: list[int] = []
        while len(out) < count:
            epoch, offset = divmod(start + len(out), self.n)
            if epoch != self._epoch:
                generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
                self._epoch, self._permutation = epoch, torch.randperm(self.n, generator=generator)
            out += self._permutation[offset : offset + count - len(out)].tolist()
        return out


def tokenize(tokenizer: Tokenizer, files: Sequence[Path], length: int, separator: str, key: str = "data") -> Sequences:
    """The files end to end, a separator after each, cut into sequences of `length` tokens; the rest is dropped.

    Raises:
        ValueError: not even one sequence comes out.
    """
    end = tokenizer.token_to_id(separator)
    return Sequences(pack(tokenizer, files, length, Specials(separator=() if end is None else (end,)), key))
