"""`Recipe`: everything a run depends on, read from YAML with strict errors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kdfast.strict import build, one_of, override, plain, ranged


@dataclass(frozen=True)
class Model:
    """A student: a `transformers` architecture, a folder with weights, or a function that makes a module.

    Args:
        model_type: name of a `transformers` causal language model (`gpt2`, `llama`, ...), with random weights.
        config: fields of its configuration; `vocab_size` defaults to the tokenizer's.
        path: a local folder that `from_pretrained` reads.
        function: `module:function`, called with `arguments`, returning an `nn.Module` that maps `input_ids=[B, L]`
            to logits `[B, L, V]` or to an output with `.logits`.
        arguments: keyword arguments of `function`.
    """

    model_type: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    path: str | None = None
    function: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Teacher:
    """A teacher: a folder, a `module:function` as for the student (both run live), or a cache of its targets."""

    path: str | None = None
    function: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    cache: str | None = None


@dataclass(frozen=True)
class Data:
    """Text files, split by file.

    Args:
        train: files or folders; with a cached teacher the cache is the training data and this may stay empty.
        validation: files or folders; empty: a seeded share of the training files is held out.
        validation_share: that share, drawn by a seeded hash of each path.
        glob: which files of a folder.
        exclude: folder or file names to leave out.
        sequence_length: tokens per packed sequence; the last one of each has no label.
        separator: token put after every file; none when the tokenizer lacks it.
    """

    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    validation_share: float = ranged(0.05, low=0.0, high=0.5)
    glob: str = "**/*.txt"
    exclude: tuple[str, ...] = ()
    sequence_length: int = ranged(128, low=2)
    separator: str = "<|endoftext|>"


@dataclass(frozen=True)
class Optimizer:
    """AdamW; weight decay on matrices only. `schedule` follows `warmup_steps` and ends at `final_lr_share * lr`."""

    lr: float = ranged(1e-3, above=0.0)
    weight_decay: float = ranged(0.1, low=0.0)
    beta1: float = ranged(0.9, low=0.0, high=1.0)
    beta2: float = ranged(0.95, low=0.0, high=1.0)
    eps: float = ranged(1e-8, above=0.0)
    clip: float = ranged(1.0, low=0.0)
    warmup_steps: int = ranged(0, low=0)
    schedule: str = one_of("cosine", "cosine", "linear", "constant")
    final_lr_share: float = ranged(0.1, low=0.0, high=1.0)


@dataclass(frozen=True)
class Recipe:
    """One training run.

    Args:
        method: `supervised` (teachers and plain students) or `word_kd`.
        out: the run folder.
        student, teacher, data, optimizer: see their classes.
        init_from: folder or safetensors file with weights the student starts from.
        tokenizer: a `tokenizer.json`, or a folder that holds one.
        steps: optimiser steps; each sees `batch_size * accumulation` sequences per process.
        seed: of weights, data order and dropout.
        precision: `fp32`, or autocast to `bf16` or `fp16`.
        temperature, soft_weight, hard_weight: loss = soft_weight * T^2 * KL(p_T || q_T) + hard_weight * CE.
        log_every: steps between looks at the metrics; every step is logged.
        eval_every: steps between evaluations on the validation files, 0 = at the end only.
        eval_sequences: how many sequences an evaluation reads, 0 = all.
        save_every: steps between checkpoints, 0 = at the end only.
        keep: how many checkpoints stay.
        tracker: `tensorboard` or `none`; `metrics.jsonl` is always written.
        check: run two steps, print memory, alignment and time left, then stop.
    """

    method: str = one_of("supervised", "supervised", "word_kd")
    out: str = "runs/train"
    student: Model = field(default_factory=Model)
    teacher: Teacher | None = None
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    init_from: str | None = None
    tokenizer: str | None = None
    steps: int = ranged(1000, low=1)
    batch_size: int = ranged(16, low=1)
    accumulation: int = ranged(1, low=1)
    seed: int = ranged(1, low=0)
    precision: str = one_of("fp32", "fp32", "bf16", "fp16")
    temperature: float = ranged(1.0, above=0.0)
    soft_weight: float = ranged(1.0, low=0.0)
    hard_weight: float = ranged(0.0, low=0.0)
    log_every: int = ranged(10, low=1)
    eval_every: int = ranged(0, low=0)
    eval_sequences: int = ranged(0, low=0)
    save_every: int = ranged(0, low=0)
    keep: int = ranged(2, low=1)
    tracker: str = one_of("tensorboard", "tensorboard", "none")
    check: bool = False

    def __post_init__(self) -> None:
        given = [n for n in ("model_type", "path", "function") if getattr(self.student, n)]
        if len(given) != 1:
            raise ValueError(f"student: expected one of model_type, path, function, got {' and '.join(given) or 'none'}")
        if self.student.config and not self.student.model_type:
            raise ValueError(f"student.config: it belongs to student.model_type, but {given[0]} is given; leave it out")
        if self.method == "supervised":
            if self.teacher is not None:
                raise ValueError("teacher: method supervised has none; leave it out, or set method: word_kd")
            return
        sources = [n for n in ("path", "function", "cache") if self.teacher and getattr(self.teacher, n)]
        if len(sources) != 1:
            raise ValueError(f"teacher: method {self.method} expects one of path, function, cache, got {sources or 'none'}")
        if self.soft_weight == 0 and self.hard_weight == 0:
            raise ValueError("soft_weight: expected soft_weight or hard_weight above 0, got 0 for both: nothing to train on")

    @classmethod
    def load(cls, path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
        """The recipe in a YAML file, with `dotted.key=value` overrides.

        Raises:
            ValueError: the file is no YAML mapping, or a key, type or range is wrong (one line, with the dotted path).
            OSError: the file cannot be read.
        """
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected a YAML mapping of recipe keys, got {type(values).__name__}")
        return cls.build(override(values, overrides))

    @classmethod
    def build(cls, values: dict[str, Any]) -> Recipe:
        """The recipe in a plain mapping, checked as strictly as a file."""
        recipe: Recipe = build(cls, values)
        return recipe

    def to_yaml(self) -> str:
        """The whole recipe, defaults written out; `Recipe.load` reads it back to an equal one."""
        return yaml.safe_dump(plain(self), sort_keys=False)
