"""Several writers, a thread behind the writer, limits, and kills at every point."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from cache_helpers import SETTINGS, assert_same, document, small_cache
from kill_rounds import contents, run
from test_cache_capture import SETTINGS as CAPTURE
from test_cache_capture import VOCAB, K, Tiny, documents

from kdfast.cache import (
    CacheError,
    CacheFull,
    CacheMismatch,
    CacheReader,
    CacheWriter,
    Example,
    capture,
    merge,
    nucleus,
    part_path,
    share_of,
    verify,
)  # fmt: skip
from kdfast.cache.background import Background
from kdfast.ops.topk import topk_targets


def capture_part(path: Path, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    with CacheWriter(part_path(path, rank, world), **CAPTURE, records_per_shard=6) as writer:
        capture(Tiny(), share_of(documents(), 4, rank, world), writer, batch_size=4)


def test_four_processes_at_once_capture_what_one_does(tmp_path: Path) -> None:
    """30 documents in groups of 4: the parts hold 4, 8, 8 and 10 documents, side by side."""
    root = Path(__file__).parents[1]
    code = "import sys, pathlib, test_cache_parallel as t; t.capture_part(pathlib.Path(sys.argv[1]), int(sys.argv[2]), 4)"
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}", "OMP_NUM_THREADS": "1"}
    path = tmp_path / "together"
    children = [subprocess.Popen([sys.executable, "-c", code, str(path), str(r)], env=environment) for r in range(4)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with CacheWriter(tmp_path / "alone", **CAPTURE, records_per_shard=6) as writer:
        capture(Tiny(), documents(), writer, batch_size=4)
    torch.set_num_threads(threads)
    assert [child.wait() for child in children] == [0] * 4
    info = merge(path)
    assert sorted(p.name for p in path.iterdir() if p.is_dir()) == []
    assert info == verify(path)
    alone, together = CacheReader(tmp_path / "alone"), CacheReader(path)
    assert (len(alone), together.info.tokens) == (len(together), alone.info.tokens)
    assert together.info.kl_histogram == alone.info.kl_histogram
    for a, b in zip(alone, together, strict=True):
        assert a.input_ids.equal(b.input_ids)
        assert_same(a.targets, b.targets)


def test_merge_links_caches_and_names_what_is_wrong(tmp_path: Path) -> None:
    first, second = small_cache(tmp_path / "a", 3), small_cache(tmp_path / "b", 4)
    info = merge(tmp_path / "both", [second, first])
    assert (info.records, info.shards) == (7, 4)
    both = CacheReader(tmp_path / "both")
    for i, wanted in enumerate((0, 1, 2, 3, 0, 1, 2)):
        assert both[i].input_ids.equal(document(wanted)[0])
    assert (tmp_path / "both" / "shard-00002.safetensors").samefile(first / "shard-00000.safetensors")
    verify(first)
    with pytest.raises(CacheError, match="without a cache"):
        merge(tmp_path / "both", [first])
    (tmp_path / "whose").mkdir()
    (tmp_path / "whose" / "shard-00000.safetensors").write_bytes(b"whose?")
    with pytest.raises(CacheError, match="without shards"):
        merge(tmp_path / "whose", [first])
    assert (tmp_path / "whose" / "shard-00000.safetensors").read_bytes() == b"whose?"
    with pytest.raises(CacheMismatch, match="teacher 't' != 'u'"):
        merge(tmp_path / "c", [first, small_cache(tmp_path / "u", 1, teacher="u")])
    with pytest.raises(CacheError, match="found none"):
        merge(tmp_path / "c")
    small_cache(part_path(tmp_path / "d", 0, 3), 1)
    small_cache(part_path(tmp_path / "d", 2, 3), 1)
    with pytest.raises(CacheError, match="rank 1 is missing"):
        merge(tmp_path / "d")
    writer = CacheWriter(part_path(tmp_path / "d", 1, 3), **SETTINGS)
    with pytest.raises(CacheError, match="not finished"):
        merge(tmp_path / "d")
    writer.close()
    shutil.copytree(tmp_path / "d", tmp_path / "parts")
    merged = merge(tmp_path / "d")
    assert merged.records == 2
    # Killed after the manifest was written and before the parts were removed: the next merge removes them.
    shutil.copytree(tmp_path / "parts", tmp_path / "d", dirs_exist_ok=True)
    assert merge(tmp_path / "d") == merged == verify(tmp_path / "d")
    assert not list((tmp_path / "d").glob("part-*"))


@pytest.mark.parametrize(("count", "world"), [(0, 3), (1, 4), (30, 4), (31, 7)])
def test_shares_are_whole_groups_side_by_side(count: int, world: int) -> None:
    shares = [share_of(list(range(count)), 4, r, world) for r in range(world)]
    assert [i for share in shares for i in share] == list(range(count))
    assert all(not share or share[0] % 4 == 0 for share in shares)


def test_a_thread_behind_the_writer_changes_nothing(tmp_path: Path) -> None:
    small_cache(tmp_path / "a", 9)
    with CacheWriter(tmp_path / "b", **SETTINGS, records_per_shard=2, queue=3) as writer:
        for i in range(9):
            ids, targets = document(i)
            writer.add(ids, targets)
            targets.logprobs.zero_()  # the memory is the caller's again
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_an_error_behind_the_writer_comes_back_and_keeps_what_was_finished(tmp_path: Path) -> None:
    ids, targets = document(0, 9)
    bad = document(1, 9)[1]
    bad.logprobs.fill_(-0.01)
    writer = CacheWriter(tmp_path, **SETTINGS, records_per_shard=1, queue=4)
    writer.add(ids, targets)
    with pytest.raises(CacheError, match="sum to 1"):  # noqa: PT012 (which call raises depends on the thread)
        writer.add(ids, bad)
        writer.add(ids, targets)
        writer.close()
    with contextlib.suppress(CacheError):
        writer.close()
    with pytest.raises(CacheError, match="closed"):
        writer.add(ids, targets)
    with CacheWriter(tmp_path, **SETTINGS) as again:
        assert len(again) == 1


def test_the_queue_is_bounded_and_in_order() -> None:
    gate, done = threading.Event(), []
    background = Background(2)

    def job(i: int) -> None:
        gate.wait()
        done.append(i)

    def producer() -> None:
        for i in range(6):
            background.put(lambda i=i: job(i))

    thread = threading.Thread(target=producer)
    thread.start()
    time.sleep(0.05)
    assert thread.is_alive()  # one is worked on, two wait, the fourth has no room
    gate.set()
    thread.join()
    background.wait()
    assert done == list(range(6))
    background.stop()


def test_a_limit_ends_a_capture_with_what_fits(tmp_path: Path) -> None:
    with CacheWriter(tmp_path / "c", **CAPTURE, records_per_shard=4, max_bytes=20_000) as writer:
        capture(Tiny(), documents(), writer, batch_size=4)
        assert writer.full
    info = verify(tmp_path / "c")
    assert 4 < info.records < 30
    assert info.bytes <= 20_000
    with CacheWriter(tmp_path / "d", **SETTINGS, max_bytes=9000) as writer:
        writer.add(*document(0))
        with pytest.raises(CacheFull, match="9,000 bytes"):
            writer.add(*document(1, 2000))
    assert len(CacheReader(tmp_path / "d")) == 1


def test_top_p_keeps_the_fewest_ids_that_hold_the_mass(tmp_path: Path) -> None:
    logits = Tiny().eval()(documents()[0][None])[0].detach()
    exact = topk_targets(logits, VOCAB, temperatures=(1.0, 2.0))
    kept = nucleus(exact, 0.6)
    p = logits.double().softmax(-1)
    for t in range(len(logits)):
        ids = kept.ids[t][kept.ids[t] >= 0].long()
        assert p[t, ids].sum() >= 0.6 - 1e-6
        assert p[t, ids].sum() - p[t, ids].min() < 0.6
        for j, temperature in enumerate((1.0, 2.0)):
            rest = (logits[t].double() / temperature).softmax(-1)
            assert kept.log_tail[t, j].exp() == pytest.approx(1 - float(rest[ids].sum()), abs=1e-5)
    with CacheWriter(tmp_path, **{**CAPTURE, "kind": "topp", "k": 64}) as writer:
        with pytest.raises(CacheError, match="top_p"):
            capture(Tiny(), documents(), writer, batch_size=4)
        capture(Tiny(), documents(), writer, batch_size=4, top_p=0.2)
    counts = (CacheReader(tmp_path)[0].targets.ids >= 0).sum(-1)
    assert len(counts.unique()) > 1
    assert counts.equal((nucleus(exact, 0.2).ids >= 0).sum(-1))


def test_a_masked_model_keeps_rows_where_something_is_asked(tmp_path: Path) -> None:
    labels = [torch.where(torch.arange(len(d)) % 3 == 0, d, -100) for d in documents(5)]
    with CacheWriter(tmp_path, **CAPTURE, alignment="same") as writer:
        capture(Tiny(), [Example(d, y) for d, y in zip(documents(5), labels, strict=True)], writer, batch_size=2)
    reader = CacheReader(tmp_path)
    for record, wanted in zip(reader, labels, strict=True):
        assert record.labels is not None
        assert record.labels.equal(wanted)
        assert record.loss_mask.equal(wanted != -100)
        assert ((record.targets.ids >= 0).sum(-1) == torch.where(wanted != -100, K, 0)).all()


def test_kills_at_every_point_lose_nothing(tmp_path: Path) -> None:
    """A few of the rounds of `python -m tests.kill_rounds`."""
    kills = run(24, 0, tmp_path)
    assert set(kills) >= {"write", "before fsync", "after fsync", "before rename", "after rename"}
