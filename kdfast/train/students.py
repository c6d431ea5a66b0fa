"""Students: built as a recipe says, and written to a folder that anyone can load."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from kdfast.extras import need
from kdfast.files import write_json
from kdfast.models.grow import start_from
from kdfast.models.load import (
    check_fields,
    from_config,
    from_function,
    lacks,
    load_folder,
    quiet,
    resolve_folder,
    tied,
)
from kdfast.models.settings import end_ids, end_like
from kdfast.models.shrink import cast_weights, cut_out
from kdfast.tensors import save_tensors, writing_tensors
from kdfast.text.tokenizers import load_tokenizer
from kdfast.train.inputs import Inputs, cut_from, model_folders
from kdfast.train.positions import check_positions
from kdfast.train.recipe import Lora, Model, Recipe
from kdfast.train.tasks.classes import ClassTask
from kdfast.train.tasks.language import LanguageTask
from kdfast.train.tasks.task import Task
from kdfast.train.teachers import teacher_keys

#: What a tokenizer may be made of, beside `tokenizer.json`.
_TOKENIZER_FILES = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip


def build_student(
    recipe: Recipe, task: Task[Any], vocab_size: int | None, say: Callable[[str], None] = lambda line: None
) -> nn.Module:
    """The student of `recipe`, its random weights from torch's global generator; `say` takes a line about what it grew from."""
    spec = recipe.student
    _check_classes(recipe, task)
    missing: list[str] = []
    student = _plain(spec, recipe, task, vocab_size, missing)
    if missing:
        say(f"student: its folder {lacks(missing)}, which are random")
    if recipe.init_from:
        example = task.example(student) if task.through_head else None
        grown = start_from(student, resolved(recipe.init_from, "init_from"), "init_from", kind=task.kind, example=example)
        if grown:
            say(grown)
    if spec.dtype == "bfloat16":
        cast_weights(student, torch.bfloat16)
    if isinstance(getattr(student, "config", None), PretrainedConfig) and isinstance(task, LanguageTask):
        end, ends = task.ids.get("eos_token_id"), end_ids(student)
        if "eos_token_id" not in spec.config:
            end_like(student, end)
        elif end is not None and ends and end not in ends:
            say(f"student: what it writes ends with id {ends[0]} (student.config.eos_token_id), the rows end with {end}")
    if spec.freeze:
        _freeze(student, spec.freeze)
    if spec.lora:
        student = _with_lora(student, spec.lora)
    if spec.gradient_checkpointing:
        if not hasattr(student, "gradient_checkpointing_enable"):
            raise ValueError(f"student.gradient_checkpointing: expected a transformers model, got {type(student).__name__}")
        student.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    return student.train()  # a model from a folder comes without its dropout


def resolved(path: str, key: str) -> str | Path:
    """A file or folder as it is, else a hub name's folder."""
    if Path(path).exists() or path.count("/") != 1:
        return path
    return resolve_folder(path, key)


def _plain(spec: Model, recipe: Recipe, task: Task[Any], vocab_size: int | None, missing: list[str]) -> nn.Module:
    fields = task.model_fields(vocab_size)
    # Of a model in a folder what follows from the data; sizes are the folder's.
    settings = {k: v for k, v in fields.items() if k in ("id2label", "label2id", "pad_token_id") and v is not None}
    if spec.function:
        return from_function(spec.function, spec.arguments, "student.function")
    if spec.model_type:
        return from_config(spec.model_type, spec.config, "student", kind=task.kind, **fields)
    settings |= spec.config
    if spec.path:
        check_fields(spec.path, spec.config, "student.config")
        return load_folder(spec.path, "student.path", kind=task.kind, dtype=spec.dtype, missing=missing, **settings)
    cut, key = spec.from_teacher, "student.from_teacher.path"
    assert cut is not None  # a recipe has one of the four
    source = cut_from(recipe)
    check_fields(source, spec.config, "student.config")
    teacher = load_folder(source, key, kind=task.kind, dtype=spec.dtype, missing=missing, **settings)
    return cut_out(teacher, cut.layers, cut.decoder_layers, cut.width, "student.from_teacher")


def _check_classes(recipe: Recipe, task: Task[Any]) -> None:
    """Raises where a model in a folder has a head for other classes than the task's, or has them in another order, or a teacher
    another task's head."""
    if not isinstance(task, ClassTask):
        return
    named = model_folders(recipe)
    if recipe.init_from and (Path(recipe.init_from) / "config.json").is_file():
        named["init_from"] = Path(recipe.init_from)
    for key, folder in named.items():
        task.check_folder(folder, key, heard=key.startswith("teacher"))


def check_models(student: nn.Module, inputs: Inputs) -> None:
    """Raises where the student, or a live teacher, does not fit the data as far as the task can see."""
    # The random head of a teacher that has none is heard by nobody.
    live = [None if getattr(teacher, "missing", ()) else getattr(teacher, "model", None) for teacher in inputs.teachers]
    models = {"student": student, **dict(zip(teacher_keys(len(live)), live, strict=True))}
    for key, model in models.items():
        if model is not None:
            inputs.task.check_model(model, inputs.train, key)
    for rows in (inputs.train, inputs.validation):
        check_positions(models.items(), rows, inputs.task, bool(inputs.caches))


def _freeze(student: nn.Module, names: Sequence[str]) -> None:
    for name in names:
        frozen = [p for n, p in student.named_parameters() if n == name or n.startswith(f"{name}.")]
        if not frozen:
            listed = ", ".join(n for n, _ in student.named_children())
            raise ValueError(f"student.freeze: expected modules of {type(student).__name__} ({listed}), got {name!r}")
        for parameter in frozen:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in student.parameters()):
        raise ValueError(f"student.freeze: nothing of {type(student).__name__} would train; leave a part out")


def _with_lora(student: nn.Module, spec: Lora) -> nn.Module:
    peft = need("peft", extra="lora", what="student.lora")
    config = peft.LoraConfig(
        r=spec.rank, lora_alpha=spec.alpha, lora_dropout=spec.dropout, target_modules=list(spec.modules) or None,
    )  # fmt: skip
    try:
        adapted: nn.Module = peft.get_peft_model(student, config)
    except ValueError as error:
        raise ValueError(f"student.lora.modules: {' '.join(str(error).split())[:200]}") from None
    return adapted


def save_folder(
    student: nn.Module, folder: Path, weights: dict[str, Tensor], tokenizer: Path | None = None, homes: Sequence[Path] = ()
) -> None:  # fmt: skip
    """Fills `folder`: a `transformers` model as `save_pretrained` does, any other as model.safetensors, which
    `load_state_dict(load_file(...))` takes: every weight by each of its names.

    Adapters are merged into the weights they adapt, and kept beside them in `adapter/`.
    """
    if hasattr(student, "merge_and_unload"):
        student.load_state_dict(weights, strict=False)
        with quiet(), writing_tensors(folder):
            student.save_pretrained(folder / "adapter")  # type: ignore[operator]
        student = student.merge_and_unload()  # type: ignore[operator]
        weights = {name: value.detach().cpu() for name, value in student.state_dict().items()}
    if isinstance(student, PreTrainedModel):
        doubled = tied(student)
        weights = {name: value for name, value in weights.items() if name not in doubled}
        with quiet(), writing_tensors(folder):
            student.save_pretrained(folder, state_dict=weights, max_shard_size="5GB")
    else:
        save_tensors({k: v.contiguous().clone() for k, v in weights.items()}, folder / "model.safetensors")
    if tokenizer is not None:
        copy_tokenizer(tokenizer, homes, folder)
        if isinstance(student, PreTrainedModel) and not (folder / "tokenizer_config.json").is_file():
            write_json(folder / "tokenizer_config.json", _tokenizer_config(student.config, tokenizer))


def _tokenizer_config(config: Any, tokenizer: Path) -> dict[str, Any]:
    """What `AutoTokenizer` has to know of a tokenizer by itself: without a class it takes the architecture's own."""
    known = load_tokenizer(tokenizer)[0]
    ids = {name: getattr(config, f"{name}_id", None) for name in ("eos_token", "pad_token")}
    firsts = {name: found[0] if isinstance(found, list) else found for name, found in ids.items()}
    special = known.get_added_tokens_decoder()  # of a configuration's ids, which may be its defaults
    tokens = {name: known.id_to_token(found) for name, found in firsts.items() if found in special}
    types = ["token_type_ids"] if getattr(config, "type_vocab_size", 0) > 1 else []
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", *types, "attention_mask"],
        **{name: token for name, token in tokens.items() if token is not None},
    }  # fmt: skip


def copy_tokenizer(tokenizer: Path, homes: Sequence[Path], folder: Path) -> None:
    """The file of a tokenizer, whatever it is called, with everything that belongs to it: settings, special tokens, chat
    template, each from the first of `homes` that has it."""
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    for name in _TOKENIZER_FILES:
        home = next((home for home in homes if (home / name).is_file()), None)
        if home is not None:
            shutil.copyfile(home / name, folder / name)
