"""Knowledge distillation on logits: checks and `kd_loss`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from kdfast import dispatch
from kdfast.ops import parallel, ranges, rows
from kdfast.ops.row_op import RowCall, RowOp
from kdfast.ops.row_options import row_options
from kdfast.ops.shards import Shards
from kdfast.options import Head

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from kdfast.ops.row_keywords import KDKeywords

_op = RowOp("logits", dense=True, stats=lambda teachers: 3 + teachers)
_parallel_op = RowOp(
    "parallel", extra="str group", dense=True, stats=lambda teachers: teachers + parallel.STATS_BESIDE_TEACHERS,
    kernel=parallel.slices, vocab=lambda student, extra: student.shape[1] * parallel.size(extra[0]),
)  # fmt: skip


@overload
def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor | Sequence[Tensor],
    labels: Tensor | None = None, *, return_parts: Literal[False] = False, **options: Unpack[KDKeywords],
) -> Tensor: ...  # fmt: skip


@overload
def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor | Sequence[Tensor],
    labels: Tensor | None = None, *, return_parts: Literal[True], **options: Unpack[KDKeywords],
) -> tuple[Tensor, rows.Parts]: ...  # fmt: skip


@overload
def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor | Sequence[Tensor],
    labels: Tensor | None = None, *, return_parts: bool, **options: Unpack[KDKeywords],
) -> Tensor | tuple[Tensor, rows.Parts]: ...  # fmt: skip


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | Sequence[Tensor],
    labels: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    beta: float = 0.5,
    skew: float = 0.1,
    ab_alpha: float = 1.0,
    ab_beta: float = 0.0,
    scale_by_t2: bool = True,
    ignore_index: int = -100,
    shift_labels: bool = False,
    token_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    student_head: Head = Head(),
    teacher_head: Head = Head(),
    teacher_weights: Sequence[float] | None = None,
    teacher_mix: str = "probs",
    reduction: str = "mean",
    num_items: int | float | Tensor | None = None,
    tp_group: Any = None,
    overwrite_logits: bool = False,
    return_parts: bool = False,
) -> Tensor | tuple[Tensor, rows.Parts]:
    """Knowledge distillation from logits to logits, fused: no N x V distribution is ever formed.

    Equals, with T = temperature, p = softmax(teacher_logits / T), q = softmax(student_logits / T):

        kl = F.kl_div(F.log_softmax(student_logits / T, -1), F.log_softmax(teacher_logits / T, -1),
                      log_target=True, reduction="none").sum(-1)
        ce = F.cross_entropy(student_logits.flatten(0, -2), labels.flatten(), reduction="none", label_smoothing=...)
        z = student_logits.logsumexp(-1) ** 2
        loss = (soft_weight * T**2 * kl + hard_weight * ce + z_loss * z)[labels != ignore_index].mean()

    with float32 arithmetic for half-precision inputs, and another divergence in the place of kl:

        forward_kl        KL(p || q)
        reverse_kl        KL(q || p)
        jsd               beta * KL(p || m) + (1 - beta) * KL(q || m), m = beta * p + (1 - beta) * q; beta 0 is
                          forward_kl and beta 1 reverse_kl, as in GKD's implementations (the limits would be 0)
        skew_forward_kl   KL(p || skew * p + (1 - skew) * q)
        skew_reverse_kl   KL(q || skew * q + (1 - skew) * p)
        tvd               (p - q).abs().sum() / 2
        alpha_beta        -(p**a * q**b - a/(a+b) * p**(a+b) - b/(a+b) * q**(a+b)).sum() / (a * b), a = ab_alpha,
                          b = ab_beta, with its limits at 0; (1, 0) is forward_kl, (0, 1) reverse_kl

    Args:
        student_logits: `[..., Vs]` float32, bfloat16, float16 (or float64, on the reference backend).
        teacher_logits: `[..., Vt]`, same leading dimensions and device, or a sequence of such tensors: several teachers,
            mixed in the same pass. Gets no gradient. When Vt != Vs the soft term compares the ids all sides have, as if
            the larger side's other logits were -inf.
        labels: `[...]` int64 or int32, already aligned with the logits (the caller shifts, or says `shift_labels`). Rows whose
            label is `ignore_index` do not count. None: every row counts and there is no hard loss.
        shift_labels: labels are `[B, L]` like input_ids, and row t is compared with label t + 1, the last of a sequence with
            none: labels = F.pad(labels[:, 1:], (0, 1), value=ignore_index). `token_weight` stays with the rows: a weight per
            token of the input is shifted by the caller, F.pad(weight[:, 1:], (0, 1)).
        divergence, beta, skew, ab_alpha, ab_beta: the soft term, as above. 0 <= beta <= 1, 0 <= skew < 1, others >= 0. A
            divergence leaves the parameters of the others aside, as a term of weight 0 does its own (`label_smoothing` without
            `hard_weight`): options may be passed on together.
        temperature: T > 0, on both sides of the soft term.
        soft_weight, hard_weight: the two weights; a term of weight 0 is left out, infinite or not. The hard cross-entropy is
            at T = 1 over the whole student vocabulary.
        scale_by_t2: multiply the soft term by T^2, which keeps its gradient's size as T changes.
        token_weight: `[...]` weights >= 0; a row of weight 0 does not count.
        label_smoothing: share of the hard target that is spread evenly over the student's vocabulary.
        z_loss: weight of the squared log-sum-exp of the student's logits at T = 1, which keeps them from drifting.
        student_head, teacher_head: what lies between the logits given and the softmax (a cap, a factor), fused.
        teacher_weights: a positive number per teacher, normalised to sum 1; None: all alike.
        teacher_mix: "probs": p is the weighted mean of the teachers' tempered probabilities; "logits": of their logits.
        reduction: "mean" over the rows that count, "sum", or "none" (`[...]`, 0 where a row does not count).
        num_items: divisor >= 0 of the mean in place of the rows that count (gradient accumulation, data parallel). Where it
            is 0 the loss is 0 with zero gradients, whatever counts.
        tp_group: a process group over whose ranks the vocabulary is sliced: rank r holds ids r*C to (r+1)*C of every side,
            fewer only on the last rank. Labels are ids of the whole vocabulary; labels and weights are the same on all
            ranks, and so is the loss. Runs in plain PyTorch between two exchanges of a few numbers a row. Logits that are
            DTensors, sharded over the vocabulary on one mesh dimension, need no group.
        overwrite_logits: put the gradient in the place of `student_logits`, saving a second N x V buffer; nothing
            may read the logits afterwards (autograd raises when it would).
        return_parts: return `(loss, Parts)` with detached metrics from the same pass.

    Raises:
        ValueError: a shape, dtype, device, option, or (on a CPU, or under `debug_checks()`) a value is wrong.

    Under `torch.compile` options may change from call to call; each new value of a number is compiled anew, up to
    `torch._dynamo.config.recompile_limit` values.

    Source: Hinton, Vinyals, Dean 2015, arXiv 1503.02531, equation 4 and section 2.1; GKD, arXiv 2306.13649 (jsd);
    DistiLLM, arXiv 2402.03898 (skew); f-distill, arXiv 2307.15190 (tvd); ABKD, arXiv 2505.04560 (alpha_beta).
    """
    teachers = [teacher_logits] if isinstance(teacher_logits, Tensor) else list(teacher_logits)
    options = row_options(
        divergence=divergence, temperature=temperature, soft_weight=soft_weight, hard_weight=hard_weight, beta=beta,
        skew=skew, ab_alpha=ab_alpha, ab_beta=ab_beta, scale_by_t2=scale_by_t2, ignore_index=ignore_index,
        label_smoothing=label_smoothing, z_loss=z_loss, student_head=student_head, teacher_head=teacher_head,
        teachers=len(teachers), teacher_weights=teacher_weights, teacher_mix=teacher_mix,
    )  # fmt: skip
    shards = Shards(tp_group)
    student_logits = shards.slice("student_logits", student_logits, -1)
    teachers = [shards.slice(rows.member("teacher_logits", i, len(teachers)), t, -1) for i, t in enumerate(teachers)]
    labels, token_weight = shards.whole("labels", labels), shards.whole("token_weight", token_weight)
    rows.check_float("student_logits", student_logits)
    rows.check_vocab("student_logits", student_logits)
    lead = student_logits.shape[:-1]
    for i, teacher in enumerate(teachers):
        name = rows.member("teacher_logits", i, len(teachers))
        rows.check_float(name, teacher, like=student_logits, like_name="student_logits")
        rows.check_vocab(name, teacher)
        rows.check_lead(name, teacher.shape[:-1], lead, "student_logits")
    if shift_labels:
        labels = ranges.shifted_labels(labels, lead, ignore_index)
    labels = rows.check_labels(labels, lead, student_logits.device, options)
    scale = rows.row_scale(student_logits, lead, labels, token_weight, reduction, num_items, options)
    if overwrite_logits:
        rows.check_overwrite(student_logits, reduction)
    student = rows.as_rows(student_logits)
    backend = dispatch.choose("parallel" if shards.group else "logits", student.device, student.dtype)
    call = RowCall(
        student,
        targets=tuple(rows.as_rows(t.detach()) for t in teachers),
        labels=labels,
        scale=scale,
        scalars=(*options.values, *([shards.group] if shards.group else []), backend, return_parts),
        lead=lead,
        reduction=reduction,
        needs_grad=student_logits.requires_grad and torch.is_grad_enabled(),
        overwrite=overwrite_logits,
    )
    loss, parts = (_parallel_op if shards.group else _op)(call)
    return (loss, rows.make_parts(parts, scale, labels is not None)) if return_parts else loss
