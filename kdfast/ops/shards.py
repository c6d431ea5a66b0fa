"""What callers hold on several ranks: plain tensors, beside a `tp_group` or not, and DTensors, which know their layout.

A layout is not a meaning. `Shard(0)` on a head is a slice of the vocabulary under tensor parallelism, where all ranks compute
the loss of the same rows together; it is storage and nothing else under FSDP, where each rank has rows of its own. Logits that
are DTensors are one tensor of all ranks, and so are hidden states; a head says nothing of whose rows it meets. So it is taken
for slices only over the mesh dimension that is known for tensor parallelism: that of `tp_group`, one named so, or the one over
which the hidden states are a DTensor as well. Every other is gathered: right whatever the rows are, at the cost of memory.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from kdfast.ops import parallel
from kdfast.ops.rows import is_dtensor

_TENSOR_PARALLEL = re.compile(r"(^|_)tp($|_)|tensor", re.IGNORECASE)


class _ScaledGrad(torch.autograd.Function):
    """x, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class Shards:
    """Turns arguments into this rank's plain tensors, and finds the one group over which the vocabulary is sliced.

    Args:
        tp_group: the caller's process group: plain tensors are slices then. None: only DTensors can be sliced.
        hidden: the student's hidden states, where there are heads.
    """

    def __init__(self, tp_group: Any, hidden: Any = None) -> None:
        self.given = "" if tp_group is None else parallel.name_of(tp_group)
        self.group = self.given
        self._hidden_mesh = hidden.device_mesh if is_dtensor(hidden) else None
        self._from_dtensors = self._seen = False
        self._step: int | None = None

    @property
    def from_dtensors(self) -> bool:
        """Whether a DTensor said how the vocabulary is sliced."""
        return self._from_dtensors

    def slice(self, name: str, x: Any, dim: int) -> Any:
        """This rank's slice of logits `x`, whose vocabulary is dimension `dim`.

        Raises:
            ValueError: a DTensor is sharded otherwise than over the vocabulary and one mesh dimension, or not like the others.
        """
        if not is_dtensor(x):
            return self._plain(name, x)
        sliced = [i for i, p in enumerate(x.placements) if p.is_shard(dim % x.ndim)]
        rest = [p for i, p in enumerate(x.placements) if i not in sliced]
        if len(sliced) > 1 or not all(p.is_replicate() for p in rest):
            raise ValueError(
                f"{name}: expected Shard({dim % x.ndim}) on at most one mesh dimension and Replicate on the others,"
                f" got {x.placements}; redistribute it, or pass local tensors and tp_group"
            )
        self._join(name, x, dim, sliced[0] if sliced else None)
        return x.to_local(grad_placements=x.placements)

    def head(self, name: str, x: Any) -> Any:
        """This rank's slice of a head `x` (weight or bias, the vocabulary is dimension 0), or all of it where none is sliced.

        The gradient of what was gathered is the ranks' mean, as FSDP gives every other parameter: with rows of their own it is
        that of the mean of their losses, with the same rows on all ranks it is that of any of them.

        Raises:
            ValueError: a DTensor is not sharded over `tp_group`, or not like the others.
        """
        if not is_dtensor(x):
            return self._plain(name, x)
        from torch.distributed.tensor import Replicate, Shard

        at = self._tensor_parallel_dim(name, x)
        self._join(name, x, 0, at)
        whole: list[Any] = [Replicate()] * x.device_mesh.ndim
        if at is not None:
            whole[at] = Shard(0)
        return _redistributed(x, whole, list(self.grad_placements(name, x)))

    def grad_placements(self, name: str, x: Any) -> tuple[Any, ...]:
        """How the gradient of a DTensor's `head` lies on the ranks before it is reduced; partial ones are to be averaged."""
        from torch.distributed.tensor import Partial, Shard

        at, same_rows = self._tensor_parallel_dim(name, x), self._hidden_mesh == x.device_mesh
        grads: list[Any] = [p if same_rows and p.is_replicate() else Partial() for p in x.placements]
        if at is not None:
            grads[at] = Shard(0)
        return tuple(grads)

    def _tensor_parallel_dim(self, name: str, x: Any) -> int | None:
        mesh, names = x.device_mesh, x.device_mesh.mesh_dim_names or ()
        sharded = [i for i, p in enumerate(x.placements) if _shards_first(p)]
        if self.given:
            of_group = [i for i in range(mesh.ndim) if parallel.name_of(mesh.get_group(i)) == self.given]
            if of_group and of_group[0] not in sharded:
                raise ValueError(
                    f"{name}: expected Shard(0) on mesh dimension {of_group[0]}, that of tp_group, got {x.placements};"
                    " redistribute it, or leave tp_group out"
                )
            return of_group[0] if of_group else None
        named = [i for i in sharded if i < len(names) and _TENSOR_PARALLEL.search(names[i])]
        if len(named) > 1:
            raise ValueError(
                f"{name}: expected the vocabulary to be sliced over one mesh dimension, got {[names[i] for i in named]};"
                " pass tp_group"
            )
        if named:
            return named[0]
        return sharded[0] if len(sharded) == 1 and self._hidden_mesh == mesh else None

    def _plain(self, name: str, x: Any) -> Any:
        if self.group and not self.given:
            raise ValueError(f"{name}: expected a DTensor sharded over its vocabulary like the student's, got a tensor")
        self._seen = True
        return x

    def _join(self, name: str, x: Any, dim: int, mesh_dim: int | None) -> None:
        """Notes over which group `x` is sliced, and raises where the others are sliced otherwise."""
        group = "" if mesh_dim is None else parallel.name_of(x.device_mesh.get_group(mesh_dim))
        # Under `tp_group` a tensor on another mesh is a slice that others stored, like a plain one.
        stored = mesh_dim is None and self.given and not self._covers(x)
        if not stored and group != self.group and (self.given or self._seen):
            raise ValueError(
                f"{name}: expected to be sliced over the group {self.group!r} like the others, got {group!r};"
                " redistribute it, or name the mesh dimension of tensor parallelism 'tp' on every side"
            )
        self.group, self._seen = self.group if stored else group, True
        if mesh_dim is None:
            return
        self._from_dtensors = True
        vocab, ranks = x.shape[dim], x.device_mesh.size(mesh_dim)
        step = -(-vocab // ranks)
        if self._step is not None and step != self._step:
            longest = max(step, self._step) * ranks
            raise ValueError(
                f"{name}: expected slices of {self._step} ids on every rank like the others, got {step} ({vocab} ids over"
                f" {ranks} ranks); {parallel.equal_slices(longest, ranks)}"
            )
        self._step = step

    def _covers(self, x: Any) -> bool:
        return self.given in {parallel.name_of(x.device_mesh.get_group(i)) for i in range(x.device_mesh.ndim)}

    def whole(self, name: str, x: Any, *, partial_grad: bool = False) -> Any:
        """All of `x`, which every rank holds; a plain tensor stays as it is.

        Args:
            partial_grad: this rank's gradient is its slice's share, which DTensor adds up over the ranks.
        """
        if not is_dtensor(x):
            return x
        from torch.distributed.tensor import Partial, Replicate

        mesh = x.device_mesh
        placements = [Replicate()] * mesh.ndim
        grads: list[Any] = list(placements)
        if partial_grad:
            sliced = [i for i in range(mesh.ndim) if parallel.name_of(mesh.get_group(i)) == self.group]
            if not sliced:
                raise ValueError(f"{name}: expected the device mesh of the student's head, got {mesh}")
            grads[sliced[0]] = Partial()
        return x.redistribute(placements=placements).to_local(grad_placements=grads)


def gathered(x: Any) -> Any:
    """All of a weight, whose gradient is the ranks' mean as in `Shards.head`; a plain tensor stays as it is."""
    if not is_dtensor(x):
        return x
    from torch.distributed.tensor import Partial, Replicate

    return _redistributed(x, [Replicate()] * x.device_mesh.ndim, [Partial()] * x.device_mesh.ndim)


def _redistributed(x: Any, placements: list[Any], grads: list[Any]) -> Tensor:
    """This rank's part of `x` in other placements; its gradient is the mean over the mesh dimensions of partial `grads`."""
    ranks = math.prod(x.device_mesh.size(i) for i, p in enumerate(grads) if p.is_partial())
    local = x.redistribute(placements=placements).to_local(grad_placements=grads)
    return _ScaledGrad.apply(local, 1 / ranks) if ranks > 1 and local.requires_grad else local


def _shards_first(placement: Any) -> bool:
    """Whether dimension 0 is sharded, evenly or in strides (FSDP over tensor parallelism)."""
    return placement.is_shard(0) or getattr(placement, "dim", None) == 0
