"""Knowledge distillation through linear heads, all logits at once. Contract: `kdfast.backends`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast.backends.reference import logits
from kdfast.backends.reference.logits import wide
from kdfast.chunks import Chunking, Needs, RowKernel, Side, grad_buffers, without_ignored
from kdfast.options import RowOptions


def _logits(side: Side, dtype: torch.dtype) -> Tensor:
    z = wide(side.hidden) @ wide(side.weight).T
    z = z if side.bias is None else z + wide(side.bias)
    return z if z.dtype == torch.float64 else z.to(dtype)


def product(side: Side, out: Tensor) -> None:
    out.copy_(_logits(side, out.dtype))


def forward(
    student: Side,
    teachers: Sequence[Side],
    labels: Tensor | None,
    scale: Tensor,
    options: RowOptions,
    chunking: Chunking,
    need_parts: bool,
    needs: Needs,
    kernel: RowKernel = logits.forward,
    row_inputs: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if chunking.row_index is not None:
        scale = torch.zeros_like(scale).index_copy(0, chunking.row_index, scale[chunking.row_index])
    z = _logits(student, chunking.dtype)
    z_t = [_logits(teacher, chunking.dtype) for teacher in teachers]
    loss, _, parts = kernel(z, [*z_t, *row_inputs], labels, scale, options, need_parts, z if needs.any else None)
    hidden, weight, bias = grad_buffers(student, needs)
    if needs.hidden:
        hidden.copy_(wide(z) @ wide(student.weight))
    if needs.weight:
        weight.copy_(wide(z).T @ without_ignored(wide(student.hidden), scale))
    if needs.bias:
        bias.copy_(wide(z).sum(0))
    return loss, parts, hidden, weight, bias
