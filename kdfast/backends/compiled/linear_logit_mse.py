"""Logit matching by Gram matrices on a CPU. Contract: `kdfast.backends`.

All of the work is products of tall matrices with small ones, which torch's own GEMMs (oneDNN or MKL) do as fast as the
machine can; there is nothing left for C++ to add. What this backend adds is the guard: on a CPU it costs nothing to
look at what is left after the terms cancelled, and to take the next form where that is too little.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.chunks import Needs, Side
from kdfast.logit_grams import Problem, Rung, Solution, climbed, difference, direct, plain, solve, uses_grams

_SINGLE, _DOUBLE = torch.float32, torch.float64
#: Left at least of the terms: float32 Grams lose about 1e-7 / kept of the value, float64 Grams 1e-15 / kept, and
#: float32 logits 1e-7 / sqrt(kept) of every difference.
_GRAM_KEEP, _WIDE_KEEP, _LOGITS_KEEP = 1e-2, 1e-11, 1e-5
_LAST = Rung(direct, _DOUBLE, 0.0)


def _choose(p: Problem, method: str) -> Solution:
    if not uses_grams(p, method):
        return climbed(p, (Rung(direct, _SINGLE, _LOGITS_KEEP), _LAST))
    if p.one_head:
        return difference(p, _SINGLE)
    middle = [Rung(difference, _SINGLE, _GRAM_KEEP), Rung(difference, _DOUBLE, _WIDE_KEEP)]
    if not p.equal_sizes:
        middle = [Rung(plain, _DOUBLE, _WIDE_KEEP)]
    return climbed(p, (Rung(plain, _SINGLE, _GRAM_KEEP), *middle, _LAST))


def forward(
    student: Side, teacher: Side, mask: Tensor | None, center: bool, method: str, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    return solve(_choose, student, teacher, mask, center, method, needs)
