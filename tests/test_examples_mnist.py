"""The studies on MNIST from end to end, on digits that are drawn here: every run, table and picture they make, in few steps."""

from __future__ import annotations

import importlib
import json
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from kdfast.cli import main

EXAMPLES = Path(__file__).parent.parent / "examples"
FOLDERS = [str(EXAMPLES / name) for name in ("hinton_mnist", "soft_tree")]
PARTS = {"train": 120, "validation": 40, "test": 60}
FEW = ["steps=3", "batch_size=20", "optimizer.warmup_steps=1", "eval_every=0", "save_every=0"]


def load(name: str, folder: str) -> Any:
    """A script of an example; `study` is a name of both."""
    spec = importlib.util.spec_from_file_location(f"{folder}_{name}", EXAMPLES / folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", [*sys.path, *FOLDERS])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name in ("mnist_runs", "prepare", "networks", "explain", "study"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """28 x 28, class c a bright square at its own place."""
    folder = tmp_path_factory.mktemp("digits")
    random = np.random.default_rng(0)
    labels = np.arange(240) % 10
    images = random.integers(0, 40, (240, 28, 28))
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 4)
        image[2 + 8 * row : 8 + 8 * row, 1 + 7 * column : 6 + 7 * column] += 200
    for name, values in (("t10k-images-idx3-ubyte", images), ("t10k-labels-idx1-ubyte", labels)):
        raw = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()
        (folder / name).write_bytes(raw)
    return folder


def test_the_study_of_hinton(paths: None, digits: Path, tmp_path: Path) -> None:
    runs, study = load("mnist_runs", "hinton_mnist"), load("study", "hinton_mnist")
    made = study.Study(tmp_path / "out", digits, PARTS, FEW)
    assert {name: len(source) for name, source in made.sources.items()} == PARTS
    table = study.study_of(made, seeds=(1, 2), temperatures=(2,), members=3, grid=[(1e-3, 0.01)])
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["group"] for row in rows] == ["T"] * 3 + ["ensemble"] * 4 + ["missing digit"] * 4
    assert table.count("\n") == 2 + len(rows)
    assert (tmp_path / "out" / "results.md").read_text() == table
    assert rows[2]["parameters"] == runs.size(made.model(tmp_path / "out" / "T2-1"))
    assert all(0 <= share <= 1 for row in rows for share in (*row["validation"], *row["test"]))
    recipe = (tmp_path / "out" / "ensembled-1" / "recipe.yaml").read_text()
    assert recipe.count("member-") == 3
    # The bias is chosen where the digit is known, and can only help there.
    alone, raised = rows[-2], rows[-1]
    assert all(b >= a for a, b in zip(alone["validation"], raised["validation"], strict=True))
    assert all(len(row["on 3s %"]) == 2 for row in rows[-4:])
    # What is there is not run again.
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("metrics.jsonl")}
    again = study.study_of(study.Study(tmp_path / "out", digits, PARTS, FEW), (1, 2), (2,), 3, [(1e-3, 0.01)])
    assert again == table
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("metrics.jsonl")} == before


def test_a_folder_of_all_of_mnist_is_split_by_its_test_files(
    paths: None, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    prepare, whole = load("prepare", "hinton_mnist"), tmp_path / "whole"
    whole.mkdir()
    for file in digits.iterdir():
        (whole / file.name).write_bytes(file.read_bytes())
        (whole / file.name.replace("t10k", "train")).write_bytes(b"not read")
    monkeypatch.chdir(tmp_path)
    of_all, of_test = (prepare.split(folder, Path(folder.name), PARTS) for folder in (whole, digits))
    for part in PARTS:
        name = "images-idx3-ubyte"
        assert (of_all[part] / name).read_bytes() == (of_test[part] / name).read_bytes()
    (whole / "t10k-images-idx3-ubyte").unlink()
    (whole / "other-images-idx3-ubyte").touch()
    with pytest.raises(SystemExit, match=r"whole: expected t10k-images-idx3-ubyte\(\.gz\) and its labels; set KDFAST_DATA"):
        prepare.split(whole, tmp_path / "out", PARTS)


def test_the_study_of_the_tree(paths: None, digits: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    study = load("study", "soft_tree")
    hinton = load("study", "hinton_mnist")
    network = hinton.Study(tmp_path / "network", digits, PARTS, FEW).run(EXAMPLES / "hinton_mnist" / "network.yaml", "run")
    made = study.Study(tmp_path / "out", digits, PARTS, FEW)
    grids = ([["method.penalty=0.03"]], [["method.temperature=2"]])
    table = study.study_of(made, network, seeds=(1,), rates=[["optimizer.lr=0.01"]], grids=grids, labelled=60)
    assert "tree, distilled, likeliest leaf" in table
    assert "tree, distilled on all images, 60 labels, mixture of leaves" in table
    for name in ("tree.png", "tree.svg", "path.png", "path.svg", "path.txt"):
        assert (tmp_path / "out" / name).stat().st_size > 100
    assert (tmp_path / "out" / "path.txt").read_text().splitlines()[-1].startswith("leaf ")
    run, drawn = tmp_path / "out" / "tree-alone-1", tmp_path / "drawn"
    kept = study.explained(run, torch.rand(4, 1, 28, 28), 2, drawn, list("0123456789"))
    assert kept.splitlines()[0].startswith("level 0, node 0:")


def test_the_recipes_by_the_command_line(
    paths: None, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a folder elsewhere: the modules that the recipes name lie beside them."""
    monkeypatch.chdir(tmp_path)
    load("prepare", "hinton_mnist").split(digits, Path("mnist"), PARTS)
    hinton, few = EXAMPLES / "hinton_mnist", [*FEW, "tracker=none"]
    sys.path[:] = [entry for entry in sys.path if entry not in FOLDERS]
    assert main(["train", str(hinton / "network.yaml"), *few]) == 0
    assert main(["train", str(hinton / "recipe.yaml"), *few]) == 0
    assert main(["train", str(EXAMPLES / "soft_tree" / "recipe.yaml"), *few]) == 0
    capsys.readouterr()
    words = ["--function", "networks:perceptron", "--task", "image_classification", "--set", "mean=[0.1307]", "std=[0.3081]"]
    assert main(["eval", "runs/hinton/student/model", "--data", "mnist/test", "--json", *words]) == 0
    by_flags = json.loads(capsys.readouterr().out)
    assert by_flags["rows"] == PARTS["test"]
    # Of a run's folder its recipe says what the model and the images are.
    assert main(["eval", "runs/hinton/student", "--data", "mnist/test", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == by_flags
    assert main(["eval", "runs/soft_tree/tree", "--data", "mnist/test", "--json"]) == 0
    single = json.loads(capsys.readouterr().out)
    mixture = ["eval", "runs/soft_tree/tree", "--arguments", "predict=mixture", "--data", "mnist/test", "--json"]
    assert main(mixture) == 0
    assert json.loads(capsys.readouterr().out)["nll"] != single["nll"]
    for run in ("runs/hinton/student", "runs/soft_tree/tree"):
        assert {"recipe.yaml", "run.json", "result.json", "metrics.jsonl", "model", "checkpoints"} <= set(os.listdir(run))


def test_images_of_each_class_in_a_folder(paths: None, digits: Path, tmp_path: Path) -> None:
    """The same digits as files: a network and its student."""
    image = pytest.importorskip("PIL.Image")
    from kdfast.train import Recipe, distill
    from kdfast.train.tasks.image_classification import read_idx

    images, labels = read_idx(digits / "t10k-images-idx3-ubyte", 3, ""), read_idx(digits / "t10k-labels-idx1-ubyte", 1, "")
    for i, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        (tmp_path / "images" / f"digit {label}").mkdir(parents=True, exist_ok=True)
        image.fromarray(pixels).save(tmp_path / "images" / f"digit {label}" / f"{i}.png")
    values = {
        "task": "image_classification", "method": "supervised", "out": str(tmp_path / "network"), "batch_size": 20,
        "student": {"function": "networks:convolutional"}, "steps": 60, "tracker": "none", "optimizer": {"lr": 3e-3},
        "data": {"train": str(tmp_path / "images"), "validation_share": 0.3, "channels": 1, "mean": [0.2], "std": [0.3]},
    }  # fmt: skip
    network = distill(Recipe.build(values), say=lambda line: None)
    assert network.evaluation is not None
    assert network.evaluation["accuracy"] > 0.9
    teacher = {"function": "networks:convolutional", "weights": str(network.model)}
    values |= {"out": str(tmp_path / "student"), "teacher": teacher, "student": {"function": "networks:perceptron"}}
    values["method"] = {"name": "word_kd", "temperature": 4.0, "soft_weight": 1.0}
    student = distill(Recipe.build(values), say=lambda line: None)
    assert student.evaluation is not None
    assert student.evaluation["accuracy"] > 0.9


def test_shifted_images_keep_their_pixels(paths: None) -> None:
    networks = load("networks", "hinton_mnist")
    jitter = networks.Jitter(2)
    images = torch.zeros(64, 1, 9, 9)
    images[:, 0, 4, 4] = 1
    torch.manual_seed(0)
    places = jitter(images).flatten(1).argmax(1)
    rows, columns = places // 9 - 4, places % 9 - 4
    assert torch.equal(jitter(images).sum((1, 2, 3)), torch.ones(64))
    assert set(rows.tolist()) == set(columns.tolist()) == {-2, -1, 0, 1, 2}
    assert jitter.eval()(images) is images


def test_training_images_are_there_in_every_shift(digits: Path, tmp_path: Path) -> None:
    from kdfast.train.tasks.image_classification import Data, ImageClassification

    def opened(**options: Any) -> Any:
        data = Data(train=(str(digits),), validation_share=0.25, **options)
        return ImageClassification(None, data).open(None, None, tmp_path, True)

    plain, shifted = opened(), opened(shift=2)
    n = len(plain.train)
    assert len(shifted.train) == 25 * n
    assert len(shifted.validation) == len(plain.validation)
    image = plain.train.batch([7]).by_name["pixel_values"][0, 0]
    found = shifted.train.batch([7 + k * n for k in range(25)])
    assert found.labels.tolist() == plain.train.batch([7]).labels.tolist() * 25
    images = found.by_name["pixel_values"][:, 0]
    assert torch.equal(images[0], image)
    want = []
    for down in range(-2, 3):
        for right in range(-2, 3):
            padded = np.pad(image.numpy(), 2, mode="edge")
            want.append(padded[2 - down : 30 - down, 2 - right : 30 - right].tobytes())
    assert {x.numpy().tobytes() for x in images} == set(want)
    assert plain.train.digest != shifted.train.digest != opened(shift=1).train.digest
    hidden = opened(shift=1, exclude_labels=(3,), excluded="hide").train.batch(range(9 * n - 1, 0, -1))
    assert (hidden.labels == -100).sum() > 0
    assert 3 not in hidden.labels.tolist()
    assert hidden.soft_mask.all()


@pytest.mark.slow
@pytest.mark.skipif("KDFAST_DATA" not in os.environ, reason="KDFAST_DATA is not set")
def test_a_missing_digit_is_learnt_from_soft_targets(paths: None, tmp_path: Path) -> None:
    """On MNIST's images: no 3 among those the student sees, in few steps."""
    study = load("study", "hinton_mnist")
    made = study.Study(tmp_path / "out", None, {"train": 2000, "validation": 300, "test": 600}, ["steps=300", "eval_every=0"])
    network = made.run(EXAMPLES / "hinton_mnist" / "network.yaml", "network")
    hidden = "data.exclude_labels=[3]"
    soft = ["method.temperature=4", "method.soft_weight=1", "method.hard_weight=0"]
    recipe = EXAMPLES / "hinton_mnist" / "recipe.yaml"
    alone = made.run(recipe, "alone", hidden, "method=supervised", "teacher=null")
    taught = made.run(recipe, "taught", hidden, f"teacher.weights={network / 'model'}", *soft)
    for run, what in ((alone, "alone"), (taught, "taught")):
        study.missing_row(made, what, [run])
    without, _, heard, raised = (row["on 3s %"][0] for row in made.rows)
    assert without == 0.0
    assert max(heard, raised) > 0.3
