"""What a cache promises of every row: its KL at every captured temperature, or that it is named."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_helpers import SETTINGS, document, mixed_targets, rows_of, small_cache
from codec_cases import assert_same_bits, peaked
from hypothesis import given, settings
from hypothesis import strategies as st

import kdfast
from kdfast import TopKTargets
from kdfast.cache import CacheError, CacheReader, CacheWriter, CorruptCache, codec, repair, shard, verify
from kdfast.cache.draws import draws_of
from kdfast.cache.manifest import Manifest, digest, read_manifest
from kdfast.cli import main

needs_native = pytest.mark.skipif(not codec.native(), reason="the C++ extension is not built")
LANGUAGES = [pytest.param(True, id="cpp", marks=needs_native), pytest.param(False, id="python")]
TEMPERATURES = [(1.0,), (1.0, 2.0), (0.5, 1.0, 2.0, 4.0), (0.05, 1.0), (1.0, 1e4)]


@pytest.fixture(params=LANGUAGES)
def language(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(codec, "_native", None)
    return request.param


def of_logits(logits: torch.Tensor, k: int, temperatures: tuple[float, ...]) -> TopKTargets:
    """The k likeliest ids of float64 logits."""
    logp = logits.log_softmax(-1)
    values, ids = logp.topk(k)
    log_z = torch.stack([(logp / t).logsumexp(-1) for t in temperatures], -1)
    rest = logp.scatter(-1, ids, -math.inf)
    log_tail = torch.stack([(rest / t).logsumexp(-1) for t in temperatures], -1) - log_z
    floats = (values.float(), log_z.float(), log_tail.clamp(max=0).float())
    return TopKTargets(ids.int(), *floats, temperatures, logits.shape[-1])


def masses(
    ids: np.ndarray, logprobs: np.ndarray, log_z: np.ndarray, log_tail: np.ndarray, targets: TopKTargets, j: int
) -> np.ndarray:
    """Probabilities at temperature j of every id that is an entry and, last, of the others: float64 [rows, V + 1]."""
    out = np.zeros((len(ids), targets.vocab_size + 1))
    with np.errstate(under="ignore"):
        p = np.exp(logprobs.astype(np.float64) / targets.temperatures[j] - log_z[:, j, None].astype(np.float64))
        out[:, -1] = np.exp(log_tail[:, j].astype(np.float64))
    for t, (row, values) in enumerate(zip(ids, p, strict=True)):
        out[t, row[row >= 0]] = values[row >= 0]
    return out


def kl_of(targets: TopKTargets, rows: codec.Rows) -> np.ndarray:
    """The worst over the temperatures of KL(exact || decoded) over entries and tail, float64."""
    worst = np.zeros(len(rows.ids))
    for j in range(len(targets.temperatures)):
        p = masses(*rows_of(targets)[:4], targets, j)
        q = masses(*rows[:4], targets, j)
        assert (q[p > 0] > 0).all() or p[(q == 0) & (p > 0)].max() < 1e-30
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where((p > 0) & (q > 0), p * np.log(p / q), 0) - p + q
        worst = np.maximum(worst, terms.sum(-1))
    return worst


def round_trip(targets: TopKTargets, max_kl: float) -> tuple[codec.Encoded, codec.Rows]:
    layout = codec.Layout(targets.k, targets.vocab_size, targets.temperatures)
    coded = codec.encode(layout, rows_of(targets), max_kl, None)
    rows = codec.empty_rows(layout, (len(targets.ids),))
    codec.decode(layout, np.frombuffer(coded.data, np.uint8), coded.has_counts, rows)
    return coded, rows


def adversarial(seed: int, vocab: int) -> torch.Tensor:
    """Flat rows, one-hot rows, cliffs, two peaks, huge spreads, ties, impossible ids, half-precision logits; float64."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(12, vocab, generator=g, dtype=torch.float64)
    spread = torch.tensor([0, 1e-3, 1, 3, 6, 10, 20, 40, 3, 5, 8, 2.0], dtype=torch.float64)
    z = z * spread[:, None]
    z[3, 0] += 30
    z[4, : max(1, vocab // 20)] += 25 * torch.rand(max(1, vocab // 20), generator=g, dtype=torch.float64)
    z[5, :2] += 60
    z[8, vocab // 2 :] = -math.inf
    z[9] = z[9].half().double()
    z[10] = z[10].bfloat16().double()
    z[11, 0] = 800
    z[0, 0] += 1e-9
    return z


@pytest.mark.parametrize("temperatures", TEMPERATURES, ids=str)
@pytest.mark.parametrize("max_kl", [1e-2, 5e-5, 1e-6, 1e-9])
@pytest.mark.parametrize(("vocab", "k"), [(700, 1), (700, 33), (40, 40), (6000, 200)])
def test_every_row_keeps_the_promise(
    language: bool, temperatures: tuple[float, ...], max_kl: float, vocab: int, k: int
) -> None:
    for seed in range(2 if language else 1):
        targets = of_logits(adversarial(seed, vocab), k, temperatures)
        coded, rows = round_trip(targets, max_kl)
        found = kl_of(targets, rows)
        assert found.max() <= max_kl, (seed, int(found.argmax()))
        assert coded.kl.max() <= max_kl
        assert (coded.kl >= 0).all()


@st.composite
def any_targets(draw: st.DrawFn) -> TopKTargets:
    vocab = draw(st.integers(1, 60))
    logits = draw(st.lists(st.floats(-300, 300), min_size=vocab, max_size=vocab))
    temperatures = draw(st.sampled_from([*TEMPERATURES, (0.1, 1.0, 7.0)]))
    return of_logits(torch.tensor([logits], dtype=torch.float64), draw(st.integers(1, vocab)), temperatures)


@needs_native
@settings(max_examples=150, deadline=None)
@given(any_targets(), st.sampled_from([1e-3, 5e-5, 1e-7]))
def test_any_row_keeps_the_promise(targets: TopKTargets, max_kl: float) -> None:
    assert kl_of(targets, round_trip(targets, max_kl)[1]).max() <= max_kl


def test_rows_that_no_level_serves_come_back_bit_for_bit(language: bool) -> None:
    targets = peaked(8, 3000, (1.0, 2.0, 4.0), 64)
    coded, rows = round_trip(targets, 5e-5)
    assert 0 < coded.exact < 8
    order = targets.ids.long().argsort(-1)
    same = (rows.logprobs == targets.logprobs.gather(-1, order).numpy()).all(-1)
    same &= (rows.log_z == targets.log_z.numpy()).all(-1) & (rows.log_tail == targets.log_tail.numpy()).all(-1)
    assert same.sum() == coded.exact
    assert (coded.kl[same] == 0).all()


def test_bits_in_the_place_of_a_limit_promise_nothing(language: bool) -> None:
    targets = peaked(8, 3000, (1.0, 2.0), 64)
    coded = codec.encode(codec.Layout(64, 3000, (1.0, 2.0)), rows_of(targets), 5e-5, 4)
    assert coded.exact == 0
    assert coded.kl.max() > 5e-5


def test_rare_draws_keep_their_weights(language: bool) -> None:
    """Drawn at T = 2 with p far below the square of the largest level: weights are powers of p."""
    temperatures = (1.0, 2.0)
    targets, draws = mixed_targets(10, 1000, 6, 20, temperatures, 2.0, sharpness=(4.0, 9.0))
    layout = codec.Layout(26, 1000, temperatures, 20, True, 2.0)
    coded = codec.encode(layout, rows_of(targets), 5e-5, None, draws)
    assert coded.exact > 0
    rows = codec.empty_rows(layout, (10,))
    codec.decode(layout, np.frombuffer(coded.data, np.uint8), coded.has_counts, rows)
    for t in range(10):
        given_ = {int(i): float(w) for i, w in zip(targets.ids[t], targets.weights[t], strict=True) if i >= 0}
        for i, w in zip(rows.ids[t].tolist(), rows.weights[t].tolist(), strict=True):
            assert i < 0 or w == pytest.approx(given_[i], rel=0.15)


def peaked_cache(path: Path, **changes: object) -> CacheReader:
    temperatures = (1.0, 2.0)
    settings = {"vocab_size": 3000, "k": 64, "teacher": "t", "tokenizer_hash": "h", "temperatures": temperatures, **changes}
    with CacheWriter(path, records_per_shard=1, **settings) as writer:
        for rows in (4, 8):
            writer.add(torch.arange(rows), peaked(rows, 3000, temperatures, 64))
    return CacheReader(path)


def test_a_cache_says_how_many_rows_are_exact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info = peaked_cache(tmp_path / "c").info
    assert 0 < info.exact_rows < 12
    assert info.kl_max <= 5e-5
    assert verify(tmp_path / "c").exact_rows == info.exact_rows
    assert main(["cache", "info", str(tmp_path / "c"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["exact_rows"] == info.exact_rows
    shard = tmp_path / "c" / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1  # of the payload's last row
    shard.write_bytes(data)
    repair(tmp_path / "c")
    left = CacheReader(tmp_path / "c")
    assert left.info.exact_rows == read_manifest(tmp_path / "c")[0].shards[0].exact_rows
    assert verify(tmp_path / "c").records == 1


def change_shards(path: Path, **changes: object) -> None:
    """A manifest that says something else, under a digest that fits."""
    manifest, _ = read_manifest(path)
    shards = tuple(dataclasses.replace(shard, **changes) for shard in manifest.shards)
    (path / "manifest.json").write_bytes(dataclasses.replace(manifest, shards=shards).to_bytes())


def test_verify_fails_on_a_promise_that_was_broken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_cache(tmp_path / "c", 2)
    verify(tmp_path / "c")
    change_shards(tmp_path / "c", kl_max=1.2e-4)
    with pytest.raises(CacheError, match=r"max_kl: expected at most the 5e-05 nats .* records 0.00012"):
        verify(tmp_path / "c")
    assert main(["cache", "verify", str(tmp_path / "c")]) != 0
    assert "max_kl" in capsys.readouterr().err
    small_cache(tmp_path / "bits", 2, values_bits=2)
    assert verify(tmp_path / "bits").kl_max > 5e-5


def test_verify_counts_exact_rows(tmp_path: Path) -> None:
    peaked_cache(tmp_path / "c")
    change_shards(tmp_path / "c", exact_rows=0)
    with pytest.raises(CorruptCache, match=r"shard-00000.* the manifest says 0 exact rows, the shard has"):
        verify(tmp_path / "c")


def as_version_1(path: Path) -> None:
    """The cache as the last version wrote it: the same but for the numbers, where no row is exact."""
    manifest, _ = read_manifest(path)
    shards = []
    for entry in manifest.shards:
        held = shard.Shard(path, entry, manifest.settings)
        data, old = held.path.read_bytes(), b'"version": "2"'
        assert data.count(old) == 1
        data = data.replace(old, b'"version": "1"')
        held.path.write_bytes(data)
        begin = len(data) - held.payload.size
        shards.append(dataclasses.replace(entry, index_digest=digest(data[:begin])))
    text = dataclasses.replace(manifest, shards=tuple(shards)).to_bytes().decode()
    body = json.loads(text) | {"version": 1, "digest": "0" * 32}
    for s in body["shards"]:
        assert s.pop("exact_rows") == 0
    blank = json.dumps(body, indent=1).encode()
    (path / "manifest.json").write_bytes(blank.replace(b'"digest": "' + b"0" * 32, b'"digest": "' + digest(blank).encode()))


def test_the_last_version_is_read_and_continued(tmp_path: Path) -> None:
    now = CacheReader(small_cache(tmp_path / "now", 4))
    as_version_1(small_cache(tmp_path / "old", 4))
    old = CacheReader(tmp_path / "old")
    assert_same_bits(old.batch(range(4)).targets, now.batch(range(4)).targets)
    assert verify(tmp_path / "old").exact_rows == 0
    manifest, _ = read_manifest(tmp_path / "old")
    (tmp_path / "old" / "manifest.json").write_bytes(dataclasses.replace(manifest, complete=False).to_bytes())
    with CacheWriter(tmp_path / "old", **SETTINGS) as writer:
        assert len(writer) == 4
        writer.add(*document(4))
    both = CacheReader(tmp_path / "old")
    assert_same_bits(both.batch(range(4)).targets, now.batch(range(4)).targets)
    assert verify(tmp_path / "old").records == 5


def test_another_version_is_refused_with_both_names(tmp_path: Path) -> None:
    small_cache(tmp_path / "c", 1)
    text = (tmp_path / "c" / "manifest.json").read_bytes()
    body = json.loads(text) | {"version": 3, "digest": "0" * 32}
    blank = json.dumps(body, indent=1).encode()
    data = blank.replace(b'"digest": "' + b"0" * 32, b'"digest": "' + digest(blank).encode())
    with pytest.raises(CacheError, match="reads format versions 1 and 2, the cache has 3"):
        Manifest.from_bytes(data, "m")


NOTHING = {
    "no-entries-no-tail": {"ids": -1, "logprobs": -math.inf, "log_tail": -math.inf},
    "impossible-entries": {"logprobs": -math.inf, "log_tail": -math.inf},
    "all-empty-tail-half": {"ids": -1, "log_tail": math.log(0.5)},
    "mass-two": {"log_tail": 0.0},
    "mass-missing": {"logprobs": -30.0, "log_tail": -30.0},
    "nan": {"logprobs": math.nan},
    "nan-log-z": {"log_z": math.nan},
    "id-twice": {"ids": 3},
    "id-beyond": {"ids": 1 << 30},
}


def broken(targets: TopKTargets, row: int, change: dict[str, float]) -> TopKTargets:
    fields = {name: getattr(targets, name).clone() for name in change}
    for name, value in change.items():
        fields[name][row] = value
    return dataclasses.replace(targets, **fields)


@pytest.mark.parametrize("change", NOTHING.values(), ids=NOTHING)
def test_a_row_that_is_no_distribution_is_refused_where_it_counts(
    language: bool, tmp_path: Path, change: dict[str, float]
) -> None:
    ids, targets = document(0, 6)
    with CacheWriter(tmp_path / "c", **SETTINGS) as writer:
        with pytest.raises(CacheError, match=r"^targets.*row 2 of the record"):
            writer.add(ids, broken(targets, 2, change))
        mask = torch.ones(6, dtype=torch.bool)
        with pytest.raises(CacheError, match=r"^targets.*row 2 of the record"):
            writer.add(ids, broken(targets, 2, change), loss_mask=mask)
        mask[2] = False
        writer.add(ids, broken(targets, 2, change), loss_mask=mask)
        writer.add(ids, broken(targets, 5, change))  # the last row has no label
        writer.add(ids, targets)
    assert_empty_row(tmp_path / "c", [(0, 2), (1, 5)])
    verify(tmp_path / "c")


def assert_empty_row(path: Path, places: list[tuple[int, int]]) -> None:
    """Empty rows there, and the same as in the last record everywhere else."""
    reader = CacheReader(path)
    whole = reader[len(reader) - 1].targets
    for record, row in places:
        got = reader[record].targets
        assert (got.ids[row] == -1).all()
        assert got.logprobs[row].isneginf().all()
        assert (got.log_tail[row] == 0).all()
        assert (got.log_z[row] == 0).all()
        others = [t for t in range(len(got.ids)) if t != row]
        assert_same_bits(got[others], whole[others])


def test_rows_without_a_label_may_say_anything(language: bool, tmp_path: Path) -> None:
    ids, targets = document(0, 6)
    nothing = broken(targets, 3, NOTHING["no-entries-no-tail"])
    labels = ids.clone()
    with CacheWriter(tmp_path / "c", **SETTINGS, alignment="same", queue=2) as writer:
        labels[3] = -100
        writer.add(ids, nothing, labels=labels)
        writer.add(ids, targets, labels=ids)
    assert_empty_row(tmp_path / "c", [(0, 3)])
    writer = CacheWriter(tmp_path / "d", **SETTINGS, alignment="same")
    with pytest.raises(CacheError, match="row 3"):
        writer.add(ids, nothing, labels=ids)
    writer.close()


def test_a_row_that_holds_nothing_but_a_tail_is_a_distribution(language: bool, tmp_path: Path) -> None:
    ids, targets = document(0, 6)
    with CacheWriter(tmp_path / "c", **SETTINGS) as writer:
        writer.add(ids, broken(targets, 2, {"ids": -1, "log_tail": 0.0}))
        writer.add(ids, targets)
    assert_empty_row(tmp_path / "c", [(0, 2)])


def test_drawn_rows_that_do_not_count_may_say_anything(language: bool, tmp_path: Path) -> None:
    targets, _ = mixed_targets(5, 97, 4, 30, (1.0, 2.0), 2.0)
    bad = targets.weights.clone()
    bad[1] = math.nan
    bad[3] *= 1.7
    garbage = dataclasses.replace(targets, weights=bad)
    counted = np.array([True, False, True, False, True])
    with pytest.raises(CacheError, match="row 1"):
        draws_of(garbage, 30, 2.0, 4)
    settings = {**SETTINGS, "k": 34, "kind": "mixed", "samples": 30, "sample_temperature": 2.0}
    with CacheWriter(tmp_path / "c", **settings) as writer:
        writer.add(torch.arange(5), garbage, loss_mask=torch.from_numpy(counted))
    got = CacheReader(tmp_path / "c")[0].targets
    assert ((got.ids >= 0).any(-1).numpy() == counted).all()
    assert (got.weights[1] == 0).all()


_BROKEN = """
import sys, warnings
import numpy as np
sys.meta_path = [f for f in sys.meta_path if getattr(f, '__name__', '') != '_EditableFinder']
warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    import kdfast
    from kdfast.cache import codec
    assert kdfast.__file__.startswith(sys.argv[1]), kdfast.__file__
    before = len(found)
    small = codec.Layout(2, 50, (1.0,))
    rows = codec.empty_rows(small, (1,))
    codec.checksum(b"a few bytes")
    few = len(found)
    for _ in range(3):
        codec.checksum(bytes(70000))
texts = [str(w.message) for w in found if "kdfast.cache" in str(w.message)]
from kdfast.cli import main
print(before, few, len(texts), texts[0] if texts else "")
main(["env"])
"""


@pytest.mark.parametrize(
    ("extension", "why"),
    [(None, "the C++ extension is not built: install a C++ compiler"), (b"not a library", "the C++ extension is broken ("),
     ("def isa(): return 'none'\n", "the C++ extension is another version's (it lacks matmul"),
     ("parts = ('soft', 'hard')\n__getattr__ = lambda name: print\n",
      "the C++ extension is another version's (it fills soft, hard, not soft, hard, z,")],
)  # fmt: skip
def test_plain_python_says_once_why_it_runs(tmp_path: Path, extension: bytes | str | None, why: str) -> None:
    source = Path(kdfast.__file__).parent
    shutil.copytree(source, tmp_path / "kdfast", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    if isinstance(extension, bytes):
        (tmp_path / "kdfast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(extension)
    elif extension is not None:
        (tmp_path / "kdfast" / "_C.py").write_text(extension)
    done = subprocess.run(
        [sys.executable, "-c", _BROKEN, str(tmp_path)], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    early = 0 if extension is None else 1  # a broken extension is said at once, a missing one when there is work
    assert first.startswith(
        f"0 {early} 1 kdfast.cache: targets are coded in plain Python, about a thousand times slower: {why}"
    ), first
    assert "reinstall kdfast" in first
    shown = [line for line in rest if line.startswith(("extension", "backend   cpp"))]
    assert len(shown) == 2
    assert all(why.removeprefix("the C++ extension is ") in line for line in shown), shown
