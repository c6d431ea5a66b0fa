"""The quickstart's whole path at the smallest size; the claim itself is made by `kdfast quickstart --seeds 1,2,3`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdfast.cli import main
from kdfast.cli.quickstart_job import Job, Plan, keep_best, llama
from kdfast.train import Result

TINY = replace(
    Plan.short(), vocab_size=512, length=32, teacher_steps=40, student_sequences=16, student_steps=6, eval_every=2,
    teacher=llama(32, 1), student=llama(16, 1), held_out_sequences=16, part=0.05,
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
        "teacher": ("ppl",), "student_ce": ("ppl", "seconds", "best_ppl", "best_step"),
        "student_kd": ("ppl", "seconds", "best_ppl"),
        "student_ce_longer": ("ppl", "steps"), "speed": ("logits_vs_eager", "linear_vs_eager"),
        "cache": ("bytes_per_token", "kl", "tokens", "capture_seconds", "capture_tokens_per_s"),
    }  # fmt: skip
    for section, keys in wanted.items():
        assert all(summary[section][key] > 0 for key in keys)
    assert summary["seeds"] == [1, 2]
    assert len(summary["student_kd"]["per_seed"]["ppl"]) == 2
    assert summary["student_kd"]["steps"] == summary["student_ce"]["steps"] == 6
    assert summary["student_ce_longer"]["steps"] > 6
    assert summary["cache"]["tokens"] == summary["data"]["student_tokens"] == 16 * 32
    assert summary["data"]["student_epochs"] == 3
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")

    teacher = (out / "teacher" / "model" / "model.safetensors").stat().st_mtime_ns
    (out / "student_kd-seed2" / "result.json").unlink()
    assert main([*words, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (out / "teacher" / "model" / "model.safetensors").stat().st_mtime_ns == teacher
    for section in ("teacher", "student_ce", "student_ce_longer"):
        assert again[section] == summary[section]
    assert again["student_kd"]["per_seed"]["ppl"] == summary["student_kd"]["per_seed"]["ppl"]


def test_the_best_step_is_the_one_validation_liked(tmp_path: Path) -> None:
    """Of three checkpoints the second is best: its weights stay, beside the last checkpoint."""
    rows = [{"step": s, "seconds": float(s), "validation_ppl": p} for s, p in ((2, 9.0), (4, 5.0), (6, 7.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [{"step": 1, "loss": 1.0}, *rows]))
    for row in rows:
        folder = tmp_path / "checkpoints" / f"step-{row['step']:08d}"
        folder.mkdir(parents=True)
        tensors = {"module.student.w": torch.tensor([row["validation_ppl"]]), "optimizer.student.w/step": torch.ones(1)}
        save_file(tensors, folder / "training.safetensors")
    keep_best(tmp_path)
    assert {k: v.tolist() for k, v in load_file(tmp_path / "best.safetensors").items()} == {"w": [5.0]}
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 4, "validation_ppl": 5.0}
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000006"]


@pytest.mark.parametrize(("plain", "distilled", "steps"), [(10.0, 12.0, 150), (10.0, 9.0, 130), (10.0, 10.0, 130)])
def test_hard_labels_get_the_seconds_of_capture_and_distillation(plain: float, distilled: float, steps: int) -> None:
    """Never fewer than the capture's alone, where distillation happened to be the faster one."""
    job = Job(Path(), TINY, [1], None, print)  # type: ignore[arg-type]
    found = [Result(Path(), Path(), 100, seconds, None) for seconds in (plain, distilled)]
    assert job.longer_steps(found[0], found[1], capture_seconds=3.0) == steps


@pytest.mark.usefixtures("tiny")
def test_a_folder_of_other_sizes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plan.json").write_text("{}")
    assert main(["quickstart", "--short", "--out", str(tmp_path)]) == 2
    assert "holds a quickstart of other sizes; add --fresh" in capsys.readouterr().err
