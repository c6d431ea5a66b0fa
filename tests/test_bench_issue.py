"""`kdfast bench issue`: loops read from machine code, and no kernel above its committed counts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from bench import issue, issue_counts, issue_model, issue_targets
from bench.issue_counts import Count
from bench.issue_model import H100, H200

SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.EL.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   FFMA R4, R4, R5, R6 ;
        /*0030*/                   MUFU.EX2 R4, R4 ;
        /*0040*/              @!P1 BRA 0x70 ;
        /*0050*/                   FSEL R4, R4, R5, P2 ;
        /*0060*/                   FADD R4, R4, R5 ;
        /*0070*/                   FMNMX R4, R4, R5, !PT ;
        /*0080*/               @P0 BRA 0x10 ;
        /*0090*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*00a0*/               @P0 BRA 0x90 ;
        /*00b0*/                   BRA 0x0 ;
        /*00c0*/                   BRA 0xc0;
"""


def test_loops_over_rows_without_what_a_branch_steps_over() -> None:
    (loop,) = issue_counts.loops(SASS)
    assert [op.split()[0] for op in loop.body] == ["LDG.E.EL.128", "FFMA", "MUFU.EX2", "BRA", "FMNMX", "BRA"]
    assert loop.loaded_bits == 128


def test_a_count_above_the_committed_one_is_named() -> None:
    committed = Count(40.0, 10.0, 4.0, 128, 2)
    assert issue._worse(committed, committed) == []
    assert issue._worse(Count(42.0, 10.0, 4.0, 128, 2), committed) == ["instructions 42 a column, committed 40"]
    assert issue._worse(Count(40.0, 10.0, 4.0, 128, 2, products=9), committed) == ["products 9 a column, committed 0"]
    launches = Count(0, 0, 0, 0, 6)
    assert issue._worse(launches, launches) == []
    assert issue._worse(Count(0, 0, 0, 0, 7), launches) == ["7 launches, committed 6"]


def test_fewer_instructions_are_no_failure_but_loops_that_are_not_found_are() -> None:
    committed = Count(40.0, 10.0, 4.0, 128, 2, products=256)
    assert issue._worse(dataclasses.replace(committed, instructions=30.0, alu=5.0, special=2.0), committed) == []
    assert issue._worse(dataclasses.replace(committed, loops=1, instructions=20.0), committed) == ["1 loops, committed 2"]
    for products in (0, 128):
        said = [f"products {products} a column, committed 256"]
        assert issue._worse(dataclasses.replace(committed, products=products), committed) == said
    assert issue._worse(dataclasses.replace(committed, special=0.0), committed) == ["special 0 a column, committed 4"]
    assert len(issue._worse(Count(0, 0, 0, 0, 0), committed)) == 5
    assert issue._worse(Count(0, 0, 0, 0, 0), Count(0, 0, 0, 0, 6)) == ["0 launches, committed 6"]


def test_a_call_without_a_committed_count_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(issue, "COUNTS", tmp_path / "issue.csv")
    assert issue.main(["--check", "--row", "scale"]) == 1
    _, line, sum_ = capsys.readouterr().out.splitlines()
    assert sum_.startswith("1 calls, 1 of them above")
    assert line.endswith("no committed count; kdfast bench issue --write")
    assert issue.main(["--write", "--row", "scale"]) == 2
    assert capsys.readouterr().err.startswith("issue: --write: expected counts of every call, got none of kd_loss")


@pytest.mark.parametrize("options", [["--row", "nope"], ["--quick", "--row", "scale"]])
def test_a_row_that_is_not_there(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    assert issue.main(options) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("issue: --row: expected part of a name in docs/gpu.md")


PRODUCTS = """
        /*0000*/                   HGMMA.64x128x16.F32.BF16 R4, gdesc[UR4], R4 ;
        /*0010*/                   HGMMA.64x16x8.F32.TF32 R4, R2, gdesc[UR4], R4 ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0030*/              @!P1 BRA 0x50 ;
        /*0040*/                   MUFU.EX2 R4, R4 ;
        /*0050*/               @P0 BRA 0x0 ;
        /*0060*/                   FFMA R4, R4, R5, R6 ;
        /*0070*/               @P0 BRA 0x60 ;
"""


def test_products_of_a_loop_in_those_of_warpgroups_of_halves() -> None:
    (loop,) = issue_counts.product_loops(PRODUCTS)
    of_a_warp = 2 * 64 * 128 * 16 / 4 + 2 * (2 * 64 * 16 * 8) / 4 + 2 * 16 * 8 * 16 / 0.62
    assert loop.products == pytest.approx(of_a_warp)
    assert sum(op.startswith("MUFU") for op in loop.body) == 1  # a branch over it may be one that is seldom taken


def test_every_call_is_committed_and_documented() -> None:
    committed = issue_counts.read_counts(issue.COUNTS)
    assert list(committed) == issue.calls()
    assert set(issue_counts.read_counts(issue.FIRST)) <= set(committed)
    assert issue.PAGE.read_text() == issue.page(committed, issue_counts.read_counts(issue.FIRST))


def test_every_aim_has_its_row_before_and_after() -> None:
    committed, first = issue_counts.read_counts(issue.COUNTS), issue_counts.read_counts(issue.FIRST)
    found = {t.name: t for t in issue_targets.targets(list(issue.rows()), committed, first)}
    for words in (
        "kd_loss bf16 T=2 4096 x 128256", "128256, cluster", "x 32000", "x 50257", "fp32 logits", "bf16 logits", "topk_targets",
        "topk_kd_loss", "attention_scores", "attention_probs", "attention_kl", "hidden_mse projected", "float16",
    ):  # fmt: skip
        assert any(words in name for name in found), words
    for target in found.values():
        name, meant, before, h100, h200, verdict = target.cells()
        assert all((name, meant, before, verdict))
        assert (h100 and h200) or "not counted" in verdict
        if "not counted" not in verdict:
            assert any(word in verdict for word in ("reached", "bound", "short"))


def row(n: int = 4096, vocab: int = 128256) -> issue_model.Row:
    v = n * vocab
    return issue_model.Row("", "", "", v, 6 * v, 4 * v, 4, rows=n)


def test_what_a_second_pass_finds_depends_on_the_rows_in_flight() -> None:
    one, two = Count(40, 10, 4, 128, 2, programs=1, ahead=32768), Count(40, 10, 4, 128, 2, programs=2, ahead=16384)
    assert issue_model.in_flight(row(), one, H100) == 132 * 128256 * 4
    assert issue_model.kept(row(), one, H100, 50e6) == pytest.approx(50e6 / (132 * 128256 * 4))
    assert issue_model.kept(row(vocab=32000), two, H100, 50e6) == 1
    # Nothing kept: five tensors move and not three.
    assert issue_model.bytes_ms(row(), 0, H100) == pytest.approx(issue_model.bytes_ms(row(), 1, H100) * 5 / 3)


def test_without_loads_ahead_nothing_is_hidden() -> None:
    one_pass = issue_model.Row("", "", "", 10**9, 4 * 10**9, 0, 4)
    ahead, none = (Count(50, 0, 0, 128, 1, ahead=bytes_) for bytes_ in (1 << 20, 0))
    memory, issued = issue_model.bytes_ms(one_pass, 1, H200), issue_model.work(10**9, ahead, H200)["issue"]
    assert issue_model.predicted(one_pass, ahead, H200)[1] == pytest.approx(max(memory, issued))
    assert issue_model.predicted(one_pass, none, H200)[1] == pytest.approx(memory + issued)


def test_verdicts() -> None:
    outcome = issue_model.Outcome(0.6, 0.7, 0.9, "why", "lacking", "largest")
    said = [outcome.verdict(reach) for reach in (0.6, 0.65, 0.8, 0.95)]
    assert said == ["reached", "reached if lacking", "short: largest", "bound 0.90: why"]


@pytest.mark.parametrize("name", ["kd_loss bf16 T=2 4096 x 128256"])
def test_no_kernel_needs_more_than_committed(name: str) -> None:
    pytest.importorskip("triton")
    assert issue.main(["--check", "--row", name]) == 0
