"""Attention losses with their maps, in plain PyTorch by autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def inputs(heads: tuple[int, int, int], sizes: tuple[int, int], lengths: tuple[int, int], batch: int = 2) -> tuple[Tensor, ...]:
    """(q_s, k_s, q_t, k_t) with (query, student key, teacher key) heads, (student, teacher) sizes, (Lq, Lk)."""
    (h, hs, ht), (ds, dt), (lq, lk) = heads, sizes, lengths
    shapes = ((h, lq, ds), (hs, lk, ds), (h, lq, dt), (ht, lk, dt))
    return tuple(torch.randn(batch, *shape) for shape in shapes)


def scores(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return factor * (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT)


def loss(
    name: str,
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    scale_s: float | None = None,
    scale_t: float | None = None,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """`name` is "kl", "probs", or anything else for scores; normalised by what counts."""
    u_s, u_t = scores(q_s, k_s, scale_s), scores(q_t, k_t, scale_t)
    counts = torch.ones_like(u_s, dtype=torch.bool)
    counts = counts.tril() if causal else counts
    counts = counts if query_mask is None else counts & query_mask[:, None, :, None]
    counts = counts if key_mask is None else counts & key_mask[:, None, None, :]
    if name in ("kl", "probs"):
        # A row without keys would be NaN: give it any, and leave it out below.
        seen = counts | ~counts.any(-1, keepdim=True)
        log_q, log_p = (u.masked_fill(~seen, -torch.inf).log_softmax(-1) for u in (u_s, u_t))
    if name == "kl":
        pairs = F.kl_div(log_q.masked_fill(~counts, 0), log_p.masked_fill(~counts, 0), log_target=True, reduction="none")
        terms, counts = torch.where(counts, pairs, 0).sum(-1), counts.any(-1)
    else:
        difference = log_q.exp() - log_p.exp() if name == "probs" else u_s - u_t
        terms = difference.square()
    heads = tuple(range(2, terms.ndim))
    total, number = torch.where(counts, terms, 0).sum(heads), counts.sum(heads)
    return total / number.clamp(min=1) if reduction == "none" else total.sum() / number.sum().clamp(min=1)


def gradients(
    function: Callable[..., Tensor], name: str, sides: tuple[Tensor, ...], dtype: torch.dtype, **options: object
) -> list[Tensor]:
    """[value, gradient of q_s, of k_s] in float64 of a loss evaluated in `dtype`, with an uneven incoming gradient."""
    q_s, k_s, q_t, k_t = (x.to(dtype) for x in sides)
    q_s, k_s = q_s.detach().requires_grad_(), k_s.detach().requires_grad_()
    value = function(name, q_s, k_s, q_t, k_t, **options)
    incoming = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)
    return [x.detach().double() for x in (value, *torch.autograd.grad(value, (q_s, k_s), incoming))]
