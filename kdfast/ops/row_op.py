"""`RowOp`: schema, fakes, kernels' entry and autograd of a loss that is computed row by row from student logits.

A row op is three `torch.library` ops: NAME (loss and, when asked for, gradient), NAME_overwrite (the gradient in the
place of the student) and NAME_backward (the gradient recomputed from row statistics). The gradient has two modes:

* in forward: formed while the logits are at hand; backward scales it by the incoming gradient, on the device.
* in backward: only row statistics are kept and the incoming gradient is folded in when the gradient is recomputed.
  For float16, where a gradient of 1/N formed at scale 1 would underflow before the loss scale reaches it, and for
  per-row losses, whose incoming gradient differs from row to row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdfast import dispatch, memory
from kdfast.ops import rows
from kdfast.ops.autograd import known_signature, save, saved
from kdfast.ops.scale import scale_grad
from kdfast.options import PARTS, RowOptions

_lib = torch.library.Library("kdfast", "FRAGMENT")


class RowOp:
    """A row-wise loss as torch ops.

    Args:
        name: the op's name, also that of its kernel modules.
        extra: schema of the scalars after the options, such as "int vocab_size".
        dense: the targets are logits of teachers, which can be looked at when a row goes wrong.
        stats: columns of the row statistics for a number of targets.
        kernel: backend -> an object with the kernel's functions; by default its module of this name.
        vocab: (student, extra scalars) -> ids a label can have; by default the student's columns.
        check_targets: (targets, row, extra scalars) of a row whose loss is NaN; raises when the targets are why.
    """

    def __init__(
        self, name: str, extra: str = "", dense: bool = False, stats: Callable[[int], int] = lambda _: 3,
        kernel: Callable[[str], Any] | None = None,
        vocab: Callable[[Tensor, tuple[Any, ...]], int] = lambda student, _: student.shape[1],
        check_targets: Callable[[list[Tensor], int, tuple[Any, ...]], None] = lambda targets, row, extra: None,
    ) -> None:  # fmt: skip
        self.name, self.dense, self.stats, self.vocab, self.check_targets = name, dense, stats, vocab, check_targets
        self.kernel = kernel or (lambda backend: dispatch.kernel(name, backend))
        self.n_options = len(RowOptions().values)
        tensors = "Tensor[] targets, Tensor? labels, Tensor scale"
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

    def _scalars(self, args: tuple[Any, ...]) -> tuple[RowOptions, tuple[Any, ...], Any]:
        """Options, extra scalars and kernel module of a call, from the scalars in schema order without the flags."""
        options = RowOptions.of(args[: self.n_options])
        return options, args[self.n_options : -1], self.kernel(args[-1])

    def _run(
        self, student: Tensor, targets: list[Tensor], labels: Tensor | None, scale: Tensor, scalars: tuple[Any, ...],
        need_parts: bool, grad: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        options, extra, kernel = self._scalars(scalars)
        loss, stats, parts = kernel.forward(student, targets, labels, scale, options, *extra, need_parts, grad)
        # The kernel writes over an overwritten student, so that only the teacher can be looked at afterwards.
        seen = None if grad is student else student
        bad = rows.first_bad(loss)
        if bad is not None:
            self.check_targets(targets, bad, extra)
            rows.check_rows(loss, seen, targets if self.dense else [], labels, self.vocab(student, extra), options)
        return loss, stats, parts

    def _forward(self, student: Tensor, targets: list[Tensor], labels: Any, scale: Tensor, *args: Any) -> tuple[Tensor, ...]:
        *scalars, need_parts, need_grad = args
        grad = _grad_buffer(student) if need_grad else None
        outputs = self._run(student, targets, labels, scale, tuple(scalars), need_parts, grad)
        return *outputs, student.new_empty(0) if grad is None else grad

    def _overwrite(
        self, student: Tensor, targets: list[Tensor], labels: Any, scale: Tensor, *args: Any
    ) -> tuple[Tensor, Tensor]:
        *scalars, need_parts = args
        loss, _, parts = self._run(student, targets, labels, scale, tuple(scalars), need_parts, student)
        return loss, parts

    def _backward(
        self, student: Tensor, targets: list[Tensor], labels: Any, scale: Tensor, stats: Tensor, *scalars: Any
    ) -> Tensor:
        options, extra, kernel = self._scalars(scalars)
        grad = _grad_buffer(student)
        kernel.backward(student, targets, labels, scale, stats, options, *extra, grad)
        return grad

    def _row_outputs(self, student: Tensor, n_targets: int, need_parts: bool) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        n = student.shape[0]
        return (
            student.new_empty(n, dtype=dtype),
            student.new_empty(n, self.stats(n_targets), dtype=torch.float64),
            student.new_empty((n, len(PARTS)) if need_parts else (0,), dtype=dtype),
        )

    def _forward_fake(self, student: Tensor, targets: list[Tensor], *args: Any) -> tuple[Tensor, ...]:
        grad = student.new_empty(student.shape if args[-1] else 0)
        return *self._row_outputs(student, len(targets), args[-2]), grad

    def _overwrite_fake(self, student: Tensor, targets: list[Tensor], *args: Any) -> tuple[Tensor, Tensor]:
        loss, _, parts = self._row_outputs(student, len(targets), args[-1])
        return loss, parts

    def _backward_fake(self, student: Tensor, *args: Any) -> Tensor:
        return student.new_empty(student.shape)

    def __call__(self, call: RowCall) -> tuple[Tensor, Tensor]:
        """(loss, parts): the loss reduced as `call.reduction` says, the parts per row."""
        # The targets go one by one: autograd sees tensors among arguments, not inside lists.
        inputs = (self.name, len(call.targets), call.student, *call.targets, call.labels, call.scale, *call.scalars)
        if call.overwrite and call.needs_grad:
            loss, parts = _Overwrite.apply(*inputs)
            return loss, parts
        if call.needs_grad and call.reduction != "none" and call.student.dtype != torch.float16:
            loss, parts, _ = _InForward.apply(*inputs)
            return loss, parts
        loss, parts, _ = _InBackward.apply(*inputs)
        return rows.reduce(loss, call.lead, call.reduction), parts


@dataclass(frozen=True)
class RowCall:
    """One checked call of a row op: N x V student rows and everything that goes with them.

    `scalars` are the options, the extra scalars, the backend and whether parts are wanted, in schema order.
    """

    student: Tensor
    targets: tuple[Tensor, ...]
    labels: Tensor | None
    scale: Tensor
    scalars: tuple[Any, ...]
    lead: torch.Size
    reduction: str
    needs_grad: bool
    overwrite: bool


def _grad_buffer(student: Tensor) -> Tensor:
    return memory.empty(student.shape, dtype=student.dtype, device=student.device)


def _op(name: str, n_targets: int, student: Tensor, *rest: Any) -> Any:
    """The torch op `name` on the arguments an autograd function gets."""
    return getattr(torch.ops.kdfast, name)(student, list(rest[:n_targets]), *rest[n_targets:])


def _scaled(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    (grad,) = ctx.saved_tensors
    out = None if upstream is None else scale_grad(grad, upstream, ctx.backend)
    return None, None, out, *(None,) * (len(ctx.needs_input_grad) - 3)


class _InForward(torch.autograd.Function):
    @staticmethod
    @known_signature
    def forward(name: str, *inputs: Any) -> tuple[Tensor, ...]:
        loss, _, parts, grad = _op(name, *inputs, True)
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
    def forward(ctx: Any, name: str, n_targets: int, student: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        grad = student.detach()
        loss, parts = _op(f"{name}_overwrite", n_targets, grad, *rest)
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
    @known_signature
    def forward(name: str, *inputs: Any) -> tuple[Tensor, ...]:
        loss, stats, parts, _ = _op(name, *inputs, False)
        return loss, parts, stats

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        name, n_targets, *rest = inputs
        _, parts, stats = output
        ctx.mark_non_differentiable(parts, stats)
        ctx.set_materialize_grads(False)
        n_tensors = n_targets + 3  # student, targets, labels, scale
        ctx.name, ctx.n_targets, ctx.scalars = name, n_targets, rest[n_tensors:-1]
        save(ctx, *rest[:n_tensors], stats)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        *tensors, scale, stats = saved(ctx)
        grad = None
        if upstream is not None:
            grad = _op(f"{ctx.name}_backward", ctx.n_targets, *tensors, rows.folded(scale, upstream), stats, *ctx.scalars)
        return None, None, grad, *(None,) * (len(ctx.needs_input_grad) - 3)
