"""The cache on its way to a GPU: one copy from pinned memory, decoded there to the floats of every other decoder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from codec_cases import CASES, LENGTHS, assert_same_bits, cache_of

import kdfast
from kdfast import EncodedTargets, TopKTargets, topk_kd_loss
from kdfast.cache import Batch, CacheReader, CacheStream

DEVICE = "cuda"
ALL = range(len(LENGTHS))

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.worth(4),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.fixture(scope="module", params=CASES)
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    return cache_of(request.param, tmp_path_factory.mktemp("gpu") / "c")


def assert_same_batch(a: Batch, b: Batch) -> None:
    for name in (f.name for f in dataclasses.fields(Batch) if f.name not in ("targets", "place")):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None and y is None) or (x.dtype == y.dtype and x.cpu().equal(y.cpu())), name
    sides = [b.targets.decode() if isinstance(b.targets, EncodedTargets) else b.targets for b in (a, b)]
    assert_same_bits(*sides)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("decode", ["auto", "host", "device", "loss"])
def test_batches_are_those_of_the_host(reader: CacheReader, decode: str, backend: str) -> None:
    with kdfast.use_backend(backend):
        for there, here in (
            (reader.batch(ALL, DEVICE, decode=decode), reader.batch(ALL)),
            (reader.packed([[0, 1], [2]], 6, DEVICE, decode=decode), reader.packed([[0, 1], [2]], 6)),
        ):
            assert there.input_ids.is_cuda
            assert isinstance(there.targets, EncodedTargets if decode == "loss" else TopKTargets)
            assert_same_batch(there, here)


@pytest.mark.hardware
@pytest.mark.parametrize("decode", ["host", "device", "loss"])
def test_a_stream_puts_batches_together_in_pinned_memory(tmp_path: Path, decode: str) -> None:
    reader = cache_of("topp", tmp_path / "c")
    settings = {"seed": 1, "epochs": 20, "prefetch": 3, "threads": 2}
    here = list(CacheStream(reader, 2, **settings))
    assert reader.stage([0], pin=True, decode=decode).buffer.is_pinned()
    with torch.cuda.stream(torch.cuda.Stream()):  # copy, kernel and whoever takes the batch share a stream
        there = list(CacheStream(reader, 2, device=DEVICE, decode=decode, **settings))
        torch.cuda.current_stream().synchronize()
    for a, b in zip(there, here, strict=True):
        assert_same_batch(a, b)


@pytest.mark.hardware
def test_a_batch_in_code_is_one_copy(tmp_path: Path) -> None:
    reader = cache_of("mixed", tmp_path / "c")
    reader.batch(ALL, DEVICE, decode="device")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        reader.batch(ALL, DEVICE, decode="loss")
        torch.cuda.synchronize()
    copies = [event for event in profile.events() if "HtoD" in event.name]
    assert len(copies) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_take_bytes_like_targets(tmp_path: Path, dtype: torch.dtype) -> None:
    reader = cache_of("topp", tmp_path / "c")
    coded = reader.batch(ALL, DEVICE, decode="loss").targets
    x = torch.randn(*coded.counts.shape, 1000, device=DEVICE, dtype=dtype)
    results = []
    for targets in (coded, coded.decode(), reader.batch(ALL).targets.to(DEVICE)):
        leaf = x.clone().requires_grad_()
        loss = topk_kd_loss(leaf, targets, temperature=2.0)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_a_row_that_no_writer_produces_makes_its_loss_nan(tmp_path: Path) -> None:
    reader = cache_of("topp", tmp_path / "c")
    targets = reader.batch([0], DEVICE, decode="loss").targets
    broken = dataclasses.replace(targets, counts=targets.counts.index_fill(1, torch.tensor([3], device=DEVICE), 71))
    losses = topk_kd_loss(torch.randn(1, LENGTHS[0], 1000, device=DEVICE), broken, reduction="none")
    assert losses[0, 3].isnan()
    assert losses[0, :3].isfinite().all()
    with kdfast.debug_checks(), pytest.raises(ValueError, match="row 3 holds NaN"):
        topk_kd_loss(torch.randn(1, LENGTHS[0], 1000, device=DEVICE), broken)
