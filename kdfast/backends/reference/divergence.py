"""Forward KL in closed form, summed from non-negative terms."""

from __future__ import annotations

import torch
from torch import Tensor


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum_v p * (log p - log q) over the last dimension.

    Summed as p * (d + expm1(-d)) with d = log p - log q: each term is >= 0, while p * d cancels to noise (and can
    turn negative) once student and teacher agree. The derivative with respect to the student's tempered logit is q - p.
    """
    p = log_p.exp()
    d = log_p - log_q
    # p = 0: p*d has limit 0 and p*expm1(-d) = q - p = q. q = 0 < p is a true infinity and stays one.
    terms = torch.where(p > 0, p * (d + torch.expm1(-d)), log_q.exp())
    terms = torch.where((p > 0) & torch.isneginf(log_q), torch.inf, terms)
    large = d.abs() > 20  # expm1(-d) overflows long before p * expm1(-d) = q - p does
    terms = torch.where((p > 0) & large & ~torch.isneginf(log_q), p * d + (log_q.exp() - p), terms)
    return terms.sum(-1)
