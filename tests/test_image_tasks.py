"""Images from their files to their scores, from a live teacher and from a cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

pytest.importorskip("transformers")

from task_rows import WORD_KD, cached, losses, pictures, run, tokenizer_file, values, write_idx  # noqa: F401

from kdfast.train import Recipe, capture_classes
from kdfast.train.data import hold_out
from kdfast.train.tasks import task_class


def make_classifier(classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, classes))


IMAGES = {"student": {"function": f"{__name__}:make_classifier"}, "steps": 80}


@pytest.mark.parametrize("suffix", ["", ".gz"], ids=["plain", "gzipped"])
def test_a_class_that_only_the_teacher_names_is_learnt(suffix: str, tmp_path: Path) -> None:
    images, labels = pictures(90)
    write_idx(tmp_path / f"images-idx3-ubyte{suffix}", images)
    write_idx(tmp_path / f"labels-idx1-ubyte{suffix}", labels)
    data = {"train": str(tmp_path), "validation_share": 0.3, "mean": [0.2], "std": [0.3]}
    teacher = run(values(None, tmp_path / "teacher", data, "image_classification", **IMAGES))
    assert teacher.evaluation["accuracy"] == 1.0
    hidden = {**data, "exclude_labels": [2], "excluded": "hide"}
    taught = {"function": f"{__name__}:load_classifier", "arguments": {"folder": str(teacher.model)}}
    changes = {**IMAGES, "method": {**WORD_KD, "temperature": 3.0}, "teacher": taught}
    student = run(values(None, tmp_path / "student", hidden, "image_classification", **changes))
    assert student.evaluation["accuracy"] == 1.0
    alone = run(values(None, tmp_path / "alone", {**data, "exclude_labels": [2]}, "image_classification", **IMAGES))
    assert alone.evaluation["accuracy"] < 0.75


def test_images_without_a_class_are_what_a_teacher_is_heard_on(tmp_path: Path) -> None:
    """A digit that no label shows is learnt from images that only the teacher names; labels beside those are not read."""
    images, labels = pictures(120)
    for part, rows in (("all", labels >= 0), ("shown", labels != 2), ("unnamed", labels == 2)):
        (tmp_path / part).mkdir()
        write_idx(tmp_path / part / "images-idx3-ubyte", images[rows])
        if part != "unnamed":
            write_idx(tmp_path / part / "labels-idx1-ubyte", labels[rows])
    whole = {"train": str(tmp_path / "all"), "validation": str(tmp_path / "all"), "mean": [0.2], "std": [0.3]}
    teacher = run(values(None, tmp_path / "teacher", whole, "image_classification", **IMAGES))
    task = {"name": "image_classification", "labels": [0, 1, 2]}
    data = {**whole, "train": str(tmp_path / "shown"), "unlabelled": [str(tmp_path / "unnamed")]}
    taught = {"function": f"{__name__}:load_classifier", "arguments": {"folder": str(teacher.model)}}
    changes = {**IMAGES, "method": {**WORD_KD, "temperature": 3.0}, "teacher": taught}
    assert run(values(None, tmp_path / "student", data, task, **changes)).evaluation["accuracy"] == 1.0
    shown = {**data, "unlabelled": []}
    assert run(values(None, tmp_path / "alone", shown, task, **IMAGES)).evaluation["accuracy"] < 0.75
    with pytest.raises(ValueError, match=r"data\.unlabelled: expected none, as method supervised has no teacher here"):
        run(values(None, tmp_path / "fails", data, task, **IMAGES))
    born = {**IMAGES, "method": {**WORD_KD, "name": "born_again", "generations": 2}}
    assert run(values(None, tmp_path / "born", data, task, **born)).evaluation["accuracy"] < 0.75
    shared = {**data, "validation": [], "validation_share": 0.2}
    result = run(values(None, tmp_path / "shared", shared, task, **changes))
    assert result.evaluation["rows"] == len(hold_out(range(80), 0.2)[1])  # of the rows with a label


def load_classifier(folder: str) -> nn.Module:
    from safetensors.torch import load_file

    model = make_classifier()
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return model


def test_images_of_the_same_names_and_sizes_are_told_apart(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    from PIL import Image

    digests = []
    for folder, shade in (("first", 10), ("second", 200)):
        (tmp_path / folder).mkdir()
        for i in range(70):
            Image.fromarray(np.full((6, 6), shade + i % 5, np.uint8)).save(tmp_path / folder / f"{i}.bmp")
        data = {"train": str(tmp_path / "labelled"), "unlabelled": str(tmp_path / folder), "channels": 1}
        for label in ("a", "b"):
            (tmp_path / "labelled" / label).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((6, 6), np.uint8)).save(tmp_path / "labelled" / label / "0.bmp")
        recipe = Recipe.build(
            values(None, tmp_path / "run", data, "image_classification", method=WORD_KD, teacher={"path": "x"})
        )
        task = task_class(recipe.task.name)(recipe.task.options, recipe.data)
        digests.append(task.open(None, None, tmp_path, True).train.digest)
    assert digests[0] != digests[1]


def test_folders_of_images_and_a_transformers_classifier(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    from PIL import Image

    images, labels = pictures(24)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = tmp_path / "images" / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.astype(np.uint8)).save(folder / f"{i}.png")
    vit = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "patch_size": 3}
    data = {"train": str(tmp_path / "images"), "validation_share": 0.3, "size": [6], "channels": 1}
    changes = {"student": {"model_type": "vit", "config": vit}, "steps": 2}
    result = run(values(None, tmp_path / "run", data, "image_classification", **changes))
    config = json.loads((result.model / "config.json").read_text())
    assert config["id2label"] == {"0": "class0", "1": "class1", "2": "class2"}
    assert (config["num_channels"], config["image_size"]) == (1, 6)
    assert set(result.evaluation) == {"accuracy", "macro_f1", "nll", "rows"}


def test_faults_in_images_are_said_in_one_line(tmp_path: Path) -> None:
    images, labels = pictures(6)
    write_idx(tmp_path / "images-idx3-ubyte", images)
    recipe = values(None, tmp_path / "run", {"train": str(tmp_path)}, "image_classification", **IMAGES)
    with pytest.raises(ValueError, match=r"data\.train: expected a file of labels beside .* \(labels-idx1-ubyte\), found none"):
        run(recipe)
    write_idx(tmp_path / "labels-idx1-ubyte", labels[:4])
    with pytest.raises(ValueError, match=r"expected as many labels as images, got 4"):
        run(recipe)
    write_idx(tmp_path / "labels-idx1-ubyte", labels)
    whole = (tmp_path / "images-idx3-ubyte").read_bytes()
    (tmp_path / "images-idx3-ubyte").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"expected 216 bytes of values \(\[6, 6, 6\]\) .* got 215"):
        run(recipe)


def test_images_from_a_cache_and_what_does_not_belong_to_it(tokenizer: Path, tmp_path: Path) -> None:
    images, labels = pictures(90)
    write_idx(tmp_path / "images-idx3-ubyte", images)
    write_idx(tmp_path / "labels-idx1-ubyte", labels)
    whole = {"train": str(tmp_path), "validation_share": 0.3}
    data = {**whole, "exclude_labels": [2], "excluded": "hide"}
    teacher = run(values(None, tmp_path / "teacher", whole, "image_classification", **IMAGES))
    spec = {"function": f"{__name__}:load_classifier", "arguments": {"folder": str(teacher.model)}}
    method = {**WORD_KD, "temperature": 2.0}
    live = {**values(None, tmp_path / "live", data, "image_classification", **IMAGES), "method": method, "teacher": spec}
    live["steps"] = 10
    want = run(live)
    taught = cached(tmp_path, live, spec)
    got = run(taught)
    for a, b in zip(losses(want.out), losses(got.out), strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-6)

    def fails(recipe: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            run({**recipe, "out": str(tmp_path / "fails")})

    other = {**data, "validation_share": 0.2}
    fails({**taught, "data": other}, r"teacher\.cache: expected a cache of these \d+ training rows, got \d+ of others")
    named = {"name": "image_classification", "labels": [2, 1, 0]}
    fails({**taught, "task": named}, r"teacher\.cache: expected the classes 2, 1, 0, got 0, 1, 2")
    fails({**taught, "method": {**method, "temperature": 3.0}}, r"method\.temperature: 3 is not in the cache")
    text = {**values(tokenizer, tmp_path / "text", {"train": "unused"}, "causal_lm")}
    from kdfast.train.recipe import Teacher

    with pytest.raises(ValueError, match="expected a task with classes, got causal_lm"):
        capture_classes(Recipe.build(text), Teacher(**spec), tmp_path / "none")
