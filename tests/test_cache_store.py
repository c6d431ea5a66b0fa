"""Writer and reader: what goes in comes out; settings, locks, resumption and searching behave."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import pickle
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_helpers import SETTINGS, assert_same, document, small_cache, teacher_targets

from kdfast.cache import Batch, CacheError, CacheMismatch, CacheReader, CacheWriter, CorruptCache, codec, verify
from kdfast.cache.format import MANIFEST


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return small_cache(tmp_path / "cache")


def test_records_come_back_in_order(cache: Path) -> None:
    reader = CacheReader(cache, vocab_size=97, tokenizer_hash="h", teacher="t")
    assert len(reader) == 5
    assert reader.lengths().tolist() == [len(document(i)[0]) for i in range(5)]
    for i, record in enumerate(reader):
        ids, targets = document(i)
        assert record.input_ids.equal(ids)
        assert record.targets.ids.equal(targets.ids.sort(-1).values)
        assert record.loss_mask.tolist() == [True] * (len(ids) - 1) + [False]
        assert (record.labels, record.context_ids) == (None, None)
    assert reader[-1].input_ids.equal(document(4)[0])
    with pytest.raises(IndexError, match="holds 5 records"):
        reader[5]


def test_info_adds_up(cache: Path) -> None:
    info = CacheReader(cache).info
    assert (info.records, info.tokens, info.shards) == (5, sum(len(document(i)[0]) for i in range(5)), 3)
    assert info.bytes == sum(p.stat().st_size for p in cache.iterdir())
    assert 0 < info.kl_mean <= info.kl_max <= 5e-5
    assert sum(info.kl_histogram) == info.tokens
    assert json.loads(json.dumps(info.as_json()))["vocab_size"] == 97


def test_batch_is_the_records_padded(cache: Path) -> None:
    reader = CacheReader(cache)
    batch = reader.batch([3, 0, 3])
    longest = max(len(document(i)[0]) for i in (0, 3))
    assert batch.targets.ids.shape == (3, longest, 5)
    for row, i in enumerate((3, 0, 3)):
        record, n = reader[i], len(document(i)[0])
        assert batch.input_ids[row, :n].equal(record.input_ids)
        assert_same(batch.targets[row, :n], record.targets)
        assert batch.attention_mask[row].tolist() == [True] * n + [False] * (longest - n)
        assert batch.loss_mask[row, :n].equal(record.loss_mask)
        assert batch.labels[row, : n - 1].equal(record.input_ids[1:])
        assert (batch.labels[row, n - 1 :] == -100).all()
        assert not batch.loss_mask[row, n - 1 :].any()
        assert (batch.targets.ids[row, n:] == -1).all()
        assert (batch.targets.log_tail[row, n:] == 0).all()
    with pytest.raises(ValueError, match="indices"):
        reader.batch([])


def test_masks_labels_and_contexts(tmp_path: Path) -> None:
    ids, targets = document(0, 6)
    mask = torch.tensor([False, True, True, False, True, True])
    labels = torch.tensor([-100, 3, 96, 0, -100, 7])
    context = torch.tensor([70000, 1])
    with CacheWriter(tmp_path / "next", **SETTINGS) as writer:
        writer.add(ids, targets, loss_mask=mask)
        writer.add(ids, targets, labels=labels, context_ids=context)
        writer.add(ids, targets, labels=labels, loss_mask=mask)
    reader = CacheReader(tmp_path / "next")
    assert reader[0].loss_mask.tolist() == [False, True, True, False, True, False]
    assert reader[1].loss_mask.equal(labels != -100)
    assert reader[1].labels is not None
    assert reader[1].labels.equal(labels)
    assert reader[2].loss_mask.equal(mask)
    batch = reader.batch([1, 2])
    assert batch.labels.tolist() == [labels.tolist(), [-100, 3, 96, -100, -100, 7]]
    assert batch.context_ids is not None
    assert batch.context_mask is not None
    assert batch.context_ids.tolist() == [[70000, 1], [0, 0]]
    assert batch.context_mask.tolist() == [[True, True], [False, False]]
    with CacheWriter(tmp_path / "same", **SETTINGS, alignment="same") as writer:
        writer.add(ids, targets, labels=labels)
        with pytest.raises(CacheError, match="alignment is 'same'"):
            writer.add(ids, targets)
    assert CacheReader(tmp_path / "same").batch([0]).labels.tolist() == [labels.tolist()]


def assert_same_batch(a: Batch, b: Batch) -> None:
    assert_same(a.targets, b.targets)
    for name in (f.name for f in dataclasses.fields(Batch) if f.name not in ("targets", "place")):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None and y is None) or (x.dtype == y.dtype and x.equal(y)), name


def test_batches_without_a_compiler_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every section of a record, with room to pad, a record that is cut, and a byte that changed."""
    if not codec.native():
        pytest.skip("the C++ extension is not built")
    with CacheWriter(tmp_path, **SETTINGS) as writer:
        for i in range(4):
            ids, targets = document(i, 9 + i)
            mask = ids % 3 == 0 if i % 2 else None
            labels = torch.where(ids % 2 == 0, ids, -100) if i > 1 else None
            writer.add(ids, targets, mask, labels, torch.arange(i) + 300 if i > 1 else None)
    reader = CacheReader(tmp_path)
    native = reader.batch([3, 0, 2, 1]), reader.packed([[0]], 9), reader.packed([[0]], 5), reader.packed([[0]], 15)
    checksums = [codec.checksum(bytes(range(n))) for n in (0, 1, 3, 4, 7, 8, 31, 32, 33, 100)]
    monkeypatch.setattr(codec, "_native", None)
    python = reader.batch([3, 0, 2, 1]), reader.packed([[0]], 9), reader.packed([[0]], 5), reader.packed([[0]], 15)
    for a, b in zip(native, python, strict=True):
        assert_same_batch(a, b)
    assert checksums == [codec.checksum(bytes(range(n))) for n in (0, 1, 3, 4, 7, 8, 31, 32, 33, 100)]
    assert checksums[0] == 0xEF46DB3751D8E999  # of nothing, as XXH64's own test vectors have it
    damage(tmp_path / "shard-00000.safetensors", -1)
    for language in (None, importlib.import_module("kdfast._C")):
        monkeypatch.setattr(codec, "_native", language)
        with pytest.raises(CorruptCache, match=r"record 3 .*checksum"):
            reader.batch([0, 3])


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    with open(path, "r+b") as file:
        file.write(data)


BAD_RECORDS = [
    pytest.param({"input_ids": torch.tensor([0, 97, 1])}, "input_ids", id="id-beyond-vocabulary"),
    pytest.param({"input_ids": torch.zeros(0, dtype=torch.int64)}, "input_ids", id="empty-document"),
    pytest.param({"input_ids": torch.zeros(3)}, "input_ids", id="float-ids"),
    pytest.param({"targets": teacher_targets(4, 97, 5, (1.0, 2.0))}, "targets.ids", id="another-length"),
    pytest.param({"targets": teacher_targets(3, 97, 4, (1.0, 2.0))}, "targets.ids", id="another-k"),
    pytest.param({"targets": teacher_targets(3, 97, 5, (1.0,))}, "targets.temperatures", id="another-temperature"),
    pytest.param({"targets": teacher_targets(3, 98, 5, (1.0, 2.0))}, "targets.vocab_size", id="another-vocabulary"),
    pytest.param({"loss_mask": torch.ones(3)}, "loss_mask", id="float-mask"),
    pytest.param({"labels": torch.tensor([0, -1, 2])}, "labels", id="negative-label"),
]


@pytest.mark.parametrize(("change", "name"), BAD_RECORDS)
def test_a_bad_record_is_refused_and_adds_nothing(tmp_path: Path, change: dict[str, Any], name: str) -> None:
    with CacheWriter(tmp_path, **SETTINGS) as writer:
        with pytest.raises(CacheError, match=name):
            writer.add(**{"input_ids": torch.tensor([1, 2, 3]), "targets": teacher_targets(3, 97, 5, (1.0, 2.0)), **change})
        writer.add(*document(0))
    assert len(CacheReader(tmp_path)) == 1


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("vocab_size", 98), ("tokenizer_hash", "other"), ("teacher", "other")],
)
def test_opening_for_something_else_names_both_sides(cache: Path, name: str, wrong: object) -> None:
    with pytest.raises(CacheMismatch, match=name) as caught:
        CacheReader(cache, **{name: wrong})
    assert repr(wrong) in str(caught.value)
    assert repr(SETTINGS[name]) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("vocab_size", (1 << 24) + 1), ("k", 98), ("k", 0), ("temperatures", (2.0,)), ("temperatures", (1.0, 1.0)),
     ("max_kl", 0.0), ("values_bits", 17), ("alignment", "previous"), ("records_per_shard", 0)],
)  # fmt: skip
def test_settings_out_of_range(tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(CacheError, match=name):
        CacheWriter(tmp_path / "c", **{**SETTINGS, name: value})


def test_an_interrupted_writer_goes_on_after_its_last_shard(tmp_path: Path) -> None:
    whole = CacheReader(small_cache(tmp_path / "whole"))
    path = tmp_path / "resumed"
    with contextlib.suppress(KeyboardInterrupt), CacheWriter(path, **SETTINGS, records_per_shard=2) as writer:
        for i in range(3):
            writer.add(*document(i))
        raise KeyboardInterrupt
    (path / "shard-00001.safetensors.tmp").write_bytes(b"half")
    (path / "shard-00007.safetensors").write_bytes(b"not listed")
    with pytest.raises(CacheError, match="not finished"):
        CacheReader(path)
    with pytest.raises(CacheMismatch, match="k 4 != 5"):
        CacheWriter(path, **{**SETTINGS, "k": 4})
    with CacheWriter(path, **SETTINGS, records_per_shard=2) as writer:
        assert len(writer) == 2
        for i in range(len(writer), 5):
            writer.add(*document(i))
    with pytest.raises(CacheError, match="finished already"):
        CacheWriter(path, **SETTINGS)
    assert sorted(p.name for p in path.iterdir()) == sorted(p.name for p in (tmp_path / "whole").iterdir())
    for a, b in zip(whole, CacheReader(path), strict=True):
        assert a.input_ids.equal(b.input_ids)
        assert_same(a.targets, b.targets)
    verify(path)


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with CacheWriter(tmp_path, **SETTINGS):
        with pytest.raises(CacheError, match="another writer"):
            CacheWriter(tmp_path, **SETTINGS)
        code = f"from kdfast.cache import CacheWriter; CacheWriter({str(tmp_path)!r}, **{SETTINGS!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
        assert "another writer" in done.stderr
    CacheReader(tmp_path)


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "shard-00000.safetensors").write_bytes(b"whose?")
    with pytest.raises(CacheError, match="expected an empty folder"):
        CacheWriter(tmp_path, **SETTINGS)
    assert (tmp_path / "shard-00000.safetensors").read_bytes() == b"whose?"
    with pytest.raises(CacheError, match=r"no teacher cache .*; make one with `kdfast cache build`"):
        CacheReader(tmp_path)


def test_parts_that_were_not_joined_are_told_how(tmp_path: Path) -> None:
    small_cache(tmp_path / "part-00000-of-00002")
    with pytest.raises(CacheError, match=r"no teacher cache .*; join the parts that lie in it with `kdfast cache merge`"):
        CacheReader(tmp_path)


def test_a_full_disk_is_one_line_and_loses_nothing_finished(tmp_path: Path) -> None:
    """A file size limit makes the kernel refuse the write as a full disk does."""
    code = textwrap.dedent(f"""
        import resource, signal, sys
        from kdfast.cache import CacheWriter
        from cache_helpers import SETTINGS, document
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        writer = CacheWriter({str(tmp_path)!r}, **SETTINGS, records_per_shard=2)
        for i in range(2):
            writer.add(*document(i, 20))
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        try:
            for i in range(2, 4):
                writer.add(*document(i, 500))
        except OSError as error:
            print(error)
        """)
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "cannot write" in done.stdout, done.stderr
    assert "2 records are safe" in done.stdout
    assert not list(tmp_path.glob("*.tmp"))
    with CacheWriter(tmp_path, **SETTINGS) as writer:
        assert len(writer) == 2
    assert CacheReader(tmp_path)[1].input_ids.equal(document(1, 20)[0])


def test_find_by_content(tmp_path: Path) -> None:
    lengths = [64, 200, 63, 128, 10, 130]
    documents = [document(i, n) for i, n in enumerate(lengths)]
    order = np.random.default_rng(0).permutation(len(lengths))
    with CacheWriter(tmp_path, **SETTINGS, records_per_shard=4) as writer:
        for i in order:
            writer.add(*documents[i])
    reader = CacheReader(tmp_path)
    for at, i in enumerate(order):
        ids = documents[i][0]
        for n in {len(ids), *(n for n in (9, 63, 64, 100, 128) if n <= len(ids))}:
            assert reader.find(ids[:n]) == at
        changed = ids.clone()
        changed[-1] = (changed[-1] + 1) % 97
        assert reader.find(changed) is None
        assert reader.find(torch.cat([ids, ids])) is None


def test_an_empty_cache_and_a_pickled_reader(tmp_path: Path, cache: Path) -> None:
    with CacheWriter(tmp_path / "empty", **SETTINGS):
        pass
    empty = CacheReader(tmp_path / "empty")
    assert (len(empty), empty.find(torch.tensor([1])), len(empty.lengths())) == (0, None, 0)
    copy = pickle.loads(pickle.dumps(CacheReader(cache)))
    assert_same(copy[2].targets, CacheReader(cache)[2].targets)


def test_worker_processes_read_what_the_parent_reads(cache: Path) -> None:
    reader = CacheReader(cache)
    loader = torch.utils.data.DataLoader(range(5), batch_size=2, num_workers=2, collate_fn=reader.batch)
    for i, batch in enumerate(loader):
        assert_same(batch.targets, reader.batch(list(range(5))[2 * i : 2 * i + 2]).targets)


def test_threads_read_what_one_thread_reads(cache: Path) -> None:
    reader = CacheReader(cache)
    with ThreadPoolExecutor(4) as pool:
        batches = list(pool.map(lambda i: reader.batch([i % 5, (i + 1) % 5]), range(40)))
    for i, batch in enumerate(batches):
        assert_same(batch.targets, reader.batch([i % 5, (i + 1) % 5]).targets)


DEVICES = [pytest.param("meta", id="no-data"), pytest.param("cuda", id="pinned-copy", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_moves_to_its_device(cache: Path, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    batch, here = CacheReader(cache).batch([0, 1], device=device), CacheReader(cache).batch([0, 1])
    for name in ("input_ids", "loss_mask", "labels", "attention_mask"):
        moved = getattr(batch, name)
        assert (moved.device.type, moved.shape) == (device, getattr(here, name).shape)
    assert batch.targets.log_tail.device.type == device
    if device == "cuda":
        assert_same(batch.targets.to("cpu"), here.targets)


def test_the_manifest_is_json_that_people_can_read(cache: Path) -> None:
    body = json.loads((cache / MANIFEST).read_text())
    assert body["settings"]["teacher"] == "t"
    assert [s["records"] for s in body["shards"]] == [2, 2, 1]
