"""Vocabulary-parallel kd_loss and linear_kd_loss: two gloo processes with a slice each against the unsplit result.

Both processes run all cases of `parallel_ranks` once; the tests here report what became of each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from kdfast import kd_loss

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
FOLDER = Path(__file__).parent
WORLD = 2


def case_names() -> list[str]:
    if not dist.is_available():
        return []
    import parallel_ranks

    return list(parallel_ranks.cases())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each rank reports of each case."""
    folder = tmp_path_factory.mktemp("ranks")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(FOLDER), str(FOLDER.parent), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(FOLDER / "parallel_ranks.py")]
    ranks = [
        subprocess.Popen([*command, str(rank), str(WORLD), str(folder)], env=env, stderr=subprocess.PIPE, text=True)
        for rank in range(WORLD)
    ]
    try:
        errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * WORLD, "\n".join(errors)[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize("case", case_names())
def test_on_two_ranks(case: str, results: list[dict[str, str]]) -> None:
    for rank, outcome in enumerate(results):
        assert outcome[case] == "", f"rank {rank}: {outcome[case]}"


def test_group_needs_torch_distributed() -> None:
    with pytest.raises(ValueError, match=r"tp_group: expected torch.distributed to be initialised"):
        kd_loss(torch.randn(2, 5), torch.randn(2, 5), tp_group="tp")
