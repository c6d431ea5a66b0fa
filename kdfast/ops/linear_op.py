"""The torch op behind `linear_kd_loss` and `linear_topk_kd_loss`: schema, fake, kernel entry, autograd in both gradient modes.

The student's logits are compared with those of teachers' heads, or with sparse targets: then there are `targets`, the tables of
`tails.kernel_rows`, and no teachers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdfast import dispatch
from kdfast.chunks import Chunking, Needs, Side, grad_buffers
from kdfast.ops import parallel, parallel_topk, rows, tails
from kdfast.ops.autograd import known_signature, outside_autocast, save, saved
from kdfast.ops.main_grad import MainGrad, add_to
from kdfast.ops.scale import scale_grad
from kdfast.options import PARTS, RowOptions

_lib = torch.library.Library("kdfast", "FRAGMENT")
_lib.define(
    "linear(Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor[] teacher_hidden,"
    " Tensor[] teacher_weight, Tensor?[] teacher_bias, Tensor? labels, Tensor scale, Tensor? row_index,"
    f" Tensor[] targets, {RowOptions.schema()}, float? workspace_mb, ScalarType logits_dtype, ScalarType? heads_dtype,"
    " str group, bool reduce_hidden, int vocab_size, bool spread, str backend, bool check, bool need_parts,"
    " bool need_hidden, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def side_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> Side:
    """Hidden states in the dtype of their head, and both in `dtype` where autocast asks for one."""
    dtype = dtype or weight.dtype
    return Side(hidden.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype))


@torch.library.impl(_lib, "linear", "CompositeExplicitAutograd")
@outside_autocast
def _linear(*args: Any) -> tuple[Tensor, ...]:
    h_s, w_s, b_s, h_t, w_t, b_t, labels, scale, row_index, targets, *scalars = args
    *scalars, check, need_parts, n_h, n_w, n_b = scalars
    *values, workspace_mb, dtype, heads_dtype, group, reduce_hidden, vocab_size, spread, backend = scalars
    options, needs = RowOptions.of(values), Needs(n_h, n_w, n_b)
    row_index = _counting_rows(scale, row_index)
    kernel = {}
    if targets:
        sparse = (
            parallel_topk.row_kernel(group, dispatch.choose("parallel", h_s.device, h_s.dtype), vocab_size, spread)
            if group
            else None
        )
        kernel = {"kernel": sparse or _sparse(backend, vocab_size, spread), "row_inputs": targets}
    elif group:
        kernel = {"kernel": parallel.row_kernel(group, h_s)}
    student = side_of(h_s, w_s, b_s, heads_dtype)
    teachers = [side_of(*side, heads_dtype) for side in zip(h_t, w_t, b_t, strict=True)]
    outputs = dispatch.kernel("linear", backend).forward(
        student, teachers, labels, scale, options, Chunking(workspace_mb, dtype, row_index), need_parts, needs, **kernel,
    )  # fmt: skip
    if group and reduce_hidden and needs.hidden:
        parallel.all_reduce(outputs[2], group)
    if check:
        bad = rows.first_bad(outputs[0])
        if bad is not None:
            vocab = w_s.shape[0] * parallel.size(group) if group else w_s.shape[0]
            if targets:
                tails.check_ids(targets, bad, vocab_size)
            rows.check_rows(outputs[0], None, [], labels, vocab, options)
    return tuple(outputs)


def _sparse(backend: str, vocab_size: int, spread: bool) -> Any:
    """`forward` of `topk` with the arguments of that of `logits`."""
    forward = dispatch.kernel("topk", backend).forward

    def kernel(student: Tensor, targets: Any, labels: Any, scale: Tensor, options: RowOptions, *rest: Any) -> Any:
        return forward(student, targets, labels, scale, options, vocab_size, spread, *rest)

    return kernel


def _counting_rows(scale: Tensor, row_index: Tensor | None) -> Tensor | None:
    """Positions of the rows to compute, None for all. On a CPU a row that does not count costs no GEMM."""
    if not rows.values_are_checked(scale.device):
        return row_index
    counts = scale != 0
    if row_index is not None:
        if bool(((row_index < 0) | (row_index >= scale.numel())).any()):
            raise ValueError(f"row_index: expected positions from 0 to {scale.numel() - 1}, got {row_index.tolist()[:8]} ...")
        if bool((row_index[1:] <= row_index[:-1]).any()):
            raise ValueError("row_index: expected ascending positions without repeats, got others; use row_index.unique()")
        left_out = counts.index_fill(0, row_index, False)
        if bool(left_out.any()):
            raise ValueError(
                f"row_index: row {int(left_out.nonzero()[0])} counts but is not listed; list every row that counts"
            )
    if scale.device.type != "cpu":
        return row_index
    return None if bool(counts.all()) else counts.nonzero()[:, 0]


@torch.library.register_fake("kdfast::linear", lib=_lib)
def _linear_fake(*args: Any) -> tuple[Tensor, ...]:
    heads_dtype = args[-11]
    need_parts, *needs = args[-4:]
    student = side_of(args[0], args[1], args[2], heads_dtype)
    n = student.hidden.shape[0]
    loss = student.hidden.new_empty(n, dtype=torch.float64 if student.weight.dtype == torch.float64 else torch.float32)
    return loss, loss.new_empty((n, len(PARTS)) if need_parts else (0,)), *grad_buffers(student, Needs(*needs), torch.empty)


@dataclass(frozen=True)
class LinearCall:
    """One checked call on N rows.

    Args:
        student: hidden, weight, bias; teachers likewise, none where there are targets.
        main_grad: float32 sum to which the weight's gradient is added in place of being returned.
        scalars: the options and everything that follows them in the schema, up to the backend.
    """

    student: tuple[Tensor, Tensor, Tensor | None]
    teachers: Sequence[tuple[Tensor, Tensor, Tensor | None]]
    labels: Tensor | None
    scale: Tensor
    row_index: Tensor | None
    main_grad: MainGrad | None
    scalars: tuple[Any, ...]
    need_parts: bool
    targets: tuple[Tensor, ...] = ()

    def run(self, per_row: bool) -> tuple[Tensor, Tensor]:
        """(loss, parts): the loss of every row, or their sum."""
        needs = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in self.student]
        # Autograd sees tensors among arguments, not inside lists.
        by_kind = zip(*self.teachers, strict=True)
        inputs = (
            len(self.teachers), len(self.targets), *self.student, self.labels, self.scale, self.row_index, self.main_grad,
            *(x for kind in by_kind for x in kind), *self.targets, *self.scalars, self.need_parts, *needs,
        )  # fmt: skip
        if per_row:
            return _InBackward.apply(*inputs)
        loss, parts, *_ = _InForward.apply(*inputs)
        return loss, parts


def _op(inputs: Sequence[Any], check: bool) -> Any:
    """The torch op on what an autograd function gets (see `LinearCall.run`)."""
    n_teachers, n_targets, hidden, weight, bias, labels, scale, row_index, _, *rest = inputs
    sides = [list(rest[i * n_teachers : (i + 1) * n_teachers]) for i in range(3)]
    targets, rest = rest[3 * n_teachers :][:n_targets], rest[3 * n_teachers + n_targets :]
    *scalars, need_parts, need_hidden, need_weight, need_bias = rest
    flags = (check, need_parts, need_hidden, need_weight, need_bias)
    return torch.ops.kdfast.linear(hidden, weight, bias, *sides, labels, scale, row_index, targets, *scalars, *flags)


def _remember(ctx: Any, inputs: tuple[Any, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.needs = inputs[-3:]
    ctx.dtypes = [torch.float32 if x is None else x.dtype for x in inputs[2:5]]
    # Not saved for backward: other layers and other batches add to it meanwhile, which autograd would take for misuse.
    ctx.main_grad = inputs[8]


def _to_student(ctx: Any, grads: Sequence[Tensor], upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight and bias, times `upstream` when it is given, in the dtypes of their inputs."""
    out: list[Tensor | None] = []
    for position, (grad, dtype, need) in enumerate(zip(grads, ctx.dtypes, ctx.needs, strict=True)):
        if need and position == 1 and ctx.main_grad is not None:
            add_to(ctx.main_grad, grad, upstream)
            need = False
        scaled = grad if upstream is None or not need else scale_grad(grad, upstream, ctx.backend)
        out.append(scaled.to(dtype) if need else None)
    return None, None, *out, *(None,) * (len(ctx.needs_input_grad) - 5)


class _InForward(torch.autograd.Function):
    """Gradients are formed chunk by chunk while the logits are at hand; backward only scales them."""

    @staticmethod
    @known_signature
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        loss, parts, *grads = _op(inputs, check=True)
        return loss.sum(), parts, *grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, *rest = output
        ctx.mark_non_differentiable(*rest)
        _remember(ctx, inputs)
        ctx.backend = inputs[-5]
        ctx.save_for_backward(*rest[1:])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        return _to_student(ctx, ctx.saved_tensors, upstream)


class _InBackward(torch.autograd.Function):
    """Losses per row: their incoming gradients differ, so the chunks are run again with those folded into the scale."""

    @staticmethod
    @known_signature
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        loss, parts, *_ = _op((*inputs[:-3], False, False, False), check=True)
        return loss, parts

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(output[1])
        _remember(ctx, inputs)
        ctx.counts = inputs[:2]
        first_scalar = 9 + 3 * inputs[0] + inputs[1]
        ctx.scalars = inputs[first_scalar:-4]
        save(ctx, *inputs[2:8], *inputs[9:first_scalar])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        tensors = saved(ctx)
        *student, labels, scale, row_index = tensors[:6]
        tensors = [*student, labels, rows.folded(scale, upstream), row_index, None, *tensors[6:]]
        _, _, *grads = _op((*ctx.counts, *tensors, *ctx.scalars, False, *ctx.needs), check=False)
        return _to_student(ctx, grads, None)
