"""A soft decision tree trained on labels, on a teacher's word, or on both.

Source: Frosst and Hinton 2017, arXiv 1711.09784. The student is a `kdfast.models.soft_tree:SoftTree`. The loss printed there is
the logarithm of a sum of negative numbers; the sum itself, the expected cross-entropy at the leaves, is what is minimised.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdfast.models.soft_tree import SoftTree, TreeOutput
from kdfast.models.view import Needs, View
from kdfast.ops.rows import values_are_checked
from kdfast.strict import ranged, refuse_unused
from kdfast.train.batch import IGNORE, Batch, check_classes, divisor
from kdfast.train.objective import Metric, Metrics, Objective, Setting
from kdfast.train.schedule import Scheduled, scheduled


@dataclass(frozen=True)
class SoftTreeOptions:
    """loss = sum_leaf P_leaf(x) * CE(target, Q_leaf) + penalty, target = soft_weight * teacher_T + hard_weight * label.

    Args:
        temperature: of the teacher's distribution. soft_weight: of it; without a teacher it counts for nothing.
        hard_weight: of the label.
        penalty: lambda of -lambda * sum_i decay^level_i * (log a_i + log(1 - a_i)) / 2, a_i the share of what comes to node i
            that goes right: the tree is to use both sides.
        penalty_decay: what a level's penalty is of the one above.
        window: batches that a_i at the root is taken over; twice as many at every level below, where fewer rows come.
    """

    temperature: Scheduled = scheduled(1.0, above=0.0)
    soft_weight: Scheduled = scheduled(0.5, low=0.0)
    hard_weight: Scheduled = scheduled(0.5, low=0.0)
    penalty: Scheduled = scheduled(0.1, low=0.0)
    penalty_decay: float = ranged(0.5, above=0.0, high=1.0)
    window: float = ranged(1.0, low=1.0)


class SoftTreeMethod(Objective):
    Options = SoftTreeOptions
    teacher = "optional"
    level: Tensor
    log_sides: Tensor
    batches: Tensor

    def __init__(self, options: SoftTreeOptions, setting: Setting) -> None:
        super().__init__(options, setting)
        tree = setting.student
        if not isinstance(tree, SoftTree):
            raise ValueError(
                f"student: method soft_tree expects a kdfast.models.soft_tree:SoftTree as student.function, got"
                f" {type(tree).__name__}"
            )
        for teacher in setting.teachers:
            if teacher.info is not None and (teacher.info.kind != "topk" or teacher.info.k < tree.classes):
                raise ValueError(
                    f"teacher.cache: method soft_tree expects all {tree.classes} classes of every row, got {teacher.info.k} of"
                    f" kind {teacher.info.kind}"
                )
        if not setting.teachers:
            refuse_unused(options, ("temperature",), "without a teacher expected none", "method")
        self._check_weights(options, bool(setting.teachers))
        total = sum(teacher.weight for teacher in setting.teachers)
        self.teacher_weights = [teacher.weight / total for teacher in setting.teachers]
        level = torch.arange(tree.depth).repeat_interleave(2 ** torch.arange(tree.depth)).float()  # of every inner node
        self.register_buffer("level", level, persistent=False)
        # The window: logarithms of what went left and right, and how many batches that is. Saved with the run.
        self.register_buffer("log_sides", torch.full((len(level), 2), -math.inf))
        self.register_buffer("batches", torch.zeros(len(level), 1))

    @staticmethod
    def _check_weights(options: SoftTreeOptions, taught: bool) -> None:
        if options.hard_weight == 0 and (options.soft_weight == 0 or not taught):
            without = "" if taught else " without a teacher"
            raise ValueError(f"method.hard_weight: expected a number above 0{without}, got 0: nothing to train on")

    def needs_of_student(self) -> Needs:
        return Needs(output=True)

    def forward(self, student: View, teachers: Sequence[View], batch: Batch, num_items: int | Tensor) -> tuple[Tensor, Metrics]:
        with torch.autocast(student.output.gates.device.type, enabled=False):
            return self._loss(student.output, teachers, batch, num_items)

    def _loss(
        self, tree: TreeOutput, teachers: Sequence[View], batch: Batch, num_items: int | Tensor
    ) -> tuple[Tensor, Metrics]:
        leaves, log_classes = tree.log_leaves.exp(), tree.log_classes
        known = None if batch.labels is None else batch.labels != IGNORE
        heard = batch.soft_mask if batch.soft_mask is not None else known  # None: all rows
        rows = torch.tensor(len(leaves), device=leaves.device) if heard is None else heard.sum()
        metrics: Metrics = {}
        terms: list[tuple[str, Tensor, Tensor]] = []  # name, target [B, C], rows that have one
        if batch.labels is not None and known is not None:
            classes = torch.arange(log_classes.shape[-1], device=leaves.device)
            if values_are_checked(leaves.device):
                check_classes(batch.labels, len(classes))
            one_hot = (batch.labels[:, None] == classes).to(leaves.dtype)  # of no class where there is no label
            terms.append(("hard", one_hot, rows if heard is known else known.sum()))
        if teachers:
            target = self._target(teachers, leaves.dtype)
            agrees = target.argmax(-1) == tree.logits.argmax(-1)
            if heard is not None:  # what is said of other rows may be NaN
                target, agrees = target.masked_fill(~heard[:, None], 0), agrees & heard
            terms.append(("soft", target, rows))
            metrics["top1_agreement"] = Metric(agrees.sum(), rows)
        if not terms:
            raise ValueError("data: method soft_tree without a teacher expects labels, got a batch without")
        sums = expected_cross_entropy(leaves, log_classes, torch.stack([target for _, target, _ in terms], 1))
        shown = sums.detach().unbind()
        metrics |= {name: Metric(total, count) for (name, _, count), total in zip(terms, shown, strict=True)}
        weights = [self.now[f"{name}_weight"] for name, _, _ in terms]
        items = divisor(num_items, leaves.device)
        loss = torch.stack([weight * total for weight, total in zip(weights, sums.unbind(), strict=True)]).sum() / items
        if self.now["penalty"]:
            penalty = self.now["penalty"] * self.penalty(tree)
            share = rows / items  # of the optimiser step, where that has several batches
            metrics["penalty"] = Metric(penalty.detach() * share, share)
            loss = loss + share * penalty
        metrics["likeliest_leaf"] = Metric(leaves.detach().amax(1).sum(), torch.tensor(len(leaves), device=leaves.device))
        return loss, metrics

    def _target(self, teachers: Sequence[View], dtype: torch.dtype) -> Tensor:
        """`[B, C]`: mean of the teachers' distributions at T."""
        said = [(_logits(view, dtype) / self.now["temperature"]).softmax(-1) for view in teachers]
        return torch.stack([w * p for w, p in zip(self.teacher_weights, said, strict=True)]).sum(0)

    def penalty(self, tree: TreeOutput) -> Tensor:
        """`-sum_i decay_i * (log a_i + log(1 - a_i)) / 2` with a_i over the window, this batch in it.

        Its gradient is that of the same sum over the population, as far as one batch shows it: da_i is the batch's, over the
        mass that a batch brings to node i on the average of the window. Letting it flow through the batch's part of the
        window instead would divide it by the window's length, most where the penalty is weakest.
        """
        now = tree.log_nodes[:, 1:].logsumexp(0).view(-1, 2)  # [I, 2]: what goes left and right, all nodes but the root
        with torch.no_grad():
            level = self.level.to(now.dtype)[:, None]
            decay, kept = self.options.penalty_decay**level, 1 - 1 / (self.options.window * 2**level)
            sums = torch.logaddexp(self.log_sides + kept.log(), now)
            batches = kept * self.batches + 1
            if self.training:
                self.log_sides.copy_(sums)
                self.batches.copy_(batches)
            log_shares = sums.log_softmax(1)
            value = -(decay * log_shares).sum() / 2
            shares = log_shares.exp()
            weight = decay * batches * (shares - shares.flip(1)) / 2 * (now - sums).exp()
        moved = (weight * now).sum()
        return value + (moved - moved.detach())


def _logits(view: View, dtype: torch.dtype) -> Tensor:
    """Up to a constant a row; a cache that holds all classes says them too, and at any T."""
    if view.targets is None:
        return view.logits.to(dtype)
    targets = view.targets.decode()
    classes = targets.vocab_size
    found = torch.full((len(targets.ids), classes + 1), -math.inf, dtype=dtype, device=targets.ids.device)
    places = targets.ids.long().where(targets.ids >= 0, classes)  # an empty slot goes where it is cut off
    return found.scatter(1, places, targets.logprobs.to(dtype))[:, :classes]


def expected_cross_entropy(leaves: Tensor, log_classes: Tensor, targets: Tensor) -> Tensor:
    """`-(leaves[:, :, None, None] * targets[:, None] * log_classes[:, None]).sum((0, 1, 3))` with nothing of that size formed.

    Args:
        leaves: `[B, L]` path probabilities. log_classes: `[L, C]`. targets: `[B, M, C]`, zeros where a row does not count.

    Returns:
        `[M]`.
    """
    _, several, classes = targets.shape
    mass = (leaves.T @ targets.flatten(1)).view(-1, several, classes)
    return -(mass * log_classes[:, None]).sum((0, 2))
