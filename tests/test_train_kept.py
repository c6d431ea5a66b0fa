"""What a run keeps when it is stopped, killed or fails, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_runs import LABELLED, Rows, make_tokenizer, quiet, recipe_values, untimed

from kdfast.models.load import load_folder
from kdfast.train import Batch, Recipe, distill, evaluate
from kdfast.train.batch import likeliest
from kdfast.train.best import beats
from kdfast.train.inputs import open_inputs
from kdfast.train.stop import stop_signals
from kdfast.train.tasks.classes import class_scores, class_summary

ENDLESS = """
from torch import nn
class Endless(nn.Module):
    def __init__(self):
        super().__init__()
        self.inputs, self.head = nn.Embedding(300, 4), nn.Linear(4, 300)
        nn.init.zeros_(self.inputs.weight)
    def forward(self, input_ids):
        return self.head(self.inputs(input_ids).abs().sqrt())
"""

NOISY = """
import torch
from torch import nn
class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.inputs, self.head = nn.Embedding(300, 8), nn.Linear(8, 300)
    def forward(self, input_ids):
        return self.head(nn.functional.dropout(self.inputs(input_ids), 0.2))
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_the_best_model_is_kept_and_changes_nothing_else(tokenizer: Path, tmp_path: Path) -> None:
    # So high a rate that it gets worse before the end.
    values = recipe_values(tokenizer, tmp_path / "run", steps=6, eval_every=1, optimizer={"lr": 0.1, "schedule": "constant"})
    distill(Recipe.build({**values, "keep_best": True}), say=quiet)
    plain = distill(Recipe.build({**values, "out": str(tmp_path / "plain")}), say=quiet)
    assert not (tmp_path / "plain" / "best").exists()
    last = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    assert last == (plain.model / "model.safetensors").read_bytes()
    recipe = Recipe.build(values)
    validation = open_inputs(recipe, tmp_path / "data").validation
    assert validation is not None

    def best() -> dict[str, Any]:
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        found = min(summary["evaluations"], key=lambda row: row["nll"])
        assert summary["best"] == found
        model = load_folder(tmp_path / "run" / "best", "best")
        assert evaluate(model, validation, batch_size=recipe.batch_size)["nll"] == pytest.approx(found["nll"], rel=1e-6)
        return found

    assert best()["step"] < 6
    assert (tmp_path / "run" / "best" / "tokenizer.json").is_file()
    # Gone on with, it is compared with what came before.
    distill(Recipe.build({**values, "keep_best": True, "steps": 8}), say=quiet)
    best()


def test_the_best_is_of_what_was_kept(tokenizer: Path, tmp_path: Path) -> None:
    """Evaluations whose models were not kept do not count, whoever was better."""
    out = tmp_path / "run"
    values = recipe_values(tokenizer, out, steps=3, eval_every=1, optimizer={"lr": 0.1, "schedule": "constant"})
    distill(Recipe.build(values), say=quiet)
    said: list[str] = []
    distill(Recipe.build({**values, "keep_best": True}), say=said.append)
    assert said[-1] == f"{out / 'best'}: none kept; keep_best takes the evaluations of steps that are still to come"
    # Not marked as done, its last evaluation is made again, and its model kept.
    (out / "result.json").unlink()
    distill(Recipe.build({**values, "keep_best": True}), say=quiet)
    assert json.loads((out / "best.json").read_text())["step"] == 3
    distill(Recipe.build({**values, "keep_best": True, "steps": 6}), say=said.append)
    summary = json.loads((out / "summary.json").read_text())
    later = [row for row in summary["evaluations"] if row["step"] >= 3]
    assert summary["best"] == min(later, key=lambda row: row["nll"])
    assert said[-1].startswith(f"{out / 'best'}: the model after step {summary['best']['step']}, validation perplexity ")


def test_a_best_model_of_a_later_step_is_forgotten(tokenizer: Path, tmp_path: Path) -> None:
    values = {**recipe_values(tokenizer, tmp_path / "run", steps=4, save_every=2, eval_every=4), "keep_best": True}
    distill(Recipe.build(values), say=quiet)
    # As if it had been killed before its last checkpoint.
    (tmp_path / "run" / "result.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    said: list[str] = []
    distill(Recipe.build({**values, "steps": 3}), say=said.append)
    assert f"{tmp_path / 'run' / 'best'}: was of step 4, which a run of 3 does not have; removed" in said
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["best"]["step"] == 3


def test_a_diverged_model_is_never_the_best(tmp_path: Path) -> None:
    assert not beats(tmp_path, {"accuracy": 0.9, "nll": math.nan}, "accuracy", 1)
    assert beats(tmp_path, {"accuracy": 0.1, "nll": 3.0}, "accuracy", 1)
    right = torch.zeros(4, dtype=torch.long)
    assert class_summary([class_scores(torch.full((4, 3), math.nan), right)])["accuracy"] == 0
    # Of a row of NaN argmax says 0: the first class, tag or token.
    logits = torch.tensor([[2.0, 1.0], [math.nan, 1.0], [0.0, math.nan], [-math.inf, 0.0]])
    assert likeliest(logits).tolist() == [0, -1, -1, 1]


def test_a_run_killed_after_its_last_checkpoint_has_an_evaluation(tokenizer: Path, tmp_path: Path) -> None:
    recipe = Recipe.build(recipe_values(tokenizer, tmp_path / "run", steps=2))
    first = distill(recipe, say=quiet)
    (tmp_path / "run" / "result.json").unlink()
    before = untimed(tmp_path / "run")
    assert distill(recipe, say=quiet).evaluation == first.evaluation
    assert untimed(tmp_path / "run") == before


def test_a_damaged_checkpoint_is_one_line_with_the_remedy(tokenizer: Path, tmp_path: Path) -> None:
    values = recipe_values(tokenizer, tmp_path / "run", steps=4, save_every=2)
    distill(Recipe.build(values), say=quiet)
    last = tmp_path / "run" / "checkpoints" / "step-00000004"
    whole = (last / "training.safetensors").read_bytes()
    more = Recipe.build({**values, "steps": 6})
    for name, damaged in (("training.safetensors", whole[:-9]), ("state.json", b"{"), ("rng-00000.json", None)):
        before = (last / name).read_bytes()
        (last / name).unlink() if damaged is None else (last / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{name}.*; remove {re.escape(str(last))} to go on from the checkpoint before"):
            distill(more, say=quiet)
        (last / name).write_bytes(before)
    shutil.rmtree(last)
    assert distill(more, say=quiet).steps == 6


def test_a_full_disk_names_the_file_and_loses_nothing(tokenizer: Path, tmp_path: Path) -> None:
    values = recipe_values(tokenizer, tmp_path / "run", steps=2)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "kdfast.cli", "train", str(tmp_path / "recipe.yaml")]

    def no_room() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, 16_000))

    assert subprocess.run(command, capture_output=True, text=True, check=False).returncode == 0
    done = subprocess.run([*command, "steps=4"], capture_output=True, text=True, preexec_fn=no_room, check=False)
    wanted = tmp_path / "run" / "checkpoints" / "step-00000004"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2, f"kdfast train: {wanted}: file too large; make room and run the same again"
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert not list(wanted.parent.glob(".*"))
    again = subprocess.run([*command, "steps=4"], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr


def test_weights_that_are_nan_are_not_saved(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of a step says nothing of its gradients, and the next one comes after the checkpoint."""
    (tmp_path / "endless_gradient.py").write_text(ENDLESS)
    monkeypatch.syspath_prepend(str(tmp_path))
    values = recipe_values(tokenizer, tmp_path / "run", steps=1, student={"function": "endless_gradient:Endless"})
    with pytest.raises(RuntimeError, match=r"^step 1: the gradient's norm is (nan|inf|None)"):
        distill(Recipe.build(values), say=quiet)
    assert not (tmp_path / "run" / "checkpoints").exists()


class Watched:
    """A bar that calls `told(description, done, total)`."""

    def __init__(self, told: Any) -> None:
        self.told = told

    def __call__(self, description: str, total: int, unit: str) -> Watched:
        made = Watched(self.told)
        made.description, made.total = description, total  # type: ignore[attr-defined]
        return made

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *error: object) -> None: ...

    def update(self, done: int, note: str = "") -> None:
        self.told(self.description, done, self.total)  # type: ignore[attr-defined]


class Fragile(Rows):
    """Rows that cannot be read while `broken`."""

    broken = False

    def batch(self, indices: Sequence[int]) -> Batch:
        if self.broken:
            raise OSError("the disk with the validation data is gone")
        return super().batch(indices)


@pytest.mark.parametrize(("changes", "at"), [({}, 4), ({"eval_every": 2, "save_every": 2}, 2)], ids=["the-last", "in-between"])
def test_an_evaluation_that_fails_loses_no_step(changes: dict[str, Any], at: int, tokenizer: Path, tmp_path: Path) -> None:
    values = recipe_values(tokenizer, tmp_path / "whole", steps=4, log_every=1, **changes)
    rows = Fragile(LABELLED)
    given: dict[str, Any] = {"train_data": Rows(LABELLED), "validation_data": rows, "say": quiet}
    whole = distill(Recipe.build(values), **given)
    cut = Recipe.build({**values, "out": str(tmp_path / "cut")})
    with pytest.raises(OSError, match="is gone"):
        distill(cut, **given, bar=Watched(lambda name, done, total: setattr(rows, "broken", done == at)))
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == [f"step-0000000{at}"]
    rows.broken = False
    steps: list[int] = []
    again = distill(cut, **given, bar=Watched(lambda name, done, total: steps.append(done)))
    assert steps == list(range(at + 1, 5)), "steps that were done are not done again"
    assert again.evaluation == whole.evaluation
    assert untimed(again.out) == untimed(whole.out)
    for file in ("model/model.safetensors", "checkpoints/step-00000004/training.safetensors"):
        assert (again.out / file).read_bytes() == (whole.out / file).read_bytes()
    left = [sorted(path.name for path in (run.out / "checkpoints").iterdir()) for run in (again, whole)]
    assert left[0] == left[1]


def test_an_evaluation_draws_nothing_from_the_training(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a checkpoint may be written before it or after it."""
    (tmp_path / "noisy_student.py").write_text(NOISY)
    monkeypatch.syspath_prepend(str(tmp_path))
    runs = []
    for every in (0, 1):
        values = recipe_values(tokenizer, tmp_path / str(every), student={"function": "noisy_student:Noisy"}, steps=4,
                               eval_every=every)  # fmt: skip
        runs.append(distill(Recipe.build(values), say=quiet).model / "model.safetensors")
    assert runs[0].read_bytes() == runs[1].read_bytes()


def test_a_signal_in_the_last_step_is_told_when_all_is_done(tokenizer: Path, tmp_path: Path) -> None:
    """Whoever trains several, one after another, stops there."""
    recipe = Recipe.build(recipe_values(tokenizer, tmp_path / "run", steps=2, log_every=1))

    def stop(name: str, done: int, total: int) -> None:
        if done == total:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match=r"^stopped after step 2, the last: .*run is done"):
        distill(recipe, say=quiet, bar=Watched(stop))
    said: list[str] = []
    assert distill(recipe, say=said.append).evaluation is not None
    assert said == [f"{tmp_path / 'run'}: finished before; nothing to do"]


def test_a_block_within_a_block_hears_for_both() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_signals() as outer:
        with stop_signals() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
            assert inner.wait(5)
        assert outer.is_set()
        with stop_signals() as later:
            assert later.is_set()
    assert signal.getsignal(signal.SIGTERM) is before
    with stop_signals() as fresh:
        assert not fresh.is_set()


def test_what_killed_runs_left_is_cleared_away(tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    recipe = Recipe.build(recipe_values(tokenizer, out, steps=1))
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    left = [
        out / "data" / f".train.{process.pid}-01234567.part" / "input_ids.bin",
        out / "prepared" / "0" / f".rows.{process.pid}-01234567.part" / "input_ids.bin",
        out / "prepared" / "0" / "decoded" / f".decoding.json.{process.pid}-01234567.part",
        out / ".model.part" / "model.safetensors",
        out / "checkpoints" / ".step-00000007.part" / "state.json",
    ]
    alive = out / "data" / f".train.{os.getpid()}-01234567.part"
    for file in (*left, alive):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x")
    distill(dataclasses.replace(recipe, check=True), say=quiet)
    assert all(file.exists() for file in left), "a check leaves everything as it is"
    distill(recipe, say=quiet)
    assert [path for path in out.rglob(".*") if path.name.endswith(".part")] == [alive]
