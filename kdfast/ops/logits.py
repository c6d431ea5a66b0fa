"""Knowledge distillation on logits: checks and `kd_loss`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast import dispatch
from kdfast.ops import rows
from kdfast.ops.row_op import RowCall, RowOp
from kdfast.options import RowOptions

_op = RowOp("logits", targets=("teacher",))


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
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
    """Knowledge distillation from logits to logits, fused: no N x V distribution is ever formed.

    Equals, with T = temperature:

        kl = F.kl_div(F.log_softmax(student_logits / T, -1), F.log_softmax(teacher_logits / T, -1),
                      log_target=True, reduction="none").sum(-1)
        ce = F.cross_entropy(student_logits.flatten(0, -2), labels.flatten(), reduction="none")
        loss = (soft_weight * T**2 * kl + hard_weight * ce)[labels != ignore_index].mean()

    from one read of each logit tensor, with float32 arithmetic for half-precision inputs.

    Args:
        student_logits: `[..., Vs]` float32, bfloat16, float16 (or float64, on the reference backend).
        teacher_logits: `[..., Vt]`, same leading dimensions and device. Gets no gradient. When Vt != Vs the soft
            term compares the ids both sides have, as if the larger side's other logits were -inf.
        labels: `[...]` int64 or int32, already aligned with the logits (the caller shifts). Rows whose label is
            `ignore_index` do not count. None: every row counts and there is no hard loss.
        temperature: T > 0, on both sides of the soft term.
        soft_weight, hard_weight: the two weights. The hard cross-entropy is at T = 1 over the whole student vocabulary.
        scale_by_t2: multiply the soft term by T^2, which keeps its gradient's size as T changes.
        token_weight: `[...]` weights >= 0; a row of weight 0 does not count.
        reduction: "mean" over the rows that count, "sum", or "none" (`[...]`, 0 where a row does not count).
        num_items: divisor of the mean in place of the rows that count (gradient accumulation, data parallel).
        overwrite_logits: put the gradient in the place of `student_logits`, saving a second N x V buffer; nothing
            may read the logits afterwards (autograd raises when it would).
        return_parts: return `(loss, Parts)` with detached metrics from the same pass.

    Raises:
        ValueError: a shape, dtype, device, option, or (on a CPU, or under `debug_checks()`) a value is wrong.

    Source: Hinton, Vinyals, Dean 2015, arXiv 1503.02531, equation 4 and section 2.1.
    """
    options = RowOptions(float(temperature), float(soft_weight), float(hard_weight), scale_by_t2, ignore_index)
    rows.check_options(options)
    rows.check_float("student_logits", student_logits)
    rows.check_float("teacher_logits", teacher_logits, like=student_logits, like_name="student_logits")
    rows.check_vocab("student_logits", student_logits)
    rows.check_vocab("teacher_logits", teacher_logits)
    lead = student_logits.shape[:-1]
    rows.check_lead("teacher_logits", teacher_logits.shape[:-1], lead, "student_logits")
    labels = rows.check_labels(labels, lead, student_logits.device, options)
    scale = rows.row_scale(student_logits, lead, labels, token_weight, reduction, num_items, options)
    if overwrite_logits:
        rows.check_overwrite(student_logits, reduction)
    student = rows.as_rows(student_logits)
    backend = dispatch.choose("logits", student.device, student.dtype)
    call = RowCall(
        student,
        tensors=(rows.as_rows(teacher_logits.detach()), labels, scale),
        scalars=(*options.values, backend, return_parts),
        lead=lead,
        reduction=reduction,
        needs_grad=student_logits.requires_grad and torch.is_grad_enabled(),
        overwrite=overwrite_logits,
    )
    loss, parts = _op(call)
    return (loss, rows.make_parts(parts, scale, labels is not None)) if return_parts else loss
