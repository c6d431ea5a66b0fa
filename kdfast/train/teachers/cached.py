"""A cache as training data and teacher at once: each batch carries its targets."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdfast.cache import CacheReader
from kdfast.cache.batch import Batch as CacheBatch
from kdfast.models.view import NOTHING, Needs, View
from kdfast.train.batch import Batch


class CachedTeacher:
    """The records of a cache as rows.

    Args:
        path: a folder or a URL. tokenizer_hash: compared with the cache's. weight: among several teachers.
        pack: tokens of a row that holds several whole documents; `batch` takes a list of records for each such row.

    Raises:
        CacheMismatch: the tokenizer is not the one the cache was made with.
    """

    def __init__(
        self, path: str | Path, *, tokenizer_hash: str | None = None, weight: float = 1.0, pack: int | None = None
    ) -> None:
        self.reader = CacheReader(path, tokenizer_hash=tokenizer_hash)
        self.path, self.info, self.weight, self.pack = self.reader.path, self.reader.info, weight, pack

    def __len__(self) -> int:
        return len(self.reader)

    def lengths(self) -> np.ndarray:
        """Tokens of each record, its context's among them."""
        return np.asarray(sum(self._sizes()))

    def sizes(self) -> list[np.ndarray]:
        """Tokens of each record and of its context, as far as `pack` leaves them."""
        return [np.minimum(size, self.pack) if self.pack else size for size in self._sizes()]

    def _sizes(self) -> list[np.ndarray]:
        return [size.astype(np.int64) for size in (self.reader.lengths(), self.reader.context_lengths())]

    def to(self, device: torch.device) -> None:
        """A cache has no place; its batches are sent."""

    def batch(self, indices: Sequence[Any]) -> Batch:
        if self.pack and indices and isinstance(indices[0], list):
            return as_batch(self.reader.packed(indices, self.pack))
        return as_batch(self.reader.batch(list(indices)))

    def __call__(self, batch: Batch, needs: Needs = NOTHING) -> View:
        return View(targets=batch.targets)

    @property
    def digest(self) -> str:
        """Of the manifest, which has every shard's."""
        return hashlib.blake2b((Path(self.path) / "manifest.json").read_bytes(), digest_size=16).hexdigest()


def as_batch(read: CacheBatch) -> Batch:
    """A cache's batch as the trainer's: of an encoder-decoder the context is the input."""
    if read.context_ids is not None:
        inputs = {"input_ids": read.context_ids, "decoder_input_ids": read.input_ids}
        return Batch(inputs, read.labels, read.context_mask, read.targets)
    if read.position_ids is not None:
        # Positions that start anew tell a `transformers` model where a document ends, in every row of the batch; a mask would
        # hide that from it. Each position of the padding is 0: a document of its own, which nobody attends to.
        return Batch({"input_ids": read.input_ids, "position_ids": read.position_ids}, read.labels, None, read.targets)
    mask = None if bool(read.attention_mask.all()) else read.attention_mask
    return Batch({"input_ids": read.input_ids}, read.labels, mask, read.targets)
