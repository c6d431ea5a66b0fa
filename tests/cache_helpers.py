"""Teachers' rows and small caches for the tests of the cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import kdfast
from kdfast.cache import CacheWriter, codec
from kdfast.ops.targets import TopKTargets


def teacher_logits(rows: int, vocab: int, seed: int = 0, sharpness: tuple[float, float] = (1.1, 3.5)) -> Tensor:
    """Rows whose probability falls with rank as rank^-s, s uniform in `sharpness`, with noise, over shuffled ids."""
    g = torch.Generator().manual_seed(seed)
    s = torch.rand(rows, 1, generator=g) * (sharpness[1] - sharpness[0]) + sharpness[0]
    z = -s * torch.log(torch.arange(vocab) + 1.5) + 0.5 * torch.randn(rows, vocab, generator=g)
    order = torch.rand(rows, vocab, generator=g).argsort(-1)
    return torch.empty(rows, vocab).scatter_(1, order, z)


def teacher_targets(rows: int, vocab: int, k: int, temperatures: tuple[float, ...] = (1.0,), seed: int = 0) -> TopKTargets:
    with kdfast.use_backend("reference"):
        return kdfast.topk_targets(teacher_logits(rows, vocab, seed), k, temperatures=temperatures)


def rows_of(targets: TopKTargets) -> codec.Rows:
    return codec.Rows(*(x.numpy() for x in (targets.ids, targets.logprobs, targets.log_z, targets.log_tail)))


def empty_rows(tokens: int, k: int, n_t: int) -> codec.Rows:
    """Poisoned: whatever a decoder leaves unwritten shows."""
    return codec.Rows(np.full((tokens, k), 7, np.int32), *(np.full((tokens, n), np.nan, np.float32) for n in (k, n_t, n_t)))


SETTINGS = {"vocab_size": 97, "k": 5, "teacher": "t", "tokenizer_hash": "h", "temperatures": (1.0, 2.0)}


def document(i: int, length: int | None = None) -> tuple[Tensor, TopKTargets]:
    length = 20 + 37 * i % 90 if length is None else length
    ids = torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(1000 + i))
    return ids, teacher_targets(length, 97, 5, (1.0, 2.0), seed=i)


def small_cache(path: Path, documents: int = 5, **changes: object) -> Path:
    with CacheWriter(path, **{**SETTINGS, "records_per_shard": 2, **changes}) as writer:
        for i in range(documents):
            writer.add(*document(i))
    return path


def assert_same(a: TopKTargets, b: TopKTargets) -> None:
    for name in ("ids", "logprobs", "log_z", "log_tail"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0, equal_nan=False)
