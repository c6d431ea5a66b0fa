"""The contestants of hidden states, logit matching and the TinyBERT step compute the same thing."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from bench import __main__ as bench_main
from bench import hidden, linear_logit_mse, tinybert
from bench.peers import Peer, agree

JOBS = {kind: hidden.contestants(kind, 9, 5, 13, torch.float32) for kind in hidden.KINDS}
JOBS["linear_logit_mse"] = linear_logit_mse.contestants(9, 129, 8, 12, 0.5, torch.float32)


@pytest.mark.parametrize("name", JOBS)
def test_peers_agree_with_kdfast_and_both_with_the_truth(name: str) -> None:
    job, case = JOBS[name], JOBS[name].small()
    assert len(job.peers) >= 2
    for peer in (*job.peers, Peer("truth", lambda c: c.truth())):
        assert agree(peer, job.peers[0], case) == "", peer.name


def test_model_of_the_projection_counts_three_products() -> None:
    assert JOBS["projected"].model.flops == 3 * 2 * 9 * 5 * 13


@pytest.mark.parametrize("op", ["hidden", "linear_logit_mse"])
def test_command_line(op: str, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--quick", "--rows", "9", "--student-dim", "6", "--json"]
    assert bench_main.main([op, *small, *(["--vocab", "40"] if op == "linear_logit_mse" else [])]) == 0
    assert capsys.readouterr().out.startswith("[")


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("width", [None, 24], ids=["same-width", "narrower"])
def test_tinybert_step_agrees_with_plain_losses(width: int | None) -> None:
    step = tinybert.make_step(None, 2, 8, width, "sdpa")
    assert tinybert.agreement(step) == ""
    loss, grads = tinybert.fused(step)
    assert loss > 0
    assert any(g is not None and bool(g.abs().max() > 0) for g in grads)
    assert len(tinybert.floor(step)[1]) == len(grads)
    maps = tinybert.eager(tinybert.make_step(None, 2, 8, width, "eager"))
    assert maps[0].isfinite()
