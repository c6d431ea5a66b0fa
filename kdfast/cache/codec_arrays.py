"""The arrays that coded and decoded targets lie in, the same for both codecs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Rows(NamedTuple):
    """Contiguous arrays: ids int32 [..., k], logprobs float32 [..., k], log_z and log_tail float32 [..., n_T], and with
    samples weights float32 [..., k]."""

    ids: np.ndarray
    logprobs: np.ndarray
    log_z: np.ndarray
    log_tail: np.ndarray
    weights: np.ndarray | None = None

    def each(self, change: Callable[[np.ndarray], np.ndarray]) -> Rows:
        """The same change to every array there is."""
        ids, logprobs, log_z, log_tail = map(change, self[:4])
        return Rows(ids, logprobs, log_z, log_tail, None if self.weights is None else change(self.weights))


class Encoded(NamedTuple):
    """The bytes of a record's targets, whether rows have counts, the KL error of every token (float32 [L]), and how many rows
    are stored exactly because no levels keep the limit."""

    data: bytes
    has_counts: bool
    kl: np.ndarray
    exact: int


class Collated(NamedTuple):
    """Where a batch of records goes beside the rows: int64 and bool arrays; the contexts' may be None."""

    input_ids: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray
    attention_mask: np.ndarray
    context_ids: np.ndarray | None
    context_mask: np.ndarray | None


class Index(NamedTuple):
    """Where coded rows go: uint8 of as many bytes as all records have and CODEC_SLACK more; and for every row its offset
    behind its count (int64) and its count (int32), both 0 where there is no row."""

    data: np.ndarray
    offsets: np.ndarray
    counts: np.ndarray


#: Columns of the jobs of `decode_batch`, int64 [n, 8]: where a record's bytes are, its size, tokens and context ids by the
#: index, its checksum, and where it goes: first row, rows to fill (a longer record is cut), first context id.
JOB = ("address", "size", "tokens", "contexts", "checksum", "at", "room", "context_at")
