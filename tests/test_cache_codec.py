"""The record codec: within its KL limit, the same in both languages, and safe whatever the bytes are."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_helpers import empty_rows, mixed_targets, rows_of, teacher_targets
from hypothesis import given, settings
from hypothesis import strategies as st

import kdfast
from kdfast.cache import CacheError, CacheReader, CacheWriter, CorruptCache, codec, verify
from kdfast.cache.draws import draws_of, without_rare
from kdfast.ops.targets import TopKTargets

needs_native = pytest.mark.skipif(not codec.native(), reason="the C++ extension is not built")
LANGUAGES = [pytest.param(True, id="cpp", marks=needs_native), pytest.param(False, id="python")]


@pytest.fixture(params=LANGUAGES)
def language(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(codec, "_native", None)
    return request.param


def round_trip(targets: TopKTargets, max_kl: float = 5e-5, values_bits: int | None = None) -> tuple[codec.Encoded, codec.Rows]:
    layout = codec.Layout(targets.k, targets.vocab_size, targets.temperatures)
    coded = codec.encode(layout, rows_of(targets), max_kl, values_bits)
    rows = empty_rows(len(targets.ids), targets.k, len(targets.temperatures))
    codec.decode(layout, np.frombuffer(coded.data, np.uint8), coded.has_counts, rows)
    return coded, rows


def kl_of(targets: TopKTargets, rows: codec.Rows, column: int) -> np.ndarray:
    """KL(exact || decoded) over entries and tail at one temperature, float64, from what a loss would read."""
    temperature = targets.temperatures[column]
    total = np.zeros(len(rows.ids))
    for t in range(len(rows.ids)):
        decoded = {
            int(i): lp / temperature - rows.log_z[t, column] for i, lp in zip(rows.ids[t], rows.logprobs[t], strict=True)
        }
        for i, lp in zip(targets.ids[t].tolist(), targets.logprobs[t].tolist(), strict=True):
            if i >= 0 and lp > -math.inf:
                log_p = lp / temperature - float(targets.log_z[t, column])
                total[t] += math.exp(log_p) * (log_p - decoded[i]) - math.exp(log_p) + math.exp(decoded[i])
        exact, tail = float(targets.log_tail[t, column]), float(rows.log_tail[t, column])
        if exact > -math.inf:
            total[t] += math.exp(exact) * (exact - tail) - math.exp(exact) + math.exp(tail)
    return total


SHAPES = [
    pytest.param(151936, 64, (1.0,), id="large-vocab"),
    pytest.param(4096, 33, (1.0, 2.0, 4.0), id="odd-k-three-temperatures"),
    pytest.param(1000, 1, (1.0,), id="k1"),
    pytest.param(50, 50, (2.0, 1.0), id="k-is-vocab"),
    pytest.param(1, 1, (1.0,), id="one-id"),
    pytest.param(2, 1, (0.5, 1.0), id="two-ids-sharp"),
]


@pytest.mark.parametrize(("vocab", "k", "temperatures"), SHAPES)
def test_round_trip_keeps_ids_and_kl(language: bool, vocab: int, k: int, temperatures: tuple[float, ...]) -> None:
    targets = teacher_targets(12, vocab, k, temperatures)
    coded, rows = round_trip(targets)
    assert (rows.ids == np.sort(targets.ids.numpy(), -1)).all()
    assert np.isfinite(rows.logprobs).all()
    for column in range(len(temperatures)):
        kl = kl_of(targets, rows, column)
        # The float32 the loss reads adds about 1e-7 to what the encoder measured in float64.
        assert kl.max() <= 5e-5 + 5e-7
        assert (kl <= coded.kl + 5e-7).all()
    entries = np.exp(rows.logprobs.astype(np.float64)).sum(-1)
    tail = np.exp(rows.log_tail[:, temperatures.index(1.0)].astype(np.float64))
    np.testing.assert_allclose(entries + tail, 1.0, atol=5e-7)


def test_tempered_rows_sum_to_one(language: bool) -> None:
    _, rows = round_trip(teacher_targets(12, 4096, 33, (1.0, 3.0)))
    p = np.exp(rows.logprobs.astype(np.float64) / 3.0 - rows.log_z[:, 1:])
    np.testing.assert_allclose(p.sum(-1) + np.exp(rows.log_tail[:, 1].astype(np.float64)), 1.0, atol=2e-6)


def assert_equal_rows(a: codec.Rows, b: codec.Rows) -> None:
    for x, y in zip(a, b, strict=True):
        if x is not None:
            np.testing.assert_array_equal(x.view(np.int32), y.view(np.int32))  # the sign of a zero and every bit


@needs_native
@pytest.mark.parametrize("values_bits", [None, 1, 6, 16])
@pytest.mark.parametrize(("vocab", "k", "temperatures"), SHAPES)
def test_both_languages_decode_both_encoders_to_the_same_floats(
    vocab: int, k: int, temperatures: tuple[float, ...], values_bits: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = teacher_targets(8, vocab, k, temperatures, seed=3)
    layout = codec.Layout(k, vocab, temperatures)
    native, sizes = codec._native, []
    for encoder in (native, None):
        monkeypatch.setattr(codec, "_native", encoder)
        coded = codec.encode(layout, rows_of(targets), 5e-5, values_bits)
        sizes.append(len(coded.data))
        decoded = []
        for decoder in (native, None):
            monkeypatch.setattr(codec, "_native", decoder)
            decoded.append(empty_rows(8, k, len(temperatures)))
            codec.decode(layout, np.frombuffer(coded.data, np.uint8), coded.has_counts, decoded[-1])
        assert_equal_rows(*decoded)
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


_PER_ISA = """
import sys, numpy as np
sys.path[:0] = ["tests"]
from cache_helpers import empty_rows
from kdfast.cache import codec
data = np.fromfile(sys.argv[1], np.uint8)
rows = codec.empty_rows(codec.Layout(70, 5000, (0.5, 1.0, 2.0), 40, True, 2.0), (60,))
codec.decode(codec.Layout(70, 5000, (0.5, 1.0, 2.0), 40, True, 2.0), data, True, rows)
np.concatenate([x.reshape(-1).view(np.int32) for x in rows]).tofile(sys.argv[2])
"""


@needs_native
def test_every_instruction_set_decodes_the_same_floats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """k = 70 is no multiple of a vector or a block; rows have empty slots, draws, and temperatures on both sides of 1."""
    targets, draws = mixed_targets(60, 5000, exact=30, samples=40, temperatures=(0.5, 1.0, 2.0), sample_temperature=2.0)
    layout = codec.Layout(70, 5000, (0.5, 1.0, 2.0), 40, True, 2.0)
    coded = codec.encode(layout, rows_of(targets), 5e-5, None, draws)
    assert coded.has_counts
    np.frombuffer(coded.data, np.uint8).tofile(tmp_path / "data")
    found = []
    for isa in ("baseline", "avx2", "avx512"):
        out = tmp_path / isa
        environment = {**os.environ, "KDFAST_ISA": isa} if isa != "avx512" else dict(os.environ)
        root = Path(__file__).parents[1]
        environment["PYTHONPATH"] = str(root)
        subprocess.run([sys.executable, "-c", _PER_ISA, tmp_path / "data", out], check=True, cwd=root, env=environment)
        found.append(np.fromfile(out, np.int32))
    monkeypatch.setattr(codec, "_native", None)
    rows = codec.empty_rows(layout, (60,))
    codec.decode(layout, np.frombuffer(coded.data, np.uint8), True, rows)
    found.append(np.concatenate([x.reshape(-1).view(np.int32) for x in rows if x is not None]))
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


def test_smaller_limits_cost_bytes_and_hold(language: bool) -> None:
    targets = teacher_targets(12, 2048, 32)
    sizes = []
    for max_kl in (1e-2, 1e-4, 1e-6):
        coded, rows = round_trip(targets, max_kl)
        assert coded.kl.max() <= max_kl
        assert kl_of(targets, rows, 0).max() <= max_kl + 5e-7
        sizes.append(len(coded.data))
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_size_at_a_large_vocabulary() -> None:
    """k = 64 of 151936 ids whose probability falls as rank^-s, s in [1.1, 3.5]: with 3 bytes for the input id, <= 169."""
    coded, _ = round_trip(teacher_targets(48, 151936, 64))
    assert len(coded.data) / 48 + 3 <= 169
    assert coded.kl.mean() <= 5e-5


def _by_hand(ids: list[list[int]], logprobs: list[list[float]], log_tail: list[float], vocab: int) -> TopKTargets:
    n = len(ids)
    tensor = torch.tensor(ids, dtype=torch.int32)
    return TopKTargets(tensor, torch.tensor(logprobs), torch.zeros(n, 1), torch.tensor(log_tail).view(n, 1), (1.0,), vocab)


def test_empty_slots_impossible_ids_and_extreme_ids(language: bool) -> None:
    half, inf = math.log(0.5), math.inf
    top = (1 << 24) - 1
    targets = _by_hand(
        [[top, -1, 0], [-1, -1, -1], [9, 4, 2], [0, 1, top]],
        [[half, -inf, half], [-inf, -inf, -inf], [0.0, -inf, -200.0], [-20.0, -20.0, 0.0]],
        [-inf, 0.0, -inf, -25.0],
        1 << 24,
    )
    _, rows = round_trip(targets)
    assert rows.ids.tolist() == [[0, top, -1], [-1, -1, -1], [2, 9, -1], [0, 1, top]]
    np.testing.assert_allclose(rows.logprobs[0, :2], half, atol=1e-6)
    assert (rows.logprobs[0, 2], rows.log_tail[0, 0]) == (-inf, -inf)
    assert (rows.logprobs[1] == -inf).all()
    assert rows.log_tail[1, 0] == 0
    # Entry 2 has p = e^-200: it stays a possible id.
    assert -inf < rows.logprobs[2, 0] < -5
    assert rows.log_tail[3, 0] == pytest.approx(-25.0, abs=1e-3)


FAULTS = [
    pytest.param({"ids": [[1, 50]]}, "vocab_size", id="id-beyond-vocabulary"),
    pytest.param({"ids": [[1, -2]]}, "vocab_size", id="negative-id"),
    pytest.param({"ids": [[1, 1]]}, "distinct", id="id-twice"),
    pytest.param({"logprobs": [[math.nan, -1.0]]}, "NaN", id="nan"),
    pytest.param({"logprobs": [[0.5, -1.0]]}, "<= 0", id="positive-logprob"),
    pytest.param({"logprobs": [[-3.0, -3.0]]}, "sum to 1", id="mass-missing"),
    pytest.param({"log_z": [[math.inf]]}, "NaN", id="infinite-log-z"),
    pytest.param({"log_z": [[-1e30]]}, "sum to 1", id="nonsense-log-z"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS)
def test_targets_that_are_no_distribution_are_refused(language: bool, change: dict[str, Any], message: str) -> None:
    good = {"ids": [[1, 2]], "logprobs": [[math.log(0.5), math.log(0.25)]], "log_z": [[0.0]], "log_tail": [[math.log(0.25)]]}
    dtypes = {"ids": np.int32}
    rows = codec.Rows(**{name: np.array(x, dtypes.get(name, np.float32)) for name, x in {**good, **change}.items()})
    with pytest.raises(CacheError, match=message):
        codec.encode(codec.Layout(2, 50, (1.0,)), rows, 5e-5, None)


@pytest.mark.parametrize(
    ("exact", "samples", "sample_temperature"),
    [pytest.param(0, 12, 1.0, id="sampled"), pytest.param(0, 12, 2.0, id="sampled-tempered"),
     pytest.param(6, 20, 1.0, id="mixed"), pytest.param(6, 20, 2.0, id="mixed-tempered")],
)  # fmt: skip
def test_weights_of_drawn_entries_come_back(language: bool, exact: int, samples: int, sample_temperature: float) -> None:
    temperatures = (1.0, 2.0)
    targets, draws = mixed_targets(20, 300, exact, samples, temperatures, sample_temperature)
    assert (draws_of(targets, samples, sample_temperature, exact) == draws).all()
    layout = codec.Layout(exact + samples, 300, temperatures, samples, exact > 0, sample_temperature)
    coded = codec.encode(layout, rows_of(targets), 5e-5, None, draws)
    rows = codec.empty_rows(layout, (20,))
    codec.decode(layout, np.frombuffer(coded.data, np.uint8), coded.has_counts, rows)
    for t in range(20):
        given = {int(i): float(w) for i, w in zip(targets.ids[t], targets.weights[t], strict=True) if i >= 0}
        got = {int(i): float(w) for i, w in zip(rows.ids[t], rows.weights[t], strict=True) if i >= 0}
        assert given.keys() == got.keys()
        assert (rows.weights[t][rows.ids[t] < 0] == 0).all()
        for i in given:
            # p is kept to a level of sqrt(p); where draws were made at T = 1 from everything, nothing but c / n is left.
            loose = 0 if sample_temperature == 1.0 and not exact else 0.15
            assert got[i] == pytest.approx(given[i], rel=loose + 1e-6)


def test_draws_that_contradict_the_kind_are_refused(language: bool) -> None:
    targets, draws = mixed_targets(4, 300, 6, 20, (1.0,), 1.0)
    with pytest.raises(CacheError, match="draws"):
        codec.encode(codec.Layout(26, 300, (1.0,), 21, True), rows_of(targets), 5e-5, None, draws)
    with pytest.raises(CacheError, match="draws"):
        codec.encode(codec.Layout(26, 300, (1.0,), 20, False), rows_of(targets), 5e-5, None, draws)
    weights = targets.weights.clone()
    weights[2, 7:] *= 1.3
    with pytest.raises(CacheError, match="20 draws a row"):
        draws_of(dataclasses.replace(targets, weights=weights), 20, 1.0, 6)


@pytest.mark.parametrize("at", [1.0, 2.0])
@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_native)])
def test_rows_with_nothing_left_to_draw(language: bool, backend: str, at: float, tmp_path: Path) -> None:
    """A peaked teacher's rows, through the writer: what comes back is what a row without draws says, and trains alike."""
    z = torch.randn(6, 300, generator=torch.Generator().manual_seed(0)).double()
    z[1, 4:] = z[2, 1:] = -torch.inf
    for row, gap in ((3, 95), (4, 150), (5, 1e4)):
        z[row, 4:] -= gap
    with kdfast.use_backend(backend):
        targets = kdfast.topk_targets(z.float(), 4, temperatures=(1.0, 2.0), samples=6, sample_temperature=at)
    settings = {"vocab_size": 300, "k": 10, "teacher": "t", "tokenizer_hash": "h", "temperatures": (1.0, 2.0)}
    with CacheWriter(tmp_path, kind="mixed", samples=6, sample_temperature=at, **settings) as writer:
        writer.add(torch.arange(6), targets)
    found = verify(tmp_path)
    assert found.tokens == 6
    got = CacheReader(tmp_path)[0].targets
    for row in range(1, 6):
        p = z[row].softmax(-1)
        for i, weight in zip(got.ids[row].tolist(), got.weights[row].tolist(), strict=True):
            assert weight == pytest.approx(float(p[i]) if 0 <= i < 4 else 0.0, rel=0.05, abs=1e-6)
        assert got.log_tail[row].exp().max() < 1e-6
    student = torch.randn(6, 300, generator=torch.Generator().manual_seed(1)).double()
    for temperature in (1.0, 2.0):
        loss = kdfast.topk_kd_loss(
            student[1:], got[1:], temperature=temperature, tail="none", reduction="none", scale_by_t2=False
        )
        truth = kdfast.kd_loss(student[1:], z[1:], temperature=temperature, reduction="none", scale_by_t2=False)
        torch.testing.assert_close(loss, truth, rtol=2e-3, atol=2e-3)


def test_rows_without_draws_that_have_something_left_are_refused(language: bool) -> None:
    targets, _ = mixed_targets(4, 300, 6, 20, (1.0,), 1.0)
    for change in ("no draws", "no weight"):
        ids, weights = targets.ids.clone(), targets.weights.clone()
        if change == "no draws":
            ids[2, 6:] = -1
        weights[2, 6:] = 0
        with pytest.raises(CacheError, match=r"expected those of 20 draws a row at temperature 1, got 0 draws .* in row 2"):
            draws_of(dataclasses.replace(targets, ids=ids, weights=weights), 20, 1.0, 6)


def test_draws_that_float32_holds_no_weight_of(language: bool) -> None:
    """They are left out, their mass at every temperature goes to the tails; any other weight of theirs is refused."""
    targets, _ = mixed_targets(4, 300, 6, 20, (1.0, 2.0), 1.0)
    change = {"logprobs": targets.logprobs.clone(), "log_tail": targets.log_tail.clone(), "log_z": targets.log_z.clone()}
    change["logprobs"][2, :6] -= change["logprobs"][2, :6].logsumexp(0)
    change["log_z"][2] = (change["logprobs"][2, :6] / torch.tensor([[1.0], [2.0]])).logsumexp(-1)
    change["logprobs"][2, 6:] = torch.where(targets.ids[2, 6:] >= 0, -200.0, -torch.inf)
    change["log_tail"][2] = torch.tensor([-200.0, -100.0])
    rare = dataclasses.replace(targets, **change)
    with pytest.raises(CacheError, match=r"expected those of 20 draws a row at temperature 1, got .* in row 2"):
        draws_of(without_rare(rare, 20, 1.0, 6), 20, 1.0, 6)
    weights = targets.weights.clone()
    weights[2, 6:] = 0
    kept = without_rare(dataclasses.replace(rare, weights=weights), 20, 1.0, 6)
    assert kept.ids[2].tolist() == [*targets.ids[2, :6].tolist(), *[-1] * 20]
    assert torch.equal(kept.ids[[0, 1, 3]], targets.ids[[0, 1, 3]])
    distinct = int((targets.ids[2, 6:] >= 0).sum())
    for column, (tail, each) in enumerate(((-200.0, -200.0), (-100.0, -100.0 - float(rare.log_z[2, 1])))):
        mass = math.log(math.exp(0) + distinct * math.exp(each - tail)) + tail
        assert float(kept.log_tail[2, column]) == pytest.approx(mass, rel=1e-6)
    draws = draws_of(kept, 20, 1.0, 6)
    assert draws[2].tolist() == [20, *[0] * 25]
    # At another temperature than 1 some of a row's may be held and some not: what is left are not all draws.
    targets, _ = mixed_targets(4, 300, 6, 20, (1.0, 8.0), 8.0)
    change = {"logprobs": targets.logprobs.clone(), "weights": targets.weights.clone()}
    change["logprobs"][2, 6:9], change["weights"][2, 6:9] = -200.0, 0.0
    with pytest.raises(CacheError, match=r"in row 2; ids too rare for a weight in float32 are none"):
        draws_of(without_rare(dataclasses.replace(targets, **change), 20, 8.0, 6), 20, 8.0, 6)


def test_many_entries_and_counts_that_vary(language: bool) -> None:
    targets = teacher_targets(3, 5000, 4096, (1.0, 2.0))
    ids = targets.ids.clone()
    ids[1, 100:] = -1
    cut = torch.logaddexp(
        targets.log_tail, (targets.logprobs[:, 100:, None] / torch.tensor([1.0, 2.0])).logsumexp(1) - targets.log_z
    )
    log_tail = torch.where(torch.tensor([[False], [True], [False]]), cut, targets.log_tail)
    targets = dataclasses.replace(targets, ids=ids, log_tail=log_tail)
    coded, rows = round_trip(targets, 1e-4)
    assert coded.has_counts
    assert (rows.ids[1, 100:] == -1).all()
    for t, n in enumerate((4096, 100, 4096)):
        assert (rows.ids[t, :n] == np.sort(targets.ids[t, :n].numpy())).all()
    for column in range(2):
        assert (kl_of(targets, rows, column) <= coded.kl + 2e-6).all()


@st.composite
def targets_strategy(draw: st.DrawFn) -> TopKTargets:
    vocab = draw(st.integers(1, 400))
    k = draw(st.integers(1, min(vocab, 40)))
    logits = draw(st.lists(st.floats(-60, 60), min_size=vocab, max_size=vocab))
    temperatures = draw(st.sampled_from([(1.0,), (1.0, 2.0), (4.0, 1.0)]))
    z = torch.tensor(logits, dtype=torch.float64)[None]
    logp = z.log_softmax(-1)
    values, ids = logp.topk(k)
    log_z = torch.stack([(logp / t).logsumexp(-1) for t in temperatures], -1)
    rest = logp.scatter(-1, ids, -math.inf)
    log_tail = torch.stack([(rest / t).logsumexp(-1) for t in temperatures], -1) - log_z
    return TopKTargets(ids.int(), values.float(), log_z.float(), log_tail.float(), temperatures, vocab)


@needs_native
@settings(max_examples=60, deadline=None)
@given(targets_strategy())
def test_any_distribution_round_trips(targets: TopKTargets) -> None:
    coded, rows = round_trip(targets)
    ids, got = np.sort(targets.ids.numpy(), -1), rows.ids
    assert (got == ids).all()
    assert np.isfinite(rows.logprobs).all()
    for column in range(len(targets.temperatures)):
        assert kl_of(targets, rows, column).max() <= coded.kl.max() + 5e-6


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_bytes_are_decoded_or_refused_alike_and_nothing_outside_is_written(data: st.DataObject) -> None:
    k, vocab = data.draw(st.sampled_from([(1, 1), (3, 40), (5, 1 << 24)]))
    tokens = data.draw(st.integers(1, 6))
    blob = np.frombuffer(data.draw(st.binary(max_size=120)), np.uint8)
    has_counts = data.draw(st.booleans())
    layout = codec.Layout(k, vocab, (1.0,))
    outcomes = []
    native = codec._native
    for use in [native, None] if codec.native() else [None]:
        guarded = empty_rows(tokens + 2, k, 1)
        rows = codec.Rows(*(x[1:-1] for x in guarded[:4]))
        codec._native = use
        try:
            codec.decode(layout, blob, has_counts, rows)
            outcomes.append(None)
            assert ((rows.ids >= -1) & (rows.ids < vocab)).all()
            assert not np.isnan(rows.logprobs).any()
        except CorruptCache as error:
            outcomes.append(str(error))
        finally:
            codec._native = native
        for array in guarded[:4]:
            for edge in (array[0], array[-1]):
                assert (edge == 7).all() if array.dtype == np.int32 else np.isnan(edge).all()
    assert len(set(outcomes)) == 1
