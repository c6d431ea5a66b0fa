"""The row losses on views: through heads where both sides have one, else on logits; from targets where teachers are cached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdfast import Parts, TopKTargets, kd_loss, linear_kd_loss, linear_topk_kd_loss, topk_kd_loss
from kdfast.models.heads import LinearHead
from kdfast.models.view import View
from kdfast.train.objective import Metric, Metrics

#: Part of a row loss -> the name it is logged under, and how it is shown.
_SHOWN = {
    "soft": (("kl_at_T", "mean"),),
    "hard": (("hard", "mean"), ("student_ppl", "exp")),
    "z": (("lse_squared", "mean"),),
    "kl_at_1": (("kl_at_1", "mean"),),
    "teacher_nll": (("teacher_ppl", "exp"),),
    "teacher_entropy": (("teacher_entropy", "mean"),),
    "student_entropy": (("student_entropy", "mean"),),
    "top1_agreement": (("top1_agreement", "mean"),),
}  # fmt: skip


def distillation(
    student: View,
    teachers: Sequence[View],
    labels: Tensor | None,
    num_items: int | Tensor,
    *,
    tail: str = "ghost",
    workspace_mb: float | None = None,
    soft_mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Metrics]:
    """`kd_loss` or the one of its kin that fits what is at hand; `options` are theirs.

    Args:
        student: of a live model. teachers: all live, or all with targets.
        tail: of cached targets. workspace_mb: for logits through a head.
        soft_mask: rows of the soft term, where that is more than those with a label (`Batch.soft_mask`). Both terms are divided
            by the same `num_items`, the rows of `soft_mask`: a row without label adds nothing to the hard term, and each row
            with one weighs what it would weigh if all had one, whatever else is in its batch.
    """
    if soft_mask is not None:
        return _unlabelled(student, teachers, labels, num_items, soft_mask, tail, workspace_mb, options)
    options = {**options, "num_items": num_items, "return_parts": True}
    if teachers[0].targets is not None:
        targets = [teacher.targets for teacher in teachers]
        given: Any = targets[0] if len(targets) == 1 else targets
        for name in ("skew", "ab_alpha", "ab_beta", "teacher_mix"):
            options.pop(name, None)
        return _shown(*_from_targets(student, given, labels, tail, workspace_mb, options))
    sides = [through(view) for view in (student, *teachers)]
    if None in sides or len({side[1].form for side in sides[1:] if side is not None}) > 1:
        logits = [teacher.logits for teacher in teachers]
        return _shown(*kd_loss(student.logits, logits if len(logits) > 1 else logits[0], labels, **options))
    (hidden, head), *others = [side for side in sides if side is not None]
    return _shown(*linear_kd_loss(
        hidden, head.weight, [h for h, _ in others], [t.weight for _, t in others], labels, student_bias=head.bias,
        teacher_bias=[t.bias for _, t in others], student_head=head.form, teacher_head=others[0][1].form,
        workspace_mb=workspace_mb, **options,
    ))  # fmt: skip


def _unlabelled(
    student: View, teachers: Sequence[View], labels: Tensor | None, num_items: int | Tensor, soft_mask: Tensor, tail: str,
    workspace_mb: float | None, options: dict[str, Any],
) -> tuple[Tensor, Metrics]:  # fmt: skip
    """A row loss ignores a row without label altogether: so the soft term is one call, the hard term another."""
    names = ("hard_weight", "label_smoothing", *(("z_loss",) if labels is not None else ()))
    if labels is None and options.get("hard_weight"):
        raise ValueError(f"labels: expected a tensor because hard_weight is {options['hard_weight']}, got None")
    on_labels = {name: options[name] for name in names if name in options}
    loss, metrics = distillation(
        student, teachers, None, num_items, tail=tail, workspace_mb=workspace_mb, token_weight=soft_mask.float(),
        **{**options, **dict.fromkeys(on_labels, 0.0), "hard_weight": 0.0},
    )  # fmt: skip
    if labels is not None and (on_labels.get("hard_weight") or on_labels.get("z_loss")):
        on_labels = {"hard_weight": 0.0, **on_labels}
        labelled, found = hard(student, labels, num_items, workspace_mb=workspace_mb, **on_labels)
        loss, metrics = loss + labelled, {**metrics, **found}
    return loss, metrics


def through(view: View) -> tuple[Tensor, LinearHead] | None:
    """Hidden states and the head they enter, where that is named."""
    return None if view.head is None or view.hidden is None else (view.hidden, view.head)


def hard(
    student: View, labels: Tensor, num_items: int | Tensor, *, workspace_mb: float | None = None, **options: Any
) -> tuple[Tensor, Metrics]:
    """Cross-entropy with the labels, with `label_smoothing` and `z_loss`, through the head where there is one."""
    options = {"hard_weight": 1.0, **options, "soft_weight": 0.0, "num_items": num_items, "return_parts": True}
    loss, metrics = _shown(*_from_targets(student, _nothing_said(student, labels), labels, "ghost", workspace_mb, options))
    return loss, {name: metrics[name] for name in ("hard", "student_ppl")}


def _from_targets(
    student: View, targets: Any, labels: Tensor | None, tail: str, workspace_mb: float | None, options: dict[str, Any]
) -> tuple[Tensor, Parts]:
    if student.head is None or student.hidden is None:
        return topk_kd_loss(student.logits, targets, labels, tail=tail, **options)
    return linear_topk_kd_loss(
        student.hidden, student.head.weight, targets, labels, student_bias=student.head.bias, student_head=student.head.form,
        tail=tail, workspace_mb=workspace_mb, **options,
    )  # fmt: skip


def _nothing_said(student: View, labels: Tensor) -> TopKTargets:
    """A teacher that is sure of id 0; at soft_weight 0 nobody asks it."""
    vocab = student.logits.shape[-1] if student.head is None else student.head.weight.shape[0]
    one = torch.zeros(*labels.shape, 1, device=labels.device)
    return TopKTargets(one.int(), one, one, one - torch.inf, (1.0,), vocab)


def _shown(loss: Tensor, parts: Parts) -> tuple[Tensor, Metrics]:
    metrics: Metrics = {}
    for name, part in parts._asdict().items():
        for shown, how in _SHOWN.get(name, ((name, "mean"),)):
            metrics[shown] = Metric(part.sum, part.count, how)
    return loss, metrics
