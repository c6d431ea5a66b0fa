"""Forward KL in closed form, summed from non-negative terms."""

from __future__ import annotations

import torch
from torch import Tensor


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum_v p * (log p - log q) over the last dimension.

    Summed as p * (d + expm1(-d)) with d = log p - log q: each term is >= 0, while p * d cancels to noise (and can
    turn negative) once student and teacher agree. The derivative with respect to the student's tempered logit is q - p.
    """
    p, q = log_p.exp(), log_q.exp()
    d = log_p - log_q
    # p * (d + expm1(-d)) is p * d + (q - p): the same number, which only cancels where d is small.
    terms = torch.where(d.abs() < 1, p * (d + torch.expm1(-d)), p * d + (q - p))
    # At p = 0 the limit is q, whatever d. A NaN is not 0 and stays; q = 0 < p is a true infinity.
    return torch.where(p == 0, q, terms).sum(-1)
