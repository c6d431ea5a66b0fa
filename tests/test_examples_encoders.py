"""The encoder examples: data sets from their files, and every run of the study as a recipe that can be built."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from kdfast.train import Recipe

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES / "encoders"))
    for name in ("prepare", "runs", "study"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import prepare
    import study

    yield prepare, study
    for name in ("prepare", "runs", "study"):
        sys.modules.pop(name, None)


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_data_sets_are_split_once_and_for_all(scripts: Any, tmp_path: Path) -> None:
    prepare, _ = scripts
    data, out = tmp_path / "given", tmp_path / "data"
    for part, rows in (("train", 200), ("dev", 7)):
        write(data / f"sst2/{part}.tsv", "".join(f"sentence {i} of {part}\t{i % 2}\n" for i in range(rows)))
        pairs = "".join(f'{i}\tone "{i}\ttwo\tentailment\n' for i in range(rows))
        write(data / f"rte/{part}.tsv", f"index\tsentence1\tsentence2\tlabel\n{pairs}")
        write(data / f"wnut17/{part}.conll", "\n".join(f"word{i}\tO\nparis\tB-loc\n" for i in range(rows)))
    review = (
        "<review>\n<rating>\n1.0\n</rating>\n<review_text>\nBad & {}\n  worse \n!  It broke on the\tfirst day. Never again"
        "\n</review_text>\n</review>\n"
    )  # fmt: skip
    for domain in ("books", "dvd"):
        for sentiment in prepare.SENTIMENTS:
            write(data / f"amazon_reviews/{domain}.{sentiment}.review", "".join(review.format(i) for i in range(60)))
    counts = prepare.prepare(data, out)
    for name in ("sst2", "rte", "wnut17"):
        assert counts[name]["train"] + counts[name]["validation"] == 200
        assert 8 < counts[name]["validation"] < 35
        assert counts[name]["test"] == 7
    reviews = sum(len((out / f"amazon/{domain}/train.jsonl").read_text().splitlines()) for domain in ("books", "dvd"))
    assert counts["amazon_reviews"] == {"books": 120, "dvd": 120, "sentences": 2 * reviews}
    header, first, second, *_ = (out / "amazon/sentences.tsv").read_text().splitlines()
    assert header == "text\tlabel"
    assert first in {f"Bad & {i} worse !\t" for i in range(60)}
    assert second == "It broke on the first day.\t"
    assert (out / "rte/test.tsv").read_text().splitlines()[:2] == [
        "index\tsentence1\tsentence2\tlabel",
        '0\tone "0\ttwo\tentailment',
    ]
    assert (out / "wnut17/test.conll").read_text().startswith("word0\tO\nparis\tB-loc\n\nword1\tO\n")
    parts = {part: [json.loads(x) for x in (out / f"amazon/dvd/{part}.jsonl").read_text().splitlines()]
             for part in ("train", "validation", "test")}  # fmt: skip
    assert sum(map(len, parts.values())) == 120
    assert len(parts["train"]) > len(parts["test"]) > len(parts["validation"]) > 0
    assert {row["text"] for row in parts["test"]} < {
        f"Bad & {i} worse ! It broke on the first day. Never again" for i in range(60)
    }
    assert {(row["domain"], row["label"]) for row in parts["train"]} == {("dvd", "negative"), ("dvd", "positive")}
    # A line ends where its file says so.
    (data / "sst2/train.tsv").write_text("".join(f"one\x85two\u2028three {i}\t{i % 2}\n" for i in range(100)))
    assert sum(prepare.sst2(data, out).values()) == 107
    (data / "amazon_reviews/dvd.negative.review").unlink()
    with pytest.raises(SystemExit, match=r"expected dvd\.negative\.review beside the other one, found none"):
        prepare.amazon(data, out)
    (data / "rte" / "train.tsv").unlink()
    with pytest.raises(SystemExit, match="expected one of the folders sst2, rte, wnut17, amazon_reviews, found none"):
        prepare.prepare(tmp_path / "nothing", out)


def test_every_run_of_the_study_is_a_recipe_whose_needs_are_runs(scripts: Any) -> None:
    _, study = scripts
    recipes = {name: study.recipe_of(name, 2) for name in study.RUNS}
    models = {f"{recipe.out}/model" for recipe in recipes.values()}
    for name, run in study.RUNS.items():
        recipe = recipes[name]
        assert recipe.seed == 2
        assert recipe.out == (f"runs/{name}/2" if run.seeded else f"runs/{name}")
        assert all(needed in study.RUNS for needed in run.needs)
        # What a run reads of another one is where that one writes.
        named = [*(t.path for t in recipe.all_teachers), recipe.student.path,
                 recipe.student.from_teacher.path if recipe.student.from_teacher else None]  # fmt: skip
        for path in named:
            if path is not None and path.startswith("runs/"):
                assert path in models, (name, path)
        # Shares are of domains that it reads.
        for domain in getattr(recipe.data, "domain_shares", {}):
            assert any(f"/{domain}/" in file for file in recipe.data.train), name
    steps = {name: recipes[f"sst2/{name}"].total_steps for name in ("tinybert", "tinybert-without-general", "alone")}
    assert len(set(steps.values())) == 1


def test_the_table_has_means_and_the_share_of_the_teacher(scripts: Any) -> None:
    _, study = scripts

    def row(accuracy: float) -> dict[str, Any]:
        return {"validation": {"accuracy": accuracy}, "test": {"accuracy": accuracy}, "seconds": 60, "parameters": 2e6,
                "without_embeddings": 1e6}  # fmt: skip

    known = {"sst2/teacher:1": row(0.9), "sst2/tinybert:1": row(0.88), "sst2/tinybert:2": row(0.86)}
    lines = study.table(known).splitlines()
    row_of = "| sst2/tinybert | 2 | accuracy | 87.00 ± 1.41 | 87.00 ± 1.41 | 96.67 ± 1.57 % | 2.00 M | 1.00 M | 1.0 |"
    assert row_of in lines


def test_the_picture_shows_what_is_done(scripts: Any, tmp_path: Path) -> None:
    _, study = scripts
    names = ("sst2/teacher", "sst2/tinybert", "sst2/half-alone", "reviews/electronics-2%-meta", "reviews/electronics-meta",
             "reviews/electronics-100%-meta-unseen")  # fmt: skip
    done = {f"{name}:{seed}": {"test": {"accuracy": 0.8 + seed / 100}} for name in names for seed in (1, 2)}
    study.picture(done, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    study.picture({}, tmp_path / "curves.png")


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*/*.yaml")), ids=lambda f: f"{f.parent.name}/{f.name}")
def test_every_example_is_a_recipe(file: Path) -> None:
    assert Recipe.load(file).total_steps > 0


def test_what_the_study_is_asked_wrongly_is_said_in_a_line(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, study = scripts
    monkeypatch.chdir(tmp_path)

    def says(match: str, *words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["study.py", *words])
        with pytest.raises(SystemExit, match=match):
            study.main()

    says("results.json: nothing is done yet; name runs", "--table")
    says("no run is called rte/teecher; --list names them", "sst2/teacher", "rte/teecher")
    says(r"expected `data` \(python prepare.py DATA\) and `encoder`", "sst2/teacher")
    says("--speed: expected names of runs, the first one the measure", "--speed")
    says("--speed: sst2/teacher is not trained yet", "--speed", "sst2/teacher")
    Path("runs/sst2/teacher/model").mkdir(parents=True)
    says("--speed: expected runs of one task, got sst2/teacher and wnut17/teacher", "--speed", "sst2/teacher", "wnut17/teacher")
    for text in ("1-3", "1,,2", ""):
        says("2", "--seeds", text, "--table")
        assert f"expected whole numbers with commas between, such as 1,2,3, got {text!r}" in capsys.readouterr().err
    for text in ("", '{"sst2', "[1]"):
        Path("results.json").write_text(text)
        says("results.json: expected ", "--table")
    Path("results.json").write_text(json.dumps({"sst2/teacher:1": {"precision": "bf16"}}))
    says("--precision: expected bf16, which results.json has, got fp32", "sst2/alone")


def test_a_run_that_has_diverged_stands_in_the_table(scripts: Any, tmp_path: Path) -> None:
    _, study = scripts
    row = {"seconds": 60.0, "parameters": 1000, "without_embeddings": 500}
    known = {
        f"{name}:{seed}": {**row, "validation": {what: score}, "test": {what: score}}
        for name, what, scores in (
            ("wnut17/teacher", "entity_f1", [0.0]), ("wnut17/tinybert", "entity_f1", [0.1, None]), ("mlm/head", "ppl", [None]),
            ("sst2/alone", "accuracy", [0.5, None]),
        )
        for seed, score in enumerate(scores, 1)
    }  # fmt: skip
    lines = study.table(known).splitlines()[2:]
    told = {line.split(" | ")[0]: line.split(" | ")[2:6] for line in lines}
    assert told == {
        "| mlm/head": ["ppl", "-", "-", ""], "| sst2/alone": ["accuracy", "-", "-", ""],
        "| wnut17/teacher": ["entity_f1", "0.00", "0.00", ""], "| wnut17/tinybert": ["entity_f1", "-", "-", ""],
    }  # fmt: skip
    study.picture(known, tmp_path / "curves.png")


def test_studies_side_by_side_keep_what_both_have_done(scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, study = scripts
    monkeypatch.chdir(tmp_path)
    mine, theirs = study.done(), study.done()
    study.keep("rte/teacher:1", {"steps": 1}, mine)
    study.keep("wnut17/teacher:1", {"steps": 2}, theirs)
    assert study.done() == theirs == {"rte/teacher:1": {"steps": 1}, "wnut17/teacher:1": {"steps": 2}}
