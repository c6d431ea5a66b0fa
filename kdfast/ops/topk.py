"""Top-k teacher targets: `topk_targets` captures them in one pass, `topk_kd_loss` learns from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdfast import dispatch
from kdfast.ops import rows
from kdfast.ops.row_op import RowCall, RowOp
from kdfast.ops.row_options import row_options
from kdfast.ops.targets import TopKTargets
from kdfast.options import PARTS, RowOptions

_lib = torch.library.Library("kdfast", "FRAGMENT")
_lib.define("topk_capture(Tensor logits, int k, float[] temperatures, str backend) -> (Tensor, Tensor, Tensor, Tensor)")
_op = RowOp("topk", extra="int vocab_size")


@torch.library.impl(_lib, "topk_capture", "CompositeExplicitAutograd")
def _capture(logits: Tensor, k: int, temperatures: Sequence[float], backend: str) -> tuple[Tensor, ...]:
    ids, logprobs, log_z, log_tail = dispatch.kernel("topk", backend).capture(logits, k, tuple(temperatures))
    if k:
        rows.check_rows(logprobs[:, 0], None, [logits], None, logits.shape[1], RowOptions())
    return ids, logprobs, log_z, log_tail


@torch.library.register_fake("kdfast::topk_capture", lib=_lib)
def _capture_fake(logits: Tensor, k: int, temperatures: Sequence[float], backend: str) -> tuple[Tensor, ...]:
    n, n_t = logits.shape[0], len(temperatures)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    ids = logits.new_empty(n, k, dtype=torch.int32)
    return (
        ids,
        logits.new_empty(n, k, dtype=dtype),
        logits.new_empty(n, n_t, dtype=dtype),
        logits.new_empty(n, n_t, dtype=dtype),
    )


@torch.no_grad()
def topk_targets(logits: Tensor, k: int, *, temperatures: Sequence[float] = (1.0,)) -> TopKTargets:
    """A teacher's logits as their k most likely ids and one bucket for the rest, in one pass.

    Equals, for every T in temperatures and S the ids selected:

        logp = logits.float().log_softmax(-1)
        logprobs, ids = logp.topk(k)                    # ties go to the lower id
        log_z = (logp / T).logsumexp(-1)
        log_tail = (logp / T).masked_fill(S, -inf).logsumexp(-1) - log_z

    Args:
        logits: `[..., V]` float32, bfloat16, float16 (or float64, on the reference backend).
        k: entries to keep, 0 < k <= V.
        temperatures: at which log_z and log_tail are captured; a loss can only use these.

    Returns:
        `TopKTargets` with float32 values and leading dimensions as `logits`, entries sorted from likely to unlikely.

    Raises:
        ValueError: a shape, dtype or scalar is wrong, or (on a CPU, or under `debug_checks()`) a row holds NaN or +inf.
    """
    rows.check_float("logits", logits)
    rows.check_vocab("logits", logits)
    vocab = logits.shape[-1]
    if not 0 < k <= vocab:
        raise ValueError(f"k: expected 0 < k <= {vocab} (the vocabulary), got {k}")
    temperatures = tuple(float(t) for t in temperatures)
    if not temperatures or not all(t > 0 and math.isfinite(t) for t in temperatures):
        raise ValueError(f"temperatures: expected one or more finite numbers above 0, got {temperatures}")
    lead = logits.shape[:-1]
    backend = dispatch.choose("topk", logits.device, logits.dtype)
    ids, logprobs, log_z, log_tail = torch.ops.kdfast.topk_capture(rows.as_rows(logits), k, temperatures, backend)
    return TopKTargets(
        ids.view(*lead, k),
        logprobs.view(*lead, k),
        log_z.view(*lead, -1),
        log_tail.view(*lead, -1),
        temperatures,
        vocab,
    )


def topk_kd_loss(
    student_logits: Tensor,
    targets: TopKTargets,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    scale_by_t2: bool = True,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | float | Tensor | None = None,
    overwrite_logits: bool = False,
    return_parts: bool = False,
) -> Any:
    """Knowledge distillation from k teacher entries and a ghost bucket; no dense teacher tensor is formed.

    The ghost bucket holds everything the teacher did not list. With T = temperature, S the entries and
    p, q the tempered teacher and student, equals

        p_S, p_tail = exp(logprobs / T - log_z), exp(log_tail)
        q = softmax(student_logits / T);  q_tail = q[v not in S].sum()
        soft = (p_S * (p_S / q[S]).log()).sum() + p_tail * (p_tail / q_tail).log()
        loss = soft_weight * T**2 * soft + hard_weight * cross_entropy(student_logits, labels)

    with q_tail from a log-sum-exp over the unselected ids, never 1 - sum. The gradient is dense: an unselected id gets
    q_v * (1 - p_tail / q_tail) / T.

    Args:
        student_logits: `[..., Vs]`, Vs >= targets.vocab_size; ids beyond the teacher's vocabulary take no part in the
            soft term.
        targets: `TopKTargets` with the same leading dimensions and device. Empty slots (id -1) are skipped.
        temperature: one of `targets.temperatures`.
        labels, soft_weight, hard_weight, scale_by_t2, ignore_index, token_weight, reduction, num_items,
            overwrite_logits, return_parts: as in `kd_loss`. Of the parts, `teacher_nll` and `teacher_entropy` spread the
            bucket evenly over the unselected ids, and `kl_at_1` is NaN unless T is 1.

    Raises:
        ValueError: as `kd_loss`; a temperature that was not captured; a student smaller than `targets.vocab_size`; an
            entry's id outside the vocabulary (on a CPU, or under `debug_checks()`).

    Source: the bucket is the "ghost token" of sparse logit distillation; Kim & Rush 2016, arXiv 1606.07947, for the
    word-level loss it approximates.
    """
    options = row_options(
        temperature=temperature, soft_weight=soft_weight, hard_weight=hard_weight, scale_by_t2=scale_by_t2,
        ignore_index=ignore_index,
    )  # fmt: skip
    rows.check_float("student_logits", student_logits)
    rows.check_vocab("student_logits", student_logits)
    if not isinstance(targets, TopKTargets):
        raise ValueError(f"targets: expected TopKTargets, got {type(targets).__name__}")
    if targets.weights is not None:
        raise ValueError("targets: expected exact entries (weights None); drawn entries have no ghost bucket")
    lead = student_logits.shape[:-1]
    rows.check_lead("targets", targets.ids.shape[:-1], lead, "student_logits")
    if targets.ids.device != student_logits.device:
        raise ValueError(f"targets: expected device {student_logits.device} like student_logits, got {targets.ids.device}")
    if student_logits.shape[-1] < targets.vocab_size:
        raise ValueError(
            f"student_logits: expected a vocabulary of at least {targets.vocab_size} like the targets',"
            f" got {student_logits.shape[-1]}"
        )
    column = targets.column(options.temperature)
    labels = rows.check_labels(labels, lead, student_logits.device, options)
    scale = rows.row_scale(student_logits, lead, labels, token_weight, reduction, num_items, options)
    if overwrite_logits:
        rows.check_overwrite(student_logits, reduction)
    student = rows.as_rows(student_logits)
    backend = dispatch.choose("topk", student.device, student.dtype)
    target_rows = (
        targets.ids.reshape(-1, targets.k).contiguous(),
        targets.logprobs.reshape(-1, targets.k).contiguous(),
        targets.log_z[..., column].reshape(-1).contiguous(),
        targets.log_tail[..., column].reshape(-1).contiguous(),
    )
    call = RowCall(
        student,
        targets=target_rows,
        labels=labels,
        scale=scale,
        scalars=(*options.values, targets.vocab_size, backend, return_parts),
        lead=lead,
        reduction=reduction,
        needs_grad=student_logits.requires_grad and torch.is_grad_enabled(),
        overwrite=overwrite_logits,
    )
    loss, parts = _op(call)
    if not return_parts:
        return loss
    teacher = _teacher_parts(targets, labels)
    parts = parts.clone()
    for name, column_values in teacher.items():
        parts[:, PARTS.index(name)] = torch.where(scale != 0, column_values, 0)
    return loss, rows.make_parts(parts, scale, labels is not None)


def label_logprobs(targets: TopKTargets, labels: Tensor) -> Tensor:
    """The teacher's log-probability of each label at T = 1, from its entry or its even share of the bucket.

    Args:
        targets: captured at T = 1 among others.
        labels: `[...]` like the targets' leading dimensions; negative labels give the bucket's share.
    """
    share = targets.log_tail[..., targets.column(1.0)] - _unlisted(targets).log()
    hit = targets.ids == labels.clamp(min=0)[..., None]
    found = torch.where(hit, targets.logprobs, -torch.inf).amax(-1)
    return torch.where(hit.any(-1), found, share)


def _unlisted(targets: TopKTargets) -> Tensor:
    """How many ids share the bucket of each row, at least 1."""
    return (targets.vocab_size - (targets.ids >= 0).sum(-1)).clamp(min=1)


def _teacher_parts(targets: TopKTargets, labels: Tensor | None) -> dict[str, Tensor]:
    """teacher_nll and teacher_entropy at T = 1; NaN when T = 1 was not captured."""
    n = targets.ids.shape[:-1].numel()
    unknown = torch.full((n,), torch.nan, dtype=torch.float32, device=targets.ids.device)
    if 1.0 not in targets.temperatures:
        return {"teacher_nll": unknown, "teacher_entropy": unknown}
    tail = targets.log_tail[..., targets.column(1.0)]
    share = tail - _unlisted(targets).log()
    entropy = torch.special.entr(targets.logprobs.exp()).sum(-1) - torch.where(tail.isneginf(), 0, tail.exp() * share)
    nll = torch.zeros_like(unknown) if labels is None else -label_logprobs(targets, labels.view(tail.shape)).reshape(-1)
    return {"teacher_nll": nll, "teacher_entropy": entropy.reshape(-1)}
