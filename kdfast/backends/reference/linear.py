"""Knowledge distillation through linear heads, all logits at once. Contract: `kdfast.backends`."""

from __future__ import annotations

from torch import Tensor

from kdfast.backends.reference import logits
from kdfast.backends.reference.logits import wide
from kdfast.chunks import Needs, Side, grad_buffers
from kdfast.options import RowOptions


def _logits(side: Side) -> Tensor:
    z = wide(side.hidden) @ wide(side.weight).T
    return z if side.bias is None else z + wide(side.bias)


def forward(
    student: Side,
    teacher: Side,
    labels: Tensor | None,
    scale: Tensor,
    options: RowOptions,
    chunk_rows: int,
    need_parts: bool,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    z = _logits(student)
    loss, _, parts = logits.forward(z, _logits(teacher), labels, scale, options, need_parts, z if needs.any else None)
    hidden, weight, bias = grad_buffers(student, needs)
    if needs.hidden:
        hidden.copy_(z @ wide(student.weight))
    if needs.weight:
        weight.copy_(z.T @ wide(student.hidden))
    if needs.bias:
        bias.copy_(z.sum(0))
    return loss, parts, hidden, weight, bias
