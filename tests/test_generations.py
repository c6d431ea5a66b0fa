"""Ensembles over generations and born-again networks on tiny data."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from tiny_translation import SIZE, make_tokenizer, marian, marian_config, pairs, recipe_values, save, write_rows
from transformers import AutoModelForSeq2SeqLM

from kdfast.models.ensemble import Ensemble
from kdfast.train import Recipe, distill, evaluate
from kdfast.train.data import Sequences
from kdfast.train.generations import agreement
from kdfast.train.inputs import Inputs, open_inputs

SHAPES = [{"model_type": "marian", "config": marian_config(width=width)} for width in (16, 24)]


@pytest.fixture
def home(tmp_path: Path) -> tuple[Path, Path]:
    return make_tokenizer(tmp_path / "tokenizer"), write_rows(tmp_path / "pairs.jsonl", pairs())


def run(values: dict[str, Any], said: list[str] | None = None) -> Any:
    return distill(Recipe.build(values), say=(lambda line: None) if said is None else said.append)


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_generations_of_an_ensemble_end_in_the_same_bits_when_killed(home: tuple[Path, Path], tmp_path: Path) -> None:
    tokenizer, data = home
    teachers = [{"path": str(save(marian(seed), tmp_path / f"t{seed}", tokenizer))} for seed in range(3)]
    method = {"name": "ensemble", "generations": 2, "members": SHAPES, "member_steps": 3, "hard_weight": 0.5}
    values = recipe_values(tokenizer, data, tmp_path / "whole", method=method, teachers=teachers)
    said: list[str] = []
    run(values, said)
    folder = tmp_path / "whole" / "prepared" / "0"
    found = json.loads((folder / "generations.json").read_text())
    assert list(found) == ["teachers", "generation 1", "generation 2"]
    assert [len(row["members"]) for row in found.values()] == [3, 2, 2]
    assert all(0 <= row["top1_agreement"] <= 1 and row["js"] >= 0 for row in found.values())
    told = next(line for line in said if line.startswith("generation 2: best of 2 perplexity"))
    assert "nats gained" in told or "nats lost" in told
    # The second generation learns from the first, the student from the second.
    recipe = Recipe.load(folder / "generation-2" / "member-1" / "recipe.yaml")
    assert [t.path for t in recipe.teachers] == [str(folder / "generation-1" / f"member-{i}" / "model") for i in range(2)]
    assert (recipe.method.name, recipe.method.options.hard_weight, recipe.steps) == ("word_kd", 0.5, 3)

    class Stopped:
        """Stops the run in the second generation."""

        def __init__(self, description: str, total: int, unit: str) -> None:
            self.here = "member-0" in description and runs == 4

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *error: object) -> None: ...

        def update(self, done: int, note: str = "") -> None:
            if self.here:
                os.kill(os.getpid(), signal.SIGINT)

    runs = 0

    def bar(*args: Any) -> Any:
        nonlocal runs
        runs += 1
        return Stopped(*args)

    cut = {**values, "out": str(tmp_path / "cut"), "log_every": 1}
    cut["method"] = dict(method)
    runs = 1
    with pytest.raises(KeyboardInterrupt):
        distill(Recipe.build(cut), say=lambda line: None, bar=bar)
    assert not (tmp_path / "cut" / "run.json").exists()
    assert (tmp_path / "cut" / "prepared" / "0" / "generation-2" / "member-0" / "checkpoints").is_dir()
    said.clear()
    run(cut, said)
    assert any("generation 1, member 1" in line and "finished before" in line for line in said)
    assert any("generation 2, member 0: resuming from" in line for line in said)
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("cut", "whole")]
    assert weights[0] == weights[1]
    again = json.loads((tmp_path / "cut" / "prepared" / "0" / "generations.json").read_text())
    assert again == found


def test_members_learn_from_labels_where_there_is_no_teacher(home: tuple[Path, Path], tmp_path: Path) -> None:
    tokenizer, data = home
    method = {"name": "ensemble", "generations": 1, "members": SHAPES, "member_steps": 2}
    values = recipe_values(tokenizer, data, tmp_path / "run", method=method)
    run({**values, "check": True})
    run(values)
    first = tmp_path / "run" / "prepared" / "0" / "generation-1"
    assert Recipe.load(first / "member-0" / "recipe.yaml").method.name == "supervised"
    assert AutoModelForSeq2SeqLM.from_pretrained(first / "member-1" / "model").config.d_model == 24


def test_every_generation_of_one_shape_begins_with_the_weights_that_are_given(home: tuple[Path, Path], tmp_path: Path) -> None:
    """Otherwise what the given weights know would look like what a generation gained."""
    tokenizer, data = home
    given = save(marian(5), tmp_path / "given", tokenizer)
    values = recipe_values(
        tokenizer, data, tmp_path / "run", method={"name": "born_again", "generations": 2}, steps=1, init_from=str(given),
        optimizer={"lr": 1e-9},
    )  # fmt: skip
    run(values)
    found = json.loads((tmp_path / "run" / "prepared" / "0" / "generations.json").read_text())
    nll = {name: row["members"][0]["nll"] for name, row in found.items() if len(row["members"]) == 1}
    assert json.loads((tmp_path / "run" / "result.json").read_text())["evaluation"]["nll"] == pytest.approx(
        next(iter(nll.values())), rel=1e-4
    )


def test_born_again_students_vote_at_the_end(home: tuple[Path, Path], tmp_path: Path) -> None:
    tokenizer, data = home
    method = {"name": "born_again", "generations": 3, "hard_weight": 0.5}
    values = recipe_values(tokenizer, data, tmp_path / "run", method=method)
    result = run(values)
    folder = tmp_path / "run" / "prepared" / "0"
    found = json.loads((folder / "generations.json").read_text())
    assert list(found) == ["generation 1", "generation 2", "generation 3", "all together"]
    assert Recipe.load(folder / "generation-1" / "member-0" / "recipe.yaml").method.name == "supervised"
    second = Recipe.load(folder / "generation-2" / "member-0" / "recipe.yaml")
    assert second.teachers[0].path == str(folder / "generation-1" / "member-0" / "model")
    models = [AutoModelForSeq2SeqLM.from_pretrained(path) for path in (
        folder / "generation-1" / "member-0" / "model", folder / "generation-2" / "member-0" / "model", result.model,
    )]  # fmt: skip
    inputs = open_inputs(Recipe.build(values), tmp_path / "read")
    want = evaluate(Ensemble(models), inputs.validation, task=inputs.task)
    assert found["all together"]["ensemble"] == pytest.approx(want, rel=1e-5)
    assert found["generation 3"]["members"][0] == pytest.approx(result.evaluation, rel=1e-5)


def test_agreement_by_hand(home: tuple[Path, Path], tmp_path: Path) -> None:
    tokenizer, data = home
    inputs = open_inputs(Recipe.build(recipe_values(tokenizer, data, tmp_path / "run")), tmp_path / "read")
    models = [marian(seed) for seed in range(3)]
    same, apart, rows = 0.0, 0.0, 0
    for i in range(len(inputs.validation)):
        batch = inputs.validation.batch([i])
        with torch.no_grad():
            p = torch.stack([model(**batch.by_name).logits[0].double().softmax(-1) for model in models])
        best, mean = p.argmax(-1), p.mean(0)
        same += sum(float((best[a] == best[b]).sum()) for a, b in ((0, 1), (0, 2), (1, 2))) / 3
        apart += float((p * (p / mean).log()).sum()) / 3
        rows += p.shape[1]
    found = agreement(models, inputs.validation, 5)
    assert found == pytest.approx({"top1_agreement": same / rows, "js": apart / rows}, rel=1e-4)


def test_faults_are_said_in_one_line(home: tuple[Path, Path], tmp_path: Path) -> None:
    tokenizer, data = home
    teacher = {"path": str(save(marian(0), tmp_path / "t", tokenizer))}

    def fails(match: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=match):
            run(recipe_values(tokenizer, data, tmp_path / "run", **changes))

    fails(r"teachers: method ensemble expects at least two, got 1", method="ensemble", teacher=teacher)
    fails(r"method\.members: expected at least two students", method={"name": "ensemble", "generations": 1})
    fails(r"method\.generations: expected a number >= 1", method={"name": "ensemble", "members": SHAPES}, teacher=teacher)
    fails(r"method\.generations.*>= 2", method={"name": "born_again", "generations": 1})
    fails(r"weights: beside \w+ expected none, they are a function", method="word_kd", teacher={**teacher, "weights": "x"})


def test_members_follow_the_phase_that_hears_them(home: tuple[Path, Path], tmp_path: Path) -> None:
    """Its steps and its optimizer, not those of the whole run, which has neither."""
    tokenizer, data = home
    values = recipe_values(tokenizer, data, tmp_path / "run")
    del values["steps"], values["optimizer"]
    own = {"lr": 0.02, "schedule": "constant"}
    run({**values, "phases": [
        {"steps": 1, "method": "supervised", "optimizer": {"lr": 0.5}}, {"steps": 2, "method": "born_again", "optimizer": own},
    ]})  # fmt: skip
    recipe = Recipe.load(tmp_path / "run" / "prepared" / "1" / "generation-1" / "member-0" / "recipe.yaml")
    assert (recipe.steps, recipe.optimizer.lr, recipe.optimizer.schedule) == (2, 0.02, "constant")


def test_every_member_is_cut_out_of_the_runs_teacher(home: tuple[Path, Path], tmp_path: Path) -> None:
    """Not out of the member that teaches it, which has fewer layers."""
    tokenizer, data = home
    teacher = save(marian(0, decoder_layers=3), tmp_path / "t", tokenizer)
    method = {"name": "born_again", "generations": 3, "member_steps": 1}
    run(recipe_values(
        tokenizer, data, tmp_path / "run", method=method, teacher={"path": str(teacher)}, steps=1,
        student={"from_teacher": {"decoder_layers": [0, 2]}},
    ))  # fmt: skip
    for number in (1, 2):
        folder = tmp_path / "run" / "prepared" / "0" / f"generation-{number}" / "member-0"
        recipe = Recipe.load(folder / "recipe.yaml")
        assert recipe.student.from_teacher is not None
        assert recipe.student.from_teacher.path == str(teacher)
        assert AutoModelForSeq2SeqLM.from_pretrained(folder / "model").config.decoder_layers == 2


class Excluding(torch.nn.Module):
    """Says by a table, and never id 3."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(9, 9))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.table.index_fill(1, torch.tensor([3]), -torch.inf)[input_ids]


def test_what_models_exclude_adds_nothing_to_their_divergence() -> None:
    models, data = [Excluding(), Excluding()], Sequences(torch.randint(0, 3, (4, 6)))
    p = torch.stack([model(data.ids[:, :-1]).softmax(-1) for model in models]).double()
    kl = torch.xlogy(p, p).sum((0, -1)) / 2 - torch.xlogy(p.mean(0), p.mean(0)).sum(-1)
    assert agreement(models, data)["js"] == pytest.approx(kl.mean().item(), rel=1e-5)


class Told:
    """Rows of a run, and its bar: a signal comes in the first member's last step, or in the evaluation after it."""

    def __init__(self, rows: Any, where: str) -> None:
        self.rows, self.digest, self.where, self.armed, self.sent = rows, rows.digest, where, False, False

    def __call__(self, description: str, total: int, unit: str) -> Told:
        self.total = total if "member-0" in description else 0
        return self

    def __enter__(self) -> Told:
        return self

    def __exit__(self, *error: object) -> None: ...

    def update(self, done: int, note: str = "") -> None:
        self.armed = done == self.total
        self._send("step")

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Any) -> Any:
        self._send("evaluation")
        return self.rows.batch(indices)

    def _send(self, where: str) -> None:
        if self.armed and where == self.where and not self.sent:
            self.sent = True
            os.kill(os.getpid(), signal.SIGINT)


def read(values: dict[str, Any], folder: Path) -> Inputs:
    return open_inputs(Recipe.build(values), folder)


@pytest.mark.parametrize("where", ["step", "evaluation"])
def test_a_signal_at_a_members_end_begins_no_other(where: str, home: tuple[Path, Path], tmp_path: Path) -> None:
    tokenizer, data = home
    method = {"name": "born_again", "generations": 3, "member_steps": 2}
    values = recipe_values(tokenizer, data, tmp_path / "whole", method=method, log_every=1)
    told = Told(read(values, tmp_path / "read").validation, where)
    distill(Recipe.build(values), validation_data=told.rows, say=lambda line: None)
    cut = Recipe.build({**values, "out": str(tmp_path / "cut")})
    with pytest.raises(KeyboardInterrupt, match=r"^stopped after step 2, the last: .*member-0 is done; run the same again"):
        distill(cut, validation_data=told, bar=told, say=lambda line: None)
    folder = tmp_path / "cut" / "prepared" / "0"
    assert told.sent
    assert (folder / "generation-1" / "member-0" / "result.json").is_file()
    assert sorted(path.name for path in folder.iterdir()) == ["generation-1"]
    said: list[str] = []
    distill(cut, validation_data=told.rows, say=said.append)
    assert any("generation 1, member 0" in line and "finished before" in line for line in said)
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("cut", "whole")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("brought", [("train_data", "validation_data"), ("validation_data",), ("train_data",)], ids=str)
def test_members_train_on_the_rows_of_the_run(brought: tuple[str, ...], home: tuple[Path, Path], tmp_path: Path) -> None:
    """What the caller brings takes the place of the recipe's data for them too, and nothing else does."""
    tokenizer, data = home
    few = write_rows(tmp_path / "few.jsonl", pairs()[:6])
    other = recipe_values(tokenizer, few, tmp_path / "other")
    other["data"]["validation"] = [str(few)]
    rows = read(other, tmp_path / "read")
    given = {"train_data": rows.train, "validation_data": rows.validation}
    values = recipe_values(tokenizer, data, tmp_path / "run", method={"name": "born_again", "member_steps": 1}, steps=1)
    distill(Recipe.build(values), say=lambda line: None, **{name: given[name] for name in brought})
    own, member = (json.loads((tmp_path / "run" / folder / "run.json").read_text())
                   for folder in (".", "prepared/0/generation-1/member-0"))  # fmt: skip
    for name, argument in (("data_hash", "train_data"), ("validation_hash", "validation_data")):
        assert own[name] == member[name]
        assert (own[name] == rows.digest) == (argument in brought)


@pytest.mark.parametrize("seed", [7, 20240101, 2**32 - 1])
def test_any_seed_of_a_run_makes_seeds_of_members(seed: int, home: tuple[Path, Path], tmp_path: Path) -> None:
    tokenizer, data = home
    method = {"name": "ensemble", "generations": 1, "members": SHAPES, "member_steps": 1}
    run(recipe_values(tokenizer, data, tmp_path / "run", method=method, steps=1, seed=seed))
    members = [tmp_path / "run" / "prepared" / "0" / "generation-1" / f"member-{i}" / "recipe.yaml" for i in range(2)]
    assert [Recipe.load(file).seed for file in members] == [(seed * 1000 + 100 + i) % 2**32 for i in range(2)]


@pytest.mark.parametrize("check", [True, False], ids=["check", "run"])
@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"d_modell": 3}, r"^method\.members\[1\]\.config\.d_modell: unknown key; did you mean 'd_model'\?$"),
        ({"vocab_size": 9}, r"^method\.members\[1\]: its vocabulary has 9 ids, expected at least the data's 13; set"
                            r" method\.members\[1\]\.config\.vocab_size$"),
        ({"vocab_size": 20}, r"^method\.members\[1\]: its vocabulary has 20 ids, that of the run's student 13; expected one"),
        ({"max_position_embeddings": 2}, r"^method\.members\[1\]: data: a row has \d tokens, expected at most the 2 positions"),
    ],
    ids=["key", "small", "large", "positions"],
)  # fmt: skip
def test_a_member_that_cannot_be_is_said_before_the_first_is_trained(
    config: dict[str, Any], match: str, check: bool, home: tuple[Path, Path], tmp_path: Path
) -> None:
    tokenizer, data = home
    members = [SHAPES[0], {"model_type": "marian", "config": {**marian_config(), **config}}]
    method = {"name": "ensemble", "generations": 1, "members": members, "member_steps": 1}
    with pytest.raises(ValueError, match=match) as caught:
        run(recipe_values(tokenizer, data, tmp_path / "run", method=method, check=check))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "run").rglob("member-0"))


class Wide(torch.nn.Module):
    """A student from a function, which says nowhere how many ids it knows."""

    def __init__(self, ids: int = SIZE) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(ids, ids)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.table(input_ids)
        return logits


def test_a_member_from_a_function_is_asked_for_its_vocabulary(home: tuple[Path, Path], tmp_path: Path) -> None:
    tokenizer, data = home
    members = [{"function": "test_generations:Wide", "arguments": {"ids": ids}} for ids in (SIZE, SIZE + 1)]
    method = {"name": "ensemble", "generations": 1, "members": members, "member_steps": 1}
    values = recipe_values(tokenizer, data, tmp_path / "run", method=method, task="causal_lm", student=members[0])
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": pair["source"], "completion": pair["target"]} for pair in pairs()])
    values["data"] |= {"train": [str(rows)], "validation": [str(rows)]}
    with pytest.raises(ValueError, match=r"^method\.members\[1\]: its vocabulary has 14 ids, that of the run's student 13"):
        run(values)
    assert not list((tmp_path / "run").rglob("member-0"))


def test_a_mix_is_of_generations_that_have_several_teachers(home: tuple[Path, Path], tmp_path: Path) -> None:
    tokenizer, data = home
    teachers = [{"path": str(save(marian(seed), tmp_path / f"t{seed}", tokenizer))} for seed in range(2)]

    def mixed(out: str, method: dict[str, Any], heard: list[dict[str, Any]], member: str) -> str:
        method = {**method, "teacher_mix": "logits", "member_steps": 1}
        run(recipe_values(tokenizer, data, tmp_path / out, method=method, teachers=heard, steps=1))
        recipe = Recipe.load(tmp_path / out / "prepared" / "0" / member / "recipe.yaml")
        return str(recipe.method.options.teacher_mix)

    born = {"name": "born_again", "generations": 3}
    for heard in ([], teachers[:1]):
        with pytest.raises(ValueError, match=r"^method\.teacher_mix: of a single teacher expected probs, got 'logits'"):
            mixed("none", born, heard, "generation-1/member-0")
        assert not list((tmp_path / "none").rglob("member-0"))
    assert mixed("born", born, teachers, "generation-1/member-0") == "logits"
    assert mixed("born", born, teachers, "generation-2/member-0") == "probs"
    several = {"name": "ensemble", "generations": 2, "members": SHAPES}
    assert mixed("one", several, teachers[:1], "generation-1/member-1") == "probs"
    assert mixed("one", several, teachers[:1], "generation-2/member-1") == "logits"


def test_scores_of_a_run_that_goes_on_are_those_of_its_last_step(home: tuple[Path, Path], tmp_path: Path) -> None:
    tokenizer, data = home
    method = {"name": "born_again", "member_steps": 2}
    values = recipe_values(tokenizer, data, tmp_path / "run", method=method, steps=2, optimizer={"lr": 1e-2})
    found = []
    for steps in (2, 30):
        result = run({**values, "steps": steps})
        found.append(json.loads((tmp_path / "run" / "prepared" / "0" / "generations.json").read_text()))
        assert found[-1]["generation 2"]["members"][0] == pytest.approx(result.evaluation, rel=1e-5)
    assert found[0]["generation 1"] == found[1]["generation 1"]
    assert [row["generation 2"]["steps"] for row in found] == [2, 30]
    assert found[0]["all together"]["ensemble"]["nll"] != found[1]["all together"]["ensemble"]["nll"]


def test_scores_are_of_the_models_that_are_there(home: tuple[Path, Path], tmp_path: Path) -> None:
    """A member that was trained anew, by another recipe, is scored anew."""
    tokenizer, data = home
    method = {"name": "born_again", "generations": 3, "member_steps": 2}
    values = recipe_values(tokenizer, data, tmp_path / "run", method=method, steps=1)
    run(values)
    out = tmp_path / "run"
    first = json.loads((out / "prepared" / "0" / "generations.json").read_text())
    for name in ("generation-1", "generation-2"):
        shutil.rmtree(out / "prepared" / "0" / name)
    for name in ("run.json", "result.json"):
        (out / name).unlink()
    shutil.rmtree(out / "checkpoints")
    run({**values, "optimizer": {"lr": 0.1}})
    again = json.loads((out / "prepared" / "0" / "generations.json").read_text())
    for number in (1, 2):
        member = json.loads((out / "prepared" / "0" / f"generation-{number}" / "member-0" / "result.json").read_text())
        assert again[f"generation {number}"]["members"][0] == pytest.approx(member["evaluation"], rel=1e-5)
        assert again[f"generation {number}"]["members"] != first[f"generation {number}"]["members"]


@pytest.mark.parametrize("where", ["moved", "relative"])
def test_a_run_goes_on_wherever_its_folder_lies(
    where: str, home: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, data = home
    method = {"name": "born_again", "generations": 3, "member_steps": 2}
    values = recipe_values(tokenizer, data, tmp_path / "run", method=method, steps=4, save_every=1)
    whole = (run(values).model / "model.safetensors").read_bytes()
    (tmp_path / "run" / "result.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    if where == "moved":
        (tmp_path / "there").mkdir()
        os.rename(tmp_path / "run", tmp_path / "there" / "again")
        values["out"] = str(tmp_path / "there" / "again")
    else:
        monkeypatch.chdir(tmp_path)
        values["out"] = "./run"
    said: list[str] = []
    assert (run(values, said).model / "model.safetensors").read_bytes() == whole
    assert sum("member 0" in line and "finished before" in line for line in said) == 2
    assert any("step-00000003" in line for line in said)
    if where == "moved":
        other = [{"path": str(save(marian(seed), tmp_path / f"t{seed}", tokenizer))} for seed in (1, 2)]
        with pytest.raises(ValueError, match=r"differs in teachers"):
            run({**values, "teachers": other})


def test_scoring_teachers_leaves_them_in_evaluation_mode(home: tuple[Path, Path], tmp_path: Path) -> None:
    """An ensemble's are scored before the first step: in it they say what those of `word_kd` say, which nobody scored."""
    tokenizer, data = home
    teachers = []
    for seed in range(2):
        model = marian(seed)
        model.config.dropout = 0.5
        teachers.append({"path": str(save(model, tmp_path / f"t{seed}", tokenizer))})
    found = []
    for name in ("word_kd", "ensemble"):
        run(recipe_values(tokenizer, data, tmp_path / name, method=name, teachers=teachers, steps=2))
        found.append(losses(tmp_path / name))
    assert found[0] == found[1]


def test_an_evaluation_puts_every_module_back_as_it_was(home: tuple[Path, Path], tmp_path: Path) -> None:
    tokenizer, data = home
    inputs = read(recipe_values(tokenizer, data, tmp_path / "run"), tmp_path / "read")
    model = marian(0).train()
    model.model.encoder.eval()
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    evaluate(model, inputs.validation, task=inputs.task)
    assert [module.training for module in model.modules()] == modes
