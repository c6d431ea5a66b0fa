"""Matching logits through linear heads without forming them: `linear_logit_mse`."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast import dispatch
from kdfast.chunks import Needs, Side, grad_buffers
from kdfast.ops import rows
from kdfast.ops.autograd import outside_autocast
from kdfast.ops.formed import InForward
from kdfast.ops.hidden import check_mask
from kdfast.ops.shards import gathered

METHODS = ("auto", "gram", "logits")

_lib = torch.library.Library("kdfast", "FRAGMENT")
_lib.define(
    "linear_logit_mse(Tensor student_hidden, Tensor student_weight, Tensor teacher_hidden, Tensor teacher_weight,"
    " Tensor? mask, bool center, str method, str backend, bool need_hidden, bool need_weight) -> (Tensor, Tensor, Tensor)"
)


@torch.library.impl(_lib, "linear_logit_mse", "CompositeExplicitAutograd")
@outside_autocast
def _linear_logit_mse(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, mask: Tensor | None,
    center: bool, method: str, backend: str, need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    student, teacher = Side(student_hidden, student_weight, None), Side(teacher_hidden, teacher_weight, None)
    kernel = dispatch.kernel("linear_logit_mse", backend)
    loss, *grads = kernel.forward(student, teacher, mask, center, method, Needs(need_hidden, need_weight, False))
    if rows.first_bad(loss.reshape(1)) is not None:
        raise ValueError(f"linear_logit_mse: the loss is NaN; {_culprit(student, teacher, mask)}")
    return loss, *grads


@torch.library.register_fake("kdfast::linear_logit_mse", lib=_lib)
def _linear_logit_mse_fake(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, mask: Tensor | None,
    center: bool, method: str, backend: str, need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    buffers = grad_buffers(Side(student_hidden, student_weight, None), Needs(need_hidden, need_weight, False))
    return buffers[1].new_empty(()), buffers[0], buffers[1]


def _culprit(student: Side, teacher: Side, mask: Tensor | None) -> str:
    counts = slice(None) if mask is None else mask
    named = {
        "student_hidden": student.hidden[counts], "student_weight": student.weight,
        "teacher_hidden": teacher.hidden[counts], "teacher_weight": teacher.weight,
    }  # fmt: skip
    bad = [name for name, tensor in named.items() if not bool(tensor.isfinite().all())]
    if not bad:
        return "expected finite inputs that do not overflow float32 when multiplied"
    return f"{' and '.join(bad)}: expected finite numbers, got NaN or infinite values"


def _check_side(side: str, hidden: Tensor, weight: Tensor, like: Tensor) -> None:
    rows.check_float(f"{side}_hidden", hidden, like=like, like_name="student_hidden")
    rows.check_float(f"{side}_weight", weight, like=like, like_name="student_hidden")
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"{side}_weight: expected shape [V, D] with V, D >= 1, got {list(weight.shape)}")
    if hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{side}_hidden: expected shape [..., {weight.shape[1]}] to match {side}_weight {list(weight.shape)},"
            f" got {list(hidden.shape)}"
        )


def linear_logit_mse(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    mask: Tensor | None = None,
    center: bool = False,
    method: str = "auto",
) -> Tensor:
    """Mean squared difference of two models' logits, from hidden states and heads; the logits are never formed.

    Equals, with V the smaller of the two vocabularies,

        z_s, z_t = F.linear(student_hidden, student_weight[:V]), F.linear(teacher_hidden, teacher_weight[:V])
        if center: z_s, z_t = z_s - z_s.mean(-1, keepdim=True), z_t - z_t.mean(-1, keepdim=True)
        loss = F.mse_loss(z_s[mask], z_t[mask].detach())

    in (N + V) * D^2 work instead of N * V * D. The product of a frozen teacher's head with itself is kept across calls,
    for as long as the head lives and its version counter stands still (writes through `.data` are not seen by it).

    Accuracy: the terms of the sum cancel as student and teacher come to agree. On a CPU that is measured and answered by
    better conditioned forms (see `kdfast.logit_grams`), so that value and gradients keep four digits at any distance. On a GPU
    nothing is read back: equal hidden sizes use the difference basis, exact unless hidden states and heads differ in ways
    that undo each other; unequal sizes use float64.

    Args:
        student_hidden: `[..., Ds]`. teacher_hidden: `[..., Dt]`, same leading dimensions; no gradient.
        student_weight: `[Vs, Ds]`; teacher_weight: `[Vt, Dt]`, no gradient. A hidden or head that needs no gradient skips
            its product. The same tensor on both sides (a shared head) is recognised and costs less. A DTensor is gathered:
            each rank's loss is that of its own hidden states, and the head's gradient the ranks' mean.
        mask: `[...]` bool, True = counts; the mean is over V and the rows that count, 0 when none does.
        center: subtract each row's mean over the vocabulary first; a softmax does not see it.
        method: "gram"; "logits": the logits a few vocabulary rows at a time; "auto": whichever takes fewer operations.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit; a NaN or infinite value (on a CPU, or under
            `debug_checks()`; otherwise the loss is NaN).

    Source: matching logits, Ba & Caruana 2014, arXiv 1312.6184; ||A B^T||_F^2 = <A^T A, B^T B>.
    """
    shared = teacher_weight is student_weight
    student_weight = gathered(student_weight)
    teacher_weight = student_weight if shared else gathered(teacher_weight)
    _check_side("student", student_hidden, student_weight, student_hidden)
    _check_side("teacher", teacher_hidden, teacher_weight, student_hidden)
    lead = student_hidden.shape[:-1]
    rows.check_lead("teacher_hidden", teacher_hidden.shape[:-1], lead, "student_hidden")
    rows.check_choice("method", method, METHODS)
    mask = check_mask(mask, lead, student_hidden.device)
    student = rows.as_rows(student_hidden.to(student_weight.dtype))
    teacher = rows.as_rows(teacher_hidden.detach().to(teacher_weight.dtype))
    vocab = min(student_weight.shape[0], teacher_weight.shape[0])
    weight_s, weight_t = (w if w.shape[0] == vocab else w[:vocab] for w in (student_weight, teacher_weight.detach()))
    needs = [x.requires_grad and torch.is_grad_enabled() for x in (student, student_weight)]
    backend = dispatch.choose("linear_logit_mse", student.device, student_weight.dtype)
    return InForward.apply(
        "linear_logit_mse", 2, student, weight_s, teacher, weight_t, mask, center, method, backend, *needs
    )[0]  # fmt: skip
