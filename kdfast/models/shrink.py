"""A smaller model cut out of a larger one: some of its layers, the leading channels of each."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

#: What configs call their depth: (of a decoder-only model, an encoder, or both at once; of a decoder).
_DEPTH = ("num_hidden_layers", "n_layer", "encoder_layers", "num_layers", "n_layers")
_DECODER_DEPTH = ("decoder_layers", "num_decoder_layers")
_WIDTH = ("hidden_size", "n_embd", "d_model", "dim")
_HEADS = ("num_attention_heads", "n_head", "encoder_attention_heads", "n_heads", "num_heads", "decoder_attention_heads")
_INNER = ("intermediate_size", "n_inner", "encoder_ffn_dim", "hidden_dim", "d_ff", "decoder_ffn_dim")
#: Types of model whose weights are known channel by channel: heads one after another, nothing fused but GPT-2's `c_attn`.
_NARROWED = ("bart", "bert", "distilbert", "gpt2", "llama", "marian", "mbart", "mistral", "qwen2", "qwen3", "roberta", "t5")
#: Weights of grouped attention with one row (or column, of the output) for each channel of a query head.
_QUERY_ROWS, _QUERY_COLUMNS = ("q_proj.weight", "q_proj.bias"), ("self_attn.o_proj.weight",)


@torch.no_grad()
def cut_out(
    model: nn.Module, layers: Sequence[int] | None, decoder_layers: Sequence[int] | None, width: int | None, key: str
) -> nn.Module:
    """An ordinary `transformers` model of the same class with the layers named, in that order, and `width` channels.

    Narrower: every weight keeps its leading entries along each dimension that shrinks, of fused weights each block; heads and
    inner sizes shrink in proportion to the width, heads keep their size, and query heads of a group stay with their keys.

    Raises:
        ValueError: a layer that is not there, a width that does not fit, or an architecture whose weights are not known well
            enough to be narrowed; names `key`.
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
        if getattr(config, name) != depth:
            raise ValueError(
                f"{key}.{option}: the {getattr(config, name)} layers of {type(model).__name__} share {depth} set of weights,"
                " none can be chosen; leave it out"
            )
        wrong = [i for i in wanted if not 0 <= i < depth]
        if wrong or not wanted:
            raise ValueError(f"{key}.{option}: expected layers from 0 to {depth - 1}, got {wrong[0] if wrong else 'none'}")
        chosen[stack] = wanted
        setattr(config, name, len(wanted))
        if option == "layers" and getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[i] for i in wanted]
    if width is not None and width != getattr(model.config, "hidden_size", None):
        _narrow(config, width, key)
    student = type(model)(config)
    cast_weights(student, next(model.parameters()).dtype)
    source = model.state_dict()
    # What is formed anew whenever the model is loaded is the student's own: sines of positions depend on the width.
    anew = set(getattr(student, "_keys_to_ignore_on_save", None) or ())
    targets = {name: target for name, target in student.state_dict().items() if name not in anew}
    origins = {name: _name_of_first(_name_in(name, chosen), source) for name in targets}
    _check_layers(origins, source, chosen, f"{key}.layers")
    for name, target in targets.items():
        target.copy_(_cut(origins[name], source, target.shape, model.config, config))
    student.tie_weights()  # type: ignore[operator]
    if getattr(model, "generation_config", None) is not None:  # which ids end a text may stand there alone
        student.generation_config = copy.deepcopy(model.generation_config)
    return student


def cast_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Parameters and stored buffers in `dtype`, in place.

    Unlike `module.to(dtype)` it leaves what is not stored, such as the frequencies of rotary positions, in the precision it
    was formed in, as `from_pretrained` does; and batch norms, whose running means would lose their updates.
    """
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            continue
        for parameter in child.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for name, buffer in child.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in child._non_persistent_buffers_set:
                child._buffers[name] = buffer.to(dtype)


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


def _check_layers(origins: dict[str, str], source: dict[str, Tensor], chosen: dict[str, Sequence[int]], key: str) -> None:
    """Raises where a layer has weights that it cannot have in its new place, or lacks some that it has to have there."""
    lacking = next((origin for origin in origins.values() if origin not in source), None)
    if lacking is not None:
        raise ValueError(f"{key}: the larger model has no {lacking}, which a layer has in that place; keep layer 0 the first")
    taken = set(origins.values())
    for stack, layers in chosen.items():
        for layer in layers:
            lost = next((name for name in source if name.startswith(f"{stack}.{layer}.") and name not in taken), None)
            if lost is not None:
                raise ValueError(f"{key}: {lost} would be lost, a layer has none in its new place; keep layer 0 the first")


def _narrow(config: Any, width: int, key: str) -> None:
    """Sets the width, and heads and inner sizes in proportion to it."""
    if config.model_type not in _NARROWED:
        raise ValueError(
            f"{key}.width: expected a model of type {', '.join(_NARROWED)}, got {config.model_type}, whose weights may be"
            " fused; leave width out, layers can be chosen of any"
        )
    whole, heads = config.hidden_size, config.num_attention_heads
    step = whole // math.gcd(whole, heads)
    if not 0 < width <= whole or width % step:
        raise ValueError(f"{key}.width: expected a multiple of {step} (whole heads) up to {whole}, got {width}")
    sizes = {name: getattr(config, name) for name in (*_WIDTH, *_HEADS, *_INNER) if getattr(config, name, None) is not None}
    groups = getattr(config, "num_key_value_heads", None)
    for name, value in sizes.items():
        setattr(config, name, max(value * width // whole, 1))
    if groups:
        fewer, per_group = heads * width // whole, heads // groups
        able = [n for n in range(1, groups + 1) if fewer % n == 0 and fewer // n <= per_group]
        # Whole groups where that is possible, else the most key heads that each serve as many query heads.
        exact = fewer // per_group if fewer % per_group == 0 else 0
        if not able:
            raise ValueError(f"{key}.width: {fewer} query heads cannot share the keys of {groups} groups of {per_group} evenly")
        config.num_key_value_heads = exact or able[-1]


def _name_of_first(name: str, source: dict[str, Tensor]) -> str:
    """T5 keeps the positions of all layers in the first one: it stands in for whichever layer comes first now."""
    return name if name in source else re.sub(r"\.block\.\d+\.", ".block.0.", name)


def _cut(name: str, source: dict[str, Tensor], shape: torch.Size, large: Any, small: Any) -> Tensor:
    """The part of a weight that the smaller model keeps."""
    weight = source[name]
    if weight.shape == shape:
        return weight
    if re.search(r"attn\.c_attn\.(weight|bias)$|crossattention\.c_attn\.(weight|bias)$", name):
        # Query, key and value (of cross-attention key and value) side by side along the last dimension.
        blocks = weight.shape[-1] // large.hidden_size
        parts = [_leading(part, torch.Size((*shape[:-1], shape[-1] // blocks))) for part in weight.chunk(blocks, -1)]
        return torch.cat(parts, -1)
    if getattr(large, "num_key_value_heads", None) and name.endswith((*_QUERY_ROWS, *_QUERY_COLUMNS)):
        dim = 1 if name.endswith(_QUERY_COLUMNS) else 0
        size = weight.shape[dim] // large.num_attention_heads
        per_group = large.num_attention_heads // large.num_key_value_heads
        fewer = small.num_attention_heads // small.num_key_value_heads
        heads = torch.tensor([g * per_group + i for g in range(small.num_key_value_heads) for i in range(fewer)])
        weight = weight.index_select(dim, (heads[:, None] * size + torch.arange(size)).flatten().to(weight.device))
    return _leading(weight, shape)


def _leading(weight: Tensor, shape: torch.Size) -> Tensor:
    return weight[tuple(slice(0, n) for n in shape)]
