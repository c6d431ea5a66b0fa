"""The quickstart's whole path at the smallest size; the claim itself is made by `kdfast quickstart --seeds 1,2,3`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kdfast.cli import main
from kdfast.cli.quickstart_job import Plan, llama

TINY = replace(
    Plan.short(), vocab_size=512, length=32, teacher_steps=40, student_steps=6, teacher=llama(32, 1), student=llama(16, 1),
    held_out_sequences=16, part=0.05,
)  # fmt: skip


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plan, "short", classmethod(lambda cls: TINY))


@pytest.mark.usefixtures("tiny")
def test_quickstart_ends_in_a_summary_and_a_picture_and_continues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "quickstart"
    words = ["quickstart", "--short", "--seeds", "1,2", "--out", str(out)]
    assert main(words) == 0
    assert "perplexity" in capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    wanted = {
        "teacher": ("ppl",), "student_ce": ("ppl", "seconds"), "student_kd": ("ppl", "seconds"),
        "student_ce_longer": ("ppl", "steps"), "speed": ("logits_vs_eager", "linear_vs_eager"),
        "cache": ("bytes_per_token", "kl", "tokens", "capture_seconds", "capture_tokens_per_s"),
    }  # fmt: skip
    for section, keys in wanted.items():
        assert all(summary[section][key] > 0 for key in keys)
    assert summary["seeds"] == [1, 2]
    assert len(summary["student_kd"]["per_seed"]["ppl"]) == 2
    assert summary["student_kd"]["steps"] == summary["student_ce"]["steps"] == 6
    assert summary["student_ce_longer"]["steps"] > 6
    assert summary["cache"]["tokens"] == 6 * 8 * 32
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")

    teacher = (out / "teacher" / "model" / "model.safetensors").stat().st_mtime_ns
    (out / "student_kd-seed2" / "result.json").unlink()
    assert main([*words, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (out / "teacher" / "model" / "model.safetensors").stat().st_mtime_ns == teacher
    for section in ("teacher", "student_ce", "student_ce_longer"):
        assert again[section] == summary[section]
    assert again["student_kd"]["per_seed"]["ppl"] == summary["student_kd"]["per_seed"]["ppl"]


@pytest.mark.usefixtures("tiny")
def test_a_folder_of_other_sizes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plan.json").write_text("{}")
    assert main(["quickstart", "--short", "--out", str(tmp_path)]) == 2
    assert "holds a quickstart of other sizes; add --fresh" in capsys.readouterr().err
