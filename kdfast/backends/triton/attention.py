"""Attention maps of student and teacher compared on a GPU. Contract: `kdfast.backends`.

Scores by Gram matrices are torch's GEMMs (see `kdfast.grams`). Tiles are those of `attention_tiles`: one kernel walks the keys
of a block of queries (statistics, loss, the queries' gradient), one the queries of a block of keys (the keys' gradient).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kdfast import grams
from kdfast.backends.triton import attention_tiles as tiles
from kdfast.backends.triton.precision import exact_products
from kdfast.backends.triton.tiles import on
from kdfast.options import ATTENTION_KINDS, AttentionOptions

MAP_BLOCK, MAP_WARPS = 2048, 8


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
    if options.kind != "scores" or not grams.preferred(q_s, k_t, options):
        return _tiled(q_s, k_s, q_t, k_t, query_mask, key_mask, scale, options, need_grad)
    x = grams.clean(q_s, k_s, q_t, k_t, query_mask, key_mask)
    with exact_products():  # what TF32 rounds, the terms' cancelling would multiply
        loss, grad_q, grad_k = grams.score_mse(x, scale, options, need_grad)
    if grad_q is None or grad_k is None:
        return loss.to(scale.dtype), q_s.new_empty(0), k_s.new_empty(0)
    return loss.to(scale.dtype), grad_q.to(q_s.dtype), grad_k.to(k_s.dtype)


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
    if q_t.dtype != q_s.dtype:  # a product of two sides' dtypes would be taken in either
        q_s, k_s, q_t, k_t = (x.float() for x in (q_s, k_s, q_t, k_t))
    sides = [x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous() for x in (q_s, k_s, q_t, k_t)]
    loss = scale.new_empty(batch, heads, lq)
    stats = scale.new_empty(3, batch, heads, lq)
    grad_q = torch.empty(q_s.shape if need_grad else (0,), dtype=q_s.dtype, device=q_s.device)
    grad_k = torch.empty(k_s.shape if need_grad else (0,), dtype=k_s.dtype, device=k_s.device)
    size = tiles.launch(ds, dt, q_s.dtype)
    flags = tiles.flags(
        ATTENTION_KINDS.index(options.kind), ds, dt, q_s.dtype, query_mask is not None, key_mask is not None, options.causal
    )
    strides = [s for x in sides for s in x.stride()[:3]]
    shape = (heads, heads // k_s.shape[1], heads // k_t.shape[1], lq, lk, ds, dt, options.scale_s, options.scale_t)
    masks = (query_mask if query_mask is not None else scale, key_mask if key_mask is not None else scale)
    with on(q_s):
        tiles.queries_kernel[(triton.cdiv(lq, size.queries) * batch * heads,)](
            *sides, *masks, scale, loss, stats, grad_q, *strides, *shape, batch * heads * lq,
            **flags, GRAD=need_grad, **size.shape, **size.options,
        )  # fmt: skip
        if need_grad:
            tiles.keys_kernel[(triton.cdiv(lk, size.keys) * batch * k_s.shape[1],)](
                *sides, *masks, scale, stats, grad_k, *strides, *shape, batch * heads * lq,
                **flags, **size.shape, **size.options,
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
            tiles.map_kernel[(batch * heads * lq,)](
                student, teacher, counts, scale, loss, grad, *student.stride()[:3], *teacher.stride()[:3], *mask_strides,
                heads, lq, lk, MASK=mask is not None, GRAD=need_grad, BLOCK=MAP_BLOCK, num_warps=MAP_WARPS,
                enable_fp_fusion=True,
            )  # fmt: skip
    return loss.sum(-1), grad
