"""The same contestants under pytest-benchmark, for its histories and comparisons:

    pytest bench/entries.py --benchmark-only
    pytest bench/entries.py --benchmark-only --benchmark-autosave --benchmark-compare
    KDFAST_BENCH=full pytest bench/entries.py --benchmark-only -k logits

The name keeps it out of an ordinary test run. Results that go anywhere come from `kdfast bench`, whose timer
interleaves the contestants; pytest-benchmark runs one after the other.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from . import linear, logits, topk
from .contest import Contest
from .measure import release
from .peers import Peer, linear_peers, logits_peers, topk_peers
from .shapes import LLAMA3, QWEN3

_FULL = os.environ.get("KDFAST_BENCH") == "full"


def _jobs() -> list[Contest]:
    logits_shape = (256, LLAMA3.vocab) if _FULL else (64, 32000)
    linear_shape = (1024, 32000, 512, 1024) if _FULL else (256, 8192, 256, 512)
    capture = (64, QWEN3.vocab) if _FULL else (16, 32000)
    dtype = torch.float32
    compiled = ("log_target", "probs") if _FULL else ()
    return [
        logits.contestants(*logits_shape, dtype, peers=logits_peers("cpu", compiled=compiled)),
        linear.contestants(*linear_shape, dtype, peers=linear_peers("cpu", compiled=_FULL)),
        topk.capture_contestants(*capture, 64, dtype),
        topk.contestants(*capture, 64, dtype, peers=topk_peers(compiled=_FULL)),
    ]


_ENTRIES = [pytest.param(job, peer, id=f"{job.op}-{peer.name}") for job in _jobs() for peer in job.peers]
_cases: dict[str, Any] = {}


def _case(job: Contest) -> Any:
    """The inputs of one op at a time: the entries of an op follow each other."""
    key = f"{job.op} {job.shape}"
    if key not in _cases:
        _cases.clear()
        release("cpu")
        _cases[key] = job.make(0)
    return _cases[key]


@pytest.mark.parametrize(("job", "peer"), _ENTRIES)
def test_entry(benchmark: Any, job: Contest, peer: Peer) -> None:
    if peer.missing:
        pytest.skip(peer.missing)
    case = _case(job)
    benchmark.group = f"{job.op} {job.shape}"

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (case.fresh() if peer.fresh else case,), {}

    loss, _ = benchmark.pedantic(peer.run, setup=setup, rounds=5, warmup_rounds=1)
    assert bool(torch.isfinite(loss))
