"""Knowledge distillation on logits: schema, fake, autograd, checks and `kd_loss`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast import dispatch
from kdfast.ops import rows
from kdfast.ops.scale import scale_grad
from kdfast.options import PARTS, RowOptions

_ROWS = "Tensor teacher, Tensor? labels, Tensor scale"
_TAIL = f"{RowOptions.schema()}, str backend"
_lib = torch.library.Library("kdfast", "FRAGMENT")
_lib.define(f"logits(Tensor student, {_ROWS}, {_TAIL}, bool need_parts, bool need_grad) -> (Tensor, Tensor, Tensor, Tensor)")
_lib.define(f"logits_overwrite(Tensor(a!) student, {_ROWS}, {_TAIL}, bool need_parts) -> (Tensor, Tensor)")
_lib.define(f"logits_backward(Tensor student, {_ROWS}, Tensor stats, {_TAIL}) -> Tensor")


@torch.library.impl(_lib, "logits", "CompositeExplicitAutograd")
def _logits(student: Tensor, teacher: Tensor, labels: Tensor | None, scale: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *values, backend, need_parts, need_grad = rest
    options = RowOptions(*values)
    grad = _grad_buffer(student) if need_grad else None
    loss, stats, parts = dispatch.kernel("logits", backend).forward(student, teacher, labels, scale, options, need_parts, grad)
    rows.check_rows(loss, student, teacher, labels, student.shape[1], options)
    return loss, stats, parts, student.new_empty(0) if grad is None else grad


@torch.library.impl(_lib, "logits_overwrite", "CompositeExplicitAutograd")
def _logits_overwrite(
    student: Tensor, teacher: Tensor, labels: Tensor | None, scale: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    *values, backend, need_parts = rest
    options = RowOptions(*values)
    loss, _, parts = dispatch.kernel("logits", backend).forward(student, teacher, labels, scale, options, need_parts, student)
    rows.check_rows(loss, None, teacher, labels, student.shape[1], options)
    return loss, parts


@torch.library.impl(_lib, "logits_backward", "CompositeExplicitAutograd")
def _logits_backward(
    student: Tensor, teacher: Tensor, labels: Tensor | None, scale: Tensor, stats: Tensor, *rest: Any
) -> Tensor:
    *values, backend = rest
    grad = _grad_buffer(student)
    dispatch.kernel("logits", backend).backward(student, teacher, labels, scale, stats, RowOptions(*values), grad)
    return grad


def _grad_buffer(student: Tensor) -> Tensor:
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)


def _row_outputs(student: Tensor, need_parts: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    n = student.shape[0]
    parts = (n, len(PARTS)) if need_parts else (0,)
    return student.new_empty(n, dtype=dtype), student.new_empty(n, 3, dtype=dtype), student.new_empty(parts, dtype=dtype)


@torch.library.register_fake("kdfast::logits", lib=_lib)
def _logits_fake(student: Tensor, teacher: Tensor, labels: Tensor | None, scale: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    need_parts, need_grad = rest[-2:]
    return *_row_outputs(student, need_parts), _grad_buffer(student) if need_grad else student.new_empty(0)


@torch.library.register_fake("kdfast::logits_overwrite", lib=_lib)
def _logits_overwrite_fake(
    student: Tensor, teacher: Tensor, labels: Tensor | None, scale: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    loss, _, parts = _row_outputs(student, rest[-1])
    return loss, parts


@torch.library.register_fake("kdfast::logits_backward", lib=_lib)
def _logits_backward_fake(
    student: Tensor, teacher: Tensor, labels: Tensor | None, scale: Tensor, stats: Tensor, *rest: Any
) -> Tensor:
    return _grad_buffer(student)


class _InForward(torch.autograd.Function):
    """The gradient is formed while the logits are at hand; backward only scales it."""

    @staticmethod
    def forward(student: Tensor, teacher: Tensor, labels: Tensor | None, scale: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        loss, _, parts, grad = torch.ops.kdfast.logits(student, teacher, labels, scale, *rest, True)
        return loss.sum(), parts, grad

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, parts, grad = output
        ctx.mark_non_differentiable(parts, grad)
        ctx.set_materialize_grads(False)
        ctx.backend = inputs[-2]
        ctx.save_for_backward(grad)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (grad,) = ctx.saved_tensors
        out = None if upstream is None else scale_grad(grad, upstream, ctx.backend)
        return out, *(None,) * (len(ctx.needs_input_grad) - 1)


class _Overwrite(torch.autograd.Function):
    """As `_InForward`, with the gradient in the place of the student's logits."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, labels: Tensor | None, scale: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        # Mutating the detached view moves the version counter that `student` shares, so autograd notices a reader.
        buffer = student.detach()
        loss, parts = torch.ops.kdfast.logits_overwrite(buffer, teacher, labels, scale, *rest)
        ctx.mark_non_differentiable(parts)
        ctx.set_materialize_grads(False)
        ctx.backend = rest[-2]
        ctx.save_for_backward(buffer)
        return loss.sum(), parts

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (grad,) = ctx.saved_tensors
        out = None if upstream is None else scale_grad(grad, upstream, ctx.backend)
        return out, *(None,) * (len(ctx.needs_input_grad) - 1)


class _InBackward(torch.autograd.Function):
    """Only row statistics are kept; the gradient is recomputed with the incoming gradient folded in.

    For float16, where a gradient of 1/N formed at scale 1 would underflow before the loss scale reaches it, and
    for per-row losses, whose incoming gradient differs from row to row.
    """

    @staticmethod
    def forward(student: Tensor, teacher: Tensor, labels: Tensor | None, scale: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        loss, stats, parts, _ = torch.ops.kdfast.logits(student, teacher, labels, scale, *rest, False)
        return loss, parts, stats

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        student, teacher, labels, scale, *rest = inputs
        _, parts, stats = output
        ctx.mark_non_differentiable(parts, stats)
        ctx.set_materialize_grads(False)
        ctx.rest = rest[:-1]
        ctx.save_for_backward(student, teacher, labels, scale, stats)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        student, teacher, labels, scale, stats = ctx.saved_tensors
        grad = None
        if upstream is not None:
            grad = torch.ops.kdfast.logits_backward(student, teacher, labels, scale * upstream, stats, *ctx.rest)
        return grad, *(None,) * (len(ctx.needs_input_grad) - 1)


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
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if logits.ndim < 1 or logits.shape[-1] == 0:
            raise ValueError(f"{name}: expected shape [..., V] with V >= 1, got {list(logits.shape)}")
    lead = student_logits.shape[:-1]
    if teacher_logits.shape[:-1] != lead:
        raise ValueError(
            f"teacher_logits: expected leading dimensions {list(lead)} like student_logits, got {list(teacher_logits.shape[:-1])}"
        )
    device = student_logits.device
    labels = rows.check_labels(labels, lead, device, options)
    scale = rows.row_scale(student_logits, lead, labels, token_weight, reduction, num_items, options)
    teacher = rows.as_rows(teacher_logits.detach())
    student = rows.as_rows(student_logits)
    backend = dispatch.choose("logits", device, student.dtype)
    needs_grad = student_logits.requires_grad and torch.is_grad_enabled()
    rest = (*options.values, backend, return_parts)

    if overwrite_logits and needs_grad:
        if student.data_ptr() != student_logits.data_ptr() or not student_logits.is_contiguous():
            raise ValueError(
                "overwrite_logits: expected contiguous student_logits, got a strided view; call .contiguous() first"
            )
        if reduction == "none" or student.dtype == torch.float16:
            raise ValueError(
                "overwrite_logits: the gradient is formed before the incoming gradient is known, which needs reduction 'mean'"
                f" or 'sum' and a dtype other than float16, got {reduction!r} and {student.dtype}"
            )
        loss, parts = _Overwrite.apply(student, teacher, labels, scale, *rest)
    elif needs_grad and reduction != "none" and student.dtype != torch.float16:
        loss, parts, _ = _InForward.apply(student, teacher, labels, scale, *rest)
    else:
        loss, parts, _ = _InBackward.apply(student, teacher, labels, scale, *rest)
        loss = rows.reduce(loss, lead, reduction)
    return (loss, rows.make_parts(parts, scale, labels is not None)) if return_parts else loss
