"""Logit matching by Gram matrices on a GPU. Contract: `kdfast.backends`.

The work is GEMMs, which are the vendor's. Nothing is read back, so the form is chosen by shape alone: equal hidden sizes
use the difference basis in float32, unequal sizes float64 Grams. Products of float32 are never rounded to tf32: it would
return multiplied by what cancels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from kdfast.chunks import Needs, Side
from kdfast.logit_grams import Problem, Solution, difference, direct, plain, solve, uses_grams


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    settings = torch.backends.cuda.matmul
    name, exact = ("fp32_precision", "ieee") if hasattr(settings, "fp32_precision") else ("allow_tf32", False)
    before = getattr(settings, name)
    setattr(settings, name, exact)
    try:
        yield
    finally:
        setattr(settings, name, before)


def _choose(p: Problem, method: str) -> Solution:
    if not uses_grams(p, method):
        return direct(p, torch.float32)
    return difference(p, torch.float32) if p.equal_sizes else plain(p, torch.float64)


def forward(
    student: Side, teacher: Side, mask: Tensor | None, center: bool, method: str, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    with _without_tf32():
        return solve(_choose, student, teacher, mask, center, method, needs)
