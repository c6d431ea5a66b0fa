"""A whole training step, timed for real at tiny sizes, and the check that stands before it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

from bench import train, train_step
from bench.contest import Settings
from bench.plot import draw
from bench.report import Limits, Row, read_csv, write_csv
from bench.train_step import CACHED, EAGER, HEAD, LIVE, PLAIN, SPARSE, Bench, Spec, Trainee

pytestmark = pytest.mark.usefixtures("imports_are_no_garbage")
THREADS = 1  # on a busy machine two would wait for each other at every operation


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return train_step.prepare(Spec.tiny(), tmp_path_factory.mktemp("train"), lambda line: None)


def test_every_contestant_is_timed_and_right(bench: Bench, tmp_path: Path) -> None:
    rows = train.rows(bench, Settings(repeats=2), Limits(gemm=1e12))
    by_name = {r.contestant: r for r in rows}
    assert list(by_name) == [PLAIN, HEAD, EAGER, LIVE, CACHED, SPARSE, f"{CACHED} (again)"]
    assert [r.error for r in rows] == [""] * 7
    for row in rows:
        rate = bench.spec.tokens / (row.median_ms / 1e3)
        assert f"{rate:.0f} tokens/s" in row.note
        assert row.op == "train"
    assert all(0 < by_name[name].error_f64 < 1e-5 for name in (PLAIN, HEAD, EAGER, LIVE, CACHED, SPARSE))
    weights = sum(p.numel() for p in bench.student.parameters())
    assert by_name[PLAIN].tflop_per_s == pytest.approx(6 * weights * 32 / (by_name[PLAIN].median_ms / 1e3) / 1e12)
    assert "bytes a token" in by_name[CACHED].note
    write_csv(rows, tmp_path / "rows.csv")
    assert [r.contestant for r in read_csv(tmp_path / "rows.csv")] == list(by_name)
    pytest.importorskip("matplotlib")
    assert draw(rows, tmp_path / "rows.png")


def test_a_loss_that_is_off_has_no_number(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(b: Bench, student: Any, turn: int) -> Tensor:
        return 1.01 * train_step.cached(b, student, turn)

    true = train_step.losses
    monkeypatch.setattr(train_step, "losses", lambda b: {**true(b), CACHED: wrong})
    rows = {r.contestant: r for r in train.rows(bench, Settings(repeats=1), Limits())}
    assert rows[CACHED].error.startswith("disagrees: loss off by 0.01")
    assert math.isnan(rows[CACHED].median_ms)
    assert rows[PLAIN].median_ms > 0
    assert train.verdict(list(rows.values())).endswith("not measured")


def test_a_step_trains(bench: Bench) -> None:
    for name, loss in train_step.losses(bench).items():
        trainee = Trainee(bench, loss)
        before = [float(trainee(turn)) for turn in range(bench.spec.batches)]
        for _ in range(5):
            after = [float(trainee(turn)) for turn in range(bench.spec.batches)]
        assert sum(after) < sum(before), name


def test_the_cache_holds_the_text(bench: Bench) -> None:
    ids, labels = bench.text(1)
    batch = bench.reader.batch(bench.rows(1))
    assert torch.equal(batch.input_ids, ids)
    assert torch.equal(batch.labels, labels)


@pytest.mark.parametrize(("cached", "says"), [(1.04, "linear_cross_entropy: 1.04x, met"), (1.1, "1.10x, MISSED")])
def test_the_mark_is_set_by_the_faster_cross_entropy(cached: float, says: str) -> None:
    times = {PLAIN: 12.0, HEAD: 10.0, CACHED: 10 * cached}
    rows = [Row("train", name, median_ms=ms) for name, ms in times.items()]
    assert train.verdict(rows).endswith(says)
