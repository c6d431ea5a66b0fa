"""The study of sparse targets: caches are told apart, results survive several writers, the table is what the rows say."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
from pathlib import Path

import pytest

pytest.importorskip("safetensors")
pytest.importorskip("transformers")

from bench.sparse_study import HARD, WHOLE, Method
from bench.sparse_targets import METHODS, Result, draw, read, record, table


def test_methods_that_differ_by_more_than_their_tail_have_caches_of_their_own() -> None:
    sparse = [m for m in METHODS if m.sparse]
    same = {m.cache: {(n.k, n.samples, n.max_kl) for n in sparse if n.cache == m.cache} for m in sparse}
    assert all(len(kinds) == 1 for kinds in same.values())
    assert Method("a", 12).cache == Method("b", 12, tail="renormalize").cache
    assert Method("a", 4, 22, "none").settings["kind"] == "mixed"
    assert Method("a", 0, 12, "none").settings["kind"] == "sampled"
    assert not WHOLE.sparse
    assert not HARD.sparse


def _record_many(path: str, seed: int) -> None:
    for i in range(10):
        record(Result("top 12", seed * 100 + i, 3, 5, ppl=1.5 + i), Path(path))


def test_results_of_processes_that_write_side_by_side_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    processes = [multiprocessing.get_context("spawn").Process(target=_record_many, args=(str(path), s)) for s in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    rows = read(path)
    assert sorted(r.seed for r in rows) == sorted(s * 100 + i for s in range(3) for i in range(10))
    assert all(r.ppl == 1.5 + r.seed % 100 and math.isnan(r.bytes) for r in rows)


def test_the_table_compares_students_of_the_same_seed(tmp_path: Path) -> None:
    sparse = Result("top 12", 1, 3, 5, bytes=30.0, ppl=110.0, ece=0.02, bias=0.3, noise=0.0)
    rows = [
        Result(WHOLE.name, 1, 3, 5, ppl=100.0, ece=0.01),
        Result(WHOLE.name, 2, 3, 5, ppl=200.0, ece=0.01),
        sparse,
        dataclasses.replace(sparse, seed=2, ppl=204.0),
    ]
    line = next(x for x in table(rows).splitlines() if x.startswith("| top 12 |"))
    assert "30.0" in line
    assert "157.00 (110.00 to 204.00)" in line
    assert "+6.00%" in line  # the mean of 10% and 2%, not 157 / 150
    pytest.importorskip("matplotlib")
    draw(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
