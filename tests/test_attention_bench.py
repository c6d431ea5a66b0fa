"""`kdfast bench full attention`: the peers compute what kdfast does, the truth is the truth, results and figure are written."""

from __future__ import annotations

from pathlib import Path

import plain
import pytest
import torch

from bench import attention
from bench.__main__ import main
from bench.peers import agree
from bench.report import read_csv

KINDS = pytest.mark.parametrize("kind", attention.KINDS)


@KINDS
def test_peers_agree(kind: str) -> None:
    ours, *peers = attention.attention_peers(17)
    case = attention.contestants(kind, 17).small()
    assert [agree(p, ours, case) for p in peers] == ["", ""]


@KINDS
def test_truth_is_the_materialised_form(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_ROWS", 5)
    case = attention.AttentionCase.make(kind, 17, 8, torch.float64, "cpu")
    loss, grads = case.truth()
    expected = attention.materialised(kind, *case.sides)
    assert plain.error(loss, expected.detach()) < 1e-12
    assert all(plain.error(a, b) < 1e-12 for a, b in zip(grads, torch.autograd.grad(expected, case.wanted), strict=True))


def test_maps_that_do_not_fit_are_not_run() -> None:
    assert [bool(p.missing) for p in attention.attention_peers(8192)] == [False, True, True]
    assert "need 10 GiB" in attention.attention_peers(8192)[1].missing


def test_command_writes_rows_and_figure(tmp_path: Path) -> None:
    table, figure = tmp_path / "a.csv", tmp_path / "a.png"
    lengths = ["--length", "16", "--length", "32", "--repeats", "1"]
    assert main(["attention", *lengths, "--on", "kl", "--csv", str(table), "--figure", str(figure), "--json"]) == 0
    assert {r.shape for r in read_csv(table)} == {"B=2 H=4 L=16 D=64", "B=2 H=4 L=32 D=64"}
    assert figure.read_bytes().startswith(b"\x89PNG")
