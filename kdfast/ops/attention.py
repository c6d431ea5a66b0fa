"""`attention_mse` and `attention_kl`: a student's attention map drawn to a teacher's, from queries and keys alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kdfast import dispatch
from kdfast.ops import attention_inputs as inputs
from kdfast.ops import rows
from kdfast.ops.autograd import outside_autocast
from kdfast.ops.formed import InBackward, InForward
from kdfast.options import AttentionOptions

_lib = torch.library.Library("kdfast", "FRAGMENT")
_lib.define(
    "attention(Tensor q_s, Tensor k_s, Tensor q_t, Tensor k_t, Tensor? query_mask, Tensor? key_mask, Tensor scale,"
    f" {AttentionOptions.schema()}, str backend, bool need_q, bool need_k)"
    " -> (Tensor, Tensor, Tensor)"
)
_TENSORS = 7


@torch.library.impl(_lib, "attention", "CompositeExplicitAutograd")
@outside_autocast
def _attention(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    tensors, (*options, backend, need_q, need_k) = args[:_TENSORS], args[_TENSORS:]
    need_grad = need_q or need_k  # they come out of the same sums: one costs what both cost
    q_s, k_s, scale = tensors[0], tensors[1], tensors[-1]
    if q_s.numel() == 0 or k_s.numel() == 0:
        return torch.zeros_like(scale), _gradient(q_s, need_grad).zero_(), _gradient(k_s, need_grad).zero_()
    kernel = dispatch.kernel("attention", backend)
    loss, grad_q, grad_k = kernel.forward(*tensors, AttentionOptions.of(options), need_grad)
    _check_finite(loss, tensors)
    return loss, grad_q, grad_k


@torch.library.register_fake("kdfast::attention", lib=_lib)
def _attention_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    q_s, k_s, scale, need_grad = args[0], args[1], args[_TENSORS - 1], args[-2] or args[-1]
    return torch.empty_like(scale), _gradient(q_s, need_grad), _gradient(k_s, need_grad)


def _gradient(x: Tensor, need_grad: bool) -> Tensor:
    return torch.empty(x.shape if need_grad else (0,), dtype=x.dtype, device=x.device)


def _check_finite(loss: Tensor, tensors: tuple[Tensor | None, ...]) -> None:
    """Names what made a loss NaN or infinite: on a CPU always, on a GPU under `debug_checks()` only."""
    if not rows.values_are_checked(loss.device) or math.isfinite(loss.sum()):
        return
    q_s, k_s, q_t, k_t, query_mask, key_mask, _ = tensors
    for name, x, mask in (("q_s", q_s, query_mask), ("k_s", k_s, key_mask), ("q_t", q_t, query_mask), ("k_t", k_t, key_mask)):
        assert x is not None
        bad = ~x.isfinite().all(-1)
        bad = bad if mask is None else bad & mask[:, None]
        if bool(bad.any()):
            batch, head, position = bad.nonzero()[0].tolist()
            raise ValueError(f"{name}: [{batch}, {head}, {position}] holds NaN or infinity, expected finite numbers")
    batch, head = (~loss.isfinite()).nonzero()[0].tolist()
    raise ValueError(
        f"the loss of batch {batch}, head {head} is not finite: its scores overflow float32; scale the inputs down"
    )


def _loss(
    kind: str,
    maps: inputs.Maps,
    masks: tuple[Tensor | None, Tensor | None],
    scales: tuple[float | None, float | None],
    causal: bool,
    method: str,
    normalize: str,
    reduction: str,
) -> Tensor:
    q_s, k_s = maps.q_s, maps.k_s
    lq, lk = q_s.shape[2], k_s.shape[2]
    query_mask = inputs.check_mask("query_mask", masks[0], (q_s.shape[0], lq), q_s)
    key_mask = inputs.check_mask("key_mask", masks[1], (q_s.shape[0], lk), q_s)
    options = AttentionOptions(
        kind,
        maps.default_scale(maps.q_s, scales[0], "scale_s"),
        maps.default_scale(maps.q_t, scales[1], "scale_t"),
        causal,
        method,
    )
    counts, everything = inputs.counted(kind, query_mask, key_mask, causal, maps)
    scale = inputs.head_scale(counts, everything, normalize, reduction, q_s)
    query_mask, key_mask = inputs.used(query_mask, key_mask, causal, maps)
    backend = dispatch.choose("attention", q_s.device, q_s.dtype)
    arguments = (*maps.tensors, query_mask, key_mask, scale, *options.values, backend)
    needs = tuple(x.requires_grad and torch.is_grad_enabled() for x in (q_s, k_s))
    if any(needs) and reduction != "none" and q_s.dtype != torch.float16:
        return InForward.apply("attention", 2, *arguments, *needs)[0]
    loss = InBackward.apply("attention", 2, _TENSORS, *arguments, *needs)
    return loss if reduction == "none" else loss.sum()


def attention_mse(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    *,
    on: str = "scores",
    scale_s: float | None = None,
    scale_t: float | None = None,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
    normalize: str = "valid",
    method: str = "auto",
    relation_heads: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Mean squared difference of two attention maps, without the maps.

    Equals

        scores_s, scores_t = scale_s * q_s @ k_s.mT, scale_t * q_t @ k_t.mT
        counts = query_mask[:, None, :, None] & key_mask[:, None, None, :]      # & tril() when causal
        loss = (scores_s - scores_t)[counts.expand_as(scores_s)].square().mean()                   # on="scores"
        loss = (softmax(scores_s) - softmax(scores_t))[counts...].square().mean()                  # on="probs"

    where softmax runs over the keys that count. On scores the work and the memory grow with the length, not its square:
    the summed square of Q K^T is the inner product of Q^T Q and K^T K. On probabilities tiles of scores come and go; a GPU
    has no room for those of heads wider than 256, and there the maps of one batch entry at a time are formed.

    Args:
        q_s, k_s: the student's queries `[B, H, Lq, D]` and keys `[B, Hk, Lk, D]`, Hk dividing H (head h uses key head
            h // (H / Hk)); float32, bfloat16, float16 (or float64, on the reference backend), any strides.
        q_t, k_t: the teacher's, same B, Lq and Lk, any head size and dtype. No gradient.
        on: "scores" or "probs".
        scale_s, scale_t: factors of the products; None: 1/sqrt(head size) of that side.
        query_mask: `[B, Lq]` bool, True counts. key_mask: `[B, Lk]`. What is in no
            pair that counts may hold anything.
        causal: query i sees keys j <= i, as `F.scaled_dot_product_attention(is_causal=True)`.
        normalize: "valid" divides by the pairs that count, "all" by every pair.
        method: "gram" (linear in the length), "tiled", or "auto"; on scores only.
        relation_heads: cut all heads side by side into this many on both sides. None: the heads as they are, or the
            greatest common divisor of both sides' when their numbers differ.
        reduction: "mean" (total over all heads / all pairs that count), "sum", or "none" (`[B, H]`, each head by itself).

    The error does not grow as the student nears the teacher: with equal head sizes the difference of the scores is formed from
    differences of queries and keys; else the sums are redone in float64 when they cancel.

    Raises:
        ValueError: a shape, dtype, device, option, or (on a CPU, or under `debug_checks()`) a value is wrong.

    Source: Jiao et al. 2020 (TinyBERT), arXiv 1909.10351, equation 7; relation heads: Wang et al. 2021 (MiniLMv2),
    arXiv 2012.15828, section 3.1.
    """
    rows.check_choice("on", on, ("scores", "probs"))
    rows.check_choice("method", method, ("auto", "gram", "tiled"))
    if on == "probs" and method == "gram":
        raise ValueError("method: expected auto or tiled because on is 'probs' (a softmax has no Gram form), got 'gram'")
    maps = inputs.check_maps(q_s, k_s, q_t, k_t, relation_heads)
    return _loss(on, maps, (query_mask, key_mask), (scale_s, scale_t), causal, method, normalize, reduction)


def attention_kl(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    *,
    scale_s: float | None = None,
    scale_t: float | None = None,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
    normalize: str = "valid",
    method: str = "auto",
    relation_heads: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    """KL(teacher || student) between the attention distributions of each query, without the maps.

    Equals

        log_q = log_softmax(scale_s * q_s @ k_s.mT), log_p = log_softmax(scale_t * q_t @ k_t.mT)    # over keys that count
        loss = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)[rows that count].mean()

    A row is one query of one head. It counts when its mask says so and it sees a key; any other contributes nothing.

    Args:
        q_s, k_s, q_t, k_t, scale_s, scale_t, query_mask, key_mask, causal, relation_heads: as in `attention_mse`. With
            values in the place of queries and keys this is MiniLM's value relation.
        normalize: "valid" divides by the rows that count, "all" by every row.
        method: "auto" or "tiled"; there is one.
        reduction: "mean" (total over all heads / all rows that count), "sum", or "none" (`[B, H]`, each head by itself).

    Raises:
        ValueError: as `attention_mse`.

    Source: Wang et al. 2020 (MiniLM), arXiv 2002.10957, equations 5 and 7.
    """
    rows.check_choice("method", method, ("auto", "tiled"))
    maps = inputs.check_maps(q_s, k_s, q_t, k_t, relation_heads)
    return _loss("kl", maps, (query_mask, key_mask), (scale_s, scale_t), causal, method, normalize, reduction)
