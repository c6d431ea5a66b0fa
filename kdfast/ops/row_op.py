"""`RowOp`: schema, fakes, kernels' entry and autograd of a loss that is computed row by row from student logits.

A row op is three `torch.library` ops: NAME (loss and, when asked for, gradient), NAME_overwrite (the gradient in the
place of the student) and NAME_backward (the gradient recomputed from row statistics). The gradient has two modes:

* in forward: formed while the logits are at hand; backward scales it by the incoming gradient, on the device.
* in backward: only row statistics are kept and the incoming gradient is folded in when the gradient is recomputed.
  For float16, where a gradient of 1/N formed at scale 1 would underflow before the loss scale reaches it, and for
  per-row losses, whose incoming gradient differs from row to row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdfast import dispatch, memory
from kdfast.ops import rows
from kdfast.ops.scale import scale_grad
from kdfast.options import PARTS, RowOptions

_lib = torch.library.Library("kdfast", "FRAGMENT")


class RowOp:
    """A row-wise loss as torch ops.

    Args:
        name: the op's name, also that of its kernel modules.
        targets: names of the target tensors between the student and the labels.
        extra: schema of the scalars after the options, such as "int vocab_size".
    """

    def __init__(self, name: str, targets: tuple[str, ...], extra: str = "") -> None:
        self.name = name
        self.n_targets = len(targets)
        self.n_options = len(RowOptions().values)
        tensors = ", ".join(f"Tensor {t}" for t in targets) + ", Tensor? labels, Tensor scale"
        scalars = ", ".join(s for s in (RowOptions.schema(), extra, "str backend") if s)
        self._define(
            "", f"(Tensor student, {tensors}, {scalars}, bool need_parts, bool need_grad) -> (Tensor, Tensor, Tensor, Tensor)",
            self._forward, self._forward_fake,
        )  # fmt: skip
        self._define(
            "_overwrite", f"(Tensor(a!) student, {tensors}, {scalars}, bool need_parts) -> (Tensor, Tensor)",
            self._overwrite, self._overwrite_fake,
        )  # fmt: skip
        self._define(
            "_backward", f"(Tensor student, {tensors}, Tensor stats, {scalars}) -> Tensor", self._backward, self._backward_fake
        )

    def _define(self, suffix: str, schema: str, kernel: Any, fake: Any) -> None:
        _lib.define(f"{self.name}{suffix}{schema}")
        _lib.impl(f"{self.name}{suffix}", kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"kdfast::{self.name}{suffix}", fake, lib=_lib)

    def _split(self, args: tuple[Any, ...], between: int = 0) -> tuple[tuple[Any, ...], RowOptions, tuple[Any, ...], Any]:
        """Arguments after the student as tensors, options, extra scalars, kernel module; flags are not among them."""
        n = self.n_targets + 2 + between
        options = RowOptions(*args[n : n + self.n_options])
        return args[:n], options, args[n + self.n_options : -1], dispatch.kernel(self.name, args[-1])

    def _run(self, student: Tensor, args: tuple[Any, ...], need_parts: bool, grad: Tensor | None) -> tuple[Tensor, ...]:
        tensors, options, extra, kernel = self._split(args)
        # The kernel writes over an overwritten student, so that only the teacher can be looked at afterwards.
        seen = None if grad is student else student
        loss, stats, parts = kernel.forward(student, *tensors, options, *extra, need_parts, grad)
        teacher = tensors[0] if tensors[0].is_floating_point() else None
        rows.check_rows(loss, seen, teacher, tensors[-2], student.shape[1], options)
        return loss, stats, parts

    def _forward(self, student: Tensor, *args: Any) -> tuple[Tensor, ...]:
        *rest, need_parts, need_grad = args
        grad = _grad_buffer(student) if need_grad else None
        return *self._run(student, tuple(rest), need_parts, grad), student.new_empty(0) if grad is None else grad

    def _overwrite(self, student: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        *rest, need_parts = args
        loss, _, parts = self._run(student, tuple(rest), need_parts, student)
        return loss, parts

    def _backward(self, student: Tensor, *args: Any) -> Tensor:
        (*tensors, stats), options, extra, kernel = self._split(args, between=1)
        grad = _grad_buffer(student)
        kernel.backward(student, *tensors, stats, options, *extra, grad)
        return grad

    def _forward_fake(self, student: Tensor, *args: Any) -> tuple[Tensor, ...]:
        return *_row_outputs(student, args[-2]), student.new_empty(student.shape if args[-1] else 0)

    def _overwrite_fake(self, student: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        loss, _, parts = _row_outputs(student, args[-1])
        return loss, parts

    def _backward_fake(self, student: Tensor, *args: Any) -> Tensor:
        return student.new_empty(student.shape)

    def __call__(self, call: RowCall) -> tuple[Tensor, Tensor]:
        """(loss, parts): the loss reduced as `call.reduction` says, the parts per row."""
        student, rest = call.student, (*call.tensors, *call.scalars)
        if call.overwrite and call.needs_grad:
            loss, parts = _Overwrite.apply(self.name, student, *rest)
            return loss, parts
        if call.needs_grad and call.reduction != "none" and student.dtype != torch.float16:
            loss, parts, _ = _InForward.apply(self.name, student, *rest)
            return loss, parts
        loss, parts, _ = _InBackward.apply(self.name, len(call.tensors), student, *rest)
        return rows.reduce(loss, call.lead, call.reduction), parts


@dataclass(frozen=True)
class RowCall:
    """One checked call of a row op: N x V student rows and everything that goes with them.

    `tensors` are the targets, the labels (or None) and the row scale; `scalars` the options, the extra scalars, the
    backend and whether parts are wanted, in schema order.
    """

    student: Tensor
    tensors: tuple[Tensor | None, ...]
    scalars: tuple[Any, ...]
    lead: torch.Size
    reduction: str
    needs_grad: bool
    overwrite: bool


def _grad_buffer(student: Tensor) -> Tensor:
    return memory.empty(student.shape, dtype=student.dtype, device=student.device)


def _row_outputs(student: Tensor, need_parts: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    n = student.shape[0]
    parts = (n, len(PARTS)) if need_parts else (0,)
    return (
        student.new_empty(n, dtype=dtype),
        student.new_empty(n, 3, dtype=torch.float64),
        student.new_empty(parts, dtype=dtype),
    )


def _scaled(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    (grad,) = ctx.saved_tensors
    out = None if upstream is None else scale_grad(grad, upstream, ctx.backend)
    return None, out, *(None,) * (len(ctx.needs_input_grad) - 2)


class _InForward(torch.autograd.Function):
    @staticmethod
    def forward(name: str, student: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        loss, _, parts, grad = getattr(torch.ops.kdfast, name)(student, *rest, True)
        return loss.sum(), parts, grad

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, parts, grad = output
        ctx.mark_non_differentiable(parts, grad)
        ctx.set_materialize_grads(False)
        ctx.backend = inputs[-2]
        ctx.save_for_backward(grad)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return _scaled(ctx, upstream)


class _Overwrite(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, student: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        grad = student.detach()
        loss, parts = getattr(torch.ops.kdfast, f"{name}_overwrite")(grad, *rest)
        # The detached view shares its version counter with `student`: whoever still needs the logits is told by autograd.
        torch.autograd.graph.increment_version(grad)
        ctx.mark_non_differentiable(parts)
        ctx.set_materialize_grads(False)
        ctx.backend = rest[-2]
        ctx.save_for_backward(grad)
        return loss.sum(), parts

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return _scaled(ctx, upstream)


class _InBackward(torch.autograd.Function):
    @staticmethod
    def forward(name: str, n_tensors: int, student: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        loss, stats, parts, _ = getattr(torch.ops.kdfast, name)(student, *rest, False)
        return loss, parts, stats

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        name, n_tensors, *rest = inputs
        _, parts, stats = output
        ctx.mark_non_differentiable(parts, stats)
        ctx.set_materialize_grads(False)
        ctx.name, ctx.scalars = name, rest[1 + n_tensors : -1]
        ctx.save_for_backward(*rest[: 1 + n_tensors], stats)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        *tensors, scale, stats = ctx.saved_tensors
        grad = None
        if upstream is not None:
            backward = getattr(torch.ops.kdfast, f"{ctx.name}_backward")
            grad = backward(*tensors, scale * upstream, stats, *ctx.scalars)
        return None, None, grad, *(None,) * (len(ctx.needs_input_grad) - 3)
