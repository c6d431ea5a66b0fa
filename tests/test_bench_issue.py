"""`kdfast bench issue`: loops read from machine code, and no kernel above its committed counts."""

from __future__ import annotations

import pytest

from bench import issue

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
    (loop,) = issue.loops(SASS)
    assert [op.split()[0] for op in loop.body] == ["LDG.E.EL.128", "FFMA", "MUFU.EX2", "BRA", "FMNMX", "BRA"]
    assert loop.loaded_bits == 128


def test_a_count_above_the_committed_one_is_named() -> None:
    committed = issue.Count(40.0, 10.0, 4.0, 128, 2)
    assert issue._worse(committed, committed) == []
    assert issue._worse(issue.Count(42.0, 10.0, 4.0, 128, 2), committed) == ["instructions 42 a column, committed 40"]


def test_every_call_is_committed_and_documented() -> None:
    committed = issue.read_counts(issue.COUNTS)
    assert set(committed) == {row.name for row in issue.rows()}
    assert issue.PAGE.read_text() == issue.page(committed, issue.read_counts(issue.FIRST))


@pytest.mark.parametrize("name", ["kd_loss bf16 T=2 4096 x 128256"])
def test_no_kernel_needs_more_than_committed(name: str) -> None:
    pytest.importorskip("triton")
    assert issue.main(["--check", "--row", name]) == 0
