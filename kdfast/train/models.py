"""Students and teachers: built, loaded, saved. Weights travel as safetensors only."""

from __future__ import annotations

import contextlib
import importlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from kdfast.strict import unknown_key
from kdfast.train.recipe import Model, Teacher


def logits_of(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """`[B, L, V]` logits of a module that returns them, or an output that has them."""
    extra = {} if attention_mask is None else {"attention_mask": attention_mask}
    if isinstance(model, PreTrainedModel):
        extra["use_cache"] = False  # type: ignore[assignment]
    output = model(input_ids=input_ids, **extra)
    return output if isinstance(output, Tensor) else output.logits


def vocab_of(model: nn.Module) -> int | None:
    """The model's vocabulary size where it says so."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    return int(size) if size is not None else None


def build_student(spec: Model, vocab_size: int | None) -> nn.Module:
    """The student a recipe describes, in float32; draws its weights from torch's global generator."""
    if spec.function:
        return _call(spec.function, spec.arguments, "student.function")
    if spec.path:
        return load_folder(spec.path, "student.path")
    model_type = spec.model_type or ""
    if model_type not in CONFIG_MAPPING:
        raise ValueError(unknown_key(f"student.model_type {model_type!r}", model_type, list(CONFIG_MAPPING.keys())))
    known = CONFIG_MAPPING[model_type]().to_dict()
    for key in spec.config:
        if key not in known:
            raise ValueError(unknown_key(f"student.config.{key}", key, known))
    fields = {**({} if vocab_size is None else {"vocab_size": vocab_size}), **spec.config}
    # Token ids of the architecture's own tokenizer mean nothing here and may lie outside the vocabulary.
    fields = {**{k: None for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in known}, **fields}
    config = AutoConfig.for_model(model_type, **fields)
    try:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, TypeError) as error:
        raise ValueError(f"student: {model_type} does not make a causal language model: {error}") from None


def build_teacher(spec: Teacher) -> nn.Module:
    """The live teacher a recipe names: evaluation mode, no gradients."""
    if spec.function:
        model = _call(spec.function, spec.arguments, "teacher.function")
    else:
        model = load_folder(spec.path or "", "teacher.path")
    return model.eval().requires_grad_(False)


def load_folder(path: str | Path, key: str) -> nn.Module:
    """The causal language model in a local folder, in float32; never reaches for a network."""
    if not (Path(path) / "config.json").is_file():
        raise ValueError(f"{key}: expected a folder with config.json and safetensors weights, got {str(path)!r}")
    with _no_bars():
        return AutoModelForCausalLM.from_pretrained(path, local_files_only=True, use_safetensors=True, dtype=torch.float32)


def load_weights(model: nn.Module, path: str | Path, key: str = "init_from") -> None:
    """Puts the weights of a folder or a safetensors file into `model`; every one must fit."""
    file = Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(f"{key}: expected a safetensors file or a folder with model.safetensors, got {str(path)!r}")
    try:
        load_model(model, str(file))
    except RuntimeError as error:
        first = " ".join(str(error).split())
        raise ValueError(f"{key}: the weights in {file} do not fit the student: {first[:300]}") from None


def save_folder(model: nn.Module, folder: Path, weights: dict[str, Tensor], tokenizer: Path | None = None) -> None:
    """Fills `folder`: a `transformers` model as `save_pretrained` does, any other as model.safetensors."""
    if isinstance(model, PreTrainedModel):
        with _no_bars():
            model.save_pretrained(folder, state_dict=weights, max_shard_size="1TB")
    else:
        save_file({k: v.contiguous().clone() for k, v in weights.items()}, folder / "model.safetensors")
    if tokenizer is not None:
        shutil.copyfile(tokenizer, folder / "tokenizer.json")


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """transformers draws a bar for every file it touches, even when the output is piped."""
    was = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was:
            transformers_logging.enable_progress_bar()


def _call(name: str, arguments: dict[str, Any], key: str) -> nn.Module:
    module_name, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f"{key}: expected module:function, got {name!r}")
    try:
        make = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{key}: {name!r} cannot be imported: {error}") from None
    model = make(**arguments)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{key}: expected {name!r} to return an nn.Module, got {type(model).__name__}")
    return model
