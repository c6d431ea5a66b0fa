"""A soft binary decision tree (Frosst and Hinton 2017, arXiv 1711.09784): a classifier whose way to an answer can be read.

A node holds a filter, a leaf a distribution over the classes; an input goes right at node i with probability p_i(x).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PREDICTIONS = ("leaf", "mixture")
_DEEPEST = 16


class TreeOutput(NamedTuple):
    """What a tree says of a batch.

    logits: `[B, C]` log-probabilities of the classes. gates: `[B, I]`, sigmoid(gates) is the probability of going right at each
    of I = 2^depth - 1 inner nodes. log_nodes: `[B, 2I + 1]` log-probability of coming to each node, the leaves after the inner
    nodes, and log_leaves: `[B, 2^depth]` to each leaf. log_classes: `[2^depth, C]` the leaves' distributions.
    """

    logits: Tensor
    gates: Tensor
    log_nodes: Tensor
    log_leaves: Tensor
    log_classes: Tensor


def log_paths(gates: Tensor) -> Tensor:
    """Log-probability of coming to every node of a complete binary tree.

        P[0] = 1; P[2i + 1] = P[i] * sigmoid(-gates[i]); P[2i + 2] = P[i] * sigmoid(gates[i])

    All nodes of a level at once: one element of work a node, where a product with the matrix of all paths takes one for each
    pair of nodes. In logarithms, so that no path underflows.

    Args:
        gates: `[B, I]` in the order of levels, I = 2^depth - 1.

    Returns:
        `[B, 2I + 1]` in the same order, the leaves last.
    """
    depth = (gates.shape[1] + 1).bit_length() - 1
    # -log sigmoid(z) = softplus(-z); past its threshold -z itself, which is exact in float64.
    costs = F.softplus(torch.stack([gates, -gates], -1), threshold=50)
    levels = [gates.new_zeros(len(gates), 1)]
    for cost in costs.split([2**level for level in range(depth)], 1):  # [B, 2^level, 2]
        levels.append((levels[-1][:, :, None] - cost).flatten(1))
    return torch.cat(levels, 1)


class SoftTree(nn.Module):
    """Inner nodes say `p_i = sigmoid(beta * (x @ w_i + b_i))`, leaves `Q_l = softmax(leaf_scale * phi_l)`; P_l, the path to l.

    Args:
        shape: of one input, such as `[1, 28, 28]`; filters are drawn in it.
        classes: how many.
        depth: inner nodes on every path; 2^depth leaves.
        beta: steepness of the gates at the start of training (the weights can make up for it afterwards).
        predict: `leaf`: the distribution of the likeliest leaf. `mixture`: sum_l P_l Q_l. May be set later.
        leaf_scale: Adam moves every parameter by about its learning rate a step, whatever it does; a filter adds up hundreds
            of them, a leaf has one a class. With a scale a leaf learns that many times as fast as a filter.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        classes: int,
        depth: int = 8,
        beta: float = 1.0,
        predict: str = "leaf",
        leaf_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        for name, number, low in (("shape", min(self.shape, default=0), 1), ("classes", classes, 2), ("depth", depth, 1)):
            if not isinstance(number, int) or number < low:
                raise ValueError(f"{name}: expected whole numbers of at least {low}, got {number!r}")
        if depth > _DEEPEST:
            raise ValueError(f"depth: expected at most {_DEEPEST} ({2**_DEEPEST} leaves), got {depth}")
        for name, factor in (("beta", beta), ("leaf_scale", leaf_scale)):
            if not isinstance(factor, int | float) or not 0 < factor < math.inf:
                raise ValueError(f"{name}: expected a number above 0, got {factor!r}")
        if predict not in PREDICTIONS:
            raise ValueError(f"predict: expected one of {', '.join(PREDICTIONS)}, got {predict!r}")
        self.classes, self.depth, self.predict = classes, depth, predict
        self.beta, self.leaf_scale = float(beta), float(leaf_scale)
        inputs, inner = math.prod(self.shape), 2**depth - 1
        self.weight = nn.Parameter(torch.empty(inner, inputs).uniform_(-1, 1) / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.zeros(inner))
        self.leaves = nn.Parameter(0.1 / leaf_scale * torch.randn(inner + 1, classes))

    def extra_repr(self) -> str:
        names = ("shape", "classes", "depth", "beta", "predict", "leaf_scale")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def forward(self, inputs: Tensor) -> TreeOutput:
        """`inputs` `[B, *shape]`."""
        if tuple(inputs.shape[1:]) != self.shape:
            raise ValueError(f"inputs: expected [B, {', '.join(map(str, self.shape))}], got {list(inputs.shape)}")
        gates = F.linear(inputs.flatten(1), self.weight, self.bias)
        gates = self.beta * (gates if gates.dtype == torch.float64 else gates.float())
        with torch.autocast(gates.device.type, enabled=False):
            return self._from_gates(gates)

    def _from_gates(self, gates: Tensor) -> TreeOutput:
        log_nodes = log_paths(gates)
        log_leaves = log_nodes[:, gates.shape[1] :]
        log_classes = (self.leaf_scale * self.leaves.to(gates.dtype)).log_softmax(-1)
        if self.predict == "leaf":
            logits = log_classes[log_leaves.argmax(1)]
        else:
            top = log_leaves.amax(1, keepdim=True)  # a log-sum-exp as one product
            logits = ((log_leaves - top).exp() @ log_classes.exp()).log() + top
        return TreeOutput(logits, gates, log_nodes, log_leaves, log_classes)

    @torch.no_grad()
    def explain(self, x: Tensor, names: Sequence[str] | None = None, shares: Tensor | None = None) -> Explanation:
        """The path to the likeliest leaf of one input; printed it is text, `save(file)` draws it.

        Args:
            x: `[*shape]`, as the tree was trained on (normalised).
            names: of the classes; none: their numbers.
            shares: `[leaves]`, how many inputs come to each (`reach`): which classes lie on either side of a node is said of
                those, as in `save_picture`; none: of all leaves alike.
        """
        x = x.to(self.weight.device)
        if x.shape == (1, *self.shape):
            x = x[0]
        if tuple(x.shape) != self.shape:
            raise ValueError(f"x: expected one input of shape {list(self.shape)}, got {list(x.shape)}")
        out = self(x[None].to(self.weight.dtype))
        leaf = int(out.log_leaves[0].argmax())
        steps, node = [], 0
        for level in range(self.depth):
            right = bool(leaf >> (self.depth - 1 - level) & 1)
            gate = float(out.gates[0, node])
            taken = 1 / (1 + math.exp(-gate if right else gate)) if abs(gate) < 700 else float((gate > 0) == right)
            steps.append(Step(node, level, right, gate, taken, math.exp(float(out.log_nodes[0, node]))))
            node = 2 * node + 1 + right
        reached = math.exp(float(out.log_leaves[0, leaf]))
        return Explanation(
            self, x.cpu(), tuple(steps), leaf, reached, out.log_classes[leaf].exp().cpu(), self._names(names), shares
        )

    def _names(self, names: Sequence[str] | None) -> tuple[str, ...]:
        found = tuple(map(str, range(self.classes) if names is None else names))
        if len(found) != self.classes:
            raise ValueError(f"names: expected {self.classes}, one for each class, got {len(found)}")
        return found

    @torch.no_grad()
    def below(self, shares: Tensor | None = None) -> Tensor:
        """`[2I + 1, C]`: what the leaves below each node say on average, a leaf for itself; in the order of levels.

        Args:
            shares: `[leaves]`, how many inputs come to each (`reach`); none: all leaves alike.
        """
        said = (self.leaf_scale * self.leaves.double()).softmax(-1)
        weights = torch.ones(len(said), 1).to(said) if shares is None else shares.to(said)[:, None].clamp(min=1e-12)
        levels = [(weights * said, weights)]
        while len(levels[0][0]) > 1:
            levels.insert(0, tuple(x.reshape(-1, 2, x.shape[-1]).sum(1) for x in levels[0]))  # type: ignore[arg-type]
        return torch.cat([said / weight for said, weight in levels])

    @torch.no_grad()
    def reach(self, inputs: Tensor, batch_size: int = 1024) -> Tensor:
        """`[leaves]`: the share of `inputs` `[N, *shape]` that comes to each leaf, by path probability."""
        total = torch.zeros(len(self.leaves), dtype=torch.float64)
        for some in inputs.split(batch_size):
            total += self(some.to(self.weight)).log_leaves.double().exp().sum(0).cpu()
        return total / max(len(inputs), 1)

    def save_picture(self, file: str | os.PathLike[str], **options: Any) -> None:
        """Draws the tree; `kdfast.models.soft_tree_picture.save_tree` has the options."""
        from kdfast.models.soft_tree_picture import save_tree

        save_tree(self, file, **options)


class Step(NamedTuple):
    """A node on the way: its number in the order of levels and its level, where the path goes on, the gate's value, with what
    probability it goes there, and with what probability the node was come to."""

    node: int
    level: int
    right: bool
    gate: float
    taken: float
    reached: float


@dataclass(frozen=True)
class Explanation:
    """The path of `x` to its likeliest leaf. `classes`: what the leaf says."""

    tree: SoftTree
    x: Tensor
    steps: tuple[Step, ...]
    leaf: int
    reached: float
    classes: Tensor
    names: tuple[str, ...]
    shares: Tensor | None = None

    @property
    def label(self) -> str:
        return self.names[int(self.classes.argmax())]

    def __str__(self) -> str:
        """The path as text: at each node which classes have their share or more of either side, and where the input goes."""
        below = self.tree.below(self.shares).cpu()
        lines = []
        for step in self.steps:
            sides = [self.among(below[2 * step.node + side]) for side in (1, 2)]
            way = "right" if step.right else "left"
            lines.append(
                f"level {step.level}, node {step.node}: filter says {step.gate:+.2f}, goes {way} with probability"
                f" {step.taken:.3f}  (left: {sides[0]}; right: {sides[1]})"
            )
        best = self.classes.argsort(descending=True)[:3].tolist()
        said = ", ".join(f"{self.names[k]} ({float(self.classes[k]):.3f})" for k in best)
        lines.append(f"leaf {self.leaf} of {len(self.tree.leaves)}, reached with probability {self.reached:.3f}: {said}")
        return "\n".join(lines)

    def among(self, said: Tensor) -> str:
        """The classes that have their share of a distribution or more."""
        return " ".join(n for n, p in zip(self.names, said.tolist(), strict=True) if p >= 1 / len(self.names)) or "-"

    def save(self, file: str | os.PathLike[str]) -> None:
        """Draws the path to a `.png` or `.svg` file."""
        from kdfast.models.soft_tree_picture import save_path

        save_path(self, file)
