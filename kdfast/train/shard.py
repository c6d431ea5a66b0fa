"""A `DistillStep` sharded over all processes by FSDP2, on a CPU too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from kdfast.train.step import DistillStep


def fully_sharded(step: DistillStep) -> DistillStep:
    """`step` in place: each layer of the student a unit of its own, the rest (embedding, head, objective) with the root.

    A tied head is one parameter of the root's unit, whose weights are whole while the loss is formed.
    """
    if not dist.is_initialized():
        raise ValueError("shard: fsdp expects several processes, got one; use torchrun or accelerate launch, or shard: none")
    for tensor in (*step.parameters(), *step.buffers()):
        dist.broadcast(tensor.detach(), 0)  # as DDP does: everybody begins with the weights of the first
    device = next(step.parameters()).device
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("data",))
    for module in step.student.modules():
        if isinstance(module, nn.ModuleList):
            for layer in module:
                if not isinstance(layer, FSDPModule):
                    fully_shard(layer, mesh=mesh)
    fully_shard(step, mesh=mesh)
    return step


@contextlib.contextmanager
def synchronised(module: nn.Module, accelerator: Accelerator, last: bool) -> Iterator[None]:
    """Around a micro-batch: gradients go over the wire with the last one only."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
        yield
        return
    with contextlib.nullcontext() if last else accelerator.no_sync(module):
        yield
