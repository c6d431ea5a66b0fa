"""Logit matching by Gram matrices on a GPU. Contract: `kdfast.backends`.

The work is GEMMs, which are the vendor's. Nothing is read back, so the form is chosen by shape alone: equal hidden sizes
use the difference basis in float32, unequal sizes float64 Grams. Products of float32 are never rounded to tf32: it would
return multiplied by what cancels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.backends.triton.precision import exact_products
from kdfast.chunks import Needs, Side
from kdfast.logit_grams import Problem, Solution, difference, direct, plain, solve, uses_grams


def _choose(p: Problem, method: str) -> Solution:
    if not uses_grams(p, method):
        return direct(p, torch.float32)
    return difference(p, torch.float32) if p.equal_sizes else plain(p, torch.float64)


def forward(
    student: Side, teacher: Side, mask: Tensor | None, center: bool, method: str, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    with exact_products():
        return solve(_choose, student, teacher, mask, center, method, needs)
