"""Logit matching through linear heads, all logits at once. Contract: `kdfast.backends`."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.backends.reference.logits import wide
from kdfast.chunks import Needs, Side, grad_buffers


def forward(
    student: Side, teacher: Side, mask: Tensor | None, center: bool, method: str, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    counts = torch.ones_like(student.hidden[:, 0], dtype=torch.bool) if mask is None else mask
    hidden_s, hidden_t = (torch.where(counts[:, None], wide(side.hidden), 0) for side in (student, teacher))
    weight_s, weight_t = wide(student.weight), wide(teacher.weight)
    if center:
        weight_s, weight_t = weight_s - weight_s.mean(0), weight_t - weight_t.mean(0)
    difference = hidden_s @ weight_s.T - hidden_t @ weight_t.T
    elements = counts.sum().clamp(min=1) * student.vocab
    grad = 2 / elements * difference
    hidden, weight, _ = grad_buffers(student, needs)
    if needs.hidden:
        hidden.copy_(grad @ weight_s)
    if needs.weight:
        weight.copy_(grad.T @ hidden_s)
    return difference.square().sum() / elements, hidden, weight
