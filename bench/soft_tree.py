"""A soft decision tree's training step, all nodes at once, against the usual implementation: a module for every node.

Both take one step of the recipe `soft_tree`: forward, expected cross-entropy at the leaves, penalty, backward, AdamW (the
trainer's here, `torch.optim.AdamW(parameters)` there); and the same without the optimiser, which has three tensors here and
three for every node there. They agree in loss and gradients first. Every timed step follows one of its own, as in training.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.models.soft_tree import SoftTree
from kdfast.models.view import View
from kdfast.train.batch import Batch
from kdfast.train.objective import Setting
from kdfast.train.optimizer import make_optimizer
from kdfast.train.recipe import Optimizer
from kdfast.train.recipes.soft_tree import SoftTreeMethod, SoftTreeOptions

from .contest import AGAIN, measure_limits, parser, positive, report, settings_of
from .measure import Work, compare
from .ratios import paired
from .report import Limits, Model, Row, stamp, timed

LOOP = "a module per node"
_INPUTS, _CLASSES = 784, 10


class NodeTree(nn.Module):
    """The tree as it is usually written: nodes as modules, visited one after the other."""

    def __init__(self, tree: SoftTree, penalty: float) -> None:
        super().__init__()
        self.depth, self.penalty = tree.depth, penalty
        self.nodes = nn.ModuleList(nn.Linear(_INPUTS, 1) for _ in tree.weight)
        self.leaves = nn.ParameterList(nn.Parameter(leaf.detach().clone()) for leaf in tree.leaves)
        with torch.no_grad():
            for node, weight, bias in zip(self.nodes, tree.weight, tree.bias, strict=True):
                node.weight.copy_(weight[None])
                node.bias.copy_(bias[None])

    def loss(self, x: Tensor, target: Tensor) -> Tensor:
        self.total, self.spent = x.new_zeros(()), x.new_zeros(())
        self._visit(0, 0, x, target, x.new_ones(len(x)))
        return self.total / len(x) + self.spent

    def _visit(self, node: int, level: int, x: Tensor, target: Tensor, path: Tensor) -> None:
        if level == self.depth:
            log_classes = self.leaves[node - len(self.nodes)].log_softmax(-1)
            self.total = self.total - (path * (target @ log_classes)).sum()
            return
        right = torch.sigmoid(self.nodes[node](x)[:, 0])
        share = (path * right).sum() / path.sum()
        self.spent = self.spent - self.penalty * 2.0**-level * (share.log() + (1 - share).log()) / 2
        self._visit(2 * node + 1, level + 1, x, target, path * (1 - right))
        self._visit(2 * node + 2, level + 1, x, target, path * right)


class Contestant:
    """A model, what it learns by, and its optimiser."""

    def __init__(self, model: nn.Module, loss: Any, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.loss, self.optimizer = model, loss, optimizer

    def backward(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss: Tensor = self.loss()
        loss.backward()
        return loss.detach()

    def step(self) -> Tensor:
        loss = self.backward()
        self.optimizer.step()
        return loss


def contestants(batch: int, depth: int) -> dict[str, Contestant]:
    """Two trees of the same weights on the same batch, half from labels and half from a teacher."""
    torch.manual_seed(0)
    tree = SoftTree([_INPUTS], _CLASSES, depth=depth)
    x, labels, teacher = torch.randn(batch, _INPUTS), torch.randint(_CLASSES, (batch,)), torch.randn(batch, _CLASSES)
    options = SoftTreeOptions()
    method = SoftTreeMethod(options, Setting(tree, [SimpleNamespace(info=None, weight=1.0)], None))
    nodes, data = NodeTree(tree, float(options.penalty)), Batch({"pixel_values": x}, labels)  # type: ignore[arg-type]
    target = (teacher.softmax(-1) + nn.functional.one_hot(labels, _CLASSES)) / 2

    def ours() -> Tensor:
        out = tree(x)
        return method(View(own_logits=out.logits, output=out), [View(own_logits=teacher)], data, batch)[0]

    return {
        "kdfast": Contestant(tree, ours, make_optimizer(tree, Optimizer())),
        LOOP: Contestant(nodes, lambda: nodes.loss(x, target), torch.optim.AdamW(nodes.parameters())),
    }


def after_itself(step: Callable[[], object]) -> Work:
    """A step that finds the caches as the one before left them."""
    return Work(lambda _: step(), (step,))


def agreement(found: dict[str, Contestant]) -> str:
    """ "" when loss and gradients are the same, else what differs."""
    loss, other = (float(one.backward()) for one in found.values())
    tree, nodes = (one.model for one in found.values())
    grads = [tree.weight.grad, tree.bias.grad, tree.leaves.grad]
    others = [torch.cat([n.weight.grad for n in nodes.nodes]), torch.cat([n.bias.grad for n in nodes.nodes]),
              torch.stack([leaf.grad for leaf in nodes.leaves])]  # fmt: skip
    apart = [float((g - o).norm() / o.norm()) for g, o in zip(grads, others, strict=True)]
    worst = max(abs(loss / other - 1), *apart)
    return "" if worst <= 1e-4 else f"disagrees with {LOOP}: {worst:.2g}, allowed 1e-4"


def measure(args: argparse.Namespace, batch: int, depth: int, limits: Limits) -> Iterator[list[Row]]:
    """Rows of one shape: the whole step, and the step without optimiser."""
    settings = settings_of(args)
    error = agreement(contestants(batch, depth))
    found = contestants(batch, depth)
    found[AGAIN] = contestants(batch, depth)["kdfast"]
    inner = 2**depth - 1
    model = Model(flops=4.0 * batch * inner * _INPUTS, text="4 B (2^depth - 1) inputs: x @ W and its weight's gradient")
    for what in ("step", "backward"):
        works = {name: after_itself(getattr(one, what)) for name, one in found.items()}
        timings = compare(works, repeats=settings.repeats, warmup=settings.warmup, budget_s=settings.budget_s, cold=False)
        note = "" if what == "step" else "without the optimiser"
        rows = []
        for name, timing in timings.items():
            row = Row("soft_tree", name, dtype="float32", shape=f"B={batch} depth={depth} {_INPUTS} inputs", note=note)
            row = dataclasses.replace(row, error=error) if error else timed(row, timing, model, limits)
            ratio = paired(timing.seconds, timings["kdfast"].seconds)
            row = dataclasses.replace(row, time_ratio=ratio.median)
            if name != "kdfast":
                row = dataclasses.replace(row, ratio_low=ratio.low, ratio_high=ratio.high)
            rows.append(stamp(row, "cpu"))
        yield rows


def main(argv: list[str]) -> int:
    p = parser("soft_tree", __doc__ or "", ["--quick", "--depth 8 --batch 64 --threads 1", "--csv tree.csv"])
    p.add_argument("--batch", type=positive, action="append", metavar="B", help="may be repeated (default 64)")
    p.add_argument("--depth", type=positive, action="append", metavar="D", help="may be repeated (default 8; 4 with --quick)")
    args = p.parse_args(argv)
    settings_of(args)
    limits = measure_limits("cpu", gemm=torch.float32)
    rows = [
        case
        for batch in args.batch or (64,)
        for depth in args.depth or ((4,) if args.quick else (8,))
        for case in measure(args, batch, depth, limits)
    ]
    return report(rows, limits, args)
