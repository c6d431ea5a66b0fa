"""Scaling a gradient that was formed in the forward pass by the incoming gradient, without asking the host."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast import dispatch

_lib = torch.library.Library("kdfast", "FRAGMENT")
_lib.define("scale(Tensor grad, Tensor upstream, str backend) -> Tensor")
_lib.define("scale_(Tensor(a!) grad, Tensor upstream, str backend) -> ()")


@torch.library.impl(_lib, "scale", "CompositeExplicitAutograd")
def _scale(grad: Tensor, upstream: Tensor, backend: str) -> Tensor:
    if grad.device.type == "cpu":  # torch multiplies half values by a number of no dimensions in float32
        return torch.mul(grad, upstream)
    # Elsewhere it would round such a number to the dtype of the other side first; one of one dimension it does not.
    return torch.mul(grad, upstream.reshape(1), out=torch.empty_like(grad))


@torch.library.impl(_lib, "scale_", "CompositeExplicitAutograd")
def _scale_in_place(grad: Tensor, upstream: Tensor, backend: str) -> None:
    dispatch.kernel("scale", backend).scale_(grad, upstream)


@torch.library.register_fake("kdfast::scale", lib=_lib)
def _scale_fake(grad: Tensor, upstream: Tensor, backend: str) -> Tensor:
    return torch.empty_like(grad)


@torch.library.register_fake("kdfast::scale_", lib=_lib)
def _scale_in_place_fake(grad: Tensor, upstream: Tensor, backend: str) -> None:
    return None


def _graph_is_kept() -> bool:
    """Whether backward may run again over this graph, so that a saved gradient must survive."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())


def scale_grad(grad: Tensor, upstream: Tensor, backend: str) -> Tensor:
    """grad * upstream: in place when the graph is done with, a copy when it is kept or being compiled."""
    if torch.compiler.is_compiling() or _graph_is_kept():
        return torch.ops.kdfast.scale(grad, upstream, backend)
    # On a CPU looking at the number costs nothing, and it is 1 whenever the loss itself is differentiated.
    if upstream.device.type == "cpu" and upstream.item() == 1:
        return grad
    torch.ops.kdfast.scale_(grad.detach(), upstream, backend)
    return grad
