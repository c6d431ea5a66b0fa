"""What a teacher says of the rows of a task with classes, kept: `capture_classes`; and those rows with it: `TaughtRows`.

A cache of a language model is the training data itself. Images, and texts with a class, are not made of a vocabulary: there the
cache holds a distribution for each row (for each token, of a tagger) in the order of the training data, which it knows again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kdfast.cache import CacheInfo, CacheMismatch, CacheWriter
from kdfast.cache.capture_file import read_capture, write_capture
from kdfast.cache.manifest import is_unfinished
from kdfast.files import json_text
from kdfast.models.load import check_ids, device_named, read_config, resolve_folder, weights_hash
from kdfast.ops.topk import topk_targets
from kdfast.text.tokenizers import file_hash, load_tokenizer
from kdfast.train.batch import IGNORE, Batch
from kdfast.train.data import RowsOf, Source, digest_of
from kdfast.train.positions import check_positions
from kdfast.train.recipe import Recipe, Teacher
from kdfast.train.tasks import task_class
from kdfast.train.tasks.classes import ClassTask
from kdfast.train.teachers import teacher_keys
from kdfast.train.teachers.cached import CachedTeacher
from kdfast.train.teachers.live import LiveTeacher

#: So small that every distribution is kept as its float32 numbers; there are few of them.
_EXACT = 1e-12


@torch.no_grad()
def capture_classes(
    recipe: Recipe,
    teacher: Teacher,
    out: str | Path,
    *,
    temperatures: Sequence[float] = (1.0,),
    batch_size: int = 32,
    device: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = print,
) -> CacheInfo:
    """Runs a live teacher over the training rows of `recipe`, whose task has classes, and keeps its distributions. Equals

        {row: model(**inputs_of(row)).logits.log_softmax(-1) for row in training_rows}

    to the precision of float32. A student of the same recipe learns from them with `teacher: {cache: out}`. Killed and run
    again it goes on after the last shard that was finished.

    Args:
        recipe: its task, data and tokenizer count. teacher: a path or a function.
        temperatures: which a student may learn at; 1 among them. batch_size: rows in one call.
        progress: called with the rows done and their number. say: takes each line about the rows and their classes.

    Raises:
        ValueError: the task has no classes, or the teacher others.
        CacheMismatch: an unfinished cache in `out` is of other rows.
    """
    task = task_class(recipe.task.name)(recipe.task.options, recipe.data)
    if not isinstance(task, ClassTask):
        raise ValueError(
            f"recipe: expected a task with classes, got {recipe.task.name}, whose cache is its training data; capture text by"
            " kdfast cache build --data"
        )
    if not (teacher.path or teacher.function):
        raise ValueError("teacher: expected one that runs, a path or a function, got a cache")
    folder = None if teacher.path is None else resolve_folder(teacher.path, "teacher")
    if folder is not None:
        task.take_classes([read_config(folder)])
    tokenizer, tokenizer_file = None, None
    if task.needs_tokenizer:
        tokenizer, tokenizer_file = load_tokenizer(recipe.tokenizer or _with_tokenizer(recipe, folder))
    with tempfile.TemporaryDirectory() as made:
        rows = task.open(tokenizer, tokenizer_file, Path(made), True).train
        if rows is None or not len(rows):
            raise ValueError("data.train: expected training rows, got none")
        if folder is not None:
            task.check_folder(folder, "teacher", heard=True)
        described = {"task": recipe.task.name, "labels": task.names, "rows": digest_of(rows), "batch_size": batch_size}
        path = Path(out)
        there = read_capture(path)  # nothing where a kill came before it was written, and before the first record
        if is_unfinished(path) and there and there != described:
            raise CacheMismatch(f"{path}: holds an unfinished cache of other rows; capture these to another path")
        model = LiveTeacher.load(teacher, "teacher", task.kind)
        where = device_named(device, "device")
        model.to(where)
        if tokenizer is not None:
            check_ids(model.model, tokenizer.get_vocab_size(), "teacher")
        check_positions([("teacher", model.model)], rows, task)
        for note in [*task.notes, *task.order_notes(["teacher"])]:
            say(note)
        classes = len(task.names)
        with CacheWriter(
            path, vocab_size=classes, k=classes, teacher=_identity(teacher) if folder is None else weights_hash(folder),
            tokenizer_hash="none" if tokenizer_file is None else file_hash(tokenizer_file),
            temperatures=tuple(temperatures), max_kl=_EXACT, alignment="same",
        ) as writer:  # fmt: skip
            write_capture(path, described)
            writer.begin_groups(batch_size)
            for start in range(len(writer), len(rows), batch_size):
                _add(writer, model, rows.batch(range(start, min(start + batch_size, len(rows)))), where)
                if progress is not None:
                    progress(min(start + batch_size, len(rows)), len(rows))
        return CachedTeacher(path).info


def _identity(teacher: Teacher) -> str:
    """What a teacher that a function makes is known by: its name, its arguments and weights where it is given some."""
    arguments = [json_text(teacher.arguments)] if teacher.arguments else []
    return " ".join([str(teacher.function), *arguments, *([weights_hash(teacher.weights)] if teacher.weights else [])])


def _add(writer: CacheWriter, model: LiveTeacher, batch: Batch, device: torch.device) -> None:
    """A record for each row of the batch: one distribution, or one for each token."""
    logits = model(batch.to(device)).logits.float()
    labels = batch.labels
    assert labels is not None
    expected = (*labels.shape, writer.settings.k)
    if tuple(logits.shape) != expected:
        raise ValueError(f"teacher: expected logits {list(expected)}, a number for each class, got {list(logits.shape)}")
    targets = topk_targets(logits, writer.settings.k, temperatures=writer.settings.temperatures).to("cpu")
    heard = labels != IGNORE if batch.soft_mask is None else batch.soft_mask
    for row, label in enumerate(labels):
        if label.ndim == 0:
            label, own, mask = label[None], targets[row : row + 1], heard[row : row + 1]
        else:
            length = label.shape[0] if batch.attention_mask is None else int(batch.attention_mask[row].sum())
            label, own, mask = label[:length], targets[row][:length], heard[row][:length]
        writer.add(torch.zeros_like(label), own, mask, label)


def _with_tokenizer(recipe: Recipe, teacher: Path | None) -> Path | None:
    """The student's folder where it has a tokenizer, else the teacher's."""
    named = [] if recipe.student.path is None else [resolve_folder(recipe.student.path, "student.path")]
    found = [folder for folder in (*named, teacher) if folder is not None and (folder / "tokenizer.json").is_file()]
    return found[0] if found else None


class TaughtRows(RowsOf):
    """The training rows, and what cached teachers said of each of them.

    Raises:
        ValueError: a cache is of other rows or other classes; names the teacher.
    """

    def __init__(self, rows: Source, caches: Sequence[CachedTeacher], task: ClassTask[Any]) -> None:
        super().__init__(rows)
        self.caches = list(caches)
        for teacher, cache in zip(teacher_keys(len(caches)), caches, strict=True):
            key = f"{teacher}.cache"
            there = read_capture(cache.path)
            if "rows" not in there:
                raise ValueError(
                    f"{key}: expected a cache of rows with classes, got one of text; kdfast cache build TEACHER --recipe RECIPE"
                    " captures these"
                )
            if there["labels"] != task.names:
                raise ValueError(f"{key}: expected the classes {', '.join(task.names)}, got {', '.join(there['labels'])}")
            if there["rows"] != digest_of(rows) or len(cache) != len(rows):
                raise ValueError(
                    f"{key}: expected a cache of these {len(rows)} training rows, got {len(cache)} of others; capture it with"
                    " the same task, data and tokenizer"
                )

    def batch(self, indices: Sequence[int]) -> Batch:
        batch = self.rows.batch(indices)
        assert batch.labels is not None
        found = [cache.reader.batch(list(indices)).targets.decode() for cache in self.caches]
        targets = found if batch.labels.ndim == 2 else [of[:, 0] for of in found]
        return replace(batch, targets=targets[0] if len(targets) == 1 else tuple(targets), attention_mask=None)

    @property
    def digest(self) -> str:
        return "+".join([digest_of(self.rows), *(cache.digest for cache in self.caches)])
