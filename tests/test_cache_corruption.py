"""Attacks on a cache: every changed bit is noticed, and nothing in a file is believed before it is checked."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_helpers import SETTINGS, document, small_cache

from kdfast.cache import CacheError, CacheReader, CacheWriter, CorruptCache, codec, repair, verify
from kdfast.cache import format as fmt
from kdfast.cache import manifest as man
from kdfast.cache.shard import _payload_span, _safetensors

SHARD = "shard-00000.safetensors"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    with CacheWriter(tmp_path / "tiny", **SETTINGS) as writer:
        for i in range(2):
            writer.add(*document(i, 3))
    return tmp_path / "tiny"


@pytest.mark.parametrize("name", [fmt.MANIFEST, SHARD])
def test_a_change_of_any_single_byte_is_noticed(tiny: Path, name: str) -> None:
    """Every byte with one bit flipped, all bits flipped, and one more."""
    path = tiny / name
    good = path.read_bytes()
    verify(tiny)
    with open(path, "r+b", buffering=0) as file:
        for at, byte in enumerate(good):
            for wrong in (byte ^ 1 << at % 8, byte ^ 0xFF, (byte + 1) & 0xFF):
                file.seek(at)
                file.write(bytes([wrong]))
                with pytest.raises(CacheError):
                    verify(tiny)
            file.seek(at)
            file.write(bytes([byte]))
    verify(tiny)


def test_shards_with_holes_and_bytes_appended_are_noticed(tiny: Path) -> None:
    path, good = tiny / SHARD, (tiny / SHARD).read_bytes()
    start, _ = _payload_span(memoryview(good))
    for bad in (good + b"\0", good[:start] + bytes(len(good) - start), good[: start + 40] + bytes(64) + good[start + 104 :]):
        path.write_bytes(bad)
        with pytest.raises(CorruptCache):
            verify(tiny)


def test_records_that_changed_places_are_noticed(tmp_path: Path) -> None:
    """Two records of one size exchanged, with nothing else changed, fail their checksums."""
    path = tmp_path / "c"
    ids, targets = document(0, 9)
    with CacheWriter(path, **SETTINGS) as writer:
        writer.add(ids, targets)
        writer.add(ids.flip(0), targets)
    data = bytearray((path / SHARD).read_bytes())
    start, end = _payload_span(memoryview(data))
    middle = (start + end) // 2
    data[start:end] = data[middle:end] + data[start:middle]
    (path / SHARD).write_bytes(data)
    with pytest.raises(CorruptCache, match="checksum"):
        CacheReader(path).batch([1])


def test_links_are_not_followed_by_a_writer(tmp_path: Path) -> None:
    """A planted link in the place of a temporary file leads to nothing outside the cache."""
    outside, path = tmp_path / "outside", tmp_path / "c"
    outside.write_text("mine")
    path.mkdir()
    (path / f"{fmt.MANIFEST}.tmp").symlink_to(outside)
    with CacheWriter(path, **SETTINGS) as writer:
        (path / f"{SHARD}.tmp").symlink_to(outside)
        writer.add(*document(0, 9))
    assert outside.read_text() == "mine"
    assert not any(p.is_symlink() for p in path.iterdir())
    verify(path)


@pytest.mark.parametrize("name", [fmt.MANIFEST, SHARD])
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_noticed_at_opening(tiny: Path, name: str, keep: float) -> None:
    data = (tiny / name).read_bytes()
    (tiny / name).write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(CorruptCache):
        CacheReader(tiny)


def test_swapped_and_missing_shards_are_noticed_at_opening(tmp_path: Path) -> None:
    path = tmp_path / "c"
    with CacheWriter(path, **SETTINGS, records_per_shard=1) as writer:
        for i in range(2):
            writer.add(*document(i, 9))
    first, second = path / SHARD, path / "shard-00001.safetensors"
    first.rename(tmp_path / "x")
    with pytest.raises(CorruptCache, match="is gone"):
        CacheReader(path)
    second.rename(first)
    (tmp_path / "x").rename(second)
    with pytest.raises(CorruptCache, match=r"digest|expected \d+ bytes"):
        CacheReader(path)


def sign(body: dict[str, Any]) -> bytes:
    """A manifest as an attacker would write it: its digest is right."""
    blank = json.dumps({**body, "digest": "0" * 32}).encode()
    return blank.replace(b"0" * 32, man.digest(blank).encode())


def forge(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    body = json.loads((path / fmt.MANIFEST).read_bytes())
    change(body)
    (path / fmt.MANIFEST).write_bytes(sign(body))


def _set(*keys: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(body: dict[str, Any]) -> None:
        for key in keys[:-1]:
            body = body[key]
        body[keys[-1]] = value

    return change


FORGERIES = [
    pytest.param(_set("shards", 0, "name", value="../tiny/" + SHARD), "shard name", id="path-traversal"),
    pytest.param(_set("shards", 0, "name", value="/etc/passwd"), "shard name", id="absolute-path"),
    pytest.param(_set("shards", 0, "name", value=SHARD + "\n"), "shard name", id="newline-in-name"),
    pytest.param(_set("shards", 0, "name", value=7), "shard name", id="name-is-a-number"),
    pytest.param(_set("shards", 0, "records", value=10**18), "shape", id="huge-record-count"),
    pytest.param(_set("shards", 0, "tokens", value=10**18), "contradicts", id="huge-token-count"),
    pytest.param(_set("shards", 0, "tokens", value=-1), "whole numbers", id="negative-count"),
    pytest.param(_set("shards", 0, "tokens", value="6"), "whole numbers", id="count-is-text"),
    pytest.param(_set("shards", 0, "kl_histogram", value=[1]), "whole numbers", id="short-histogram"),
    pytest.param(_set("shards", 0, "extra", value=1), "lacks or mistypes", id="unknown-field"),
    pytest.param(_set("shards", value=None), "lacks or mistypes", id="no-shards"),
    pytest.param(_set("settings", "k", value=6), "other settings", id="another-k"),
    pytest.param(_set("settings", "k", value="5"), "whole number", id="k-is-text"),
    pytest.param(_set("settings", "vocab_size", value=1 << 40), "vocab_size", id="huge-vocabulary"),
    pytest.param(_set("settings", "kind", value="dense"), "kind", id="unknown-kind"),
    pytest.param(_set("settings", "kind", value="sampled"), "samples", id="kind-without-samples"),
    pytest.param(_set("settings", "samples", value=1 << 70), "samples", id="huge-samples"),
    pytest.param(_set("settings", "sample_temperature", value=3.0), "sample_temperature", id="draws-at-no-temperature"),
    pytest.param(_set("version", value=3), "versions 1 and 2", id="newer-version"),
    pytest.param(_set("format", value="zip"), "format", id="another-format"),
]


@pytest.mark.parametrize(("change", "message"), FORGERIES)
def test_a_forged_manifest_is_refused_at_opening(tiny: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    forge(tiny, change)
    with pytest.raises(CacheError, match=message):
        CacheReader(tiny)


def test_a_manifest_of_garbage_is_refused(tiny: Path) -> None:
    for data in (b"", b"{}", b"[" * 100000, b"\xff\xfe", sign({"format": 1})):
        (tiny / fmt.MANIFEST).write_bytes(data)
        with pytest.raises(CorruptCache):
            CacheReader(tiny)


def forge_shard(path: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Rewrites the shard with changed tensors; every digest and size in the manifest is made to fit."""
    safetensors = _safetensors()
    with safetensors.safe_open(path / SHARD, "numpy") as file:
        metadata = file.metadata()
        tensors = {name: np.array(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    change(tensors)
    data = safetensors.numpy.save(tensors, metadata)
    (path / SHARD).write_bytes(data)
    spans = _payload_span(memoryview(data)) if "payload" in tensors else (len(data), len(data))
    index_digest = man.digest(data[: spans[0]], data[spans[1] :])
    forge(path, lambda body: body["shards"][0].update(bytes=len(data), index_digest=index_digest))


def _assign(name: str, at: Any, value: int) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name][at] = value

    return change


BAD_SHARDS = [
    pytest.param(_assign("offsets", 1, 1 << 60), "contradicts", id="huge-offset"),
    pytest.param(_assign("offsets", 1, -8), "contradicts", id="negative-offset"),
    pytest.param(_assign("offsets", 0, 4), "contradicts", id="first-offset"),
    pytest.param(_assign("tokens", 0, 1 << 60), "contradicts", id="huge-tokens"),
    pytest.param(_assign("tokens", 0, 0), "contradicts", id="no-tokens"),
    pytest.param(_assign("key_offsets", 1, 1 << 40), "contradicts", id="huge-key-offset"),
    pytest.param(lambda t: t.pop("keys"), "expected the tensors", id="tensor-missing"),
    pytest.param(lambda t: t.update(tokens=t["tokens"].astype(np.float32)), "expected the tensors", id="another-dtype"),
    pytest.param(_assign("contexts", 0, 1 << 60), "contradicts", id="huge-contexts"),
    pytest.param(_assign("offsets", 1, -(1 << 63)), "contradicts", id="offset-that-wraps"),
    pytest.param(lambda t: t.update(keys=t["keys"].reshape(1, -1)), "keys of shape", id="keys-in-rows"),
    pytest.param(lambda t: t.update(checksums=t["checksums"][:1]), "checksums of shape", id="checksum-missing"),
]


@pytest.mark.parametrize(("change", "message"), BAD_SHARDS)
def test_a_forged_shard_index_is_refused_at_opening(
    tiny: Path, change: Callable[[dict[str, np.ndarray]], None], message: str
) -> None:
    forge_shard(tiny, change)
    with pytest.raises(CorruptCache, match=message):
        CacheReader(tiny)


def test_a_safetensors_header_that_lies_is_refused(tiny: Path) -> None:
    data = bytearray((tiny / SHARD).read_bytes())
    data[:8] = struct.pack("<Q", 1 << 62)
    (tiny / SHARD).write_bytes(data)
    with pytest.raises(CorruptCache, match="not a safetensors file"):
        CacheReader(tiny)


@pytest.mark.parametrize("at", range(60))
def test_a_forged_record_is_refused_or_stays_in_range(tiny: Path, at: int) -> None:
    """Checksums are made to fit, so only the record's own checks stand between a bad byte and the loss."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        end = int(tensors["offsets"][1])
        tensors["payload"][at % end] ^= 0xFF
        tensors["checksums"][0] = codec.checksum(tensors["payload"][:end].tobytes())

    forge_shard(tiny, change)
    reader = CacheReader(tiny)
    with contextlib.suppress(CorruptCache):
        targets = reader[0].targets
        assert int(targets.ids.max()) < 97
        assert not targets.logprobs.isnan().any()


def test_a_record_that_counts_context_ids_it_does_not_flag_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by libFuzzer: ids that no section holds were read from a null pointer."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        end = int(tensors["offsets"][1])
        tensors["payload"][8] = tensors["contexts"][0] = 1
        tensors["checksums"][0] = codec.checksum(tensors["payload"][:end].tobytes())

    forge_shard(tiny, change)
    reader = CacheReader(tiny)
    for native in (True, False):
        if not native:
            monkeypatch.setattr(codec, "_native", None)
        with pytest.raises(CorruptCache, match="header"):
            reader.batch([0])


def test_keys_of_another_document_are_noticed_by_verify(tiny: Path) -> None:
    forge_shard(tiny, _assign("keys", 0, 1))
    with pytest.raises(CorruptCache, match="content keys"):
        verify(tiny)


def test_verify_reads_a_good_cache_through(tmp_path: Path) -> None:
    path = small_cache(tmp_path / "c")
    seen: list[tuple[int, int]] = []
    info = verify(path, lambda done, total: seen.append((done, total)))
    assert len(seen) == info.records
    assert seen[-1] == (info.tokens, info.tokens)
    shutil.copytree(path, tmp_path / "copy")
    assert verify(tmp_path / "copy") == info


def test_repair_keeps_what_is_sound(tmp_path: Path) -> None:
    """Shards of two records: one record damaged in the first, the index of the second, nothing in the third."""
    path = small_cache(tmp_path / "c", 6)
    whole = [r.input_ids for r in CacheReader(path)]
    for name, at in ((SHARD, -1), ("shard-00001.safetensors", 20)):
        data = bytearray((path / name).read_bytes())
        data[at] ^= 1
        (path / name).write_bytes(data)
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    lost = len(whole[1]) + len(whole[2]) + len(whole[3])
    assert repair(path, dry_run=True) == (3, 3, lost, 2)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    assert repair(path) == (3, 3, lost, 2)
    info = verify(path)
    assert (info.records, info.tokens, sum(info.kl_histogram)) == (3, sum(map(len, whole)) - lost, info.tokens)
    for record, wanted in zip(CacheReader(path), (whole[0], whole[4], whole[5]), strict=True):
        assert record.input_ids.equal(wanted)
    assert repair(path) == (3, 0, 0, 0)


def test_repair_of_an_unfinished_cache_lets_the_capture_make_it_again(tmp_path: Path) -> None:
    path, whole = tmp_path / "c", small_cache(tmp_path / "whole", 6)
    with contextlib.suppress(KeyboardInterrupt), CacheWriter(path, **SETTINGS, records_per_shard=2) as writer:
        for i in range(5):
            writer.add(*document(i))
        with pytest.raises(CacheError, match="another writer"):
            repair(path)
        raise KeyboardInterrupt
    (path / SHARD).write_bytes((path / SHARD).read_bytes()[:-1])
    assert repair(path)[:2] == (0, 4)
    with CacheWriter(path, **SETTINGS, records_per_shard=2) as writer:
        assert len(writer) == 0
        for i in range(6):
            writer.add(*document(i))
    assert {p.name: p.read_bytes() for p in path.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}
