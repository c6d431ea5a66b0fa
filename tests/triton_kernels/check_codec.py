"""Encoded targets in Triton against the other decoders, bit for bit. Run by `test_triton_interpreted`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cache_helpers import mixed_targets
from codec_cases import CASES, LAYOUTS, LENGTHS, among_others, assert_same_bits, cache_of, encoded, flips, forged

import kdfast
from kdfast import EncodedTargets
from kdfast.cache import CorruptCache, codec, record
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


@pytest.mark.parametrize("case", ["topp", "mixed", "k3-three-T"])
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
    for seed in range(3):
        targets = forged(layout, seed, 40)
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
    rows = codec.Rows(*(x.numpy() for x in (targets.ids, targets.logprobs, targets.log_z, targets.log_tail)))
    coded = _as_record(layout, rows, None)
    assert_same_bits(decoded(coded.to(device), "triton"), decoded(coded, "reference"))


def test_draws_of_many_blocks(device: str) -> None:
    targets, draws = mixed_targets(3, 3000, 100, 150, (1.0, 2.0), 2.0)
    assert (draws_of(targets, 150, 2.0, 100) == draws).all()
    layout = codec.Layout(250, 3000, (1.0, 2.0), 150, True, 2.0)
    rows = codec.Rows(*(x.numpy() for x in (targets.ids, targets.logprobs, targets.log_z, targets.log_tail)))
    coded = _as_record(layout, rows, draws)
    assert_same_bits(decoded(coded.to(device), "triton"), decoded(coded, "reference"))


def _as_record(layout: codec.Layout, rows: codec.Rows, draws: object) -> EncodedTargets:
    """Rows through the encoder and the index."""
    coded = codec.encode(layout, rows, 5e-5, None, draws)
    tokens = len(rows.ids)
    payload = record.pack(np.arange(tokens), coded.data, coded.has_counts, None, None, None)
    return encoded(layout, np.frombuffer(payload, np.uint8).copy(), tokens)


def test_the_loss_decodes_on_its_device(tmp_path: Path, device: str) -> None:
    reader = cache_of("topp", tmp_path / "c")
    targets = reader.batch([0], decode="loss").targets.to(device)
    x = torch.randn(1, LENGTHS[0], 1000, device=device)
    with kdfast.use_backend("triton"):
        assert torch.equal(kdfast.topk_kd_loss(x, targets), kdfast.topk_kd_loss(x, targets.decode()))
