"""Recipes are strict: every error is one line that names the dotted path and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdfast.train import Recipe

GOOD: dict[str, Any] = {"student": {"model_type": "gpt2"}}


def _load(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return Recipe.load(file, overrides)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param({**GOOD, "stepz": 3}, r"^stepz: unknown key; did you mean 'steps'\?$", id="unknown-top-level-key"),
        pytest.param(
            {**GOOD, "optimizer": {"lrr": 1.0}}, r"^optimizer\.lrr: unknown key; did you mean 'lr'", id="unknown-nested-key"
        ),
        pytest.param({**GOOD, "data": {"qqq": 1}}, r"^data\.qqq: unknown key; valid keys are ", id="nothing-near"),
        pytest.param({**GOOD, "steps": "many"}, r"^steps: expected a whole number, got str 'many'", id="text-for-int"),
        pytest.param({**GOOD, "steps": 2.5}, r"^steps: expected a whole number, got float 2\.5", id="float-for-int"),
        pytest.param({**GOOD, "steps": True}, r"^steps: expected a whole number, got bool True", id="bool-for-int"),
        pytest.param({**GOOD, "check": 1}, r"^check: expected true or false, got int 1", id="int-for-bool"),
        pytest.param({**GOOD, "data": [1]}, r"^data: expected a mapping", id="list-for-mapping"),
        pytest.param({**GOOD, "data": {"train": [3]}}, r"^data\.train\[0\]: expected text, got int 3", id="inside-a-list"),
        pytest.param(
            {**GOOD, "seed": 2**32}, r"^seed: expected a number <= 4294967295, got 4294967296", id="seed-above-numpy's"
        ),
        pytest.param({**GOOD, "steps": 0}, r"^steps: expected a number >= 1, got 0", id="below-range"),
        pytest.param(
            {**GOOD, "method": {"name": "word_kd", "temperature": 0}},
            r"^method\.temperature: expected a number > 0\.0, got 0",
            id="at-open-end",
        ),
        pytest.param(
            {**GOOD, "method": {"name": "word_kd", "temperature": {"start": 2, "end": 0}}},
            r"^method\.temperature: expected a number > 0\.0, got 0",
            id="schedule-out-of-range",
        ),
        pytest.param(
            {**GOOD, "method": {"name": "word_kd", "temprature": 2}},
            r"^method\.temprature: unknown key; .*'temperature'",
            id="unknown-option",
        ),
        pytest.param(
            {**GOOD, "task": "causal"}, r"^task 'causal': unknown task; expected one of causal_lm, ", id="no-such-task"
        ),
        pytest.param(
            {**GOOD, "data": {"validation_share": 0.9}}, r"^data\.validation_share: expected a number <= 0\.5", id="above-range"
        ),
        pytest.param({**GOOD, "optimizer": {"lr": float("nan")}}, r"^optimizer\.lr: expected a finite number", id="nan"),
        pytest.param(
            {**GOOD, "method": "word_dk"}, r"^method 'word_dk': unknown method; did you mean 'word_kd'\?", id="word-of-a-choice"
        ),
        pytest.param(
            {**GOOD, "optimizer": {"beta1": 1.0}}, r"^optimizer\.beta1: expected a number < 1\.0, got 1", id="beta-of-1"
        ),
        pytest.param({}, r"^student: expected one of model_type, path, function, from_teacher, got none$", id="no-student"),
        pytest.param(
            {"student": {"model_type": "gpt2", "path": "x"}},
            r"^student: expected one of .*model_type and path",
            id="two-students",
        ),
        pytest.param({**GOOD, "teacher": {"path": "x"}}, r"^teacher: method supervised has none", id="teacher-unused"),
        pytest.param(
            {**GOOD, "phases": [{"steps": 2, "method": "supervised"}], "steps": 8},
            r"^steps: phases stand in the place of method and steps",
            id="phases-and-steps",
        ),
        pytest.param(
            {**GOOD, "phases": [{"steps": 2, "method": "supervised"}], "teacher": {"path": "x"}},
            r"^teacher: method supervised has none",
            id="no-phase-has-a-use-for-the-teacher",
        ),
        pytest.param({**GOOD, "method": "word_kd"}, r"^teacher: method word_kd expects one of path", id="no-teacher"),
        pytest.param(
            {**GOOD, "teacher": {"path": "x"}, **{"method": {"name": "word_kd", "soft_weight": 0}}},
            r"^method\.soft_weight: ",
            id="no-loss",
        ),
    ],
)
def test_errors_name_the_dotted_path(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Recipe.build(values)
    assert "\n" not in str(error.value)


def test_overrides_win_and_are_checked(tmp_path: Path) -> None:
    text = "student: {model_type: gpt2}\nsteps: 5\n"
    recipe = _load(tmp_path, text, "steps=7", "optimizer.lr=1e-3", "data.train=[a, b]", "student.config.n_layer=2")
    assert (recipe.steps, recipe.optimizer.lr, recipe.data.train) == (7, 1e-3, ("a", "b"))
    assert recipe.student.config == {"n_layer": 2}
    with pytest.raises(ValueError, match=r"^optimizer\.rl: unknown key"):
        _load(tmp_path, text, "optimizer.rl=1")
    with pytest.raises(ValueError, match="expected key=value"):
        _load(tmp_path, text, "steps")
    with pytest.raises(ValueError, match=r"^steps\.x: steps holds int 5"):
        _load(tmp_path, text, "steps.x=1")
    # As a shell gives `student.from_teacher={path: encoder}` to a command.
    line = r"^student\.from_teacher: expected a YAML value, got '\{path:' .*; put the whole override in quotes where it has"
    with pytest.raises(ValueError, match=line):
        _load(tmp_path, text, "student.from_teacher={path:", "encoder}")


def test_what_is_no_yaml_mapping(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not valid YAML"):
        _load(tmp_path, "a: [1")
    with pytest.raises(ValueError, match="expected a YAML mapping"):
        _load(tmp_path, "- 1\n")
    with pytest.raises(FileNotFoundError):
        Recipe.load(tmp_path / "none.yaml")


def test_the_written_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = Recipe.build(
        {**GOOD, "method": {"name": "word_kd", "temperature": 2}, "teacher": {"cache": "c"}, "data": {"train": "a"}}
    )
    assert recipe.data.train == ("a",)
    assert _load(tmp_path, recipe.to_yaml()) == recipe


def test_a_key_that_is_written_twice_is_refused(tmp_path: Path) -> None:
    good = "student: {model_type: gpt2}\n"
    with pytest.raises(ValueError, match=r"recipe\.yaml: not valid YAML: 'steps' is there twice in .*line 3, column 1"):
        _load(tmp_path, f"{good}steps: 5\nsteps: 7\n")
    with pytest.raises(ValueError, match=r"'lr' is there twice"):
        _load(tmp_path, f"{good}optimizer: {{lr: 1.0, lr: 2.0}}\n")
    shared = "student: {model_type: gpt2, config: &c {n_layer: 1}, arguments: {}}\noptimizer: {lr: 0.5}\n"
    assert _load(tmp_path, shared).optimizer.lr == 0.5


def test_a_recipe_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"out: \xe9\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml: not valid YAML: 'utf-8' codec"):
        Recipe.load(tmp_path / "recipe.yaml")


def test_a_mistyped_key_of_the_recipe_finds_those_that_are_chosen_by_name_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^methd: unknown key; did you mean 'method'\?"):
        Recipe.build({**GOOD, "methd": {"temperature": 3}})
