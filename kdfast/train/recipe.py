"""`Recipe`: everything a run depends on, read from YAML with strict errors."""

from __future__ import annotations

import dataclasses
import os
import typing
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kdfast.strict import build, one_of, override, plain, ranged, refuse_unused
from kdfast.train import recipes, tasks
from kdfast.train.data import SEEDS

#: Keys of earlier recipes that belong to the method.
_MOVED = ("temperature", "soft_weight", "hard_weight")
_CHOSEN = ("method", "task", "data", "phases")  # by name, or following from what is


@dataclass(frozen=True)
class FromTeacher:
    """A student cut out of a teacher.

    Args:
        path: the teacher's folder or hub name; null: `teacher.path`.
        layers: which of its layers to keep, in order, from 0 (an encoder-decoder's encoder); null: all.
        decoder_layers: of an encoder-decoder's decoder.
        width: hidden size: the leading channels of every layer and as many whole heads as fit; null: the teacher's.
    """

    path: str | None = None
    layers: tuple[int, ...] | None = None
    decoder_layers: tuple[int, ...] | None = None
    width: int | None = ranged(None, low=1)


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on a frozen student, by peft (`pip install peft`): all else trains nothing.

    Args:
        rank, alpha, dropout: peft's `r`, `lora_alpha`, `lora_dropout`.
        modules: names of the layers that get one; none: peft's own for the architecture.
    """

    rank: int = ranged(8, low=1)
    alpha: float = ranged(16.0, above=0.0)
    dropout: float = ranged(0.0, low=0.0, high=1.0)
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Model:
    """A student: an architecture with random weights, a folder, a function that makes a module, or cut out of the teacher.

    Args:
        model_type: name of a `transformers` architecture (`gpt2`, `llama`, ...), with random weights.
        config: fields of its configuration; beside `path` and `from_teacher`, whose weights have theirs, dropout and ids alone.
        path: a local folder that `from_pretrained` reads, or a hub name.
        function: `module:function`, called with `arguments`, returning an `nn.Module` that maps inputs to logits or to an
            output with `.logits`.
        arguments: keyword arguments of `function`.
        from_teacher: cut out of the teacher.
        dtype: of the weights that train; `auto`: as they are stored.
        freeze: modules whose weights stay as they are, such as `[bert]`: a head is trained alone.
        lora: train adapters only.
        gradient_checkpointing: layers run again in backward instead of keeping their activations.
        compile: through `torch.compile`.
    """

    model_type: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    path: str | None = None
    function: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    from_teacher: FromTeacher | None = None
    dtype: str = one_of("float32", "auto", "float32", "bfloat16")
    freeze: tuple[str, ...] = ()
    lora: Lora | None = None
    gradient_checkpointing: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        given = [n for n in ("model_type", "path", "function", "from_teacher") if getattr(self, n)]
        if len(given) > 1:
            raise ValueError(f"expected one of model_type, path, function, from_teacher, got {' and '.join(given)}")
        if self.config and (self.function or not given):
            source = given[0] if given else "none"
            raise ValueError(f"config: it is a transformers model's, but {source} is given; leave it out")
        if given and not self.function:
            refuse_unused(self, ("arguments",), f"beside {given[0]} expected none, they are a function's")
        if self.dtype == "auto" and (self.function or self.model_type):
            refuse_unused(self, ("dtype",), f"beside {given[0]} expected float32 or bfloat16, no weights are stored")


@dataclass(frozen=True)
class Teacher:
    """A teacher: a folder, a `module:function` as for the student (both run live), or a cache of its targets.

    Args:
        path: a local folder that `from_pretrained` reads, or a hub name. function, arguments: as for the student.
        weights: of a `function`: the folder `model` of its run, or a safetensors file; null: those the function gives it.
        cache: a folder or URL that `kdfast cache build` wrote, which is the training data too.
        dtype: what its weights are in; `auto`: as they are stored.
        weight: among several teachers.
    """

    path: str | None = None
    function: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    cache: str | None = None
    dtype: str = one_of("auto", "auto", "float32", "bfloat16")
    weight: float = ranged(1.0, above=0.0)

    def __post_init__(self) -> None:
        sources = [n for n in ("path", "function", "cache") if getattr(self, n)]
        if len(sources) != 1:
            raise ValueError(f"expected one of path, function, cache, got {' and '.join(sources) or 'none'}")
        if not self.function:
            refuse_unused(self, ("arguments", "weights"), f"beside {sources[0]} expected none, they are a function's")
        if not self.path:
            refuse_unused(self, ("dtype",), f"beside {sources[0]} expected none, it is that of a folder's weights")


@dataclass(frozen=True)
class Optimizer:
    """AdamW; weight decay on matrices only. `schedule` follows `warmup_steps` and ends at `final_lr_share * lr`.

    Args:
        lr: the highest learning rate. weight_decay: of matrices. beta1, beta2, eps: of AdamW.
        clip: limit of the gradient's norm, over all parameters; 0: none.
        warmup_steps: steps of linear rise to `lr`. schedule: how it falls after them.
        final_lr_share: share of `lr` that it ends at.
    """

    lr: float = ranged(1e-3, above=0.0)
    weight_decay: float = ranged(0.1, low=0.0)
    beta1: float = ranged(0.9, low=0.0, below=1.0)
    beta2: float = ranged(0.95, low=0.0, below=1.0)
    eps: float = ranged(1e-8, above=0.0)
    clip: float = ranged(1.0, low=0.0)
    warmup_steps: int = ranged(0, low=0)
    schedule: str = one_of("cosine", "cosine", "linear", "constant")
    final_lr_share: float = ranged(0.1, low=0.0, high=1.0)

    def __post_init__(self) -> None:
        if self.schedule == "constant":
            refuse_unused(self, ("final_lr_share",), "with schedule constant expected none")


@dataclass(frozen=True)
class Named:
    """A method or a task by name, with its options: `name`, or `{name: ..., option: ...}`."""

    name: str
    options: Any = None

    def plain(self) -> Any:
        options = {} if self.options is None else plain(self.options)
        return {"name": self.name, **options} if options else self.name


@dataclass(frozen=True)
class Phase:
    """A part of a run: `steps` of its own method and, where given, its own learning rate schedule."""

    steps: int
    method: Named
    optimizer: Optimizer | None = None


@dataclass(frozen=True)
class Recipe:
    """One training run.

    Args:
        method: what trains the student, a file of `kdfast/train/recipes` or `module:Class`, with its options.
        task: what the data are and how a model is scored, a file of `kdfast/train/tasks`.
        phases: several methods in turn, in the place of `method` and `steps`.
        out: the run folder.
        student, teacher, data, optimizer: see their classes. teachers: several teachers instead of one.
        init_from: folder or safetensors file with weights the student starts from; of a smaller model of its type, the
            student begins as that one.
        tokenizer: a `tokenizer.json`, or a folder that holds one; null: the folder of the student, of the model it is cut out
            of, or the teacher's.
        steps: optimiser steps. batch_size: rows per process and micro-batch. accumulation: micro-batches per step.
        seed: of weights, data order and dropout. ahead: steps whose batches are read while the current one runs.
        precision: `fp32`, or autocast of the step, teachers too, to `bf16` or `fp16`.
        shard: `fsdp` shards student, objective and optimiser over the processes (FSDP2); `none` replicates them (DDP).
        alignment: compare the teacher's loss on the labels with that at other shifts before the first step, and stop when
            another fits better.
        log_every: steps between looks at the metrics, each step's. tracker: `tensorboard` or `none`, beside `metrics.jsonl`.
        eval_every: steps between evaluations on the validation data, 0 = at the end only. eval_sequences: rows of it, 0 = all.
        eval_teacher: score live teachers on the validation data too, before the first step.
        keep_best: keep the model of the best evaluation too, in `OUT/best`; by perplexity, accuracy, entity F1, BLEU.
        save_every: steps between checkpoints, 0 = at the end only. keep: how many checkpoints stay.
        check: run two steps, print memory, alignment and time left, then stop.
    """

    method: Named = field(default_factory=lambda: Named("supervised"))
    task: Named = field(default_factory=lambda: Named("causal_lm"))
    phases: tuple[Phase, ...] = ()
    out: str = "runs/train"
    student: Model = field(default_factory=Model)
    teacher: Teacher | None = None
    teachers: tuple[Teacher, ...] = ()
    data: Any = None
    optimizer: Optimizer = field(default_factory=Optimizer)
    init_from: str | None = None
    tokenizer: str | None = None
    steps: int = ranged(1000, low=1)
    batch_size: int = ranged(16, low=1)
    accumulation: int = ranged(1, low=1)
    seed: int = ranged(1, low=0, high=SEEDS - 1)
    precision: str = one_of("fp32", "fp32", "bf16", "fp16")
    shard: str = one_of("none", "none", "fsdp")
    alignment: bool = True
    ahead: int = ranged(2, low=0)
    log_every: int = ranged(10, low=1)
    eval_every: int = ranged(0, low=0)
    eval_sequences: int = ranged(0, low=0)
    eval_teacher: bool = False
    keep_best: bool = False
    save_every: int = ranged(0, low=0)
    keep: int = ranged(2, low=1)
    tracker: str = one_of("tensorboard", "tensorboard", "none")
    check: bool = False

    @property
    def all_teachers(self) -> tuple[Teacher, ...]:
        return self.teachers or ((self.teacher,) if self.teacher else ())

    @property
    def parts(self) -> tuple[Phase, ...]:
        """The phases; a recipe without any is one."""
        return self.phases or (Phase(self.steps, self.method, self.optimizer),)

    @property
    def total_steps(self) -> int:
        return sum(phase.steps for phase in self.parts)

    def place(self, step: int) -> tuple[int, int]:
        """Number of the phase of a step (1-based), and the step's number within it."""
        before = 0
        for number, phase in enumerate(self.parts):
            if step <= before + phase.steps:
                return number, step - before
            before += phase.steps
        raise AssertionError(f"step {step} lies in no phase")

    def __post_init__(self) -> None:
        if not any(getattr(self.student, n) for n in ("model_type", "path", "function", "from_teacher")):
            raise ValueError("student: expected one of model_type, path, function, from_teacher, got none")
        if self.teacher and self.teachers:
            raise ValueError("teachers: expected teacher or teachers, got both")
        if len(self.all_teachers) == 1:
            where = "teachers[0]" if self.teachers else "teacher"
            refuse_unused(self.all_teachers[0], ("weight",), "of a single teacher expected none", where)
        if self.phases and all(phase.optimizer for phase in self.phases):
            refuse_unused(self, ("optimizer",), "where every phase has its own expected none")
        names = [phase.method.name for phase in self.parts]
        if self.all_teachers and all(recipes.objective_class(name).teacher == "none" for name in names):
            raise ValueError(f"teacher: method {names[0]} has none; leave it out, or set method: word_kd")
        silent = [name for name in names if not recipes.objective_class(name).writes]
        unlabelled = getattr(self.data, "unlabelled", False)
        if unlabelled is True:  # rows without what follows
            if silent:
                raise ValueError(
                    f"data.unlabelled: method {silent[0]} learns from targets only; expected one that has a teacher write them"
                    " (sequence_kd)"
                )
        elif unlabelled and not self.all_teachers and not any(recipes.objective_class(name).students_teach for name in names):
            raise ValueError(
                f"data.unlabelled: expected none, as method {names[0]} has no teacher here to say what they are; add one"
            )
        for phase in self.parts:
            objective = recipes.objective_class(phase.method.name)
            if objective.teacher == "required" and not self.all_teachers:
                able = "path or function" if objective.writes else "one of path, function, cache"
                raise ValueError(f"teacher: method {phase.method.name} expects {able}, got none")

    @classmethod
    def load(cls, path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
        """The recipe in a YAML file, with `dotted.key=value` overrides.

        Raises:
            ValueError: the file is no YAML mapping, or a key, type or range is wrong (one line, with the dotted path).
            OSError: the file cannot be read.
        """
        try:
            values = yaml.load(Path(path).read_text(encoding="utf-8"), _OnceLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected a YAML mapping of recipe keys, got {type(values).__name__}")
        return cls.build(override(_named(values, "method", "task"), overrides))

    @classmethod
    def build(cls, values: Mapping[str, Any]) -> Recipe:
        """The recipe in a plain mapping, checked as strictly as a file."""
        values = dict(values)
        moved = {key: values.pop(key) for key in _MOVED if key in values}
        if moved:
            warnings.warn(
                f"{', '.join(moved)}: now under method: {{name: word_kd, {next(iter(moved))}: ...}}; taken as that",
                FutureWarning, stacklevel=2,
            )  # fmt: skip
            values["method"] = {**moved, **_as_mapping(values.get("method", "supervised"))}
        task = named(values.pop("task", "causal_lm"), "task")
        chosen = {"task": task, "data": build(tasks.task_class(task.name).Data, values.pop("data", None) or {}, "data")}
        if "method" in values:
            chosen["method"] = named(values.pop("method"), "method")
        doubled = [key for key in ("method", "steps") if values.get("phases") and key in values]
        if doubled:
            raise ValueError(
                f"{doubled[0]}: phases stand in the place of method and steps, expected one of both; leave one out"
            )
        if "phases" in values:
            chosen["phases"] = tuple(_phase(v, f"phases[{i}]") for i, v in enumerate(values.pop("phases") or ()))
        elif "method" not in chosen:
            chosen["method"] = named("supervised", "method")
        # What is chosen by name is built already; the rest goes by the fields.
        rest: Recipe = build(_Rest, values, beside=_CHOSEN)
        return cls(**{name: getattr(rest, name) for name in _REST}, **chosen)

    def to_yaml(self) -> str:
        """The whole recipe, defaults written out; `Recipe.load` reads it back to an equal one."""
        values = plain(self)
        if self.phases:
            del values["method"], values["steps"]
        return yaml.safe_dump(values, sort_keys=False)


class _OnceLoader(yaml.SafeLoader):
    """A key that is written twice is an error: YAML's own reader takes the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = {"<<": 0}  # a merge, which may be repeated
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and seen.setdefault(key.value, id(key)) not in (id(key), 0):
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
        return super().construct_mapping(node, deep)


def named(value: Any, key: str, where: str | None = None) -> Named:
    """A method or task from its name, or a mapping of name and options; the options checked."""
    values = _as_mapping(value, where or key)
    name = values.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(f"{where or key}.name: expected text, got {'nothing' if name is None else repr(name)}")
    cls = recipes.objective_class(name) if key == "method" else tasks.task_class(name)
    return Named(name, build(cls.Options, values, where or key))


def _as_mapping(value: Any, where: str = "method") -> dict[str, Any]:
    if isinstance(value, str):
        return {"name": value}
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected a name, or a mapping of name and options, got {type(value).__name__} {value!r}")
    return dict(value)


def _named(values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """`values` with names as mappings, so that `method.temperature=2` has a place to go."""
    return {**values, **{key: _as_mapping(values[key], key) for key in keys if isinstance(values.get(key), str)}}


def _phase(value: Any, where: str) -> Phase:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected a mapping with steps and method, got {type(value).__name__} {value!r}")
    values = dict(value)
    method = named(values.pop("method", None) or "", "method", f"{where}.method")
    rest = build(_PhaseRest, values, where)
    return Phase(rest.steps, method, rest.optimizer)


@dataclass(frozen=True)
class _PhaseRest:
    steps: int = ranged(1000, low=1)
    optimizer: Optimizer | None = None


def _rest_of() -> type:
    """`Recipe` without what is chosen by name, for `build`."""
    hints = typing.get_type_hints(Recipe)
    fields = []
    for f in (f for f in dataclasses.fields(Recipe) if f.name not in _CHOSEN):
        default = {"default": f.default} if f.default is not dataclasses.MISSING else {"default_factory": f.default_factory}
        fields.append((f.name, hints[f.name], dataclasses.field(metadata=f.metadata, **default)))
    return dataclasses.make_dataclass("_Rest", fields, frozen=True)


_Rest: Any = _rest_of()
_REST = tuple(_Rest.__dataclass_fields__)
