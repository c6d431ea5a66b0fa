"""AdamW over what trains, and the learning rate of each step."""

from __future__ import annotations

import math

import torch
from torch import nn

from kdfast.train.recipe import Optimizer

#: Other orders in which the numbers of a tensor of so many dimensions may lie without gaps.
_FORMATS = {4: (torch.channels_last,), 5: (torch.channels_last_3d,)}


def make_optimizer(module: nn.Module, options: Optimizer) -> torch.optim.AdamW:
    """AdamW over what trains; biases and norms (fewer than two dimensions) do not decay."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": options.weight_decay, "decays": True},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0, "decays": False},
    ]
    groups = [g for g in groups if g["params"]]
    fused = all(map(_fuses, trained)) or None
    return torch.optim.AdamW(groups, lr=options.lr, betas=(options.beta1, options.beta2), eps=options.eps, fused=fused)


def _fuses(parameter: nn.Parameter) -> bool:
    """Whether torch's fused kernel may have it: on a CPU that walks from the first number on, whatever the strides."""
    dense = any(parameter.is_contiguous(memory_format=f) for f in (torch.contiguous_format, *_FORMATS.get(parameter.ndim, ())))
    return dense and parameter.is_floating_point()


def set_options(optimizer: torch.optim.Optimizer, options: Optimizer, lr: float) -> None:
    """Makes `options` those of the next step: a phase may have its own."""
    for group in optimizer.param_groups:
        decay = options.weight_decay if group["decays"] else 0.0
        group.update(lr=lr, betas=(options.beta1, options.beta2), eps=options.eps, weight_decay=decay)


def lr_at(step: int, steps: int, options: Optimizer) -> float:
    """The learning rate of `step` (1-based): linear warm-up, then the schedule down to `final_lr_share * lr`."""
    if step <= options.warmup_steps:
        return options.lr * step / options.warmup_steps
    if options.schedule == "constant":
        return options.lr
    done = (step - options.warmup_steps) / max(steps - options.warmup_steps, 1)
    left = 1 - done if options.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return options.lr * (options.final_lr_share + (1 - options.final_lr_share) * left)
