"""The GPU run as far as it shows without one: its order, what is left out, and every op's cases at tiny sizes on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.nn.functional as F

from bench import gpu, linear_hard, peers, sweep, train
from bench.report import Limits, read_csv

pytestmark = pytest.mark.usefixtures("imports_are_no_garbage")
THREADS = 1  # on a busy machine two would wait for each other at every operation


def test_ops_run_in_order_of_worth_and_none_twice() -> None:
    assert sweep.OPS[:4] == ("logits", "linear", "attention", "topk")
    assert sweep.OPS[-1] == "train"
    assert len(set(sweep.OPS)) == len(sweep.OPS)
    assert set(sweep.SHARE) == set(sweep.GROUPS)
    assert all(0 < share <= 1 for share in sweep.SHARE.values())
    assert sweep.SHARE[sweep.GROUPS[-1]] == 1.0


def test_every_op_has_cases_for_a_gpu() -> None:
    found = {job.contest.op for op in sweep.OPS for job in sweep.plan(op, "full", "cuda")}
    assert found == {
        "logits", "linear", "attention_scores", "attention_probs", "attention_kl", "topk_capture", "topk", "linear_topk",
        "linear_topk_capture", "hidden_projected", "hidden_mse", "hidden_cosine", "linear_logit_mse", "linear_hard", "codec",
        "scale",
    }  # fmt: skip
    assert len({job.contest.shape for job in sweep.plan("divergences", "full", "cuda")}) == 6
    assert "cluster kernel" in {p.name for p in sweep.plan("logits", "full", "cuda")[0].contest.peers}
    group = "hidden,linear_logit_mse"
    assert [j.contest.shape for j in sweep.plan(group, "full", "cuda")] == [
        j.contest.shape for op in group.split(",") for j in sweep.plan(op, "full", "cuda")
    ]


@pytest.mark.parametrize("op", [op for op in sweep.OPS if op != "train"])
def test_the_cases_of_an_op_run_on_a_cpu(op: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    rows = sweep.run(op, "tiny", "cpu", 600.0, str(path), {"float32": Limits(1e9, 1e9)})
    ours = [r for r in rows if r.contestant == "kdfast"]
    assert len(ours) == len(sweep.plan(op, "tiny", "cpu"))
    assert all(r.error == "" and r.median_ms > 0 and r.error_f64 < 1e-5 for r in ours)
    assert any(r.median_ms > 0 for r in rows if not r.contestant.startswith("kdfast"))
    assert len(read_csv(path)) == len(rows)


def test_the_training_step_runs_on_a_cpu(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    rows = sweep.run("train", "tiny", "cpu", 600.0, str(tmp_path / "rows.csv"), {})
    assert {r.contestant for r in rows} >= set(train.CONTESTANTS)
    assert all(r.error == "" and r.median_ms > 0 for r in rows)


def test_what_is_not_reached_is_out_of_time(tmp_path: Path) -> None:
    group = "hidden,train"
    rows = sweep.run(group, "tiny", "cpu", 0.0, str(tmp_path / "rows.csv"), {})
    assert {r.op for r in rows} == {"hidden_projected", "hidden_mse", "hidden_cosine", "train"}
    assert all(r.error.startswith("out of time: 0 s of its op's budget left") for r in rows)
    clock = iter([8.0, 8.0])
    refusal = gpu.Budget(10.0, 0.0, lambda: next(clock)).refuses(30)
    assert refusal == "out of time: 2 s of the budget left, needs about 30 s"
    assert {r.error for r in sweep.unreached(group, "tiny", "cpu", [], refusal)} == {refusal}


def test_rows_that_are_there_are_not_planned_again(tmp_path: Path) -> None:
    rows = sweep.run("hidden", "tiny", "cpu", 0.0, str(tmp_path / "rows.csv"), {})
    left = sweep.unreached("hidden,scale,train", "tiny", "cpu", rows, "its process died")
    assert {r.op for r in left} == {"scale", "train"}
    assert {r.error for r in left} == {"its process died"}


def test_a_training_step_without_transformers_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "missing", lambda: "transformers not installed: pip install 'kdfast[train]'")
    rows = sweep.run("train", "tiny", "cpu", 600.0, str(tmp_path / "rows.csv"), {})
    assert [r.contestant for r in rows] == list(train.CONTESTANTS)
    assert all(r.error.startswith("transformers not installed") for r in rows)


def test_an_older_torch_costs_its_own_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    for them in (peers.linear_peers("cuda", compiled=False), linear_hard.hard_peers("cuda", compiled=False)):
        by_name = {p.name: p for p in them}
        assert by_name["F.linear_cross_entropy"].missing == "needs torch >= 2.13"
        assert not by_name["kdfast"].missing
