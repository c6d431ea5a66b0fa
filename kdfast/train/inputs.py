"""What a recipe names on disk, opened and checked before the first step: tokenizer, data, teacher."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from kdfast.text.files import list_files, split_files
from kdfast.text.tokenizers import file_hash, load_tokenizer
from kdfast.train.data import Sequences, Source, tokenize
from kdfast.train.models import build_teacher
from kdfast.train.recipe import Recipe
from kdfast.train.teacher import CachedTeacher, LiveTeacher, Signal

#: The split by file depends on this alone, so that runs with different seeds see the same validation files.
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Inputs:
    """Everything a run reads. `teacher` is the live teacher's module; `digest` is a hash of the training data."""

    train: Source
    validation: Source | None
    signal: Signal | None
    teacher: nn.Module | None
    tokenizer: Path | None
    vocab_size: int | None
    digest: str


def open_inputs(recipe: Recipe, train: Source | None = None, validation: Source | None = None) -> Inputs:
    """Opens what `recipe` names; `train` and `validation` take the place of its text files.

    Raises:
        ValueError: something is missing, empty, or does not belong together; one line with the recipe's key.
    """
    tokenizer_file, vocab_size, tokenizer_hash = None, None, None
    needs_text = train is None and (recipe.teacher is None or recipe.teacher.cache is None)
    if recipe.tokenizer or needs_text or recipe.data.validation:
        tokenizer, tokenizer_file = load_tokenizer(recipe.tokenizer)
        vocab_size, tokenizer_hash = tokenizer.get_vocab_size(), file_hash(tokenizer_file)
    signal: Signal | None = None
    teacher = None
    if recipe.teacher and recipe.teacher.cache:
        cached = CachedTeacher(recipe.teacher.cache, tokenizer_hash=tokenizer_hash, temperature=recipe.temperature)
        vocab_size = vocab_size or cached.reader.info.vocab_size
        train, signal = cached, cached
    elif recipe.teacher:
        teacher = build_teacher(recipe.teacher)
        signal = LiveTeacher(teacher)
    if tokenizer_file is not None and (needs_text or (validation is None and recipe.data.validation)):
        text_train, text_validation = _read_text(recipe, tokenizer, needs_text)
        train, validation = train or text_train, validation or text_validation
    if train is None or len(train) == 0:
        raise ValueError("data.train: expected training sequences, got none")
    return Inputs(train, validation, signal, teacher, tokenizer_file, vocab_size, digest_of(train))


def _read_text(recipe: Recipe, tokenizer: object, needs_train: bool) -> tuple[Sequences | None, Sequences | None]:
    data = recipe.data
    train = validation = None
    held_out: list[Path] = []
    if data.validation:
        held_out = [file for _, file in list_files(data.validation, data.glob, data.exclude, "data.validation")]
    if needs_train:
        if not data.train:
            raise ValueError("data.train: expected files or folders, got none; add data.train to the recipe")
        files = list_files(data.train, data.glob, data.exclude, "data.train")
        if data.validation or data.validation_share == 0:
            kept = [file for _, file in files]
        else:
            held_out, kept = split_files(files, [data.validation_share], _SPLIT_SEED)
        train = tokenize(tokenizer, kept, data.sequence_length, data.separator, "data.train")  # type: ignore[arg-type]
    if held_out:
        validation = tokenize(tokenizer, held_out, data.sequence_length, data.separator, "data.validation")  # type: ignore[arg-type]
    return train, validation


def digest_of(data: Source) -> str:
    """A hash of the training data, as far as it can be had without reading everything."""
    if isinstance(data, CachedTeacher):
        return hashlib.blake2b((Path(data.path) / "manifest.json").read_bytes(), digest_size=16).hexdigest()
    return getattr(data, "digest", f"{type(data).__name__} of {len(data)} sequences")
