"""`kdfast cache build --dataset`: real datasets, saved and from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_teacher import make_teacher

from kdfast.cache import CacheReader
from kdfast.cli import main

datasets = pytest.importorskip("datasets")

TURNS = [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "the cat sat"}]
ROWS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": f"the old dog {i} ran far"} for i in range(5)],
    "chat": [{"messages": [*TURNS, {"role": "user", "content": str(i)}]} for i in range(3)],
    # The messages of one row have a field that those of the other lack: a dataset gives it to all of them.
    "uneven": [{"messages": TURNS}, {"messages": [{**m, "name": "x"} for m in TURNS]}],
    "prompt": [{"prompt": f"the cat {i} ", "completion": "sat"} for i in range(3)],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    make_teacher(folder / "teacher", [m["content"] for m in TURNS] + [row["text"] for row in ROWS["text"]])
    return folder


@pytest.fixture(autouse=True)
def _converted_files_stay_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "converted")


def build(world: Path, out: Path, *more: str) -> int:
    words = ["cache", "build", str(world / "teacher"), "--out", str(out), "--k", "4", "--sequence-length", "64"]
    return main([*words, "--device", "cpu", "--json", *more])


def lines(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return str(file)


def contents(cache: Path) -> list[tuple[list[int], list[bool]]]:
    return [(record.input_ids.tolist(), record.loss_mask.tolist()) for record in CacheReader(cache)]


@pytest.mark.parametrize("form", ROWS)
def test_a_saved_dataset_is_read_as_lines_of_json_are(world: Path, tmp_path: Path, form: str) -> None:
    datasets.Dataset.from_list(ROWS[form]).save_to_disk(tmp_path / "saved")
    assert build(world, tmp_path / "a", "--dataset", str(tmp_path / "saved")) == 0
    assert build(world, tmp_path / "b", "--data", lines(tmp_path / "rows.jsonl", ROWS[form])) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(contents(tmp_path / "a")) == len(ROWS[form])


@pytest.mark.parametrize("builder", ["json", "parquet"])
def test_builders_read_files(world: Path, tmp_path: Path, builder: str) -> None:
    file = tmp_path / f"rows.{builder}"
    found = datasets.Dataset.from_list(ROWS["text"]).rename_column("text", "content")
    found.to_json(file) if builder == "json" else found.to_parquet(file)
    assert build(world, tmp_path / "a", "--dataset", builder, "--data", str(file), "--field", "content") == 0
    assert build(world, tmp_path / "b", "--data", lines(tmp_path / "rows.jsonl", ROWS["text"])) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_splits_are_chosen_and_other_columns_left_alone(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = {"train": ROWS["text"][:2], "test": ROWS["text"][2:]}
    whole = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})
    whole = whole.map(lambda row: {"number": len(row["text"])})
    whole.save_to_disk(tmp_path / "saved")
    words = ["--dataset", str(tmp_path / "saved")]
    assert build(world, tmp_path / "train", *words) == 0
    assert build(world, tmp_path / "test", *words, "--split", "test") == 0
    assert [len(contents(tmp_path / name)) for name in splits] == [2, 3]
    capsys.readouterr()
    for more, message in (
        (["--split", "dev"], "it has the splits train, test, not 'dev'"),
        (["--dataset-config", "en"], "leave --dataset-config out"),
        (["--field", "body"], "expected a column body in"),
        (["--field", "number"], "row 0: expected text in number"),
    ):
        assert build(world, tmp_path / "x", *words, *more) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "--data: expected text files, .jsonl files or folders, or --dataset, got neither"),
        (["--data", "x.txt", "--split", "test"], "--split: expected it with --dataset"),
        (["--data", "x.txt", "--dataset", "some/name"], "--dataset: expected it without --data"),
        (["--dataset", "json"], "--dataset: expected --data with its files"),
        (["--dataset", "./no/such/folder"], "--dataset: expected a folder written by save_to_disk, or a name"),
    ],
)
def test_wrong_sources_are_one_line(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert build(world, tmp_path / "x", *more) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
