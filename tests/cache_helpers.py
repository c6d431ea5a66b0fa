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


def mixed_targets(
    rows: int,
    vocab: int,
    exact: int,
    samples: int,
    temperatures: tuple[float, ...],
    sample_temperature: float,
    sharpness: tuple[float, float] = (1.1, 3.5),
) -> tuple[TopKTargets, np.ndarray]:
    """The likeliest `exact` ids and draws from the others (exact 0: from all), with their weights and draw counts."""
    logits = teacher_logits(rows, vocab, sharpness=sharpness).double()
    logp, g = logits.log_softmax(-1), torch.Generator().manual_seed(1)
    first = logp.topk(exact).indices
    r = (logp / sample_temperature).scatter(-1, first, -torch.inf).softmax(-1)
    drawn = torch.multinomial(r, samples, True, generator=g)
    ids, draws = torch.full((rows, exact + samples), -1), torch.zeros(rows, exact + samples)
    weights = torch.zeros(rows, exact + samples, dtype=torch.float64)
    for t in range(rows):
        distinct, counts = drawn[t].unique(return_counts=True)
        n = exact + len(distinct)
        ids[t, :n], draws[t, exact:n] = torch.cat([first[t], distinct]), counts.float()
        p = logp[t, ids[t, :n]].exp()
        weights[t, :n] = p
        weights[t, exact:n] *= counts / samples / r[t, distinct]
    kept = torch.where(ids >= 0, logp.gather(-1, ids.clamp(min=0)), -torch.inf)
    log_z = torch.stack([(logp / t).logsumexp(-1) for t in temperatures], -1)
    rest = logp.clone()
    for t in range(rows):
        rest[t, ids[t][ids[t] >= 0]] = -torch.inf
    log_tail = torch.stack([(rest / t).logsumexp(-1) for t in temperatures], -1) - log_z
    floats = (kept.float(), log_z.float(), log_tail.float())
    return TopKTargets(ids.int(), *floats, temperatures, vocab, weights.float()), draws.int().numpy()


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
