"""Knowledge distillation on logits in C++ (`csrc/cpu/logits_rows.h`). Contract: `kdfast.backends`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast import _C
from kdfast.backends.compiled.extension import address, matrix, row_options, threads
from kdfast.options import PARTS, RowOptions


def forward(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    scale: Tensor,
    options: RowOptions,
    need_parts: bool,
    grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    n = student.shape[0]
    loss = torch.empty(n)
    stats = torch.empty(n, 3 + len(teachers), dtype=torch.float64)
    parts = torch.empty((n, len(PARTS)) if need_parts else (0,))
    _C.logits(
        True, n, matrix(student), [matrix(t) for t in teachers], options.teacher_weights,
        matrix(grad), address(labels), address(scale), address(loss), address(stats),
        address(parts if need_parts else None), row_options(options), threads(),
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
    _C.logits(
        False, student.shape[0], matrix(student), [matrix(t) for t in teachers], options.teacher_weights, matrix(grad),
        address(labels), address(scale), 0, address(stats), 0, row_options(options), threads(),
    )  # fmt: skip
