"""`CacheReader.batches`: any lists of records, read ahead, and threads that end."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from cache_helpers import SETTINGS, assert_same, document, small_cache

from kdfast.cache import CacheError, CacheReader, CacheWriter, check_alignment, nucleus
from kdfast.cache.shard import Shard
from kdfast.ops.codec import EncodedTargets
from kdfast.ops.topk import label_logprobs


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    return CacheReader(small_cache(tmp_path_factory.mktemp("ahead") / "c", documents=9))


LISTS = [[3, 0], [8], [1, 2, 7], [-1, 4]]


def readers_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("kdfast-cache-reader")]


@pytest.mark.parametrize("prefetch", [0, 1, 2, 9], ids=lambda n: f"prefetch-{n}")
@pytest.mark.parametrize("threads", [1, 3], ids=lambda n: f"threads-{n}")
def test_batches_are_those_of_batch_in_order(reader: CacheReader, prefetch: int, threads: int) -> None:
    got = list(reader.batches(LISTS, prefetch=prefetch, threads=threads))
    assert len(got) == len(LISTS)
    for batch, indices in zip(got, LISTS, strict=True):
        wanted = reader.batch(indices)
        assert torch.equal(batch.input_ids, wanted.input_ids)
        assert torch.equal(batch.labels, wanted.labels)
        assert_same(batch.targets, wanted.targets)
    assert not readers_threads()


def test_packed_rows_and_encoded_targets(reader: CacheReader) -> None:
    groups = [[[3, 0], [4]], [[1, 2]]]
    for batch, wanted in zip(reader.batches(groups, pack=160, decode="loss"), groups, strict=True):
        expected = reader.packed(wanted, 160)
        assert isinstance(batch.targets, EncodedTargets)
        assert torch.equal(batch.position_ids, expected.position_ids)
        assert_same(batch.targets.decode(), expected.targets)


def test_endless_lists_are_asked_for_no_further_than_prefetch(reader: CacheReader) -> None:
    asked: list[int] = []

    def lists() -> itertools.chain[list[int]]:
        for i in itertools.count():
            asked.append(i)
            yield [i % 9]

    with reader.batches(lists(), prefetch=3) as batches:
        for i in range(20):
            assert next(batches).input_ids[0].tolist() == document(i % 9)[0].tolist()
            assert len(asked) == i + 4
        assert readers_threads()
    assert not readers_threads()
    with pytest.raises(StopIteration):
        next(batches)


@pytest.mark.parametrize("prefetch", [0, 3])
def test_what_goes_wrong_is_raised_in_its_turn(reader: CacheReader, prefetch: int) -> None:
    batches = reader.batches([[0], [1], [99], [2]], prefetch=prefetch)
    assert [next(batches).input_ids[0].tolist() for _ in range(2)] == [document(i)[0].tolist() for i in range(2)]
    with pytest.raises(IndexError, match="record 99: the cache holds 9 records"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)
    assert not readers_threads()


@pytest.mark.parametrize("change", [{"prefetch": -1}, {"threads": 0}, {"pack": 0}, {"decode": "later"}])
def test_options_out_of_range_are_named_at_once(reader: CacheReader, change: dict[str, int]) -> None:
    with pytest.raises(CacheError, match=next(iter(change))):
        reader.batches(LISTS, **change)


@pytest.mark.parametrize(
    "source",
    ["reader.batches(([i % 9] for i in itertools.count()), threads=2)", "iter(CacheStream(reader, 2))",
     "iter(DataLoader(CacheStream(reader, 2), batch_size=None))"],
    ids=["batches", "stream", "loader"],
)  # fmt: skip
def test_an_interpreter_ends_with_batches_that_nobody_took(reader: CacheReader, source: str) -> None:
    lines = [
        "import itertools",
        "from torch.utils.data import DataLoader",
        "from kdfast.cache import CacheReader, CacheStream",
        f"reader = CacheReader({str(reader.path)!r})",
        f"batches = {source}",
        "print(len(next(batches).input_ids))",
    ]
    command = [sys.executable, "-c", "\n".join(lines)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parent.parent, check=False)
    assert (run.returncode, run.stderr) == (0, "")


def test_targets_in_code_are_taken_wherever_decoded_ones_are(reader: CacheReader, tmp_path: Path) -> None:
    coded, plain = (reader.batch([3, 0], decode=d) for d in ("loss", "host"))
    assert isinstance(coded.targets, EncodedTargets)
    assert coded.targets.column(2.0) == plain.targets.column(2.0) == 1
    assert torch.equal(label_logprobs(coded.targets, coded.labels), label_logprobs(plain.targets, plain.labels))
    assert check_alignment(coded.targets, coded.labels, min_labels=1 << 30) == check_alignment(
        plain.targets, plain.labels, min_labels=1 << 30
    )
    assert_same(nucleus(coded.targets, 0.8), nucleus(plain.targets, 0.8))
    moved = coded.to("cpu")
    assert_same(moved.targets.decode(), plain.targets.decode())
    ids = coded.input_ids[0][coded.attention_mask[0]]
    for name, targets in (("coded", coded.targets), ("plain", plain.targets)):
        with CacheWriter(tmp_path / name, **SETTINGS) as writer:
            writer.add(ids, targets[0, : len(ids)])
    assert_same(CacheReader(tmp_path / "coded")[0].targets, CacheReader(tmp_path / "plain")[0].targets)


def test_a_record_is_verified_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its labels come as they were given, where the loss mask hides them too."""
    ids, targets = document(2)
    labels, mask = ids.roll(-1), torch.arange(len(ids)) % 2 == 0
    with CacheWriter(tmp_path / "c", **SETTINGS) as writer:
        writer.add(ids, targets, loss_mask=mask, labels=labels)
        writer.add(ids, targets)
    reader = CacheReader(tmp_path / "c")
    monkeypatch.setattr(Shard, "read", lambda *_: pytest.fail("the batch has verified these bytes"))
    assert torch.equal(reader[0].labels, labels)
    assert torch.equal(reader[0].loss_mask, mask)
    assert reader[1].labels is None
