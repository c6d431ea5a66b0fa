"""Queries and keys of `transformers` models, captured while they run their fast attention.

Attention losses need scores, not maps: q k^T from the queries and keys that enter the attention function, rotary positions
applied. `transformers` looks that function up by name in a registry for every layer; a capture registers one that notes
its query and key and calls the original. No class is changed, and nothing is asked of the model but that it uses the
registry.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_PREFIX = "kdfast_"
#: How cross-attention modules are called: `crossattention`, `cross_attn`, `encoder_attn`, `EncDecAttention`.
_CROSS = ("cross", "encoder_attn", "encdec")


@dataclass(frozen=True)
class QueryKey:
    """What one attention layer compared.

    Args:
        name: the attention module's name in the model, such as "encoder.layer.0.attention.self".
        kind: "self" or "cross".
        layer: its number in its stack, from 0 (encoder and decoder count by themselves); None if it has none.
        query: `[B, H, Lq, D]`. key: `[B, Hkv, Lk, D]`, Hkv may be smaller (grouped). Part of the autograd graph.
        scale: what the model multiplies query @ key^T by.
        causal: the module masks what comes later.
    """

    name: str
    kind: str
    layer: int | None
    query: Tensor
    key: Tensor
    scale: float
    causal: bool


class Capture:
    """Collects one `QueryKey` per attention call of a model, in the order the layers run."""

    def __init__(self, layers: Collection[int] | None, kinds: Collection[str]) -> None:
        self._layers, self._kinds = layers, kinds
        self._seen: list[QueryKey] = []

    def take(self) -> list[QueryKey]:
        """What the forward passes since the last `take` compared; the capture keeps no reference to it."""
        seen, self._seen = self._seen, []
        return seen

    def _note(self, name: str, module: nn.Module, query: Tensor, key: Tensor, options: dict[str, Any]) -> None:
        layer = _layer(name, module)
        kind = "cross" if any(word in f"{name} {type(module).__name__}".lower() for word in _CROSS) else "self"
        if kind not in self._kinds or (self._layers is not None and layer not in self._layers):
            return
        scale = options.get("scaling")
        causal = options.get("is_causal")
        self._seen.append(
            QueryKey(
                name=name,
                kind=kind,
                layer=layer,
                query=query,
                key=key,
                scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
                causal=kind == "self" and bool(getattr(module, "is_causal", False) if causal is None else causal),
            )
        )


def _layer(name: str, module: nn.Module) -> int | None:
    """`layer_idx` where the model keeps it, else the first number in the module's name."""
    layer = getattr(module, "layer_idx", None)
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(number.group(1)) if layer is None and number else layer


#: Attention modules of the models being captured: id -> (capture, name). A module leaves when its capture ends.
_watched: dict[int, tuple[Capture, str]] = {}


def _noting(implementation: str) -> Callable[..., Any]:
    """The attention function that is registered beside `implementation`."""

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
        watched = _watched.get(id(module))
        # Activation checkpointing runs a layer again inside backward: it was noted the first time.
        if watched is not None and torch._C._current_graph_task_id() == -1:
            capture, name = watched
            capture._note(name, module, query, key, options)
        return _original(type(module), implementation)(module, query, key, value, *args, **options)

    return attention


def _original(kind: type[nn.Module], implementation: str) -> Callable[..., Any]:
    """The attention function a model class means by `implementation`: its own file may have its own registry."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for cls in kind.__mro__:
        own = getattr(sys.modules.get(cls.__module__), "ALL_ATTENTION_FUNCTIONS", None)
        if own is not None and implementation in own:
            return own[implementation]
    return ALL_ATTENTION_FUNCTIONS[implementation]


def _register(implementation: str) -> str:
    """Name of the noting twin of `implementation`, with the same masks."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = _PREFIX + implementation
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _noting(implementation))
        if implementation in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name


def check_capturable(model: nn.Module) -> None:
    """Raises ValueError where a model's queries and keys cannot be captured."""
    try:
        from transformers import PreTrainedModel
        from transformers.masking_utils import AttentionMaskInterface  # noqa: F401  (the newest part that is needed)
    except ImportError as error:
        raise ImportError(
            f"capture_attention: expected transformers >= 4.53, got {error}; pip install -U transformers"
        ) from None
    found = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    if not found:
        raise ValueError(f"model: expected a transformers model or a module that holds one, got {type(model).__name__}")
    for module in found:
        able = getattr(module, "_can_set_attn_implementation", None)
        if able is not None and not able():
            raise ValueError(
                f"model: {type(module).__name__} does not look its attention up in transformers' AttentionInterface"
            )


def _configs(model: nn.Module) -> list[Any]:
    """Every config a module of the model reads, parents before the sub-configs they pass a setting down to."""
    found: dict[int, Any] = {}

    def add(config: Any) -> None:
        if id(config) in found or not hasattr(config, "_attn_implementation"):
            return
        found[id(config)] = config
        for key in getattr(config, "sub_configs", ()):
            add(getattr(config, key, None))

    for module in model.modules():
        add(getattr(module, "config", None))
    return list(found.values())


@contextlib.contextmanager
def capture_attention(
    model: nn.Module, *, layers: Collection[int] | None = None, kinds: Collection[str] = ("self", "cross")
) -> Iterator[Capture]:
    """Within the block every forward pass of `model` leaves the queries and keys of its attention layers in the capture.

        with capture_attention(student) as s, capture_attention(teacher) as t:
            student(**batch)
            with torch.no_grad():
                teacher(**batch)
            for a, b in zip(s.take(), t.take()):
                loss = loss + attention_mse(a.query, a.key, b.query, b.key, scale_s=a.scale, scale_t=b.scale,
                                            query_mask=mask, key_mask=mask, causal=a.causal)

    The scores of a layer are `scale * query @ key.transpose(-1, -2)`, before its mask, soft cap and position bias (T5 adds
    one; it is not in them). `docs/transformers.md` lists the models this was tested with.

    Args:
        model: a `transformers` model, or a module that holds some (DDP, a wrapper), running sdpa or flash attention.
        layers: numbers of the layers to keep, None for all; others cost nothing.
        kinds: "self", "cross" or both.

    What was captured and not taken is dropped when the block ends, and the model is as before. Layers that activation
    checkpointing runs again in backward are noted once. A compiled model compiles once more for its capturing form.

    Raises:
        ValueError: the model runs eager attention, does not use the registry, or is being captured already; unknown kinds.
        ImportError: transformers is missing or older than 4.53.
    """
    wrong = [kind for kind in kinds if kind not in ("self", "cross")]
    if wrong:
        raise ValueError(f"kinds: expected self, cross or both, got {wrong[0]!r}")
    check_capturable(model)
    if any(id(module) in _watched for module in model.modules()):
        raise ValueError("model: expected one that is not being captured, got one inside its own capture_attention block")
    configs = _configs(model)
    before = [config._attn_implementation for config in configs]
    if "eager" in before:
        raise ValueError(
            "model: expected fast attention (sdpa or flash), got eager; call model.set_attn_implementation('sdpa') first"
        )
    capture = Capture(layers, kinds)
    # Children after parents: a config hands its setting down to its sub-configs, which may have had another.
    twins = [None if name is None else _register(name) for name in before]
    try:
        for config, twin in zip(configs, twins, strict=True):
            config._attn_implementation = twin
        _watched.update((id(module), (capture, name)) for name, module in model.named_modules())
        yield capture
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
        for module in model.modules():
            _watched.pop(id(module), None)
        capture.take()
