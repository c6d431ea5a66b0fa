"""Parameters that a loss does not reach: DDP waits for their gradients unless it is told to look for them in every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from kdfast.models.view import View
from kdfast.train.batch import Batch
from kdfast.train.step import DistillStep

#: Fields of a config that say that a batch may leave out what another one uses: experts, layers dropped by chance.
_SOME = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_BY_CHANCE = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")


def leaves_out(step: DistillStep, batch: Batch, teachers: Sequence[View], say: Callable[[str], None]) -> bool:
    """Whether a training step may leave parameters without a gradient, by the graph of one batch's loss.

    Asked once: to look for them in every step, as DDP can, costs a walk through that step's graph.
    """
    if varies(step.student):
        return True
    modes = [(module, module.training) for module in step.modules()]
    step.eval()  # nothing is drawn, no running mean moves
    loss, _ = step(batch, teachers)
    for module, training in modes:
        module.training = training
    names = unreached(step, loss)
    if names:
        more = ", ..." if len(names) > 3 else ""
        say(f"{len(names)} parameters get no gradient, {', '.join(names[:3])}{more}; they stay as they are")
    return bool(names)


def unreached(module: nn.Module, loss: Tensor) -> list[str]:
    """Names of the trained parameters of `module` that `loss` does not depend on, by its graph; nothing is run backward."""
    seen: set[Any] = set()
    reached: set[int] = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            reached.add(id(node.variable))
        waiting += [following for following, _ in node.next_functions]
    return [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in reached]


def varies(model: nn.Module) -> bool:
    """Whether a `transformers` model may use other parameters in another step."""
    config = getattr(model, "config", None)
    return any((getattr(config, name, None) or 0) > 1 for name in _SOME) or any(
        (getattr(config, name, None) or 0) > 0 for name in _BY_CHANCE
    )
