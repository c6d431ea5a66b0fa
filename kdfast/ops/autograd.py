"""What the ops and their `torch.autograd.Function`s share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_F = TypeVar("_F", bound=Callable[..., Any])


def known_signature(forward: _F) -> _F:
    """The same function, its signature worked out once: `Function.apply` asks `inspect` for it in every call, 20 us of a loss
    on short rows, and several times as much when Python's code has left the caches."""
    forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return forward


def outside_autocast(op: _F) -> _F:
    """The implementation of an op, run with autocast off: what it multiplies in float32 would be rounded to halves there, and
    what is kept across calls would stay so. What autocast wants of a head is an argument of its op, worked out before.
    """

    @functools.wraps(op)
    def run(first: Tensor, *rest: Any) -> Any:
        device = first.device.type
        if not torch.is_autocast_enabled(device):
            return op(first, *rest)
        with torch.autocast(device, enabled=False):
            return op(first, *rest)

    return run  # type: ignore[return-value]


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """`ctx.save_for_backward`, for tensors made under `torch.inference_mode()` too, as a teacher's often are: autograd refuses
    to save those, having no version counter to watch, so that they are held beside."""
    if torch.compiler.is_compiling():  # the compiler saves what its graph needs
        ctx.unwatched = [None] * len(tensors)
        ctx.save_for_backward(*tensors)
        return
    ctx.unwatched = [x if x is not None and x.is_inference() else None for x in tensors]
    ctx.save_for_backward(*(x if held is None else None for x, held in zip(tensors, ctx.unwatched, strict=True)))


def saved(ctx: Any) -> list[Any]:
    """What `save` was given."""
    return [x if held is None else held for x, held in zip(ctx.saved_tensors, ctx.unwatched, strict=True)]
