"""Knowledge distillation from hidden states through linear heads: `linear_kd_loss` never holds N x V logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdfast import dispatch
from kdfast.chunks import Chunking, Needs, Side, grad_buffers, rows_per_chunk
from kdfast.ops import rows
from kdfast.ops.row_options import row_options
from kdfast.ops.scale import scale_grad
from kdfast.options import PARTS, Head, RowOptions

_lib = torch.library.Library("kdfast", "FRAGMENT")
_lib.define(
    "linear(Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor[] teacher_hidden,"
    " Tensor[] teacher_weight, Tensor?[] teacher_bias, Tensor? labels, Tensor scale, Tensor? row_index,"
    f" {RowOptions.schema()}, int chunk_rows, ScalarType logits_dtype, str backend, bool need_parts, bool need_hidden,"
    " bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.impl(_lib, "linear", "CompositeExplicitAutograd")
def _linear(*args: Any) -> tuple[Tensor, ...]:
    h_s, w_s, b_s, h_t, w_t, b_t, labels, scale, row_index, *scalars = args
    *values, chunk_rows, dtype, backend, need_parts, need_hidden, need_weight, need_bias = scalars
    options = RowOptions(*values)
    if row_index is None and h_s.device.type == "cpu" and not bool(scale.all()):
        row_index = scale.nonzero()[:, 0]  # a row that does not count costs no GEMM
    outputs = dispatch.kernel("linear", backend).forward(
        Side(h_s, w_s, b_s), [Side(*side) for side in zip(h_t, w_t, b_t, strict=True)], labels, scale, options,
        Chunking(chunk_rows, dtype, row_index), need_parts, Needs(need_hidden, need_weight, need_bias),
    )  # fmt: skip
    rows.check_rows(outputs[0], None, [], labels, w_s.shape[0], options)
    return tuple(outputs)


@torch.library.register_fake("kdfast::linear", lib=_lib)
def _linear_fake(*args: Any) -> tuple[Tensor, ...]:
    student = Side(*args[:3])
    need_parts, *needs = args[-4:]
    dtype = torch.float64 if student.hidden.dtype == torch.float64 else torch.float32
    n = student.hidden.shape[0]
    loss = student.hidden.new_empty(n, dtype=dtype)
    return loss, loss.new_empty((n, len(PARTS)) if need_parts else (0,)), *grad_buffers(student, Needs(*needs), torch.empty)


def _op(n_teachers: int, *inputs: Any) -> Any:
    """The torch op on what an autograd function gets: student (3), labels, scale, row_index, teachers (3 each), scalars."""
    (*student, labels, scale, row_index), rest = inputs[:6], inputs[6:]
    sides = [list(rest[i * n_teachers : (i + 1) * n_teachers]) for i in range(3)]
    return torch.ops.kdfast.linear(*student, *sides, labels, scale, row_index, *rest[3 * n_teachers :])


def _like_inputs(ctx: Any, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight and bias in their inputs' dtypes; None where none is needed."""
    hidden, weight, bias = (g.to(d) if need else None for g, d, need in zip(grads, ctx.dtypes, ctx.needs, strict=True))
    return None, hidden, weight, bias, *(None,) * (len(ctx.needs_input_grad) - 4)


def _remember_student(ctx: Any, inputs: tuple[Any, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.needs = inputs[-3:]
    ctx.dtypes = [torch.float32 if x is None else x.dtype for x in inputs[1:4]]


class _InForward(torch.autograd.Function):
    """Gradients are formed chunk by chunk while the logits are at hand; backward only scales them."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        loss, parts, *grads = _op(*inputs)
        return loss.sum(), parts, *grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, *rest = output
        ctx.mark_non_differentiable(*rest)
        _remember_student(ctx, inputs)
        ctx.backend = inputs[-5]
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
        loss, parts, *_ = _op(*inputs[:-3], False, False, False)
        return loss, parts

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(output[1])
        _remember_student(ctx, inputs)
        n_tensors = 6 + 3 * inputs[0]
        ctx.n_teachers, ctx.scalars = inputs[0], inputs[1 + n_tensors : -4]
        ctx.save_for_backward(*inputs[1 : 1 + n_tensors])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        *student, labels, scale, row_index = ctx.saved_tensors[:6]
        tensors = (*student, labels, scale * upstream, row_index, *ctx.saved_tensors[6:])
        _, _, *grads = _op(ctx.n_teachers, *tensors, *ctx.scalars, False, *ctx.needs)
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


def _check_row_index(row_index: Tensor | None, like: Tensor, n: int) -> None:
    if row_index is None:
        return
    if row_index.ndim != 1 or row_index.dtype != torch.int64 or row_index.device != like.device or row_index.numel() > n:
        raise ValueError(
            f"row_index: expected at most {n} int64 positions [M] on {like.device},"
            f" got {row_index.dtype} {list(row_index.shape)} on {row_index.device}"
        )


def _as_list(argument: Any) -> list[Any]:
    return list(argument) if isinstance(argument, Sequence) else [argument]


def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | Sequence[Tensor],
    teacher_weight: Tensor | Sequence[Tensor],
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | Sequence[Tensor | None] | None = None,
    logits_dtype: torch.dtype = torch.float32,
    workspace_mb: float | None = None,
    row_index: Tensor | None = None,
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
    token_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    student_head: Head = Head(),
    teacher_head: Head = Head(),
    teacher_weights: Sequence[float] | None = None,
    teacher_mix: str = "probs",
    reduction: str = "mean",
    num_items: int | float | Tensor | None = None,
    return_parts: bool = False,
) -> Any:
    """Knowledge distillation from the two models' last hidden states and their heads.

    Equals

        kd_loss(F.linear(student_hidden, student_weight, student_bias).float(),
                F.linear(teacher_hidden, teacher_weight, teacher_bias).float(), labels, ...)

    but the logits exist for a chunk of rows at a time, and the heads' gradients are formed with them. Without
    gradients (evaluation) it takes the workspace and nothing else.

    Args:
        student_hidden: `[..., Ds]`. teacher_hidden: `[..., Dt]`, same leading dimensions; no gradient. Several teachers:
            sequences of hidden states, weights and (if any) biases.
        student_weight: `[Vs, Ds]`, hidden is taken in its dtype; teacher_weight: `[Vt, Dt]`, no gradient. A frozen head
            or hidden (requires_grad False) skips its GEMM. The head's gradient is accumulated in float32.
        student_bias, teacher_bias: `[Vs]`, `[Vt]`.
        logits_dtype: float32, or bfloat16, which halves the workspace and, where only half products are fast, the time;
            it costs 4-23% of the gradient's accuracy once the student is close to the teacher.
        workspace_mb: MiB for the logits of one chunk; None: 256 on a CPU, 1024 on a GPU.
        row_index: `[M]` int64 ascending positions (in the flattened leading dimensions) that hold every row that counts;
            the other rows cost no GEMM. On a CPU such rows are found without it; on a GPU that would wait for the device.
        divergence ... return_parts: as in `kd_loss`. With reduction "none" backward runs the chunks again.

    On a CPU with bfloat16 or float16 heads and float32 logits the weights are widened a tile at a time and multiplied in
    float32, since no CPU GEMM in torch takes half inputs to a float32 result.

    Raises:
        ValueError: as `kd_loss`.
    """
    hiddens, weights = _as_list(teacher_hidden), _as_list(teacher_weight)
    biases = [None] * len(weights) if teacher_bias is None else _as_list(teacher_bias)
    if not len(hiddens) == len(weights) == len(biases):
        raise ValueError(
            f"teacher_weight: expected as many weights and biases as teacher_hidden ({len(hiddens)}),"
            f" got {len(weights)} and {len(biases)}"
        )
    options = row_options(
        divergence=divergence, temperature=temperature, soft_weight=soft_weight, hard_weight=hard_weight, beta=beta,
        skew=skew, ab_alpha=ab_alpha, ab_beta=ab_beta, scale_by_t2=scale_by_t2, ignore_index=ignore_index,
        label_smoothing=label_smoothing, z_loss=z_loss, student_head=student_head, teacher_head=teacher_head,
        teachers=len(weights), teacher_weights=teacher_weights, teacher_mix=teacher_mix,
    )  # fmt: skip
    _check_side("student", student_hidden, student_weight, student_bias, student_hidden)
    lead = student_hidden.shape[:-1]
    for i, side in enumerate(zip(hiddens, weights, biases, strict=True)):
        _check_side(rows.member("teacher", i, len(weights)), *side, student_hidden)
        rows.check_lead(rows.member("teacher_hidden", i, len(weights)), side[0].shape[:-1], lead, "student_hidden")
    if workspace_mb is not None and workspace_mb <= 0:
        raise ValueError(f"workspace_mb: expected a number above 0, got {workspace_mb}")
    if logits_dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"logits_dtype: expected torch.float32 or torch.bfloat16, got {logits_dtype}")
    labels = rows.check_labels(labels, lead, student_hidden.device, options)
    scale = rows.row_scale(student_weight, lead, labels, token_weight, reduction, num_items, options)
    student = rows.as_rows(student_hidden.to(student_weight.dtype))
    _check_row_index(row_index, student, student.shape[0])
    teachers = (
        *(rows.as_rows(h.detach().to(w.dtype)) for h, w in zip(hiddens, weights, strict=True)),
        *(w.detach() for w in weights),
        *(None if b is None else b.detach() for b in biases),
    )
    bytes_per_row = logits_dtype.itemsize * (student_weight.shape[0] + sum(w.shape[0] for w in weights))
    chunk_rows = rows_per_chunk(student.shape[0], bytes_per_row, workspace_mb, student.device.type)
    needs = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in (student, student_weight, student_bias)]
    inputs = (
        len(weights), student, student_weight, student_bias, labels, scale, row_index, *teachers, *options.values, chunk_rows,
        logits_dtype, dispatch.choose("linear", student.device, student_weight.dtype), return_parts, *needs,
    )  # fmt: skip
    if reduction == "none":
        loss, parts = _InBackward.apply(*inputs)
        loss = loss.view(lead)
    else:
        loss, parts, *_ = _InForward.apply(*inputs)
    return (loss, rows.make_parts(parts, scale, labels is not None)) if return_parts else loss
