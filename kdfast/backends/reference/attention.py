"""Attention maps of student and teacher compared, all pairs at once. Contract: `kdfast.backends`."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.backends.reference.divergence import forward_kl
from kdfast.backends.reference.logits import wide
from kdfast.options import AttentionOptions


def forward(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    scale: Tensor,
    options: AttentionOptions,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    counts = _pairs(query_mask, key_mask, options.causal, q_s.shape[2], k_s.shape[2], q_s.device)
    sides = [_clean(q_s, query_mask), _clean(k_s, key_mask), _clean(q_t, query_mask), _clean(k_t, key_mask)]
    qs, ks, qt, kt = (_heads(x, q_s.shape[1]) for x in sides)
    u_s, u_t = options.scale_s * (qs @ ks.mT), options.scale_t * (qt @ kt.mT)
    loss, grad_u = {"scores": _scores, "probs": _probs, "kl": _kl}[options.kind](u_s, u_t, counts)
    loss = torch.where(scale != 0, scale * loss, 0)
    if not need_grad:
        return loss, q_s.new_empty(0), k_s.new_empty(0)
    grad_u = torch.where((scale != 0)[..., None, None], (options.scale_s * scale)[..., None, None] * grad_u, 0)
    grad_k = (grad_u.mT @ qs).unflatten(1, (k_s.shape[1], -1)).sum(2)
    return loss, (grad_u @ ks).to(q_s.dtype), grad_k.to(k_s.dtype)


def map_forward(maps_s: Tensor, maps_t: Tensor, mask: Tensor | None, scale: Tensor, need_grad: bool) -> tuple[Tensor, Tensor]:
    difference = wide(maps_s) - wide(maps_t)
    if mask is not None:
        difference = torch.where(mask, difference, 0)
    difference = torch.where((scale != 0)[..., None, None], difference, 0)
    loss = scale * difference.square().sum((-1, -2))
    if not need_grad:
        return loss, maps_s.new_empty(0)
    return loss, (2 * scale[..., None, None] * difference).to(maps_s.dtype)


def _clean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Widened; what the mask leaves out is never read, so that padding may hold anything."""
    return wide(x) if mask is None else torch.where(mask[:, None, :, None], wide(x), 0)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], 1)


def _pairs(query_mask: Tensor | None, key_mask: Tensor | None, causal: bool, lq: int, lk: int, device: torch.device) -> Tensor:
    """[B or 1, 1, Lq, Lk]: the pairs that count."""
    counts = torch.ones(1, 1, lq, lk, dtype=torch.bool, device=device)
    if causal:
        counts = counts.tril()
    if query_mask is not None:
        counts = counts & query_mask[:, None, :, None]
    return counts if key_mask is None else counts & key_mask[:, None, None, :]


def _scores(u_s: Tensor, u_t: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    difference = torch.where(counts, u_s - u_t, 0)
    return difference.square().sum((-1, -2)), 2 * difference


def _log_softmax(u: Tensor, counts: Tensor) -> Tensor:
    """Over the keys that count; a query without any has -inf everywhere and probability 0."""
    masked = u.masked_fill(~counts, -torch.inf)
    lse = masked.logsumexp(-1, keepdim=True)
    return masked - torch.where(lse.isneginf(), 0, lse)


def _probs(u_s: Tensor, u_t: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    q, p = _log_softmax(u_s, counts).exp(), _log_softmax(u_t, counts).exp()
    return (q - p).square().sum((-1, -2)), 2 * q * ((q - p) - ((q - p) * q).sum(-1, keepdim=True))


def _kl(u_s: Tensor, u_t: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    log_q, log_p = _log_softmax(u_s, counts), _log_softmax(u_t, counts)
    return forward_kl(log_p, log_q).sum(-1), log_q.exp() - log_p.exp()
