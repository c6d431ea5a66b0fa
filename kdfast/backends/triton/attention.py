"""Attention maps of student and teacher compared on a GPU. Contract: `kdfast.backends`.

Scores of all pairs by Gram matrices are the kernels of `attention_grams`; causal ones are torch's GEMMs (see `kdfast.grams`),
dozens of launches. Tiles are those of `attention_half` and `attention_wide`: one kernel walks the keys of a block of queries
(statistics, loss, the queries' gradient), one the queries of a block of keys (the keys' gradient).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from kdfast import dispatch, grams
from kdfast.backends.triton import attention_grams, attention_half, attention_tiles, attention_wide
from kdfast.backends.triton.precision import exact_products
from kdfast.backends.triton.tiles import before_hopper, on
from kdfast.options import ATTENTION_KINDS, AttentionOptions

MAP_BLOCK, MAP_WARPS = 2048, 8
#: Widest head, as padded, whose tiles fit a multiprocessor.
WIDEST = 256
#: What a product of the causal Gram form costs in products of the tiled one, its launches included.
CAUSAL_COST = 16


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
    by_grams = options.kind == "scores" and grams.preferred(q_s, k_t, options, CAUSAL_COST if options.causal else 1)
    if by_grams and options.causal:
        return _causal_grams(q_s, k_s, q_t, k_t, query_mask, key_mask, scale, options, need_grad)
    q_s, k_s, q_t, k_t = (x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous() for x in (q_s, k_s, q_t, k_t))
    widest = max(attention_tiles.padded(x.shape[3]) for x in (q_s, q_t))
    form = attention_grams.score_mse if by_grams else _tiled if widest <= WIDEST else _formed
    return form(q_s, k_s, q_t, k_t, query_mask, key_mask, scale, options, need_grad)


def _causal_grams(
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
    x = grams.clean(q_s, k_s, q_t, k_t, query_mask, key_mask)
    with exact_products():  # what TF32 rounds, the terms' cancelling would multiply
        loss, grad_q, grad_k = grams.score_mse(x, scale, options, need_grad)
    if grad_q is None or grad_k is None:
        return loss.to(scale.dtype), q_s.new_empty(0), k_s.new_empty(0)
    return loss.to(scale.dtype), grad_q.to(q_s.dtype), grad_k.to(k_s.dtype)


def _formed(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`forward` by maps of one batch entry at a time and torch's products: heads too wide for tiles are few, and their maps
    small beside them.
    """
    *tensors, options, need_grad = arguments
    plain, found = dispatch.kernel("attention", "reference"), []
    with exact_products():
        for entry in range(tensors[0].shape[0]):
            own = (None if x is None else x[entry : entry + 1] for x in tensors)
            found.append(plain.forward(*own, options, need_grad))
    loss, grad_q, grad_k = (torch.cat(parts) for parts in zip(*found, strict=True))
    return loss, grad_q, grad_k


def _tiled(
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
    batch, heads, lq, ds = q_s.shape
    lk, dt = k_s.shape[2], q_t.shape[3]
    grad_dtype = q_s.dtype
    if q_t.dtype != q_s.dtype:  # a product of two sides' dtypes would be taken in either
        q_s, k_s, q_t, k_t = (x.float() for x in (q_s, k_s, q_t, k_t))
    loss = scale.new_empty(batch, heads, lq)
    stats = scale.new_empty(3, batch, heads, lq)
    grad_q = torch.empty(q_s.shape if need_grad else (0,), dtype=grad_dtype, device=q_s.device)
    grad_k = torch.empty(k_s.shape if need_grad else (0,), dtype=grad_dtype, device=k_s.device)
    older = before_hopper(q_s.device)
    by_queries, by_keys = (
        attention_tiles.launch(
            ds, dt, q_s.dtype, keys, rows * triton.cdiv(length, 128), older, key_mask=key_mask is not None,
            scores=options.kind == "scores",
        )
        for keys, rows, length in ((False, batch * heads, lq), (True, batch * k_s.shape[1], lk))
    )  # fmt: skip
    flags = attention_tiles.flags(
        ATTENTION_KINDS.index(options.kind), ds, dt, q_s.dtype, query_mask is not None, key_mask is not None, options.causal,
        q_s.is_cuda, older,
    )  # fmt: skip
    kernels = attention_wide if q_s.dtype == torch.float32 else attention_half
    sides = (q_s, k_s, q_t, k_t)
    strides = [s for x in sides for s in x.stride()[:3]]
    shape = (heads, heads // k_s.shape[1], heads // k_t.shape[1], lq, lk, ds, dt, options.scale_s, options.scale_t)
    masks = (query_mask if query_mask is not None else scale, key_mask if key_mask is not None else scale)
    with on(q_s):
        kernels.queries_kernel[(triton.cdiv(lq, by_queries.own) * batch * heads,)](
            *sides, *masks, scale, loss, stats, grad_q, *strides, *shape, batch * heads * lq,
            **flags, GRAD=need_grad, **by_queries.of_queries, **by_queries.options,
        )  # fmt: skip
        if need_grad:
            kernels.keys_kernel[(triton.cdiv(lk, by_keys.own) * batch * k_s.shape[1],)](
                *sides, *masks, scale, stats, grad_k, *strides, *shape, batch * heads * lq,
                **flags, **by_keys.of_keys, **by_keys.options,
            )  # fmt: skip
    return loss.sum(-1), grad_q, grad_k


def map_forward(maps_s: Tensor, maps_t: Tensor, mask: Tensor | None, scale: Tensor, need_grad: bool) -> tuple[Tensor, Tensor]:
    student, teacher = (x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous() for x in (maps_s, maps_t))
    batch, heads, lq, lk = student.shape
    loss = scale.new_zeros(batch, heads, lq)
    grad = torch.empty(student.shape if need_grad else (0,), dtype=student.dtype, device=student.device)
    if student.numel():
        counts = scale if mask is None else mask
        mask_strides = (0, 0, 0, 0) if mask is None else mask.stride()
        with on(student):
            attention_tiles.map_kernel[(batch * heads * lq,)](
                student, teacher, counts, scale, loss, grad, *student.stride()[:3], *teacher.stride()[:3], *mask_strides,
                heads, lq, lk, MASK=mask is not None, GRAD=need_grad, BLOCK=MAP_BLOCK, num_warps=MAP_WARPS,
                enable_fp_fusion=True,
            )  # fmt: skip
    return loss.sum(-1), grad
