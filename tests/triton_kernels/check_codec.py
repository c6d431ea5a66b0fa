"""Encoded targets in Triton against the other decoders, bit for bit. Run by `test_triton_interpreted`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from cache_helpers import mixed_targets, rows_of
from codec_cases import CASES, LAYOUTS, LENGTHS, among_others, assert_same_bits, cache_of, encoded, flips, forged

import kdfast
from kdfast import EncodedTargets
from kdfast.backends.triton.codec_rows import add16, total16
from kdfast.cache import CorruptCache, codec, codec_math, record
from kdfast.cache.draws import draws_of


def decoded(targets: EncodedTargets, backend: str) -> kdfast.TopKTargets:
    with kdfast.use_backend(backend):
        return targets.decode()


def joined(records: list[EncodedTargets]) -> EncodedTargets:
    """Rows of many records as one batch, so that they are one launch."""
    sizes = torch.tensor([0, *(len(r.data) for r in records)]).cumsum(0)
    offsets = [r.offsets + at for r, at in zip(records, sizes, strict=False)]
    parts = ([r.data for r in records], offsets, [r.counts for r in records])
    return EncodedTargets(*map(torch.cat, parts), records[0].layout)


@pytest.mark.parametrize("case", CASES)
def test_rows_of_a_cache(case: str, tmp_path: Path, device: str) -> None:
    """With padding: three documents of other lengths."""
    reader = cache_of(case, tmp_path / "c")
    batch = range(len(LENGTHS))
    targets = reader.batch(batch, decode="loss").targets.to(device)
    assert_same_bits(decoded(targets, "triton"), reader.batch(batch).targets)
    assert_same_bits(decoded(targets, "reference"), reader.batch(batch).targets)


def test_no_rows(device: str) -> None:
    nothing = torch.zeros(64, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int32)
    found = decoded(EncodedTargets(*nothing, LAYOUTS["mixed"]).to(device), "triton")
    assert (found.ids.shape, found.log_z.shape) == ((0, 6), (0, 2))


@pytest.mark.parametrize("case", ["topp", "mixed", "k3-three-T", "exact-mixed"])
def test_forged_records(case: str, tmp_path: Path, device: str) -> None:
    """Every byte changed under a checksum that fits: the same rows are NaN, and the others are the same."""
    reader = cache_of(case, tmp_path / "c")
    shard, at = reader._locate(1)
    records = []
    for payload in flips(shard.read(at).copy(), (0x11,)):
        try:
            records.append(encoded(reader._layout, payload, LENGTHS[1]))
        except CorruptCache:
            continue
    targets = joined(records).to(device)
    found = decoded(targets, "triton")
    assert_same_bits(found, decoded(targets, "reference"))
    assert found.logprobs.isnan().any()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_nonsense(layout: codec.Layout, device: str) -> None:
    """Random bytes, offsets and counts; what surrounds the data, and the slack behind it, changes nothing."""
    for seed in range(2):
        targets = forged(layout, seed, 30)
        expected = decoded(targets, "reference")
        for filler in (0, 0xFF):
            assert_same_bits(decoded(among_others(targets.to(device), filler), "triton"), expected)


def test_patches_everywhere(device: str) -> None:
    """Blocks of few and of many large levels among small ones."""
    logits = torch.randn(6, 400).mul(0.1)
    for row in range(6):
        logits[row, torch.randperm(400)[: 1 + 12 * row]] += 6
    with kdfast.use_backend("reference"):
        targets = kdfast.topk_targets(logits, 200, temperatures=(1.0, 2.0))
    layout = codec.Layout(200, 400, (1.0, 2.0))
    coded = _as_record(layout, targets, None)
    assert_same_bits(decoded(coded.to(device), "triton"), decoded(coded, "reference"))


def test_as_many_entries_as_there_may_be(device: str) -> None:
    with kdfast.use_backend("reference"):
        targets = kdfast.topk_targets(torch.randn(1, 6000).mul(3), 4096)
    layout = codec.Layout(4096, 6000, (1.0,))
    coded = _as_record(layout, targets, None)
    assert_same_bits(decoded(coded.to(device), "triton"), decoded(coded, "reference"))


def test_draws_of_many_blocks(device: str) -> None:
    targets, draws = mixed_targets(3, 3000, 100, 150, (1.0, 2.0), 2.0)
    assert (draws_of(targets, 150, 2.0, 100) == draws).all()
    layout = codec.Layout(250, 3000, (1.0, 2.0), 150, True, 2.0)
    coded = _as_record(layout, targets, draws)
    assert_same_bits(decoded(coded.to(device), "triton"), decoded(coded, "reference"))


def _as_record(layout: codec.Layout, targets: kdfast.TopKTargets, draws: np.ndarray | None) -> EncodedTargets:
    """Rows through the encoder and the index."""
    coded = codec.encode(layout, rows_of(targets), 5e-5, None, draws)
    tokens = len(targets.ids)
    payload = record.pack(np.arange(tokens), coded.data, coded.has_counts, None, None, None)
    return encoded(layout, np.frombuffer(payload, np.uint8).copy(), tokens)


@triton.jit
def _sum16_kernel(x_ptr, out_ptr, n):
    sums = tl.zeros([16], tl.float64)
    for start in range(0, n, 64):
        at = start + tl.arange(0, 64)
        sums = add16(sums, tl.load(x_ptr + at, mask=at < n, other=0.0))
    tl.store(out_ptr, total16(sums))


@pytest.mark.parametrize("n", [1, 16, 47, 300])
def test_sums_have_the_order_of_the_specification(n: int, device: str) -> None:
    """In float64, before the rounding to float32 that hides most of another order."""
    for _ in range(3):
        x = torch.randn(n).exp2().mul(torch.randint(-30, 30, (n,)).float().exp2())
        out = torch.empty((), dtype=torch.float64, device=device)
        _sum16_kernel[(1,)](x.to(device), out, n, num_warps=1)
        assert float(out) == codec_math.sum16(x.numpy())


def test_the_loss_decodes_on_its_device(tmp_path: Path, device: str) -> None:
    reader = cache_of("topp", tmp_path / "c")
    targets = reader.batch([0], decode="loss").targets.to(device)
    x = torch.randn(1, LENGTHS[0], 1000, device=device)
    with kdfast.use_backend("triton"):
        assert torch.equal(kdfast.topk_kd_loss(x, targets), kdfast.topk_kd_loss(x, targets.decode()))
