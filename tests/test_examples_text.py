"""The studies on text from end to end, on a few files of the standard library: every run, table and picture, in few steps."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import email
import json as some_package

from kdfast.text.tokenizers import train_tokenizer
from kdfast.train import Recipe

EXAMPLES = Path(__file__).parent.parent / "examples"
#: Modules of the examples, which must not outlive a test: `study` and `prepare` are names of several.
MODULES = ("lstm", "text_runs", "warm_start")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loads a script of an example as Python does when it is run: its folder comes first on the path."""

    def loaded(folder: str, name: str) -> Any:
        monkeypatch.setattr(sys, "path", [str(EXAMPLES / folder), *sys.path])
        spec = importlib.util.spec_from_file_location(f"{folder}_{name}", EXAMPLES / folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    # A picture of every run takes longer than the run; the studies' own are drawn.
    monkeypatch.setattr("kdfast.train.summary.draw", lambda *args: None)
    yield loaded
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like what `word_kd/prepare.py` makes, of two packages."""
    out = tmp_path_factory.mktemp("text") / "corpus"
    for split, package in (("train", email), ("validation", some_package)):
        (out / split).mkdir(parents=True)
        for file in sorted(Path(str(package.__file__)).parent.glob("*.py")):
            shutil.copyfile(file, out / split / file.name)
    train_tokenizer(sorted((out / "train").glob("*.py")), 500).save(str(out / "tokenizer.json"))
    return out


def run(main: Callable[..., None], out: Path, corpus: Path, *words: str) -> tuple[list[str], dict[str, Any], str]:
    """What a study says, its pieces, and its table; run again, it has nothing left to do and says the same."""
    said: list[str] = []
    main(["--out", str(out), "--corpus", str(corpus), "--small", *words], said.append)
    pieces = json.loads((out / "study.json").read_text())
    text = (out / "study.md").read_text()
    assert said[-1] == text
    again: list[str] = []
    before = {file: file.stat().st_mtime_ns for file in out.rglob("metrics.jsonl")}
    main(["--out", str(out), "--corpus", str(corpus), "--small", *words], again.append)
    assert again == [text]
    assert {file: file.stat().st_mtime_ns for file in out.rglob("metrics.jsonl")} == before
    assert not [*out.rglob("checkpoints")]
    with pytest.raises(SystemExit, match="holds a study of other sizes or of another corpus; name another folder"):
        main(["--out", str(out), "--corpus", str(corpus), *words], again.append)
    return said, {name: piece for name, piece in pieces.items() if name != "of"}, text


def test_the_study_of_the_lstm(load: Any, corpus: Path, tmp_path: Path) -> None:
    study = load("lstm", "study")
    out = tmp_path / "out"
    said, pieces, text = run(study.main, out, corpus, "--seeds", "1", "2")
    # As many tries for the student alone as for the distilled one, each chosen from all of its own.
    assert [sum(name.startswith(f"try of {way}:") for name in pieces) for way in ("alone", "distilled")] == [6, 6]
    assert all("test" not in found for name, found in pieces.items() if name.startswith("try"))
    for way in ("alone", "distilled"):
        best = min((name for name in pieces if name.startswith(f"try of {way}:")), key=lambda name: pieces[name]["validation"])
        wanted = best.partition(": ")[2]
        recipe = json_of(out / "runs" / f"{way}-2")
        if wanted.startswith("lr "):
            assert recipe["optimizer"]["lr"] == float(wanted[3:])
        else:
            for key, value in (change.split("=") for change in wanted.split()):
                section, *_, name = key.split(".")
                found = recipe[section]["arguments"][name] if key.startswith("student.arguments") else recipe[section][name]
                assert found == float(value)
    # Equal steps, the same rows in the same order from the cache as live.
    assert len({pieces[f"{way} {seed}"]["steps"] for way in ("alone", "distilled", "cached") for seed in (1, 2)}) == 1
    losses = [first_hard(out / "runs" / f"{way}-1") for way in ("distilled", "cached")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert pieces["longer 1"]["steps"] >= 2 * pieces["alone 1"]["steps"]
    for line in ("| the teacher |", "| the student alone |", "| distilled, live teacher |", "| distilled, from the cache |"):
        assert line in text
    ppl = [math.exp(pieces[f"distilled {seed}"]["test"]) for seed in (1, 2)]
    assert f"| {sum(ppl) / 2:.2f} ± {abs(ppl[0] - ppl[1]) / math.sqrt(2):.2f} |" in text
    assert (out / "curves.png").stat().st_size > 1000
    assert any(line.startswith("1 of 25, try of teacher: lr 3.0e-3; about ") for line in said)


def json_of(run: Path) -> dict[str, Any]:
    import yaml

    recipe: dict[str, Any] = yaml.safe_load((run / "recipe.yaml").read_text())
    return recipe


def first_hard(run: Path) -> float:
    return float(json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["hard"])


def test_a_run_is_gone_on_with_until_it_gains_nothing(load: Any, corpus: Path, tmp_path: Path) -> None:
    """What stands in the table is the best of the lengths on the validation files, whatever came after it."""
    runs = load("word_kd", "text_runs")
    study = runs.Study(tmp_path / "out", corpus, runs.Text(files=4, length=32), say=lambda line: None)
    nll = {5: 4.0, 10: 3.0, 20: 2.5, 40: 2.495, 80: 1.0}
    trained: list[int] = []

    def length(recipe: Path, name: str, steps: int, *changes: str) -> dict[str, Any]:
        trained.append(steps)
        return {"validation": nll[steps], "steps": steps, "seconds": 1.0}

    study._length, study.model, study.score = length, lambda name: name, lambda model: model
    found = study.until_flat(Path("recipe.yaml"), "long", 5, 100)
    assert trained == [5, 10, 20, 40]
    assert (found["steps"], found["flat"], found["test"], found["model"]) == (40, True, "long-40", "long-40")
    assert study.until_flat(Path("recipe.yaml"), "long", 5, 100) == found
    assert trained == [5, 10, 20, 40]
    nll[20] = 3.5
    worse = study.until_flat(Path("recipe.yaml"), "worse", 5, 100)
    assert (worse["steps"], worse["flat"]) == (10, True)
    most = study.until_flat(Path("recipe.yaml"), "most", 5, 15)
    assert (most["steps"], most["flat"]) == (10, False)


def test_the_study_of_the_warm_start(load: Any, corpus: Path, tmp_path: Path) -> None:
    study = load("word_kd", "warm_start")
    out = tmp_path / "out"
    said, pieces, text = run(study.main, out, corpus, "--seeds", "1")
    sizes = [pieces[name]["parameters"] for name in ("small 1", "teacher", "cold 1")]
    assert sizes == sorted(sizes)
    assert pieces["warm 1"]["parameters"] == pieces["cold 1"]["parameters"]
    grown = [line for line in said if line.startswith("init_from: grown from a smaller model (layers 1 to 2, width 16 to 24")]
    assert len(grown) == 3 + 1
    assert json_of(out / "runs" / "warm-1")["init_from"] == str(out / "runs" / "small-1" / "model")
    assert "| the larger one, from the small one |" in text
    assert text.count("the warm one's after") == 3
    assert (out / "curves.png").stat().st_size > 1000


def test_a_spread_has_no_sign(load: Any) -> None:
    runs = load("word_kd", "text_runs")
    assert runs.spread([0.25, 0.75], "+.2f") == "+0.50 ± 0.35"
    assert runs.spread([-0.25], "+.2f") == "-0.25"


def test_where_a_curve_comes_to_a_perplexity(load: Any) -> None:
    reached = load("word_kd", "warm_start").reached
    curve = [{"step": 0.0, "seconds": 0.0, "nll": 5.0}, {"step": 10.0, "seconds": 4.0, "nll": 3.0},
             {"step": 20.0, "seconds": 8.0, "nll": 3.5}, {"step": 30.0, "seconds": 12.0, "nll": 2.5}]  # fmt: skip
    assert reached(curve, 6.0) == curve[0]
    assert reached(curve, 4.0) == {"step": 5.0, "seconds": 2.0, "nll": 4.0}
    assert reached(curve, 3.0) == curve[1]
    assert reached(curve, 2.75) == {"step": 27.5, "seconds": 11.0, "nll": 2.75}
    assert reached(curve, 2.0) is None
    assert reached([], 2.0) is None


class Table(nn.Module):
    """Logits by a table."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.logits[input_ids]


def test_the_study_of_ensembles(load: Any, corpus: Path, tmp_path: Path) -> None:
    study = load("ensemble", "study")
    out = tmp_path / "out"
    _, pieces, text = run(study.main, out, corpus, "--seeds", "1")
    found = pieces["ensemble 1"]["generations"]
    assert [len(of["members"]) for of in found] == [3, 3, 3]
    assert all(0 <= of["top1_agreement"] <= 1 and of["js"] >= 0 for of in found)
    # The mean of probabilities is at least as good as the mean member (Jensen).
    assert all(of["ensemble"] <= sum(of["members"]) / 3 for of in found)
    again = pieces["born again 1"]
    assert again["together"]["members"][-1] == pytest.approx(again["test"], rel=1e-6)
    for line in ("| generation 1 |", "| generation 3 |", "| f3 |", "| all together |"):
        assert line in text
    kept = json.loads((out / "runs" / "ensemble-1" / "prepared" / "0" / "generations.json").read_text())
    assert list(kept) == ["generation 1", "generation 2", "generation 3"]
    rates = {json_of(out / "runs" / f"{name}-1")["optimizer"]["lr"] for name in ("ensemble", "born-again")}
    tried = {lr: [pieces[f"try: lr {lr}, member {i}"]["validation"] for i in range(2)] for lr in study.RATES}
    assert rates == {float(min(tried, key=lambda lr: sum(tried[lr])))}
    assert (out / "generations.png").stat().st_size > 1000


def test_what_the_recipe_of_the_ensembles_trains(load: Any, corpus: Path, tmp_path: Path) -> None:
    """Members of two shapes, which the study takes from the recipe; scores of an ensemble by hand."""
    study = load("ensemble", "study")
    scale = study.Scale()
    made = study.Study(tmp_path / "out", corpus, study.Text(files=2, length=16), say=lambda line: None)
    generations = study.Generations(made, scale, [1])
    assert len(generations.shapes) == 3
    assert generations.tried_members == [0, 1]
    recipe = Recipe.load(EXAMPLES / "ensemble" / "text.yaml")
    assert recipe.student == recipe.method.options.members[0]
    torch.manual_seed(0)
    tables = [torch.randn(500, 500) for _ in range(2)]
    together = generations.together([Table(table) for table in tables])
    mean = torch.stack([table.softmax(-1) for table in tables]).double().mean(0).log()
    lost, rows = 0.0, 0
    for i in range(len(made.test)):
        batch = made.test.batch([i])
        ids, labels = batch.by_name["input_ids"][0, :-1], batch.labels[0, :-1]
        lost -= float(mean[ids, labels].sum())
        rows += len(ids)
    assert together["ensemble"] == pytest.approx(lost / rows, rel=1e-5)
