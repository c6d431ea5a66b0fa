"""What every attention loss does before its kernel: checks, relation heads, and the factor of each head's loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kdfast.ops import ranges, rows


@dataclass(frozen=True)
class Maps:
    """Two attention maps as queries `[B, H, Lq, D]` and keys `[B, Hk, Lk, D]`, H the same on both sides."""

    q_s: Tensor
    k_s: Tensor
    q_t: Tensor
    k_t: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.q_s, self.k_s, self.q_t, self.k_t

    def default_scale(self, side: Tensor, given: float | None, name: str) -> float:
        """The factor of a side's products: what was given, or 1/sqrt(head size)."""
        scale = 1.0 / math.sqrt(side.shape[-1]) if given is None else float(given)
        ranges.check_positive(name, scale)
        return scale


def check_maps(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, relation_heads: int | None) -> Maps:
    """The four tensors with as many heads on both sides; raises unless they fit together."""
    for name, x in (("q_s", q_s), ("k_s", k_s), ("q_t", q_t), ("k_t", k_t)):
        rows.check_float(name, x, like=q_s, like_name="q_s")
        if x.ndim != 4 or x.shape[-1] == 0 or x.shape[1] == 0:
            raise ValueError(f"{name}: expected shape [B, H, L, D] with H >= 1 and D >= 1, got {list(x.shape)}")
    _check_side("s", q_s, k_s)
    _check_side("t", q_t, k_t)
    for a, b, what in ((q_s, q_t, "q"), (k_s, k_t, "k")):
        if (a.shape[0], a.shape[2]) != (b.shape[0], b.shape[2]):
            raise ValueError(
                f"{what}_t: expected batch and length {[a.shape[0], a.shape[2]]} like {what}_s, got {[b.shape[0], b.shape[2]]}"
            )
    teacher = q_t.detach(), k_t.detach()
    if relation_heads is None:
        if q_s.shape[1] == q_t.shape[1]:
            return Maps(q_s, k_s, *teacher)
        relation_heads = math.gcd(q_s.shape[1], q_t.shape[1])
    q_t, k_t = teacher
    return Maps(*_regroup("s", q_s, k_s, relation_heads), *_regroup("t", q_t, k_t, relation_heads))


def _check_side(side: str, q: Tensor, k: Tensor) -> None:
    if q.dtype != k.dtype:
        raise ValueError(f"k_{side}: expected dtype {q.dtype} like q_{side}, got {k.dtype}")
    if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(
            f"k_{side}: expected batch and head size {[q.shape[0], q.shape[3]]} like q_{side}, got {[k.shape[0], k.shape[3]]}"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"k_{side}: expected a number of heads that divides q_{side}'s {q.shape[1]}, got {k.shape[1]}")


def _regroup(side: str, q: Tensor, k: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """All heads side by side, cut into `heads` relation heads; keys shared by several queries are repeated."""
    width = q.shape[1] * q.shape[3]
    if heads < 1 or width % heads:
        raise ValueError(f"relation_heads: expected a divisor of q_{side}'s width {width} (heads times head size), got {heads}")
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    q, k = (x.transpose(1, 2).flatten(2).unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k))
    return q, k


def check_mask(name: str, mask: Tensor | None, shape: tuple[int, int], like: Tensor) -> Tensor | None:
    """A contiguous boolean mask, or None; raises when it does not fit."""
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise ValueError(f"{name}: expected dtype torch.bool (True counts), got {mask.dtype}; use mask.bool()")
    if tuple(mask.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(mask.shape)}")
    if mask.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} like q_s, got {mask.device}")
    return mask.contiguous()


def counted(
    kind: str, query_mask: Tensor | None, key_mask: Tensor | None, causal: bool, maps: Maps
) -> tuple[Tensor | int, int]:
    """(terms of one head that count, `[B]` or one number for all; terms of one head): pairs, or for "kl" rows."""
    (batch, _, lq, _), lk = maps.q_s.shape, maps.k_s.shape[2]
    everything = lq if kind == "kl" else lq * lk
    if query_mask is None and key_mask is None:
        if kind == "kl":
            return lq if lk else 0, everything
        beyond = max(lq - lk, 0)
        return (lq - beyond) * (lq - beyond + 1) // 2 + beyond * lk if causal else lq * lk, everything
    seen = _keys_seen(key_mask, causal, batch, lq, lk, maps.q_s.device)
    if query_mask is not None:
        seen = seen * query_mask
    return (seen > 0).sum(1) if kind == "kl" else seen.sum(1), everything


def used(query_mask: Tensor | None, key_mask: Tensor | None, causal: bool, maps: Maps) -> tuple[Tensor | None, Tensor | None]:
    """The masks, without the queries and keys that are in no pair that counts: 0 * NaN of those would reach a gradient."""
    (batch, _, lq, _), lk = maps.q_s.shape, maps.k_s.shape[2]
    if (query_mask is None and key_mask is None and not (causal and lk > lq)) or lq == 0 or lk == 0:
        return query_mask, key_mask
    queries = _keys_seen(key_mask, causal, batch, lq, lk, maps.q_s.device) > 0
    queries = queries if query_mask is None else queries & query_mask
    if causal:
        # A key is seen by the queries from its own position on.
        keys = torch.nn.functional.pad(queries.flip(1).cumsum(1).flip(1) > 0, (0, lk - lq))
    else:
        keys = queries.any(1, keepdim=True).expand(batch, lk)
    return queries.contiguous(), (keys if key_mask is None else keys & key_mask).contiguous()


def _keys_seen(key_mask: Tensor | None, causal: bool, batch: int, lq: int, lk: int, device: torch.device) -> Tensor:
    """`[B, Lq]` int64: how many keys count for each query."""
    if lk == 0:
        return torch.zeros(batch, lq, dtype=torch.int64, device=device)
    seen = torch.arange(1, lk + 1, device=device).expand(batch, lk) if key_mask is None else key_mask.cumsum(1)
    if causal:
        return seen[:, torch.arange(lq, device=device).clamp(max=lk - 1)]
    return seen[:, -1:].expand(batch, lq)


def head_scale(counts: Tensor | int, everything: int, normalize: str, reduction: str, like: Tensor) -> Tensor:
    """`[B, H]` factors of each head's summed loss, for `like` `[B, H, ...]`. No host synchronisation.

    Args:
        counts: terms of one head that count: `[B]`, `[B, H]`, or one number for all.
        everything: terms of one head, whether they count or not.

    A mean over nothing is 0, with zero gradients: a batch of padding must not poison a training run.
    """
    rows.check_choice("normalize", normalize, ("valid", "all"))
    rows.check_choice("reduction", reduction, rows.REDUCTIONS)
    shape = like.shape[:2]
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if reduction == "sum" or normalize == "all" or isinstance(counts, int):
        terms = everything if normalize == "all" or not isinstance(counts, int) else counts
        terms = 1 if reduction == "sum" else terms if reduction == "none" else terms * math.prod(shape)
        return torch.full(shape, 1.0 / max(terms, 1), dtype=dtype, device=like.device)
    counts = (counts[:, None] if counts.ndim == 1 else counts).expand(shape)
    divisor = counts if reduction == "none" else counts.sum().expand(shape)
    return divisor.clamp(min=1).to(torch.float64).reciprocal().to(dtype)
