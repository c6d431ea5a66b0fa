"""A smaller model cut out of a larger one: some of its layers, the leading channels of each."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

#: What configs call their depth: (of a decoder-only model, an encoder, or both at once; of a decoder).
_DEPTH = ("num_hidden_layers", "n_layer", "encoder_layers", "num_layers", "n_layers")
_DECODER_DEPTH = ("decoder_layers", "num_decoder_layers")
_WIDTH = ("hidden_size", "n_embd", "d_model", "dim")
_HEADS = ("num_attention_heads", "n_head", "encoder_attention_heads", "n_heads", "num_heads")
_KV_HEADS = ("num_key_value_heads",)
_INNER = ("intermediate_size", "n_inner", "encoder_ffn_dim", "hidden_dim", "d_ff")


@torch.no_grad()
def cut_out(
    model: nn.Module, layers: Sequence[int] | None, decoder_layers: Sequence[int] | None, width: int | None, key: str
) -> nn.Module:
    """An ordinary `transformers` model of the same class with the layers named, in that order, and `width` channels.

    Narrower: every weight keeps its leading entries along each dimension that shrinks; heads and inner sizes shrink in
    proportion to the width, heads keep their size.

    Raises:
        ValueError: a layer that is not there, or a width that does not fit; names `key`.
    """
    config: Any = copy.deepcopy(model.config)
    stacks = _stacks(model)
    chosen: dict[str, Sequence[int]] = {}
    for option, names, wanted in (("layers", _DEPTH, layers), ("decoder_layers", _DECODER_DEPTH, decoder_layers)):
        if wanted is None:
            continue
        name = next((n for n in names if hasattr(config, n)), None)
        stack = _stack_for(stacks, option, config.is_encoder_decoder)
        if name is None or stack is None:
            raise ValueError(f"{key}.{option}: {type(model).__name__} has no such layers")
        depth = len(stacks[stack])
        wrong = [i for i in wanted if not 0 <= i < depth]
        if wrong or not wanted:
            raise ValueError(f"{key}.{option}: expected layers from 0 to {depth - 1}, got {wrong[0] if wrong else 'none'}")
        chosen[stack] = wanted
        setattr(config, name, len(wanted))
        if option == "layers" and getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[i] for i in wanted]
    if width is not None:
        _narrow(config, width, key)
    student: Any = type(model)(config).to(next(model.parameters()).dtype)
    source = model.state_dict()
    for name, target in student.state_dict().items():
        target.copy_(_leading(source[_name_in(name, chosen)], target.shape))
    student.tie_weights()
    return student


def _stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Name -> list of layers, the longest lists first met in their module."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return {name: module for name, module in found.items() if not any(name.startswith(f"{other}.") for other in found)}


def _stack_for(stacks: dict[str, nn.ModuleList], option: str, encoder_decoder: bool) -> str | None:
    word = "decoder" if option == "decoder_layers" else "encoder" if encoder_decoder else ""
    able = [name for name in stacks if word in name]
    return max(able, key=lambda name: len(stacks[name]), default=None)


def _name_in(name: str, chosen: dict[str, Sequence[int]]) -> str:
    """The name in the larger model of what is `name` in the smaller."""
    for stack, layers in chosen.items():
        match = re.fullmatch(rf"{re.escape(stack)}\.(\d+)\.(.*)", name)
        if match:
            return f"{stack}.{layers[int(match[1])]}.{match[2]}"
    return name


def _narrow(config: Any, width: int, key: str) -> None:
    names = {role: next((n for n in options if getattr(config, n, None) is not None), None)
             for role, options in (("width", _WIDTH), ("heads", _HEADS), ("kv", _KV_HEADS), ("inner", _INNER))}  # fmt: skip
    if names["width"] is None or names["heads"] is None:
        raise ValueError(f"{key}.width: {type(config).__name__} says no hidden size")
    whole, heads = getattr(config, names["width"]), getattr(config, names["heads"])
    size = getattr(config, "head_dim", None) or whole // heads
    if not 0 < width <= whole or width % size:
        raise ValueError(f"{key}.width: expected a multiple of the head size {size} up to {whole}, got {width}")
    kv = getattr(config, names["kv"]) if names["kv"] else heads
    fewer = width // size
    fewer_kv = max(1, fewer * kv // heads)
    if fewer % fewer_kv:
        fewer_kv = next(n for n in range(fewer_kv, 0, -1) if fewer % n == 0)
    setattr(config, names["width"], width)
    setattr(config, names["heads"], fewer)
    if names["kv"]:
        setattr(config, names["kv"], fewer_kv)
    if names["inner"]:
        setattr(config, names["inner"], max(8, getattr(config, names["inner"]) * width // whole // 8 * 8))


def _leading(weight: Tensor, shape: torch.Size) -> Tensor:
    return weight[tuple(slice(0, n) for n in shape)]
