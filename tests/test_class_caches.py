"""Students of classes from a cache: what the live teacher makes of them, to the last digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from task_rows import WORD_KD, cached, losses, run, tokenizer_file, values, write_conll, write_table  # noqa: F401

from kdfast.train import Recipe, capture_classes


def make_tables(task: str, tmp_path: Path) -> dict[str, Any]:
    if task == "token_classification":
        train, dev = write_conll(tmp_path / "train.conll", 24), write_conll(tmp_path / "dev.conll", 3)
        train.write_text(train.read_text().replace("who\tO", "who", 5))  # without a tag
        return {"train": str(train), "validation": str(dev)}
    train = write_table(tmp_path / "train.tsv", True, unlabelled=10 if task.endswith("unlabelled") else 0)
    return {"train": str(train), "validation": str(write_table(tmp_path / "dev.tsv", True, rows=12))}


@pytest.mark.parametrize("name", ["sequence_classification", "sequence_classification, unlabelled", "token_classification"])
def test_a_student_from_a_cache_of_classes_is_the_one_from_the_live_teacher(name: str, tokenizer: Path, tmp_path: Path) -> None:
    task, data = name.split(",")[0], make_tables(name, tmp_path)
    teacher = run(values(tokenizer, tmp_path / "teacher", data, task, steps=10))
    live = {
        **values(tokenizer, tmp_path / "live", data, task, steps=6, method=WORD_KD),
        "teacher": {"path": str(teacher.model)},
    }
    want = run(live)
    taught = cached(tmp_path, live, live["teacher"])
    got = run(taught)
    for a, b in zip(losses(want.out), losses(got.out), strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-6)
    assert got.evaluation == pytest.approx(want.evaluation, rel=1e-4)
    # Two caches are an ensemble; of one teacher twice it is that teacher.
    both = {**taught, "teachers": [taught["teacher"]] * 2, "teacher": None, "out": str(tmp_path / "both")}
    assert run(both).evaluation == pytest.approx(want.evaluation, rel=1e-4)


def test_rows_from_a_cache_of_classes_are_grouped_by_length(tokenizer: Path, tmp_path: Path) -> None:
    task, data = "sequence_classification", make_tables("sequence_classification", tmp_path)
    teacher = run(values(tokenizer, tmp_path / "teacher", data, task, steps=2))
    live = values(tokenizer, tmp_path / "live", {**data, "group_by_length": True}, task, steps=4, method=WORD_KD)
    live["teacher"] = {"path": str(teacher.model)}
    assert losses(run(cached(tmp_path, live, live["teacher"])).out) == [
        {name: pytest.approx(value, rel=1e-4, abs=1e-6) for name, value in row.items()} for row in losses(run(live).out)
    ]


def test_rows_without_label_count_for_nothing_where_nobody_is_heard(tokenizer: Path, tmp_path: Path) -> None:
    """The loss is the mean over the rows with a label, whatever stands beside them."""
    task, data = "sequence_classification", make_tables("sequence_classification, unlabelled", tmp_path)
    made = run(values(tokenizer, tmp_path / "run", data, task, steps=3, accumulation=2))
    rows = [json.loads(line) for line in (made.out / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "loss" in row]
    assert [row["loss"] for row in trained] == pytest.approx([row["hard"] for row in trained], rel=1e-6)


def test_a_killed_capture_of_classes_goes_on(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kdfast.cache import CacheReader, CacheWriter
    from kdfast.train.recipe import Teacher

    data = make_tables("sequence_classification", tmp_path)
    teacher = run(values(tokenizer, tmp_path / "teacher", data, "sequence_classification", steps=2))
    recipe, spec = Recipe.build(values(tokenizer, tmp_path / "run", data, "sequence_classification")), str(teacher.model)
    made = CacheWriter.__init__

    def small(self: CacheWriter, path: Any, **settings: Any) -> None:
        made(self, path, **settings, records_per_shard=8)

    monkeypatch.setattr(CacheWriter, "__init__", small)

    def killed(done: int, total: int) -> None:
        if done == 24:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture_classes(recipe, Teacher(path=spec), tmp_path / "cache", batch_size=8, progress=killed)
    again: list[int] = []
    capture_classes(recipe, Teacher(path=spec), tmp_path / "cache", batch_size=8, progress=lambda d, _: again.append(d))
    assert again == [32, 40]
    capture_classes(recipe, Teacher(path=spec), tmp_path / "whole", batch_size=8)
    a, b = (CacheReader(tmp_path / name).batch(range(40)) for name in ("cache", "whole"))
    assert torch.equal(a.targets.logprobs, b.targets.logprobs)
    assert torch.equal(a.labels, b.labels)
