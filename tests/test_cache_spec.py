"""A reader written from docs/cache-format.md alone, with nothing of kdfast: what it reads is what kdfast reads, bit for bit."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_helpers import SETTINGS, document, mixed_targets, small_cache, teacher_targets
from codec_cases import cache_of

from kdfast.cache import CacheReader, CacheWriter

f32, f64 = np.float32, np.float64
E = [f32(x) for x in (0.0013950476422905922, 0.00836888886988163, 0.04166620597243309, 0.166665181517601, 0.5)]
L = [f32(x) for x in (-0.07634081691503525, 0.1276140958070755, -0.13160260021686554, 0.14201785624027252,
                      -0.16623352468013763, 0.20001225173473358, -0.250008225440979, 0.3333333134651184)]  # fmt: skip


def EXP(x: f32) -> f32:
    x = min(max(x, f32(-87)), f32(88))
    n = (x * f32(1.44269504) + f32(12582912)) - f32(12582912)
    r = (x - n * f32(0.693359375)) - n * f32(-2.12194440e-4)
    y = E[0]
    for c in E[1:]:
        y = y * r + c
    return f32(((y * (r * r) + r) + f32(1)) * f32(2.0 ** int(n)))


def LOG(x: f32) -> f32:
    m, n = math.frexp(float(x))
    if m < float(np.array(0x3F3504F3, np.uint32).view(f32)):
        m, n = 2 * m, n - 1
    d = f32(m) - f32(1)
    y = L[0]
    for c in L[1:]:
        y = y * d + c
    g = d * d
    return f32(f32(n) * f32(0.693145752) + (f32(n) * f32(1.42860677e-6) + ((y * d) * g - g * f32(0.5) + d)))


def sum16(values: list[f32]) -> f64:
    sums = [f64(0)] * 16
    for i, v in enumerate(values):
        sums[i % 16] += f64(v)
    while len(sums) > 1:
        half = len(sums) // 2
        sums = [sums[i] + sums[i + half] for i in range(half)]
    return sums[0]


def packed(data: bytes, count: int, width: int) -> list[int]:
    number = int.from_bytes(data, "little")
    return [number >> j * width & ((1 << width) - 1) for j in range(count)]


class Bytes:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, n: int) -> bytes:
        assert self.at + n <= len(self.data)
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, n: int) -> int:
        return int.from_bytes(self.take(n), "little")


def ids_of(b: Bytes, n: int, vocab: int) -> list[int]:
    low = int(math.log2(vocab // n))
    lowest = packed(b.take(-(-n * low // 8)), n, low)
    bits = int.from_bytes(b.take(-(-(n + ((vocab - 1) >> low)) // 8)), "little")
    ones = [i for i in range(bits.bit_length()) if bits >> i & 1]
    assert len(ones) == n
    return [((one - i) << low) + lowest[i] for i, one in enumerate(ones)]


def block_numbers(b: Bytes, n: int) -> list[int]:
    out: list[int] = []
    while len(out) < n:
        m, head = min(64, n - len(out)), b.number(2)
        w, h, e = head & 31, head >> 5 & 31, head >> 10
        numbers = packed(b.take(-(-m * w // 8)), m, w)
        for patch in packed(b.take(-(-e * (6 + h) // 8)), e, 6 + h):
            numbers[patch & 63] += patch >> 6 << w
        out += numbers
    return out


def tail_and_rest(code: int) -> tuple[f64, f64]:
    if code in (0, 65535):
        return (f64(0), f64(1)) if code == 0 else (f64(1), f64(0))
    odds = f64(2.0 ** (code // 512 - 96) * (1 + code % 512 / 512))
    return odds / (1 + odds), 1 / (1 + odds)


def row_of(b: Bytes, s: dict[str, Any], counts: bool) -> dict[str, Any]:
    k, temperatures = s["k"], s["temperatures"]
    n = b.number(1 if k < 256 else 2 if k < 65536 else 4) if counts else k
    codes = [b.number(2) for _ in temperatures]
    if n and codes == [65535] * len(codes):
        return exact_row_of(b, s, n)
    masses = {t: tail_and_rest(code) for t, code in zip(temperatures, codes, strict=True)}
    log_tail = [LOG(f32(masses[t][0])) if masses[t][0] else f32(-np.inf) for t in temperatures]
    if not n:
        return {"ids": [], "logprobs": [], "log_z": [f32(0)] * len(temperatures), "log_tail": log_tail, "weights": []}
    ids, levels = ids_of(b, n, s["vocab_size"]), block_numbers(b, n)
    draws = block_numbers(b, n) if s["kind"] in ("sampled", "mixed") else None
    unit = f32(f64(masses[1.0][1]) / f64(sum((2 * q + 1) ** 2 for q in levels)))
    p = [(f32(2 * q + 1) * f32(2 * q + 1)) * unit for q in levels]
    logp = [LOG(x) for x in p]
    top, log_z = max(logp), []
    for t in temperatures:
        inv = f32(1 / t)
        scaled = f32(sum16([EXP((x - top) * inv) for x in logp]) / masses[t][1])
        log_z.append(f32(0) if t == 1 else top * inv + LOG(scaled))
    out = {"ids": ids, "logprobs": logp, "log_z": log_z, "log_tail": log_tail}
    if draws is not None:
        out["weights"] = weights_of(s, logp, p, draws, log_z, [masses[t][0] for t in temperatures])
    return out


def exact_row_of(b: Bytes, s: dict[str, Any], n: int) -> dict[str, Any]:
    ids, n_t = ids_of(b, n, s["vocab_size"]), len(s["temperatures"])
    logp, log_z, log_tail = ([f32(x) for x in np.frombuffer(b.take(4 * m), "<f4")] for m in (n, n_t, n_t))
    out = {"ids": ids, "logprobs": logp, "log_z": log_z, "log_tail": log_tail}
    if s["kind"] in ("sampled", "mixed"):
        tails = [f64(EXP(x)) if x > -np.inf else f64(0) for x in log_tail]
        out["weights"] = weights_of(s, logp, [EXP(x) for x in logp], block_numbers(b, n), log_z, tails)
    return out


def weights_of(
    s: dict[str, Any], logp: list[f32], p: list[f32], draws: list[int], log_z: list[f32], tails: list[f64]
) -> list[f32]:
    t = s["sample_temperature"]
    at = s["temperatures"].index(t)
    inv, z, begin = f32(1 / t), log_z[at], f32(1)
    if s["kind"] == "mixed":
        begin = f32(sum16([EXP(x * inv - z) if c else f32(0) for x, c in zip(logp, draws, strict=True)]) + tails[at])
    share = [((f32(c) / f32(s["samples"])) * begin) * EXP(x - (x * inv - z)) for x, c in zip(logp, draws, strict=True)]
    return [w if c else x for w, c, x in zip(share, draws, p, strict=True)]


def read(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "manifest.json").read_bytes()
    found = re.search(rb'"digest": "([0-9a-f]{32})"', text)
    assert found
    blank = text.replace(found[1], b"0" * 32)
    assert hashlib.blake2b(blank, digest_size=16).hexdigest() == found[1].decode()
    manifest = json.loads(text)
    assert (manifest["format"], manifest["version"], manifest["complete"]) == ("kdfast-cache", 2, True)
    return [r for shard in manifest["shards"] for r in read_shard(folder / shard["name"], shard, manifest["settings"])]


def read_shard(path: Path, entry: dict[str, Any], s: dict[str, Any]) -> list[dict[str, Any]]:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert {name: json.loads(header["__metadata__"][name]) for name in s} == s
    spans = {name: [8 + size + x for x in header[name]["data_offsets"]] for name in header if name != "__metadata__"}
    begin, end = spans["payload"]
    assert hashlib.blake2b(data[:begin] + data[end:], digest_size=16).hexdigest() == entry["index_digest"]
    numbers = {name: np.frombuffer(data[a:b], "<i8").tolist() for name, (a, b) in spans.items() if name != "payload"}
    offsets = numbers["offsets"]
    records = []
    for i in range(entry["records"]):
        b = Bytes(data[begin + offsets[i] : begin + offsets[i + 1]])
        flags, widths, tokens, contexts = b.number(1), [b.number(1) for _ in range(3)], b.number(4), b.number(4)
        assert (tokens, contexts) == (numbers["tokens"][i], numbers["contexts"][i])
        assert flags & 4 or contexts == 0
        record: dict[str, Any] = {"input_ids": [b.number(widths[0]) for _ in range(tokens)]}
        mask = int.from_bytes(b.take(-(-tokens // 8)), "little") if flags & 1 else None
        record["mask"] = None if mask is None else [bool(mask >> t & 1) for t in range(tokens)]
        record["labels"] = [(b.number(widths[1]) or -99) - 1 for _ in range(tokens)] if flags & 2 else None
        record["context"] = [b.number(widths[2]) for _ in range(contexts)] if flags & 4 else None
        record["rows"] = [row_of(b, s, bool(flags & 8)) for _ in range(tokens)]
        assert b.at == len(b.data)
        key = bytes(8)
        for j, at in enumerate(range(0, tokens, 64)):
            words = np.array(record["input_ids"][at : at + 64], "<i4").tobytes()
            key = hashlib.blake2b(key + words, digest_size=8).digest()
            stored = numbers["keys"][numbers["key_offsets"][i] + j]
            assert stored & (2**64 - 1) == int.from_bytes(key, "little")
        records.append(record)
    return records


def assert_same_reading(path: Path) -> None:
    reader, records = CacheReader(path), read(path)
    assert len(reader) == len(records)
    for mine, record in zip(records, reader, strict=True):
        assert mine["input_ids"] == record.input_ids.tolist()
        assert mine["labels"] == (None if record.labels is None else record.labels.tolist())
        assert mine["context"] == (None if record.context_ids is None else record.context_ids.tolist())
        for t, row in enumerate(mine["rows"]):
            n = len(row["ids"])
            assert record.targets.ids[t].tolist() == row["ids"] + [-1] * (reader.settings.k - n)
            for name in ("logprobs", "log_z", "log_tail", *(["weights"] if reader.settings.samples else [])):
                got = getattr(record.targets, name)[t].numpy()[: len(row[name])]
                np.testing.assert_array_equal(got, np.array(row[name], f32), err_msg=name)


def test_a_reader_made_from_the_specification_reads_the_same(tmp_path: Path) -> None:
    assert_same_reading(small_cache(tmp_path / "topk", 3))
    with CacheWriter(tmp_path / "all", **{**SETTINGS, "temperatures": (0.5, 1.0, 2.0)}) as writer:
        ids, _ = document(0, 70)
        targets = teacher_targets(70, 97, 5, (0.5, 1.0, 2.0))
        targets.ids[::3, 2:] = -1
        tail = torch.where(targets.ids < 0, targets.logprobs, -torch.inf)[:, None, :] / torch.tensor([[0.5], [1.0], [2.0]])
        targets.log_tail.copy_(torch.logaddexp(targets.log_tail, tail.logsumexp(-1) - targets.log_z))
        labels = torch.where(ids % 2 == 0, ids, -100)
        writer.add(ids, targets, loss_mask=ids % 3 == 0, labels=labels, context_ids=torch.tensor([5, 70000, 0]))
    assert_same_reading(tmp_path / "all")


@pytest.mark.parametrize("exact", [0, 4])
def test_drawn_entries_too(tmp_path: Path, exact: int) -> None:
    targets, _ = mixed_targets(9, 97, exact, 90, (1.0, 2.0), 2.0)
    kind = {"kind": "mixed" if exact else "sampled", "k": exact + 90, "samples": 90, "sample_temperature": 2.0}
    with CacheWriter(tmp_path, **{**SETTINGS, **kind}) as writer:
        writer.add(torch.arange(9), targets)
    assert_same_reading(tmp_path)


@pytest.mark.parametrize("case", ["mixed-nothing-left", "mixed-nothing-left-tempered"])
def test_rows_with_nothing_left_to_draw_too(tmp_path: Path, case: str) -> None:
    cache_of(case, tmp_path / "c")
    assert_same_reading(tmp_path / "c")
    (record, *_) = read(tmp_path / "c")
    for row, entries in ((1, 4 if case == "mixed-nothing-left" else 70), (2, 1)):
        found = record["rows"][row]
        assert len(found["ids"]) == entries
        assert found["log_tail"] == [-np.inf, -np.inf]
        np.testing.assert_allclose(found["weights"], np.exp(np.array(found["logprobs"], f64)), rtol=1e-6)


@pytest.mark.parametrize("case", ["exact", "exact-one-T", "exact-topp", "exact-mixed"])
def test_rows_that_are_stored_exactly_too(tmp_path: Path, case: str) -> None:
    assert cache_of(case, tmp_path / "c").info.exact_rows > 0
    assert_same_reading(tmp_path / "c")
