"""Knowledge distillation on logits, one read for the sums and one for the rest. Contract: `kdfast.backends`.

Bytes a row, student and teacher of V columns: 2V read, 2V read again (backwards, so that what was read last is still
in L2), V written. A divergence other than forward KL reads the row once more for its gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast.backends.triton import divergence, tiles
from kdfast.backends.triton.logits_rows import backward_kernel, forward_kernel
from kdfast.options import PARTS, RowOptions


class Scalars(NamedTuple):
    """The numbers a kernel gets at run time."""

    temperature: Any
    inv_t: Any
    soft_scale: Any
    hard_weight: Any
    smoothing: Any
    z_loss: Any
    a: Any
    b: Any
    student_cap: Any
    student_scale: Any
    teacher_cap: Any
    teacher_scale: Any

    @classmethod
    def of(cls, options: RowOptions) -> Scalars:
        return cls(
            options.temperature, 1 / options.temperature, options.soft_scale, options.hard_weight,
            options.label_smoothing, options.z_loss, *options.coefficients,
            options.student_softcap, options.student_scale, options.teacher_softcap, options.teacher_scale,
        )  # fmt: skip


@dataclass(frozen=True)
class Flags:
    """What a kernel is compiled for.

    Args:
        kind: the divergence, a constant of `divergence`.
        teachers: how many.
        mixed: several teachers, by their probabilities.
        student_head, teacher_head: NO_HEAD, SCALED or CAPPED of `tiles`.
        unit_t: the temperature is 1, so that its sums serve T = 1 too. squared: it is 2, so that squares of its terms do.
        soft: the divergence has a weight.
        labels: there are labels. hard: the hard loss has a weight. smooth: and smoothed labels. z: there is a z-loss.
        parts: metrics are wanted. grad: the gradient is.
        extra: the student has columns beyond those all sides have.
    """

    kind: int = 0
    teachers: int = 1
    mixed: bool = False
    student_head: int = 0
    teacher_head: int = 0
    unit_t: bool = False
    soft: bool = True
    labels: bool = False
    hard: bool = False
    smooth: bool = False
    z: bool = False
    parts: bool = False
    grad: bool = True
    extra: bool = False
    squared: bool = False

    @classmethod
    def of(cls, options: RowOptions, labels: bool, parts: bool, grad: bool, extra: bool) -> Flags:
        hard = labels and options.hard_weight != 0
        teachers = len(options.teacher_weights)
        return cls(
            divergence.kind_of(options), teachers, teachers > 1 and options.teacher_mix == "probs",
            _head(options.student_softcap, options.student_scale), _head(options.teacher_softcap, options.teacher_scale),
            options.temperature == 1, options.soft_scale != 0, labels, hard, hard and options.label_smoothing != 0,
            options.z_loss != 0,
            parts, grad, extra, options.temperature == 2,
        )  # fmt: skip

    @property
    def stats(self) -> int:
        return 3 + self.teachers

    @property
    def grad_at_1(self) -> bool:
        """The gradient has terms at T = 1."""
        return self.hard or self.z

    @property
    def at_1(self) -> bool:
        """The student's log-sum-exp at T = 1 over its whole vocabulary is needed."""
        return self.grad_at_1 or self.parts

    @property
    def student_at_1(self) -> bool:
        """It, and therefore the sum over the common columns, is not that at T."""
        return self.at_1 and not self.unit_t

    @property
    def extra_at_1(self) -> bool:
        return self.at_1 and self.extra

    @property
    def own_q_at_1(self) -> bool:
        """The softmax of the terms at T = 1 is not that of the soft term."""
        return self.extra or not self.unit_t

    @property
    def teacher_at_1(self) -> bool:
        return self.parts and not self.unit_t

    @property
    def own_kl_at_1(self) -> bool:
        """Forward KL at T = 1 is not the divergence."""
        return not self.unit_t or self.kind != divergence.FORWARD_KL.value

    @property
    def grad_in_value_pass(self) -> bool:
        return self.grad and self.kind == divergence.FORWARD_KL.value

    @property
    def extra_in_value_pass(self) -> bool:
        return self.grad_in_value_pass and self.extra

    @property
    def own_gradient_pass(self) -> bool:
        return self.grad and self.kind != divergence.FORWARD_KL.value

    @property
    def plain_rows(self) -> bool:
        """One teacher, and nothing between stored logits and softmax."""
        return self.teachers == 1 and self.student_head == self.teacher_head == 0

    @property
    def ahead(self) -> bool:
        """Tiles are loaded one ahead: there are registers for them."""
        return self.teachers == 1 and self.heavy == 0

    @property
    def phased(self) -> bool:
        """Rows may be PHASED of `tiles`: there are registers for the tile of their edges."""
        return self.heavy == 0 or not self.parts

    @property
    def heavy(self) -> int:
        """How much it holds a column (see `tiles.launch`)."""
        if self.mixed and (self.teachers > 2 or self.parts):
            return 2
        against_mixture = divergence.JSD.value <= self.kind <= divergence.SKEW_REVERSE_KL.value
        if against_mixture and self.parts and self.student_head and self.teacher_head:
            return 2
        return int(self.parts or self.teachers > 1 or against_mixture)


def _head(softcap: float, scale: float) -> int:
    flag = tiles.CAPPED if softcap != 0 else tiles.NO_HEAD if scale == 1 else tiles.SCALED
    return int(flag.value)


def _inputs(student: Tensor, teachers: Sequence[Tensor], grad: Tensor, labels: Tensor | None, scale: Tensor) -> tuple[Any, ...]:
    """The tensors of a kernel in the order of its arguments."""
    return student, tuple(teachers), grad, scale if labels is None else labels.contiguous(), scale.contiguous()


def _sizes(student: Tensor, teachers: Sequence[Tensor], grad: Tensor, common: int) -> tuple[Any, ...]:
    """The sizes of a kernel in the order of its arguments."""
    return (*student.shape, common, student.stride(0), tuple(t.stride(0) for t in teachers), grad.stride(0))


def forward(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    scale: Tensor,
    options: RowOptions,
    need_parts: bool,
    grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = student.shape
    common = min(width, *(t.shape[1] for t in teachers))
    loss = torch.empty(rows, dtype=torch.float32, device=student.device)
    stats = torch.empty(rows, 3 + len(teachers), dtype=torch.float64, device=student.device)
    parts = torch.empty((rows, len(PARTS)) if need_parts else 0, dtype=torch.float32, device=student.device)
    if rows == 0:
        return loss, stats, parts
    out = student if grad is None else grad
    flags = Flags.of(options, labels is not None, need_parts, grad is not None, width > common)
    size = tiles.launch_for(common, student, *teachers, out, heavy=flags.heavy, phased=flags.phased)
    with tiles.on(student):
        forward_kernel[tiles.grid(rows, student.device, size.warps)](
            *_inputs(student, teachers, out, labels, scale), loss, stats, parts, *_sizes(student, teachers, out, common),
            Scalars.of(options), options.teacher_weights, F=flags, **size.shape, **size.options,
        )  # fmt: skip
    return loss, stats, parts


def backward(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    scale: Tensor,
    stats: Tensor,
    options: RowOptions,
    grad: Tensor,
) -> None:
    rows, width = student.shape
    common = min(width, *(t.shape[1] for t in teachers))
    if rows == 0:
        return
    flags = Flags.of(options, labels is not None, False, True, width > common)
    size = tiles.launch_for(common, student, *teachers, grad, heavy=flags.heavy, phased=flags.phased)
    with tiles.on(student):
        backward_kernel[tiles.grid(rows, student.device, size.warps)](
            *_inputs(student, teachers, grad, labels, scale), stats, *_sizes(student, teachers, grad, common),
            Scalars.of(options), options.teacher_weights, F=flags, **size.shape, **size.options,
        )  # fmt: skip
