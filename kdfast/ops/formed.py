"""Autograd of ops that form their gradients beside the loss: `OP(*tensors, ..., backend, *needs) -> loss, *grads`.

The first len(needs) inputs are those that get a gradient, in the order of `needs` and `grads`; a gradient may come in
float32 where its input is narrower. Two modes, as everywhere: in forward (backward scales what was formed) and in
backward (the op runs again with the incoming gradient folded into the row scale, for per-row losses and for float16,
where a gradient of 1/N would underflow before the loss scale reaches it).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast.ops import rows
from kdfast.ops.autograd import known_signature, save, saved
from kdfast.ops.scale import scale_grad


def _in_their_dtypes(ctx: Any, grads: tuple[Tensor, ...], unused: int) -> tuple[Tensor | None, ...]:
    wanted = (g.to(d) if need else None for g, d, need in zip(grads, ctx.dtypes, ctx.needs, strict=True))
    return *(None,) * unused, *wanted, *(None,) * (len(ctx.needs_input_grad) - unused - len(ctx.needs))


def _dtypes(tensors: tuple[Tensor | None, ...]) -> list[torch.dtype]:
    return [torch.float32 if x is None else x.dtype for x in tensors]


class InForward(torch.autograd.Function):
    """`InForward.apply(op name, number of needs, *inputs of the op)` -> (sum of the loss, *grads)."""

    @staticmethod
    @known_signature
    def forward(name: str, n_needs: int, *inputs: Any) -> tuple[Tensor, ...]:
        loss, *grads = getattr(torch.ops.kdfast, name)(*inputs)
        return loss.sum(), *grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, n_needs, *rest = inputs
        _, *grads = output
        ctx.mark_non_differentiable(*grads)
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.needs = rest[-n_needs - 1], rest[-n_needs:]
        ctx.dtypes = _dtypes(tuple(rest[:n_needs]))
        ctx.save_for_backward(*grads)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        grads = tuple(
            scale_grad(g, upstream, ctx.backend) if need else g for g, need in zip(ctx.saved_tensors, ctx.needs, strict=True)
        )
        return _in_their_dtypes(ctx, grads, 2)


class InBackward(torch.autograd.Function):
    """`InBackward.apply(op name, number of needs, number of tensors, *inputs of the op)` -> loss per row.

    The last of the tensors is the row scale.
    """

    @staticmethod
    @known_signature
    def forward(name: str, n_needs: int, n_tensors: int, *inputs: Any) -> Tensor:
        loss, *_ = getattr(torch.ops.kdfast, name)(*inputs[:-n_needs], *(False,) * n_needs)
        return loss

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name, n_needs, n_tensors, *rest = inputs
        ctx.set_materialize_grads(False)
        ctx.scalars, ctx.needs = rest[n_tensors:-n_needs], rest[-n_needs:]
        ctx.dtypes = _dtypes(tuple(rest[:n_needs]))
        save(ctx, *rest[:n_tensors])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        *tensors, scale = saved(ctx)
        scale = rows.folded(scale, upstream)
        _, *grads = getattr(torch.ops.kdfast, ctx.name)(*tensors, scale, *ctx.scalars, *ctx.needs)
        return _in_their_dtypes(ctx, tuple(grads), 3)
