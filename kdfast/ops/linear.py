"""Knowledge distillation from hidden states through linear heads: `linear_kd_loss` never holds N x V logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast import dispatch
from kdfast.chunks import Needs, Side, grad_buffers, rows_per_chunk
from kdfast.ops import rows
from kdfast.ops.scale import scale_grad
from kdfast.options import PARTS, RowOptions

_lib = torch.library.Library("kdfast", "FRAGMENT")
_lib.define(
    "linear(Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor teacher_hidden, Tensor teacher_weight,"
    f" Tensor? teacher_bias, Tensor? labels, Tensor scale, {RowOptions.schema()}, int chunk_rows, str backend, bool need_parts,"
    " bool need_hidden, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_N_TENSORS = 8


@torch.library.impl(_lib, "linear", "CompositeExplicitAutograd")
def _linear(*args: Any) -> tuple[Tensor, ...]:
    h_s, w_s, b_s, h_t, w_t, b_t, labels, scale, *scalars = args
    *values, chunk_rows, backend, need_parts, need_hidden, need_weight, need_bias = scalars
    options = RowOptions(*values)
    outputs = dispatch.kernel("linear", backend).forward(
        Side(h_s, w_s, b_s), Side(h_t, w_t, b_t), labels, scale, options, chunk_rows, need_parts,
        Needs(need_hidden, need_weight, need_bias),
    )  # fmt: skip
    rows.check_rows(outputs[0], None, None, labels, w_s.shape[0], options)
    return tuple(outputs)


@torch.library.register_fake("kdfast::linear", lib=_lib)
def _linear_fake(*args: Any) -> tuple[Tensor, ...]:
    student = Side(*args[:3])
    need_parts, *needs = args[-4:]
    dtype = torch.float64 if student.hidden.dtype == torch.float64 else torch.float32
    n = student.hidden.shape[0]
    loss = student.hidden.new_empty(n, dtype=dtype)
    return loss, loss.new_empty((n, len(PARTS)) if need_parts else (0,)), *grad_buffers(student, Needs(*needs), torch.empty)


def _like_inputs(ctx: Any, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight and bias in their inputs' dtypes; None where none is needed."""
    needed = (g.to(d) if need else None for g, d, need in zip(grads, ctx.dtypes, ctx.needs, strict=True))
    return *needed, *(None,) * (len(ctx.needs_input_grad) - 3)


class _InForward(torch.autograd.Function):
    """Gradients are formed chunk by chunk while the logits are at hand; backward only scales them."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        loss, parts, *grads = torch.ops.kdfast.linear(*inputs)
        return loss.sum(), parts, *grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, *rest = output
        ctx.mark_non_differentiable(*rest)
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.needs = inputs[-5], inputs[-3:]
        ctx.dtypes = [torch.float32 if x is None else x.dtype for x in inputs[:3]]
        ctx.save_for_backward(*rest[1:])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        return _like_inputs(ctx, tuple(scale_grad(g, upstream, ctx.backend) for g in ctx.saved_tensors))


class _InBackward(torch.autograd.Function):
    """Losses per row: their incoming gradients differ, so the chunks are run again with those folded into the scale."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        loss, parts, *_ = torch.ops.kdfast.linear(*inputs[:-3], False, False, False)
        return loss, parts

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.scalars, ctx.needs = inputs[_N_TENSORS:-4], inputs[-3:]
        ctx.dtypes = [torch.float32 if x is None else x.dtype for x in inputs[:3]]
        ctx.save_for_backward(*inputs[:_N_TENSORS])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        *tensors, scale = ctx.saved_tensors
        _, _, *grads = torch.ops.kdfast.linear(*tensors, scale * upstream, *ctx.scalars, False, *ctx.needs)
        return _like_inputs(ctx, tuple(grads))


def _check_side(side: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, like: Tensor) -> None:
    rows.check_float(f"{side}_hidden", hidden, like=like, like_name="student_hidden")
    rows.check_float(f"{side}_weight", weight, like=like, like_name="student_hidden")
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"{side}_weight: expected shape [V, D] with V, D >= 1, got {list(weight.shape)}")
    if hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{side}_hidden: expected shape [..., {weight.shape[1]}] to match {side}_weight {list(weight.shape)},"
            f" got {list(hidden.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{side}_bias: expected shape [{weight.shape[0]}] to match {side}_weight, got {list(bias.shape)}")


def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    workspace_mb: float | None = None,
    temperature: float = 1.0,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    scale_by_t2: bool = True,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | float | Tensor | None = None,
    return_parts: bool = False,
) -> Any:
    """Knowledge distillation from the two models' last hidden states and their heads.

    Equals

        kd_loss(F.linear(student_hidden, student_weight, student_bias).float(),
                F.linear(teacher_hidden, teacher_weight, teacher_bias).float(), labels, ...)

    but the logits exist for a chunk of rows at a time, in float32 (rounding them to bfloat16 costs 4-23% of the
    gradient's accuracy once the student is close to the teacher), and the heads' gradients are formed with them.

    Args:
        student_hidden: `[..., Ds]`. teacher_hidden: `[..., Dt]`, same leading dimensions; no gradient.
        student_weight: `[Vs, Ds]`, hidden is taken in its dtype; teacher_weight: `[Vt, Dt]`, no gradient. A frozen head
            or hidden (requires_grad False) skips its GEMM. The head's gradient is accumulated in float32.
        student_bias, teacher_bias: `[Vs]`, `[Vt]`.
        workspace_mb: MiB for the logits of one chunk; None: 256 on a CPU, 1024 on a GPU.
        labels, temperature, soft_weight, hard_weight, scale_by_t2, ignore_index, token_weight, reduction, num_items,
            return_parts: as in `kd_loss`. With reduction "none" backward runs the chunks again.

    On a CPU with bfloat16 or float16 heads the weights are widened a tile at a time and multiplied in float32, since
    no CPU GEMM in torch takes half inputs to a float32 result.

    Raises:
        ValueError: as `kd_loss`.
    """
    options = RowOptions(float(temperature), float(soft_weight), float(hard_weight), scale_by_t2, ignore_index)
    rows.check_options(options)
    _check_side("student", student_hidden, student_weight, student_bias, student_hidden)
    _check_side("teacher", teacher_hidden, teacher_weight, teacher_bias, student_hidden)
    lead = student_hidden.shape[:-1]
    rows.check_lead("teacher_hidden", teacher_hidden.shape[:-1], lead, "student_hidden")
    if workspace_mb is not None and workspace_mb <= 0:
        raise ValueError(f"workspace_mb: expected a number above 0, got {workspace_mb}")
    labels = rows.check_labels(labels, lead, student_hidden.device, options)
    scale = rows.row_scale(student_weight, lead, labels, token_weight, reduction, num_items, options)
    student = rows.as_rows(student_hidden.to(student_weight.dtype))
    teacher = rows.as_rows(teacher_hidden.detach().to(teacher_weight.dtype))
    device = student.device.type
    bytes_per_row = 4 * (student_weight.shape[0] + teacher_weight.shape[0])
    chunk_rows = rows_per_chunk(student.shape[0], bytes_per_row, workspace_mb, device)
    needs = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in (student, student_weight, student_bias)]
    inputs = (
        student, student_weight, student_bias, teacher, teacher_weight.detach(),
        None if teacher_bias is None else teacher_bias.detach(), labels, scale, *options.values, chunk_rows,
        dispatch.choose("linear", student.device, student_weight.dtype), return_parts, *needs,
    )  # fmt: skip
    if reduction == "none":
        loss, parts = _InBackward.apply(*inputs)
        loss = loss.view(lead)
    else:
        loss, parts, *_ = _InForward.apply(*inputs)
    return (loss, rows.make_parts(parts, scale, labels is not None)) if return_parts else loss
