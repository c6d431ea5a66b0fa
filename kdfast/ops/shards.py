"""Slices of a vocabulary as callers hold them: plain tensors beside a `tp_group`, or DTensors, which know their group."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kdfast.ops import parallel


def is_dtensor(x: Any) -> bool:
    """Without importing torch.distributed.tensor, which most processes never need."""
    return isinstance(x, Tensor) and hasattr(x, "to_local") and hasattr(x, "placements")


class Shards:
    """Turns arguments into this rank's plain tensors, and finds the one group over which the vocabulary is sliced.

    Args:
        tp_group: the caller's process group: plain tensors are slices then. None: only DTensors can be sliced.
    """

    def __init__(self, tp_group: Any) -> None:
        self.given = "" if tp_group is None else parallel.name_of(tp_group)
        self.group = self.given
        self._mesh_dim: tuple[Any, int] | None = None
        self._seen = False

    @property
    def from_dtensors(self) -> bool:
        """Whether a DTensor said how the vocabulary is sliced."""
        return self._mesh_dim is not None

    def slice(self, name: str, x: Any, dim: int) -> Any:
        """This rank's slice of `x`, whose vocabulary is dimension `dim`.

        Raises:
            ValueError: a DTensor is sharded otherwise than over the vocabulary and one mesh dimension, or not like the others.
        """
        if not is_dtensor(x):
            if self.group and not self.given:
                raise ValueError(f"{name}: expected a DTensor sharded over its vocabulary like the student's, got a tensor")
            return x
        sliced = [i for i, p in enumerate(x.placements) if p.is_shard(dim % x.ndim)]
        rest = [p for i, p in enumerate(x.placements) if i not in sliced]
        if len(sliced) > 1 or not all(p.is_replicate() for p in rest):
            raise ValueError(
                f"{name}: expected Shard({dim % x.ndim}) on at most one mesh dimension and Replicate on the others,"
                f" got {x.placements}; redistribute it, or pass local tensors and tp_group"
            )
        group = self._join(x, sliced[0]) if sliced else ""
        if group != self.group and (self.given or self._seen):
            raise ValueError(f"{name}: expected to be sliced over the group {self.group!r} like the others, got {group!r}")
        self.group, self._seen = group, True
        return x.to_local(grad_placements=x.placements)

    def _join(self, x: Any, mesh_dim: int) -> str:
        if self._mesh_dim is None:
            self._mesh_dim = (x.device_mesh, mesh_dim)
        return parallel.name_of(x.device_mesh.get_group(mesh_dim))

    def whole(self, name: str, x: Any, *, partial_grad: bool = False) -> Any:
        """All of `x`, which every rank holds; a plain tensor stays as it is.

        Args:
            partial_grad: this rank's gradient is its slice's share, which DTensor adds up over the ranks.
        """
        if not is_dtensor(x):
            return x
        from torch.distributed.tensor import Partial, Replicate

        placements = [Replicate()] * x.device_mesh.ndim
        grads: list[Any] = list(placements)
        if partial_grad and self._mesh_dim is not None:
            mesh, dim = self._mesh_dim
            if mesh != x.device_mesh:
                raise ValueError(f"{name}: expected the device mesh of the student's head, got {x.device_mesh}")
            grads[dim] = Partial()
        return x.redistribute(placements=placements).to_local(grad_placements=grads)
