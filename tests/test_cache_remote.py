"""Caches at URLs: copied once, whole or not at all, checked like any other; with fsspec's own file systems."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from cache_helpers import SETTINGS, assert_same, document, small_cache

from kdfast.cache import (
    CacheDataset,
    CacheError,
    CacheReader,
    CacheStream,
    CacheWriter,
    CorruptCache,
    manifest,
    merge,
    part_path,
    repair,
    verify,
)
from kdfast.cache.format import MANIFEST
from kdfast.cache.remote import Remote, manifest_of
from kdfast.cli import main

fsspec = pytest.importorskip("fsspec", minversion="2024.2")


@pytest.fixture(autouse=True)
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KDFAST_CACHE_DIR", str(tmp_path / "copies"))
    return tmp_path / "copies"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return small_cache(tmp_path / "source")


@pytest.fixture
def in_memory(source: Path) -> Iterator[str]:
    files = fsspec.filesystem("memory")
    for path in source.iterdir():
        files.pipe_file(f"/bucket/cache/{path.name}", path.read_bytes())
    yield "memory://bucket/cache"
    for path in files.glob("/bucket/cache/*"):
        files.rm_file(path)


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_holds_the_documents(reader: CacheReader, documents: int = 5) -> None:
    assert len(reader) == documents
    for i, record in enumerate(reader):
        assert record.input_ids.equal(document(i)[0])


def test_records_are_those_of_the_folder(source: Path, in_memory: str) -> None:
    here = CacheReader(source)
    for url in (in_memory, in_memory + "/", f"file://{source}"):
        there = CacheReader(url, vocab_size=97, tokenizer_hash="h", teacher="t")
        assert there.info == here.info
        for mine, other in zip(here, there, strict=True):
            assert mine.input_ids.equal(other.input_ids)
            assert_same(mine.targets, other.targets)
        assert verify(url) == here.info
    assert len(CacheDataset(in_memory)) == 5
    batches = [next(iter(CacheStream(path, 2, seed=3, epochs=1))) for path in (source, in_memory)]
    assert batches[0].input_ids.equal(batches[1].input_ids)


def test_it_is_copied_once_and_workers_need_no_source(in_memory: str, copies: Path) -> None:
    reader = CacheReader(in_memory)
    before = times(copies)
    assert sorted(before) == [MANIFEST, *(f"shard-0000{i}.safetensors" for i in range(3))]
    assert CacheReader(in_memory).path == reader.path
    files = fsspec.filesystem("memory")
    for shard in files.glob("/bucket/cache/shard-*"):
        files.rm_file(shard)
    assert_holds_the_documents(CacheReader(in_memory))
    files.rm_file("/bucket/cache/manifest.json")
    assert_holds_the_documents(pickle.loads(pickle.dumps(reader)))
    assert_holds_the_documents(CacheReader(reader.path))
    assert times(copies) == before


def test_progress_counts_every_byte_and_its_errors_are_the_caller_s(in_memory: str, copies: Path) -> None:
    remote, seen = Remote(in_memory), []

    def stop(done: int, total: int) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        remote.copy(stop)
    assert times(copies) == {}
    remote.copy(lambda done, total: seen.append((done, total)))
    sizes = [entry.bytes for entry in remote.manifest.shards]
    assert seen == [(sum(sizes[: i + 1]), sum(sizes)) for i in range(3)] + [(sum(sizes), sum(sizes))]


def test_a_killed_copy_goes_on_where_it_was(source: Path, copies: Path) -> None:
    url = f"file://{source}"
    code = """
        import os, signal, sys
        from kdfast.cache.remote import Remote
        remote = Remote(sys.argv[1])
        first = remote.manifest.shards[0].bytes
        remote.copy(lambda done, total: done > first and os.kill(os.getpid(), signal.SIGKILL))
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code), url]).returncode == -9
    left = times(copies)
    assert sorted(left) == ["shard-00000.safetensors", "shard-00001.safetensors.tmp"]
    assert_holds_the_documents(CacheReader(url))
    after = times(copies)
    assert after["shard-00000.safetensors"] == left["shard-00000.safetensors"]
    assert not [name for name in after if name.endswith(".tmp")]


def test_two_processes_at_once_copy_once(source: Path, copies: Path) -> None:
    code = """
        import sys, time
        from kdfast.cache.remote import Remote
        copied, remote = [], Remote(sys.argv[1])
        print("ready", flush=True)
        sys.stdin.readline()
        remote.copy(lambda done, total: (copied.append(done), time.sleep(0.05)))
        print(len(copied))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), f"file://{source}"]
    both = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    calls = sorted(int(process.communicate("\n", timeout=60)[0]) for process in both)
    # Three shards and the end for the one that copied, the end alone for the one that waited.
    assert calls == [1, 4]
    assert [process.returncode for process in both] == [0, 0]
    assert_holds_the_documents(CacheReader(next(copies.iterdir())))


def test_a_changed_cache_is_copied_anew(source: Path, copies: Path) -> None:
    url = f"file://{source}"
    first = CacheReader(url)
    shutil.rmtree(source)
    small_cache(source, documents=3)
    second = CacheReader(url)
    assert second.path != first.path
    assert_holds_the_documents(second, 3)
    assert_holds_the_documents(CacheReader(first.path))
    assert len(list(copies.iterdir())) == 2


@pytest.mark.parametrize("change", [-1, 1])
def test_a_shard_of_another_size_is_refused_and_not_kept(source: Path, copies: Path, change: int) -> None:
    shard = source / "shard-00001.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:change] if change < 0 else data + b"x")
    with pytest.raises(CorruptCache, match=rf"shard-00001.*expected {len(data)} bytes, got .*copy the folder there again"):
        CacheReader(f"file://{source}")
    assert list(times(copies)) == ["shard-00000.safetensors"]
    shard.unlink()
    with pytest.raises(CorruptCache, match="it is gone"):
        CacheReader(f"file://{source}")
    shard.write_bytes(data)
    assert_holds_the_documents(CacheReader(f"file://{source}"))


def test_bytes_that_changed_are_noticed_where_they_always_are(source: Path) -> None:
    shard = source / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    reader = CacheReader(f"file://{source}")
    with pytest.raises(CorruptCache, match="record 3"):
        reader.batch([3])
    data[9] ^= 1
    shard.write_bytes(data)
    shutil.rmtree(reader.path)
    with pytest.raises(CorruptCache):
        CacheReader(f"file://{source}")


def forge(folder: Path, **changes: object) -> None:
    """Changes the first shard's entry; the manifest's digest is made to fit."""
    body = json.loads((folder / MANIFEST).read_bytes())
    body["shards"][0].update(changes)
    body["digest"] = "0" * 32
    blank = json.dumps(body, indent=1).encode()
    (folder / MANIFEST).write_bytes(blank.replace(b'"' + b"0" * 32 + b'"', f'"{manifest.digest(blank)}"'.encode()))


@pytest.mark.parametrize("name", ["../shard-00000.safetensors", "/etc/passwd", "shard-00000.safetensors/../../x", "x", ""])
def test_names_that_lead_elsewhere_are_refused_before_anything_is_copied(source: Path, copies: Path, name: str) -> None:
    (source.parent / "shard-00000.safetensors").write_bytes((source / "shard-00000.safetensors").read_bytes())
    forge(source, name=name)
    with pytest.raises(CorruptCache, match="expected a shard name"):
        CacheReader(f"file://{source}")
    assert not copies.exists()


def test_a_link_planted_in_the_copy_is_not_followed(source: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    remote = Remote(f"file://{source}")
    remote.folder.mkdir(parents=True)
    (remote.folder / "shard-00000.safetensors.tmp").symlink_to(victim)
    (remote.folder / "shard-00001.safetensors").symlink_to(victim)
    assert_holds_the_documents(CacheReader(f"file://{source}"))
    assert victim.read_text() == "mine"


def test_a_forged_manifest_and_an_unfinished_capture_copy_nothing(source: Path, copies: Path, tmp_path: Path) -> None:
    (source / MANIFEST).write_bytes((source / MANIFEST).read_bytes().replace(b'"tokens": ', b'"tokens": 1'))
    with pytest.raises(CorruptCache, match="its own digest"):
        CacheReader(f"file://{source}")
    with contextlib.suppress(KeyboardInterrupt), CacheWriter(tmp_path / "half", **SETTINGS, records_per_shard=1) as writer:
        writer.add(*document(0))
        raise KeyboardInterrupt
    with pytest.raises(CacheError, match="not finished"):
        CacheReader(f"file://{tmp_path / 'half'}")
    assert manifest_of(f"file://{tmp_path / 'half'}") == manifest_of(tmp_path / "half")
    assert not copies.exists()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nosuch://bucket/cache", "nosuch.*check the URL"),
        ("ftp://me:secret@127.0.0.1:9/cache", "^ftp://127.0.0.1:9/cache: .*check the URL"),
        ("memory://nowhere/at/all", "no teacher cache here"),
        ("file:///nowhere/at/all", "no teacher cache here"),
    ],
)
def test_what_cannot_be_read_is_one_line(url: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CacheError, match=message) as caught:
        CacheReader(url)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    for action in ("info", "verify", "cat", "bench"):
        assert main(["cache", action, url]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_without_fsspec_the_remedy_is_named() -> None:
    code = "import sys; sys.modules['fsspec'] = None; from kdfast.cache import CacheReader; CacheReader('s3://bucket/cache')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .endswith("CacheError: s3://bucket/cache: a cache at a URL needs fsspec: pip install 'kdfast[remote]'")
    )


def test_writers_refuse_urls(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = "memory://bucket/out"
    writers = {
        "CacheWriter": lambda: CacheWriter(url, **SETTINGS),
        "merge": lambda: merge(url, [source]),
        "merge of URLs": lambda: merge(tmp_path / "joined", [f"file://{source}"]),
        "part_path": lambda: part_path(url, 0, 2),
        "repair": lambda: repair(f"file://{source}"),
    }
    for name, write in writers.items():
        with pytest.raises(CacheError, match="expected a local folder, got") as caught:
            write()
        assert "\n" not in str(caught.value), name
    assert main(["cache", "build", "no-teacher", "--data", "no-data", "--out", url]) == 2
    assert "--out: expected a local folder, got" in capsys.readouterr().err
    assert not os.path.lexists(tmp_path / "joined")
    assert not os.path.lexists("memory:")


def test_commands_take_urls(source: Path, in_memory: str, copies: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str) -> dict[str, object]:
        assert main(["cache", *words, "--json"]) == 0
        streams = capsys.readouterr()
        assert streams.err == ""  # piped: no bar
        found: dict[str, object] = json.loads(streams.out)
        return found

    assert said("info", in_memory) == said("info", str(source))
    assert not copies.exists()  # the manifest is enough
    assert said("cat", in_memory, "--records", "0", "4") == said("cat", str(source), "--records", "0", "4")
    assert said("verify", in_memory)["records"] == 5
    assert said("bench", in_memory, "--seconds", "0.01", "--batch-size", "2")["batch_size"] == 2
    assert len(list(copies.iterdir())) == 1


def test_a_recipe_s_teacher_may_lie_at_a_url(in_memory: str, copies: Path) -> None:
    teacher = pytest.importorskip("kdfast.train.teachers")
    cached = teacher.CachedTeacher(in_memory, tokenizer_hash="h")
    assert cached.path.parent == copies
    assert cached.batch([0]).inputs["input_ids"][0].equal(document(0)[0])
