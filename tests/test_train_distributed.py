"""Two processes (DDP, FSDP2) train what one does with twice the batch; killed and stopped runs go on from where they were."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import STUDENT, make_tokenizer, recipe_values
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from kdfast.train import Recipe, distill
from kdfast.train.data import Order
from kdfast.train.inputs import open_inputs
from kdfast.train.result import Result

THREADS = 1
CONFIG = {**STUDENT, "n_layer": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LAUNCH = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def values(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe with a tied head, an objective that has parameters, and a last batch of the evaluation that is smaller."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(3)
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=24, n_layer=1, n_head=2, n_positions=32)).save_pretrained(folder)
    return recipe_values(
        tokenizer, Path("unused"), student={"model_type": "gpt2", "config": CONFIG}, teacher={"path": str(folder)},
        method={"name": "my_objective:MyObjective", "weight": 0.5}, steps=4, batch_size=4, accumulation=2, eval_every=2,
        eval_sequences=18, save_every=1, log_every=3, keep=9,
    )  # fmt: skip


def launch(folder: Path, values: dict[str, Any], processes: int = 2, check: bool = True, **env: str) -> str:
    """Runs the recipe as `kdfast train` in that many processes; what they printed."""
    file = folder.with_suffix(".yaml")
    file.write_text(Recipe.build({**values, "out": str(folder)}).to_yaml())
    done = subprocess.run(
        [sys.executable, "-m", *(LAUNCH if processes > 1 else []), "kdfast", "train", str(file)],
        env=environment(**env), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": path, **more}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same_bits(a: Path, b: Path, step: int) -> None:
    for file in ("model/model.safetensors", f"checkpoints/step-{step:08d}/training.safetensors"):
        assert (a / file).read_bytes() == (b / file).read_bytes(), file
    timed = ("seconds", "tokens_per_s", "data_wait_s")
    logged = [[{k: v for k, v in row.items() if k not in timed} for row in rows_of(folder)] for folder in (a, b)]
    assert logged[0] == logged[1]
    results = [json.loads((folder / "result.json").read_text()) for folder in (a, b)]
    assert results[0]["evaluation"] == results[1]["evaluation"]


@pytest.fixture(scope="module")
def one(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Result:
    """One process with as many rows in a step as two have together."""
    out = tmp_path_factory.mktemp("one") / "run"
    return distill(Recipe.build({**values, "out": str(out), "batch_size": 8}), say=lambda line: None)


def test_an_objective_in_a_file_of_its_own(one: Result) -> None:
    kept = load_file(one.out / "checkpoints" / "step-00000004" / "training.safetensors")
    assert kept["module.objectives.0.projection.weight"].shape == (24, 16)
    assert "optimizer.objectives.0.projection.weight/exp_avg" in kept
    before = load_file(one.out / "checkpoints" / "step-00000001" / "training.safetensors")
    assert not torch.equal(*(k["module.objectives.0.projection.weight"] for k in (before, kept)))
    exported = load_file(one.model / "model.safetensors")
    assert not [name for name in exported if "projection" in name]
    # A tied head is stored once.
    assert [name for name in exported if "lm_head" in name or "wte" in name] == ["transformer.wte.weight"]
    assert len([name for name in kept if name.startswith("module.student.") and ("lm_head" in name or "wte" in name)]) == 1
    student = AutoModelForCausalLM.from_pretrained(one.model)
    assert student.lm_head.weight is student.transformer.wte.weight
    row = next(row for row in rows_of(one.out) if "loss" in row)
    assert row["my_gap"] > 1, "exp of a mean of squares"
    assert row["loss"] == pytest.approx(
        0.7 * 4 * row["kl_at_T"] + 0.3 * row["hard"] + 0.5 * torch.tensor(row["my_gap"]).log().item(), rel=1e-4
    )
    assert (one.out / "prepared" / "0" / "prepared").read_text() == "once more\n"


def test_the_parameters_of_an_objective_are_clipped(values: dict[str, Any], tmp_path: Path) -> None:
    """With a tiny bound on the norm, the objective's gradient is part of the norm and shrinks with the rest."""
    seen: dict[str, float] = {}

    class Step(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            seen["norm"] = float(torch.stack([g.norm() for g in grads]).norm())
            seen["projection"] = max(float(g.norm()) for g in grads if g.shape == (24, 16))
            return super().step(closure)

    recipe = Recipe.build({**values, "out": str(tmp_path / "run"), "steps": 1, "optimizer": {"clip": 1e-3}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Step)
        distill(recipe, say=lambda line: None)
    assert rows_of(tmp_path / "run")[0]["grad_norm"] > 1e-2
    assert seen["norm"] == pytest.approx(1e-3, rel=1e-3)
    assert 0 < seen["projection"] <= 1e-3


@pytest.mark.parametrize("shard", ["none", "fsdp"], ids=["ddp", "fsdp2"])
def test_two_processes_equal_one(shard: str, values: dict[str, Any], one: Result, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    values = {**values, "shard": shard, "keep_best": True}
    launch(whole, values, SHAPES_IN=str(tmp_path))
    _equal_to_float_error(one.out, whole)
    # Of one evaluation the last is the best.
    assert (whole / "best/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    assert json.loads((whole / "best.json").read_text())["step"] == 4
    if shard == "fsdp":
        _is_sharded([json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)])

    launch(killed, values, check=False, KILLED_AT="4")
    assert sorted(p.name for p in (killed / "checkpoints").glob("step-*"))[-1] == "step-00000003"
    assert not (killed / "result.json").exists()
    shutil.copytree(killed, tmp_path / "alone")
    assert "resuming from" in launch(killed, values)
    same_bits(whole, killed, 4)

    # One process goes on where two had come to in the data: 3 steps of 2 * 2 * 4 rows.
    alone = {**values, "out": str(tmp_path / "alone"), "shard": "none"}
    (tmp_path / "alone" / "recipe.yaml").write_text(Recipe.build(alone).to_yaml())
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROWS_IN", str(tmp_path / "rows"))
        distill(Recipe.build(alone), say=said.append)
    assert any("another number of processes" in line for line in said)
    train = open_inputs(Recipe.build(alone), tmp_path / "again").train
    order = Order(len(train), 1)
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert rows == [train.batch(order.take(start, 4)).input_ids.tolist() for start in (48, 52)]


def _equal_to_float_error(one: Path, two: Path) -> None:
    files = "model/model.safetensors", "checkpoints/step-00000004/training.safetensors"
    for file in files:
        a, b = load_file(one / file), load_file(two / file)
        assert a.keys() == b.keys()
        for name, value in a.items():
            torch.testing.assert_close(b[name], value, rtol=1e-4, atol=1e-5)
    for a, b in zip(rows_of(one), rows_of(two), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"seconds", "tokens_per_s", "data_wait_s"}:
            assert b[name] == pytest.approx(a[name], rel=1e-3), name
    evaluations = [json.loads((folder / "result.json").read_text())["evaluation"] for folder in (one, two)]
    assert evaluations[0] == pytest.approx(evaluations[1], rel=1e-4)


def _is_sharded(ranks: list[dict[str, Any]]) -> None:
    for name, (kind, shape, local) in ranks[0].items():
        assert kind == "DTensor", name
        assert local[0] + ranks[1][name][2][0] == shape[0], name
        assert local[0] < shape[0], name


def test_two_processes_leave_alone_what_one_leaves_alone(values: dict[str, Any], tmp_path: Path) -> None:
    """Parameters without a gradient, a pooler's, neither stop DDP nor decay."""
    changes = {"student": {"function": "my_student:make_pooled"}, "method": {"name": "supervised"}, "teacher": None}
    values = {**values, **changes}
    one = distill(Recipe.build({**values, "out": str(tmp_path / "one"), "batch_size": 8}), say=lambda line: None)
    two = tmp_path / "two"
    assert "2 parameters get no gradient, student.bert.pooler.dense.weight" in launch(two, values)
    _equal_to_float_error(one.out, two)
    torch.manual_seed(1)
    ends = [load_file(folder / "model" / "model.safetensors") for folder in (one.out, two)]
    starts = load_file(one.out / "checkpoints" / "step-00000001" / "training.safetensors")
    for name in ("bert.pooler.dense.weight", "bert.pooler.dense.bias"):
        assert torch.equal(ends[0][name], ends[1][name])
        assert torch.equal(ends[0][name], starts[f"module.student.{name}"])


def test_a_student_in_several_processes_is_asked_once_what_it_uses(values: dict[str, Any], tmp_path: Path) -> None:
    said = launch(tmp_path / "all", {**values, "steps": 1, "method": {"name": "supervised"}, "teacher": None})
    assert "get no gradient" not in said
    assert "find_unused_parameters" not in said, "DDP warns where it looks in vain"


@pytest.mark.parametrize(
    ("number", "processes"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGINT, 2)], ids=["ctrl-c", "term", "torchrun"]
)
def test_a_stopped_run_goes_on_to_the_same_bits(number: int, processes: int, values: dict[str, Any], tmp_path: Path) -> None:
    values = {**values, "steps": 60, "save_every": 0, "eval_every": 1, "log_every": 1, "accumulation": 1}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    launch(whole, values, processes)
    (tmp_path / "stopped.yaml").write_text(Recipe.build({**values, "out": str(stopped)}).to_yaml())
    command = [sys.executable, "-m", *(LAUNCH if processes > 1 else []), "kdfast", "train", str(tmp_path / "stopped.yaml")]
    with open(tmp_path / "said", "w") as said:
        # A group of its own: a terminal's Ctrl-C reaches the launcher and all that it started.
        process = subprocess.Popen(command, env=environment(), stdout=said, stderr=said, start_new_session=True)
        deadline = time.monotonic() + 200
        while not (stopped / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(process.pid, number)
        code = process.wait(timeout=100)
    text = (tmp_path / "said").read_text()
    assert code == (130 if processes == 1 else 1), text
    [checkpoint] = (stopped / "checkpoints").glob("step-*")
    last = json.loads((checkpoint / "state.json").read_text())["step"]
    assert last == max(row["step"] for row in rows_of(stopped)) < 60, "the last whole step"
    assert not (stopped / "result.json").exists()
    assert "resuming from" in launch(stopped, values, processes)
    same_bits(whole, stopped, 60)


def test_two_processes_hear_several_teachers(values: dict[str, Any], tmp_path: Path) -> None:
    """An ensemble that teaches no generations trains no members, one by one."""
    teachers = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=24, n_layer=1, n_head=2, n_positions=32))
        model.save_pretrained(tmp_path / f"t{seed}")
        teachers.append({"path": str(tmp_path / f"t{seed}")})
    values = {**values, "teacher": None, "teachers": teachers, "method": {"name": "ensemble", "hard_weight": 0.5}}
    one = distill(Recipe.build({**values, "out": str(tmp_path / "one"), "batch_size": 8}), say=lambda line: None)
    assert launch(tmp_path / "two", values).count("teachers: best of 2") == 1
    _equal_to_float_error(one.out, tmp_path / "two")
    members = {"members": [values["student"]] * 2, "generations": 1}
    refused = launch(tmp_path / "members", {**values, "method": {"name": "ensemble", **members}}, check=False)
    assert "method: expected one process for generations, whose members train one by one, got 2" in refused
    assert not (tmp_path / "members" / "prepared" / "0" / "generations.json").exists()
