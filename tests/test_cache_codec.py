"""The record codec: within its KL limit, the same in both languages, and safe whatever the bytes are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from cache_helpers import empty_rows, rows_of, teacher_targets
from hypothesis import given, settings
from hypothesis import strategies as st

from kdfast.cache import CacheError, CorruptCache, codec
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
    codec.decode(layout, np.frombuffer(coded.data, np.uint8), coded.id_bytes, coded.has_counts, rows)
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


@needs_native
@pytest.mark.parametrize("values_bits", [None, 1, 6, 16])
@pytest.mark.parametrize(("vocab", "k", "temperatures"), SHAPES)
def test_both_languages_give_the_same_bytes_and_floats(
    vocab: int, k: int, temperatures: tuple[float, ...], values_bits: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = teacher_targets(8, vocab, k, temperatures, seed=3)
    coded, rows = round_trip(targets, values_bits=values_bits)
    monkeypatch.setattr(codec, "_native", None)
    coded_python, rows_python = round_trip(targets, values_bits=values_bits)
    assert coded.data == coded_python.data
    assert coded[1:3] == coded_python[1:3]
    for a, b in zip((*rows, coded.kl), (*rows_python, coded_python.kl), strict=True):
        np.testing.assert_array_equal(a, b)


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
    """k = 64 of 151936 ids whose probability falls as rank^-s, s in [1.1, 3.5]: with 3 bytes for the input id, <= 160."""
    coded, _ = round_trip(teacher_targets(48, 151936, 64))
    assert len(coded.data) / 48 + 3 <= 160
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
    id_bytes, has_counts = data.draw(st.integers(0, 130)), data.draw(st.booleans())
    layout = codec.Layout(k, vocab, (1.0,))
    outcomes = []
    native = codec._native
    for use in [native, None] if codec.native() else [None]:
        guarded = empty_rows(tokens + 2, k, 1)
        rows = codec.Rows(*(x[1:-1] for x in guarded))
        codec._native = use
        try:
            codec.decode(layout, blob, id_bytes, has_counts, rows)
            outcomes.append(None)
            assert ((rows.ids >= -1) & (rows.ids < vocab)).all()
            assert not np.isnan(rows.logprobs).any()
        except CorruptCache as error:
            outcomes.append(str(error))
        finally:
            codec._native = native
        for array in guarded:
            for edge in (array[0], array[-1]):
                assert (edge == 7).all() if array.dtype == np.int32 else np.isnan(edge).all()
    assert len(set(outcomes)) == 1
