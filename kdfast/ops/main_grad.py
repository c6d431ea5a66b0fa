"""`main_grad`: the float32 sum on a head to which its gradient is added in place of being returned, as Megatron keeps them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdfast.ops.rows import is_dtensor
from kdfast.ops.shards import Shards


@dataclass(frozen=True)
class ShardedMainGrad:
    """This rank's part of the sum of a head that is a DTensor.

    Args:
        sum: float32, as the weight's local tensor. weight: where its gradient goes.
        formed: placements of the gradient as this rank forms it: the partial ones are the mean over their ranks.
    """

    sum: Tensor
    weight: Any
    formed: tuple[Any, ...]

    def add(self, grad: Tensor, upstream: Tensor | None) -> None:
        """sum += upstream * grad, reduced in float32 over the ranks that hold shares of it."""
        from torch.distributed.tensor import DTensor

        mesh = self.weight.device_mesh
        ranks = math.prod(mesh.size(i) for i, p in enumerate(self.formed) if p.is_partial())
        share = grad.float() * (1 / ranks if upstream is None else upstream / ranks)
        whole = DTensor.from_local(
            share, mesh, self.formed, run_check=False, shape=self.weight.shape, stride=self.weight.stride()
        )
        self.sum.add_(whole.redistribute(placements=self.weight.placements).to_local())


MainGrad = Tensor | ShardedMainGrad


def main_grad_of(weight: Tensor, shards: Shards) -> MainGrad | None:
    """The sum of a head as the caller holds it, if it has one.

    Raises:
        ValueError: it is not float32, on another device, or shaped or sharded otherwise than the weight.
    """
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        return None
    sharded = is_dtensor(weight)
    wanted = weight.to_local() if sharded else weight  # type: ignore[attr-defined]
    own = main_grad.to_local() if is_dtensor(main_grad) else main_grad
    placed = not (sharded and is_dtensor(main_grad)) or (
        main_grad.device_mesh == weight.device_mesh and main_grad.placements == weight.placements  # type: ignore[attr-defined]
    )
    if not placed or own.dtype != torch.float32 or own.shape != wanted.shape or own.device != wanted.device:
        of_all = f" or, of all ranks, {list(weight.shape)} placed {weight.placements}" if sharded else ""  # type: ignore[attr-defined]
        got = f" placed {main_grad.placements}" if is_dtensor(main_grad) else ""
        raise ValueError(
            f"student_weight.main_grad: expected float32 {list(wanted.shape)} on {wanted.device}{of_all}, got"
            f" {main_grad.dtype} {list(main_grad.shape)} on {main_grad.device}{got}; use torch.zeros_like(weight,"
            " dtype=torch.float32)"
        )
    return ShardedMainGrad(own, weight, shards.grad_placements("student_weight", weight)) if sharded else own


def apart(weight: Tensor, main_grad: MainGrad | None) -> Tensor:
    """This rank's part of a head, cut off from the DTensor it is of where no gradient goes back to that."""
    if not isinstance(main_grad, ShardedMainGrad):
        return weight
    return weight.detach().requires_grad_(weight.requires_grad)


def add_to(main_grad: MainGrad, grad: Tensor, upstream: Tensor | None) -> None:
    """main_grad += upstream * grad, upstream None: 1."""
    if isinstance(main_grad, ShardedMainGrad):
        main_grad.add(grad, upstream)
    elif upstream is None:
        main_grad.add_(grad)
    else:
        main_grad.addcmul_(grad, upstream)
