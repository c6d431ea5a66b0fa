"""The two walks over a pair of attention maps in halves. `attention_wide` has those in float32.

`queries_kernel` owns queries and walks their keys: the rows' statistics, the loss, the queries' gradient. `keys_kernel` owns
keys and walks the queries that see them, with those statistics: the keys' gradient. A query that counts for nothing has the
statistic +inf, so that its probabilities are 0 wherever they are formed again. Only tiles that hold pairs which do not count
(the last, the diagonal's, all under a mask of keys) are masked entry by entry: a walk comes in two pieces.

Halves cannot be so close that a difference of exponentials fails them. An entry costs two exponentials, in base 2 with the
scale folded into one multiply-add each, and every sum that a loss can be had from is taken in the first walk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdfast.backends.triton.attention_tiles import KL, PROBS, SCORES, counted, load_rows, product, store_rows, visible, weighted
from kdfast.backends.triton.tiles import INF, LN2, LOG2E, LOWEST


@triton.jit
def queries_kernel(
    q_s_ptr, k_s_ptr, q_t_ptr, k_t_ptr, query_mask_ptr, key_mask_ptr, scale_ptr, loss_ptr, state_ptr, grad_ptr,
    q_s_batch, q_s_head, q_s_row, k_s_batch, k_s_head, k_s_row, q_t_batch, q_t_head, q_t_row, k_t_batch, k_t_head, k_t_row,
    heads, share_s, share_t, lq, lk, size_s, size_t, scale_s, scale_t, rows,
    KIND: tl.constexpr, QUERY_MASK: tl.constexpr, KEY_MASK: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, DS: tl.constexpr, DT: tl.constexpr, GRAD: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # One axis: along the others a grid has 65535 blocks, and batch times heads may be more.
    blocks = tl.cdiv(lq, BLOCK_Q)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = pair // heads, pair % heads
    first = tl.program_id(0) % blocks * BLOCK_Q
    queries = first + tl.arange(0, BLOCK_Q)
    query_counts = counted(query_mask_ptr, batch, queries, lq, QUERY_MASK)
    q_s = load_rows(q_s_ptr + batch * q_s_batch + head * q_s_head, queries, query_counts, q_s_row, size_s, DS)
    q_t = load_rows(q_t_ptr + batch * q_t_batch + head * q_t_head, queries, query_counts, q_t_row, size_t, DT)
    k_s_ptr += batch * k_s_batch + head // share_s * k_s_head
    k_t_ptr += batch * k_t_batch + head // share_t * k_t_head
    end, clear = lk, lk // BLOCK_K * BLOCK_K
    if CAUSAL:
        end = tl.minimum(lk, first + BLOCK_Q)
        clear = tl.minimum(lk, first + 1) // BLOCK_K * BLOCK_K
    FIRST: tl.constexpr = 1 if KEY_MASK else 0
    scale = tl.load(scale_ptr + pair)
    c_s, c_t = scale_s * LOG2E, scale_t * LOG2E
    # of the teacher, of the student; sum of q (q - p)
    lse_t = tl.zeros([BLOCK_Q], tl.float32)
    lse_s = tl.zeros([BLOCK_Q], tl.float32)
    along = tl.zeros([BLOCK_Q], tl.float32)
    loss = tl.zeros([BLOCK_Q], tl.float32)
    if KIND != SCORES:
        top_t = tl.full([BLOCK_Q], LOWEST, tl.float32)
        top_s = tl.full([BLOCK_Q], LOWEST, tl.float32)
        total_t, total_s, moved, square, cross = loss, loss, loss, loss, loss
        for masked in tl.static_range(FIRST, 2):
            for begin in range(clear if masked and not KEY_MASK else 0, end if masked else clear, BLOCK_K):
                keys = begin + tl.arange(0, BLOCK_K)
                key_counts = counted(key_mask_ptr, batch, keys, lk, KEY_MASK)
                k_s = load_rows(k_s_ptr, keys, key_counts, k_s_row, size_s, DS)
                k_t = load_rows(k_t_ptr, keys, key_counts, k_t_row, size_t, DT)
                s, t = product(q_s, tl.trans(k_s), PRECISION), product(q_t, tl.trans(k_t), PRECISION)
                d = s * c_s - t * c_t
                if masked:
                    seen = visible(queries, keys, key_counts, CAUSAL)
                    d, s, t = tl.where(seen, d, 0.0), tl.where(seen, s, -INF), tl.where(seen, t, -INF)
                new_t, new_s = tl.maximum(top_t, tl.max(t, 1) * c_t), tl.maximum(top_s, tl.max(s, 1) * c_s)
                p, q = tl.exp2(t * c_t - new_t[:, None]), tl.exp2(s * c_s - new_s[:, None])
                again_t, again_s = tl.exp2(top_t - new_t), tl.exp2(top_s - new_s)
                total_t, total_s = total_t * again_t + tl.sum(p, 1), total_s * again_s + tl.sum(q, 1)
                if KIND == KL:
                    moved = moved * again_t + tl.sum(p * d, 1)
                else:
                    square = square * (again_s * again_s) + tl.sum(q * q, 1)
                    cross = cross * (again_t * again_s) + tl.sum(q * p, 1)
                top_t, top_s = new_t, new_s
        none = total_t == 0  # a NaN is some
        total_t, total_s = tl.where(none, 1.0, total_t), tl.where(none, 1.0, total_s)
        lse_t = tl.where(none, INF, top_t + tl.log2(total_t))
        lse_s = tl.where(none, INF, top_s + tl.log2(total_s))
        if KIND == KL:
            loss = tl.where(none, 0.0, LN2 * (lse_s - lse_t - moved / total_t))
        else:
            along = (square / total_s - cross / total_t) / total_s
    grad = tl.zeros([BLOCK_Q, DS], tl.float32)
    if GRAD or KIND != KL:
        for masked in tl.static_range(FIRST, 2):
            for begin in range(clear if masked and not KEY_MASK else 0, end if masked else clear, BLOCK_K):
                keys = begin + tl.arange(0, BLOCK_K)
                key_counts = counted(key_mask_ptr, batch, keys, lk, KEY_MASK)
                k_s = load_rows(k_s_ptr, keys, key_counts, k_s_row, size_s, DS)
                k_t = load_rows(k_t_ptr, keys, key_counts, k_t_row, size_t, DT)
                s, t = product(q_s, tl.trans(k_s), PRECISION), product(q_t, tl.trans(k_t), PRECISION)
                if KIND == SCORES:
                    q, g = s, scale_s * s - scale_t * t
                else:
                    q = tl.exp2(s * c_s - lse_s[:, None])
                    g = q - tl.exp2(t * c_t - lse_t[:, None])
                if masked:
                    seen = visible(queries, keys, key_counts, CAUSAL)
                    q, g = tl.where(seen, q, 0.0), tl.where(seen, g, 0.0)
                if KIND != KL:
                    loss += tl.sum(g * g, 1)
                if KIND == PROBS:
                    g = q * (g - along[:, None])
                if GRAD:
                    grad += weighted(g, k_s, PRECISION)
    inside = queries < lq
    at = pair * lq + queries
    tl.store(loss_ptr + at, tl.where(scale != 0, tl.where(query_counts, scale * loss, 0.0), 0.0), mask=inside)
    if GRAD:
        tl.store(state_ptr + at, tl.where(query_counts, lse_t, INF), mask=inside)
        tl.store(state_ptr + rows + at, tl.where(query_counts, lse_s, INF), mask=inside)
        tl.store(state_ptr + 2 * rows + at, tl.where(query_counts, along, 0.0), mask=inside)
        factor = scale_s * scale if KIND == KL else 2 * scale_s * scale
        grad = tl.where(query_counts[:, None], tl.where(scale != 0, grad * factor, 0.0), 0.0)
        store_rows(grad_ptr, at, grad, inside, size_s, DS)


@triton.jit
def keys_kernel(
    q_s_ptr, k_s_ptr, q_t_ptr, k_t_ptr, query_mask_ptr, key_mask_ptr, scale_ptr, state_ptr, grad_ptr,
    q_s_batch, q_s_head, q_s_row, k_s_batch, k_s_head, k_s_row, q_t_batch, q_t_head, q_t_row, k_t_batch, k_t_head, k_t_row,
    heads, share_s, share_t, lq, lk, size_s, size_t, scale_s, scale_t, rows,
    KIND: tl.constexpr, QUERY_MASK: tl.constexpr, KEY_MASK: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, DS: tl.constexpr, DT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(lk, BLOCK_K)
    own = (tl.program_id(0) // blocks).to(tl.int64)
    key_heads = heads // share_s
    batch, key_head = own // key_heads, own % key_heads
    first = tl.program_id(0) % blocks * BLOCK_K
    keys = first + tl.arange(0, BLOCK_K)
    key_counts = counted(key_mask_ptr, batch, keys, lk, KEY_MASK)
    k_s = load_rows(k_s_ptr + batch * k_s_batch + key_head * k_s_head, keys, key_counts, k_s_row, size_s, DS)
    start, clear = 0, 0
    if CAUSAL:  # queries from `clear` on see every key of the block
        start = first // BLOCK_Q * BLOCK_Q
        clear = tl.minimum(tl.cdiv(first + BLOCK_K, BLOCK_Q), tl.cdiv(lq, BLOCK_Q)) * BLOCK_Q
    c_s, c_t = scale_s * LOG2E, scale_t * LOG2E
    # Scores are [keys, queries]: their gradient is the left side of the last product as it stands.
    grad = tl.zeros([BLOCK_K, DS], tl.float32)
    for index in range(key_head * share_s, (key_head + 1) * share_s):
        head = tl.cast(index, tl.int64)  # as key_head is; the interpreter counts in less
        pair = batch * heads + head
        k_t = load_rows(k_t_ptr + batch * k_t_batch + head // share_t * k_t_head, keys, key_counts, k_t_row, size_t, DT)
        scale = tl.load(scale_ptr + pair)
        factor = scale_s * scale if KIND == KL else 2 * scale_s * scale
        for clean in tl.static_range(0 if CAUSAL else 1, 2):
            low, high = clear if clean else start, lq if clean else clear
            for begin in range(tl.where(scale == 0, high, low), high, BLOCK_Q):
                queries = begin + tl.arange(0, BLOCK_Q)
                query_counts = counted(query_mask_ptr, batch, queries, lq, QUERY_MASK)
                q_s = load_rows(q_s_ptr + batch * q_s_batch + head * q_s_head, queries, query_counts, q_s_row, size_s, DS)
                q_t = load_rows(q_t_ptr + batch * q_t_batch + head * q_t_head, queries, query_counts, q_t_row, size_t, DT)
                at = state_ptr + pair * lq + queries
                s, t = product(k_s, tl.trans(q_s), PRECISION), product(k_t, tl.trans(q_t), PRECISION)
                if KIND == SCORES:
                    g = scale_s * s - scale_t * t
                else:
                    lse_t = tl.load(at, mask=queries < lq, other=INF)
                    lse_s = tl.load(at + rows, mask=queries < lq, other=INF)
                    q = tl.exp2(s * c_s - lse_s[None, :])
                    g = q - tl.exp2(t * c_t - lse_t[None, :])
                if KIND == PROBS:
                    g = q * (g - tl.load(at + 2 * rows, mask=queries < lq, other=0.0)[None, :])
                g *= factor
                if not clean:
                    g = tl.where(keys[:, None] <= queries[None, :], g, 0.0)
                # Scaled head by head before the product: one sum of all heads, not one more for the head at hand.
                grad += weighted(g, q_s, PRECISION)
    store_rows(grad_ptr, own * lk + keys, tl.where(key_counts[:, None], grad, 0.0), keys < lk, size_s, DS)
