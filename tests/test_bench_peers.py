"""Peers of the linear losses: those that run here agree with kdfast, those whose kernels need a GPU do so interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import __main__ as bench_main
from bench import linear_hard, peers
from bench.cases import LinearCase
from bench.peer import Peer, agree, needs_gpu, not_installed
from bench.report import read_csv

JOB = linear_hard.contestants(9, 33, 5, torch.float32, peers=linear_hard.hard_peers("cpu", compiled=False))


def test_hard_labels_alone_agree_with_the_truth() -> None:
    case = JOB.small()
    assert case.ignored == 2
    ready = [p for p in JOB.peers if p.comparable and not p.missing]
    assert len(ready) >= 2
    for peer in (*ready, Peer("truth", lambda c: c.truth())):
        assert agree(peer, JOB.peers[0], case) == "", peer.name
    assert JOB.model.flops == 6 * 9 * 33 * 5


def test_a_peer_that_cannot_run_here_says_why() -> None:
    assert not_installed("torch", "torch") == ""
    assert not_installed("no_such_module", "no-such") == "no-such is not installed: pip install no-such"
    assert needs_gpu("cpu", "torch", "torch") == "its kernels are Triton and need a GPU"
    assert needs_gpu("cuda", "torch", "torch") == ""
    by_name = {p.name: p for p in (*JOB.peers, *peers.linear_peers("cpu", compiled=False))}
    for name, module in (("cut-cross-entropy", "cut_cross_entropy"), ("fla fused_kl_div", "fla")):
        assert by_name[name].missing == needs_gpu("cpu", module, "fla-core" if module == "fla" else "cut-cross-entropy")
    if not not_installed("cut_cross_entropy", "cut-cross-entropy"):
        single = {p.name: p for p in linear_hard.hard_peers("cuda", compiled=False)}["cut-cross-entropy"]
        assert single.missing == "its backward takes half precision only"


def test_hard_labels_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.csv"
    small = ["--rows", "9", "--vocab", "33", "--student-dim", "5", "--dtype", "float32", "--csv", str(path), "--json"]
    assert bench_main.main(["linear", "--quick", "--labels", "hard", *small]) == 0
    rows = {r.contestant: r for r in read_csv(path)}
    assert {r.op for r in rows.values()} == {"linear_hard"}
    assert rows["kdfast"].median_ms > 0
    assert rows["kdfast"].error_f64 < 1e-5
    assert rows["cut-cross-entropy"].error
    capsys.readouterr()


_INTERPRETED = """
import torch
from bench import linear_hard, peers
from bench.cases import LinearCase
from bench.peer import agree

for them, name, case in (
    (peers.linear_peers("cpu", compiled=False), "fla fused_kl_div", LinearCase.make(7, 129, 8, 8, torch.float64, ignored=2)),
    (linear_hard.hard_peers("cpu", compiled=False), "Liger FusedLinearCE",
     linear_hard.HardCase.of(7, 129, 8, torch.float64, "cpu", 2, 0)),
):
    peer = next(p for p in them if p.name == name)
    if "not installed" not in peer.missing:
        print(name, agree(peer, them[0], case) or "agrees")
"""


@pytest.mark.slow
@pytest.mark.skipif(bool(not_installed("fla", "") or not_installed("triton", "")), reason="fla-core or triton is not installed")
def test_kernels_that_need_a_gpu_agree_interpreted() -> None:
    """Their arguments, temperature, mask and divisor, which a GPU's rounding has no part in."""
    command = [sys.executable, "-W", "ignore", "-c", _INTERPRETED]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True, timeout=300
    )
    assert "fla fused_kl_div agrees" in done.stdout, done.stdout + done.stderr
    assert "disagrees" not in done.stdout


def test_a_mask_is_known_to_the_host() -> None:
    assert LinearCase.make(7, 129, 8, 12, torch.float64, ignored=2).ignored == 2
