"""`kdfast bench`, the page of marks, and the check of new results against old ones."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from bench import check, performance, suite
from bench.report import Row, read_csv, write_csv
from kdfast.cli import main


def rows(ratio: float, device: str = "cpu A") -> list[Row]:
    case = {"dtype": "float32", "shape": "N=256 V=128256", "device": device, "threads": 2, "commit": "abc"}
    return [
        Row("logits", "kdfast", median_ms=2.0, time_ratio=1.0, error_f64=1e-7, **case),
        Row("logits", "kdfast overwrite_logits", median_ms=1.0, time_ratio=0.5, error_f64=1e-7, **case),
        Row("logits", "eager log_target", median_ms=2 * ratio, time_ratio=ratio, error_f64=1e-7, **case),
        Row("logits", "a floor", median_ms=0.5, time_ratio=0.25, **case),
    ]


def test_a_quick_run_of_one_op_as_json_csv_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, picture = tmp_path / "rows.csv", tmp_path / "rows.png"
    assert main(["bench", "hidden", "--quick", "--json", "--csv", str(table), "--plot", str(picture)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {r["op"] for r in found} == {"hidden_mse", "hidden_projected", "hidden_cosine"}
    assert all(r["median_ms"] > 0 and not r["error"] for r in found)
    assert len(read_csv(table)) == len(found)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_an_op_or_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "logitz"]) == 2
    assert "op: expected one of logits, topk" in capsys.readouterr().err


def test_the_summary_names_the_fastest_peer_and_what_is_not_first(capsys: pytest.CaptureFixture[str]) -> None:
    case = rows(0.5)
    assert suite.fastest_peer(case) is case[2]
    case[0] = dataclasses.replace(case[0], behind="eager log_target takes 0.50 of its time")
    suite.print_summary([case])
    out = capsys.readouterr().out
    assert "eager log_target" in out
    assert "not first: logits float32 N=256 V=128256" in out


@pytest.mark.parametrize(("now", "code", "word"), [(10.0, 0, "same"), (5.0, 1, "SLOWER"), (30.0, 0, "faster")])
def test_check_compares_ratios(now: float, code: int, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    write_csv(rows(10.0), old)
    write_csv(rows(now), new)
    assert check.main([str(new), "--against", str(old)]) == code
    assert word in capsys.readouterr().out


def test_check_counts_the_ratios_that_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    write_csv(rows(10.0), old)
    write_csv(rows(10.9), new)  # the floor beside it is where it was
    assert check.main([str(new), "--against", str(old), "--band", "1.10"]) == 0
    assert "2 of 2 ratios agree within a factor of 1.1" in capsys.readouterr().out
    assert check.main([str(new), "--against", str(old), "--band", "1.05"]) == 0  # faster is no failure
    assert "1 of 2 ratios agree within a factor of 1.05" in capsys.readouterr().out


def test_check_does_not_compare_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    write_csv(rows(10.0), old)
    write_csv(rows(10.0, "cpu B"), new)
    assert check.main([str(new), "--against", str(old)]) == 1
    assert "no case of both files" in capsys.readouterr().out


def test_check_tells_of_what_kdfast_no_longer_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    write_csv(rows(10.0), old)
    now = rows(10.0)
    now[1] = dataclasses.replace(now[1], median_ms=math.nan, time_ratio=math.nan, error="RuntimeError: broken")
    write_csv(now, new)
    assert check.main([str(new), "--against", str(old)]) == 1
    assert "kdfast overwrite_logits: RuntimeError: broken" in capsys.readouterr().out
    assert check.main([str(new), "--against", str(new)]) == 0  # it was so before


def test_a_mark_is_met_short_or_not_measured() -> None:
    page = performance.page(rows(16.0))
    lines = [line for line in page.splitlines() if line.startswith("| `kd_loss`, KL + CE, 256 x 128256, float32 |")]
    assert "| at least 15x | 16x |" in lines[0]
    assert "| not measured |" in lines[1]
    assert "| at least 20x | 32x |" in page
    assert "| at least 15x | **short** 14x |" in performance.page(rows(14.0))


def test_every_committed_result_can_be_read_and_marks_speak_of_known_cases() -> None:
    found = performance.read()
    assert found
    for mark in performance.marks():
        case = [r for r in performance.of_case(found, mark) if r.device]
        if mark.device == "cpu" and case:
            assert math.isfinite(mark.value(case)), mark.work


def test_the_page_goes_between_its_marks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    assert performance.main(["--write", str(page)]) == 2
    assert "expected a file with the marks" in capsys.readouterr().err
    page.write_text(f"before\n{performance.MARKS[0]}\nold\n{performance.MARKS[1]}\nafter\n")
    assert performance.main(["--write", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text.splitlines()
