"""Losses between hidden states. Contract: `kdfast.backends`."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.backends.reference.logits import wide
from kdfast.chunks import Needs, grad_hidden_dtype


def mse(
    student: Tensor, projection: Tensor | None, bias: Tensor | None, teacher: Tensor, scale: Tensor, needs: Needs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h = wide(student)
    projected = h if projection is None else h @ wide(projection).T
    if bias is not None:
        projected = projected + wide(bias)
    # A row that does not count may hold anything, NaN included.
    difference = torch.where((scale != 0)[:, None], projected - wide(teacher), 0)
    loss = scale * difference.square().mean(-1)
    grad = 2 / teacher.shape[1] * scale[:, None] * difference
    grad_weight = grad.T @ torch.where((scale != 0)[:, None], h, 0) if needs.weight else loss.new_empty(0)
    grad_bias = grad.sum(0) if needs.bias else loss.new_empty(0)
    dtype = student.dtype if projection is None else grad_hidden_dtype(student)
    if not needs.hidden:
        return loss, student.new_empty(0, dtype=dtype), grad_weight, grad_bias
    return loss, (grad if projection is None else grad @ wide(projection)).to(dtype), grad_weight, grad_bias


def cosine(student: Tensor, teacher: Tensor, scale: Tensor, need_hidden: bool) -> tuple[Tensor, Tensor]:
    s, t = wide(student), wide(teacher)
    ss, tt, st = (s * s).sum(-1), (t * t).sum(-1), (s * t).sum(-1)
    defined = (ss != 0) & (tt != 0)
    ss, tt = torch.where(defined, ss, 1), torch.where(defined, tt, 1)
    # The teacher's part across the student, made orthogonal twice: 1 - cos = sin^2 / (1 + cos) does not cancel.
    across = t - (st / ss)[:, None] * s
    across = across - ((across * s).sum(-1) / ss)[:, None] * s
    cos = (st / (ss.sqrt() * tt.sqrt())).clamp(-1, 1)
    loss = torch.where(cos > 0, across.square().sum(-1) / tt / (1 + cos), 1 - cos)
    loss = torch.where(defined, loss, 1)
    # An infinite row is a bad row, like a NaN.
    loss = torch.where((ss + tt + st).isfinite(), loss, torch.nan)
    loss = torch.where(scale != 0, scale * loss, 0)
    if not need_hidden:
        return loss, student.new_empty(0)
    grad = (-scale / (ss.sqrt() * tt.sqrt()))[:, None] * across
    return loss, torch.where((defined & (scale != 0))[:, None], grad, 0).to(student.dtype)
