"""Caches of every kind, small enough for Triton's interpreter, and what a decoder of encoded targets is compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from cache_helpers import mixed_targets, teacher_targets

import kdfast
from kdfast import EncodedTargets, TopKTargets
from kdfast.cache import CacheReader, CacheWriter, codec

#: Tokens of the documents of every cache: a batch of all has padding, and one of them alone has none.
LENGTHS = (4, 1, 2)


def cut(targets: TopKTargets, counts: list[int]) -> TopKTargets:
    """The first `counts` entries of the rows; the others' mass goes to the tails."""
    gone = torch.arange(targets.k) >= torch.tensor(counts)[:, None]
    lost = torch.where(gone, targets.logprobs, -torch.inf).double()
    at = torch.tensor(targets.temperatures, dtype=torch.float64)
    mass = (lost[:, None, :] / at[:, None]).logsumexp(-1) - targets.log_z
    log_tail = torch.logaddexp(targets.log_tail.double(), mass).clamp(max=0).float()
    log_tail[torch.tensor(counts) == 0] = 0
    return dataclasses.replace(
        targets,
        ids=targets.ids.masked_fill(gone, -1),
        logprobs=targets.logprobs.masked_fill(gone, -torch.inf),
        log_tail=log_tail,
    )


def extreme_ids() -> TopKTargets:
    """Ids at both ends of the largest vocabulary, a row without a tail, and one whose entries hold next to nothing."""
    top = (1 << 24) - 1
    ids = torch.tensor([[0, 1, top], [0, 1, 2], [top - 2, top - 1, top], [5, 1 << 20, 1 << 23]] + [[7, 8, 9]] * 3)
    p = torch.tensor([[0.5, 0.25, 0.125], [0.5, 0.25, 0.25], [0.9, 0.05, 0.01], [1e-9, 1e-8, 1e-7]] + [[0.3, 0.3, 0.3]] * 3)
    tail = 1 - p.double().sum(-1, keepdim=True)
    tail[1] = 0
    return TopKTargets(ids.int(), p.log(), torch.zeros(7, 1), tail.log().float(), (1.0,), 1 << 24)


def peaked(rows: int, vocab: int, temperatures: tuple[float, ...], k: int) -> TopKTargets:
    """Rows of which some hold nearly all at one id: no levels serve two temperatures, so that they are stored exactly."""
    spread, peak = (torch.tensor(x * rows)[:rows] for x in ([1.0, 8.0, 3.0, 10.0], [0.0, 40.0, 3.0, 60.0]))
    z = spread[:, None] * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0))
    z[:, 7] += peak
    with kdfast.use_backend("reference"):
        return kdfast.topk_targets(z, k, temperatures=temperatures)


def _peaked_draws() -> tuple[TopKTargets, dict[str, object]]:
    """Draws at T = 2 of ids so rare at T = 1 that no level holds them."""
    targets, _ = mixed_targets(sum(LENGTHS), 1000, 6, 20, (0.5, 1.0, 2.0), 2.0, sharpness=(4.0, 9.0))
    return targets, {"kind": "mixed", "samples": 20, "sample_temperature": 2.0}


def _topk(vocab: int, k: int, temperatures: tuple[float, ...]) -> tuple[TopKTargets, dict[str, object]]:
    return teacher_targets(sum(LENGTHS), vocab, k, temperatures), {}


def _drawn(exact: int, samples: int, at: float) -> tuple[TopKTargets, dict[str, object]]:
    kind = "mixed" if exact else "sampled"
    targets, _ = mixed_targets(sum(LENGTHS), 1000, exact, samples, (0.5, 1.0, 2.0), at)
    return targets, {"kind": kind, "samples": samples, "sample_temperature": at}


def nothing_left(exact: int = 4, samples: int = 5, at: float = 1.0) -> tuple[TopKTargets, dict[str, object]]:
    """Rows of `mixed` of which some hold everything in the exact entries, or in fewer, or all but what float32 cannot say."""
    z = torch.randn(sum(LENGTHS), 500, generator=torch.Generator().manual_seed(3))
    z[1, exact:] = z[2, 1:] = -torch.inf
    for row, gap in ((3, 95), (4, 150), (5, 1e4)):
        z[row, exact:] -= gap
    draws = torch.Generator().manual_seed(4)
    with kdfast.use_backend("reference"):
        targets = kdfast.topk_targets(
            z, exact, temperatures=(1.0, 2.0), samples=samples, sample_temperature=at, generator=draws
        )
    return targets, {"kind": "mixed", "samples": samples, "sample_temperature": at}


CASES = {
    "k1": lambda: _topk(17, 1, (1.0,)),
    "k-is-vocab": lambda: _topk(17, 17, (1.0, 2.0)),
    "k3-three-T": lambda: _topk(17, 3, (0.5, 1.0, 2.0)),
    "k64": lambda: _topk(151936, 64, (1.0,)),
    "k65-three-T": lambda: _topk(1000, 65, (2.0, 1.0, 4.0)),
    "k300": lambda: _topk(151936, 300, (1.0, 3.0)),
    "one-id": lambda: _topk(1, 1, (1.0,)),
    "largest-vocabulary": lambda: (extreme_ids(), {}),
    "topp": lambda: (cut(_topk(1000, 70, (1.0, 2.0))[0], [70, 0, 1, 16, 64, 0, 65]), {"kind": "topp"}),
    "sampled": lambda: _drawn(0, 90, 1.0),
    "sampled-tempered": lambda: _drawn(0, 12, 2.0),
    "mixed": lambda: _drawn(6, 20, 1.0),
    "mixed-tempered": lambda: _drawn(40, 40, 0.5),
    "exact": lambda: (peaked(sum(LENGTHS), 3000, (1.0, 2.0, 4.0), 70), {}),
    "exact-one-T": lambda: (peaked(sum(LENGTHS), 500, (1.0,), 20), {"max_kl": 1e-9}),
    "exact-topp": lambda: (cut(peaked(sum(LENGTHS), 1000, (2.0, 1.0), 64), [64, 60, 0, 1, 17, 64, 5]), {"kind": "topp"}),
    "exact-mixed": _peaked_draws,
    "mixed-nothing-left": nothing_left,
    "mixed-nothing-left-tempered": lambda: nothing_left(70, 30, 2.0),
}


def cache_of(case: str, path: Path) -> CacheReader:
    targets, settings = CASES[case]()
    settings |= {"vocab_size": targets.vocab_size, "k": targets.k, "temperatures": targets.temperatures}
    begin = 0
    with CacheWriter(path, teacher="t", tokenizer_hash="h", **settings) as writer:
        for n in LENGTHS:
            writer.add(torch.arange(begin, begin + n) % targets.vocab_size, targets[begin : begin + n])
            begin += n
    return CacheReader(path)


def assert_same_bits(a: TopKTargets, b: TopKTargets) -> None:
    """NaN is NaN whatever its bits, and everything else is equal to the sign of a zero."""
    assert (a.temperatures, a.vocab_size) == (b.temperatures, b.vocab_size)
    for name in ("ids", "logprobs", "log_z", "log_tail", "weights"):
        x, y = getattr(a, name), getattr(b, name)
        if x is None or y is None:
            assert x is y, name
            continue
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
        x, y = x.contiguous().cpu(), y.contiguous().cpu()
        same = x.view(torch.int32) == y.view(torch.int32)
        assert bool((same | (x.isnan() & y.isnan())).all()), name


def flips(payload: np.ndarray, masks: tuple[int, ...] = (1, 0x10, 0x80, 0xFF)) -> Iterator[np.ndarray]:
    """The record with one byte changed, every byte in turn."""
    for at in range(len(payload)):
        for mask in masks:
            changed = payload.copy()
            changed[at] ^= mask
            yield changed


def job_of(payload: np.ndarray, tokens: int, checksum: int | None = None) -> np.ndarray:
    """A record alone in its batch, its checksum made to fit; the payload has to live on."""
    fits = codec.checksum(payload) if checksum is None else checksum
    row = [payload.ctypes.data, payload.size, tokens, 0, np.uint64(fits).astype(np.int64), 0, tokens, 0]
    return np.array([row], np.int64)


def collated(tokens: int) -> codec.Collated:
    ints, bools = (lambda: np.empty(tokens, np.int64)), (lambda: np.empty(tokens, bool))
    return codec.Collated(ints(), ints(), bools(), bools(), None, None)


def encoded(layout: codec.Layout, payload: np.ndarray, tokens: int) -> EncodedTargets:
    """The rows of a record that the index accepts, as `reader.batch` would hand them out."""
    data, offsets, counts = np.full(payload.size + 64, 0xA5, np.uint8), np.empty(tokens, np.int64), np.empty(tokens, np.int32)
    codec.index_batch(layout, job_of(payload, tokens), True, codec.Index(data, offsets, counts), collated(tokens), 1)
    return EncodedTargets(*map(torch.from_numpy, (data, offsets, counts)), layout)


def forged(layout: codec.Layout, seed: int, rows: int) -> EncodedTargets:
    """Bytes, offsets and counts that mean nothing; most bytes are such that a decoder gets past some heads."""
    random = np.random.default_rng(seed)
    data = random.integers(0, 256, 400, np.uint8)
    data = np.where(random.random(400) < 0.8, random.choice([0, 0, 1, 2], 400), data).astype(np.uint8)
    offsets = random.integers(-3, 345, rows)
    counts = random.choice([-1, 0, 1, 2, layout.k // 2, layout.k, layout.k + 1], rows).astype(np.int32)
    return EncodedTargets(*map(torch.from_numpy, (data, offsets, counts)), layout)


def among_others(targets: EncodedTargets, filler: int) -> EncodedTargets:
    """The same targets, with other bytes before, behind and in the slack."""
    wide = torch.full((targets.data.numel() + 8192,), filler, dtype=torch.uint8, device=targets.data.device)
    wide[4096:-4096] = targets.data
    wide[-4096 - 64 : -4096] = filler
    return dataclasses.replace(targets, data=wide[4096:-4096])


LAYOUTS = {
    "topk": codec.Layout(5, 40, (1.0, 2.0)),
    "many": codec.Layout(70, 1 << 24, (1.0,)),
    "mixed": codec.Layout(6, 1000, (0.5, 1.0), 4, True, 0.5),
}
