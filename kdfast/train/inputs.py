"""What a recipe names on disk, opened and checked before the first step: tokenizer, data, teachers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from kdfast.cache.capture_file import read_capture
from kdfast.cache.format import CacheMismatch
from kdfast.files import read_json
from kdfast.models.load import read_config, resolve_folder
from kdfast.models.settings import end_ids
from kdfast.strict import refuse_unused
from kdfast.text.tokenizers import check_same_tokens, file_hash, load_tokenizer
from kdfast.train.batch import IGNORE
from kdfast.train.class_cache import TaughtRows
from kdfast.train.data import LengthOrder, Order, PackedOrder, Source, Subset, batches, digest_of, lengths_of
from kdfast.train.recipe import Recipe
from kdfast.train.tasks import task_class
from kdfast.train.tasks.classes import ClassTask
from kdfast.train.tasks.language import LanguageTask
from kdfast.train.tasks.task import Task
from kdfast.train.teachers import CachedTeacher, LiveTeacher, Teacher, open_teacher, teacher_keys

#: What a language task's data options say of a cache; the others are for reading text.
_OF_CACHES = ("validation_share", "pack", "group_by_length")
#: Rows whose labels are looked at before the first step.
_LOOKED_AT = 16


@dataclass(frozen=True)
class Inputs:
    """Everything a run reads. `digest` is a hash of the training data.

    `tokenizer_homes` are the folders that hold what belongs to the tokenizer: that of its file, and those of the student and
    the teachers that have this very one. `brought` is what took the place of the recipe's data, by the names that `distill`
    has for it.
    """

    task: Task[Any]
    train: Source
    validation: Source | None
    teachers: Sequence[Teacher]
    tokenizer: Path | None
    vocab_size: int | None
    digest: str
    tokenizer_homes: tuple[Path, ...] = ()
    brought: Mapping[str, Source] = field(default_factory=dict)

    def walk(self, rows: Source, recipe: Recipe) -> Order | PackedOrder:
        """The order in which a run visits `rows`."""
        caches = self.caches
        if caches and caches[0].pack:
            lengths = caches[0].reader.lengths()
            return PackedOrder(lengths[rows.rows] if isinstance(rows, Subset) else lengths, caches[0].pack, recipe.seed)
        if getattr(recipe.data, "group_by_length", False):
            return LengthOrder(lengths_of(rows), recipe.batch_size, recipe.seed)
        return Order(len(rows), recipe.seed)

    @property
    def notes(self) -> list[str]:
        """What a person is told before the first step."""
        live = [teacher for teacher in self.teachers if isinstance(teacher, LiveTeacher)]
        made = [f"teacher: no weights named, it is as {t.made_by} makes it" for t in live if t.made_by is not None]
        end = self.task.ids.get("eos_token_id") if isinstance(self.task, LanguageTask) else None
        said = [ends[0] for t in live if end is not None and (ends := end_ids(t.model)) and end not in ends]
        others = [f"teacher: what it writes ends with id {its} (eos_token_id), the rows end with {end}" for its in said]
        return [*self.task.notes, *self._lengths(), *made, *others]

    def _lengths(self) -> list[str]:
        """Where what is scored has other lengths than what was captured."""
        own = getattr(self.task.data, "sequence_length", None)
        its = {int(read_capture(cache.path).get("sequence_length", own or 0)) for cache in self.caches}
        if not self.task.cache_is_data or isinstance(self.validation, Subset | None) or own is None or its <= {own}:
            return []
        captured = ", ".join(map(str, sorted(its)))
        return [
            f"data.validation: read in sequences of {own} tokens, the cache's are of {captured}; data.sequence_length sets the"
            " former"
        ]

    @property
    def caches(self) -> list[CachedTeacher]:
        return [teacher for teacher in self.teachers if isinstance(teacher, CachedTeacher)]


def open_inputs(recipe: Recipe, folder: Path, train: Source | None = None, validation: Source | None = None) -> Inputs:
    """Opens what `recipe` names; `train` and `validation` take the place of its data, kept in `folder`.

    Raises:
        ValueError: something is missing, empty, or does not belong together; one line with the recipe's key.
    """
    brought = {name: rows for name, rows in (("train_data", train), ("validation_data", validation)) if rows is not None}
    task = task_class(recipe.task.name)(
        recipe.task.options, _kept_whole(recipe.data) if validation is not None else recipe.data
    )
    folders = model_folders(recipe).values()
    if isinstance(task, ClassTask):
        task.take_classes(map(read_config, folders))
    if isinstance(task, LanguageTask):
        task.take_ids([recipe.student.config, *map(read_config, folders)])
    cached = [spec for spec in recipe.all_teachers if spec.cache]
    cache_is_data = bool(cached) and task.cache_is_data
    _check_sources(recipe, train, cache_is_data)
    needs_train = train is None and not cache_is_data
    held_out_of_text = cache_is_data and validation is None and _holds_out(recipe.data)
    reads = needs_train or held_out_of_text or (validation is None and bool(getattr(recipe.data, "validation", None)))
    tokenizer, tokenizer_file = None, None
    # A student from a folder has a tokenizer of its own: that of the cache, or its ids mean other tokens.
    own = recipe.tokenizer or _own_tokenizer(recipe)
    if task.needs_tokenizer and (own or reads):
        tokenizer, tokenizer_file = load_tokenizer(own)
        if isinstance(task, LanguageTask):
            task.tokenizer = tokenizer
    identity = None if tokenizer_file is None else file_hash(tokenizer_file)
    pack = getattr(recipe.data, "pack", None)
    if pack and cached and task.kind != "causal_lm":
        raise ValueError(
            f"data.pack: expected task causal_lm, got {recipe.task.name}, whose rows see what follows; leave it out"
        )
    if pack and not cached:
        raise ValueError("data.pack: expected a cached teacher; running text fills its sequences by itself, leave it out")
    specs = recipe.all_teachers
    try:
        teachers = [
            open_teacher(spec, key, task.kind, identity, pack)
            for key, spec in zip(teacher_keys(len(specs)), specs, strict=True)
        ]
    except CacheMismatch as error:
        if recipe.tokenizer:
            raise
        raise CacheMismatch(f"student: {error} ({tokenizer_file}); or set tokenizer: PATH of the cache's") from None
    if tokenizer is not None:
        _check_tokenizers(recipe, tokenizer, identity)
    if not task.needs_tokenizer:
        refuse_unused(recipe, ("tokenizer",), f"task {recipe.task.name} reads no text, expected none")
    if cache_is_data and not reads:
        names = (f.name for f in fields(recipe.data) if f.init and f.name not in _OF_CACHES)
        refuse_unused(recipe.data, names, "the cache, which is the training data, was made without it; expected none", "data")
    if cache_is_data:
        train, held_out = _cached(recipe, [t for t in teachers if isinstance(t, CachedTeacher)])
        validation = held_out if validation is None else validation
    if reads:
        splits = task.open(tokenizer, tokenizer_file, folder, needs_train)
        train = splits.train if train is None else train
        validation = splits.validation if validation is None else validation
    if cached and not cache_is_data and train is not None and isinstance(task, ClassTask):
        train = TaughtRows(train, [t for t in teachers if isinstance(t, CachedTeacher)], task)
    if train is None or len(train) == 0:
        raise ValueError("data.train: expected training rows, got none")
    if validation is not None:
        _check_validation(validation, recipe)
    else:
        why = "without validation data (data.validation or data.validation_share) expected none"
        refuse_unused(recipe, ("eval_every", "eval_sequences", "eval_teacher", "keep_best"), why)
    if not any(isinstance(teacher, LiveTeacher) for teacher in teachers):
        refuse_unused(recipe, ("eval_teacher",), "without a live teacher expected none")
    vocab_size = None if tokenizer is None else tokenizer.get_vocab_size()
    if vocab_size is None and cache_is_data:
        vocab_size = next(t.info.vocab_size for t in teachers if isinstance(t, CachedTeacher))
    if pack:
        refuse_unused(recipe.data, ("group_by_length",), "beside data.pack, which leaves little padding, expected none", "data")
    _check_labels(train, vocab_size, task)
    if isinstance(task, ClassTask):
        task.notes += task.order_notes(_without_names(task, recipe, teachers))
    if isinstance(task, LanguageTask):
        task.take_start(train)
    homes = () if tokenizer_file is None else _homes(recipe, tokenizer_file)
    return Inputs(task, train, validation, teachers, tokenizer_file, vocab_size, digest_of(train), homes, brought)


def cut_from(recipe: Recipe) -> str:
    """The folder that `student.from_teacher` cuts out of: its own, else the first teacher's that has one.

    Raises:
        ValueError: there is none.
    """
    cut = recipe.student.from_teacher
    assert cut is not None
    found = cut.path or next((teacher.path for teacher in recipe.all_teachers if teacher.path), None)
    if found is None:
        raise ValueError(
            "student.from_teacher.path: expected the folder of the model to cut it out of, which teacher.path does not give;"
            " set it"
        )
    return found


def _check_sources(recipe: Recipe, train: Source | None, cached: bool) -> None:
    if cached and train is not None:
        raise ValueError("train_data: the teacher is a cache, which is the training data; leave train_data out")
    if cached and getattr(recipe.data, "dataset", None):
        raise ValueError("data.dataset: the teacher is a cache, which is the training data; leave data.dataset out")
    if cached and getattr(recipe.data, "train", None) and not _holds_out(recipe.data):
        raise ValueError(
            "data.train: the teacher is a cache, which is the training data; leave data.train out, or set"
            " data.validation_share to evaluate on that share of its files"
        )
    if recipe.student.from_teacher is not None:
        cut_from(recipe)
    kinds = {bool(spec.cache) for spec in recipe.all_teachers}
    if len(kinds) > 1:
        raise ValueError("teachers: expected all of them live or all of them caches, got both; capture the live ones")


def _holds_out(data: Any) -> bool:
    """Whether a share of the files in `data.train` is asked for as validation data."""
    named = getattr(data, "train", None) and getattr(data, "validation_share", None)
    return bool(named) and not getattr(data, "validation", None)


def _kept_whole(data: Any) -> Any:
    """The data options of a caller who brings validation data: nothing is held out."""
    names = {f.name for f in fields(data)}
    return replace(data, **{name: value for name, value in (("validation_share", 0.0), ("validation", ())) if name in names})


def model_folders(recipe: Recipe) -> dict[str, Path]:
    """The folders of the models that a recipe names, by key: the student's, the one it is cut out of, the teachers'."""
    cut, teachers = recipe.student.from_teacher, recipe.all_teachers
    named = {"student.path": recipe.student.path, "student.from_teacher.path": cut.path if cut else None}
    named |= {f"{key}.path": spec.path for key, spec in zip(teacher_keys(len(teachers)), teachers, strict=True)}
    return {key: resolve_folder(path, key) for key, path in named.items() if path}


def _without_names(task: ClassTask[Any], recipe: Recipe, teachers: Sequence[Teacher]) -> list[str]:
    """Keys of the live teachers with a trained head that do not say which class is which. A function's model has no config, but
    where its weights are a run's, that run wrote down its classes."""
    keys = []
    for key, spec, teacher in zip(teacher_keys(len(teachers)), recipe.all_teachers, teachers, strict=True):
        run = Path(spec.weights).parent / "run.json" if spec.weights else None
        if run is not None and run.is_file() and read_json(run).get("classes") == task.names:
            continue
        if isinstance(teacher, LiveTeacher) and not teacher.missing:
            keys.append(f"{key}.function" if spec.function else f"{key}.path")
    return keys


def _homes(recipe: Recipe, tokenizer: Path) -> tuple[Path, ...]:
    """Its folder, and those with this `tokenizer.json`: a file by itself may lack what the model's folder has beside it."""
    same = file_hash(tokenizer)
    held = ((folder, folder / "tokenizer.json") for folder in model_folders(recipe).values())
    return (tokenizer.parent, *(folder for folder, file in held if file.is_file() and file_hash(file) == same))


def _check_tokenizers(recipe: Recipe, tokenizer: Any, identity: str | None) -> None:
    """Raises where the folder of a model has a tokenizer with other tokens than the data's; a cache knows its own."""
    for key, folder in model_folders(recipe).items():
        if (folder / "tokenizer.json").is_file() and file_hash(folder / "tokenizer.json") != identity:
            check_same_tokens(folder, tokenizer, key)


def _own_tokenizer(recipe: Recipe) -> Path | None:
    """The tokenizer in the first model folder that has one."""
    files = (folder / "tokenizer.json" for folder in model_folders(recipe).values())
    return next((file for file in files if file.is_file()), None)


def _cached(recipe: Recipe, caches: list[CachedTeacher]) -> tuple[Source, Source | None]:
    """The caches' records as training data, and those that `data.validation_share` holds out."""
    source: Source = caches[0] if len(caches) == 1 else _SideBySide(caches)
    share = getattr(recipe.data, "validation_share", None)
    if not share or getattr(recipe.data, "validation", None) or getattr(recipe.data, "train", None):
        return source, None
    every = max(round(1 / share), 2)
    rows = range(len(source))
    return Subset(source, [i for i in rows if i % every]), Subset(source, [i for i in rows if i % every == 0])


class _SideBySide:
    """Caches of one corpus by several teachers: each batch carries the targets of all."""

    def __init__(self, caches: list[CachedTeacher]) -> None:
        first, *others = caches
        for i, other in enumerate(others, 1):
            for name in ("records", "tokens", "vocab_size"):
                own, its = getattr(first.info, name), getattr(other.info, name)
                if own != its:
                    raise ValueError(f"teachers[{i}].cache: expected {name} {own} as in teachers[0].cache, got {its}")
        self.caches, self.digest = caches, "+".join(c.digest for c in caches)

    def __len__(self) -> int:
        return len(self.caches[0])

    def lengths(self) -> Any:
        return self.caches[0].lengths()

    def sizes(self) -> Any:
        return self.caches[0].sizes()

    def batch(self, indices: Sequence[int]) -> Any:
        first, *others = [cache.batch(indices) for cache in self.caches]
        for i, other in enumerate(others, 1):
            own, its = ({**batch.by_name, "labels": batch.labels} for batch in (first, other))
            if own.keys() != its.keys() or not all(_same(own[name], its[name]) for name in own):
                raise ValueError(f"teachers[{i}].cache: holds other documents than teachers[0].cache; capture the same ones")
        return replace(first, targets=tuple(b.targets for b in (first, *others)))


def _same(first: Any, other: Any) -> bool:
    return first is other is None or (first is not None and other is not None and torch.equal(first, other))


def _check_validation(validation: Source, recipe: Recipe) -> None:
    """Raises when an evaluation would find nothing to score, which would show at the end of the run only."""
    n = len(validation)
    if n == 0:
        raise ValueError(
            "data.validation: expected at least one row, got none; raise data.validation_share, or set it to 0 and"
            " evaluate nothing"
        )
    if not any(batch.labelled for batch in batches(validation, recipe.batch_size, recipe.eval_sequences)):
        n = min(n, recipe.eval_sequences or n)
        raise ValueError(f"data.validation: expected at least one labelled position in {n} rows, got none")


def _check_labels(train: Source, vocab_size: int | None, task: Task[Any]) -> None:
    """Raises when the first rows have labels outside the vocabulary; every batch is looked at by the losses on a CPU."""
    if vocab_size is None or not isinstance(task, LanguageTask):
        return
    labels = train.batch(range(min(len(train), _LOOKED_AT))).labels
    if labels is None:
        return
    outside = labels[(labels != IGNORE) & ((labels < 0) | (labels >= vocab_size))]
    if outside.numel():
        raise ValueError(f"data: label {int(outside[0])} lies outside the vocabulary of {vocab_size} ids; check the tokenizer")
