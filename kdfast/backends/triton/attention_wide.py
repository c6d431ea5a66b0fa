"""The two walks over a pair of attention maps in float32; `attention_half` says what a walk is, and has those in halves.

A tile holds d = student - teacher scores and t = teacher scores. With equal head sizes d is formed from differences of
queries and keys, so that it is exact however close the two are. Where scores are close, q - p is p * expm1(log q - log p),
not a difference of exponentials.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdfast.backends.triton.attention_tiles import KL, PROBS, SCORES, counted, load_rows, product, store_rows, visible
from kdfast.backends.triton.tiles import INF, LOWEST


@triton.jit
def expm1_less(x):
    """exp(x) - 1 - x: a series for |x| < 1/2."""
    y = 1.0 / 40320 + x * (1.0 / 362880)
    y = 1.0 / 5040 + x * y
    y = 1.0 / 720 + x * y
    y = 1.0 / 120 + x * y
    y = 1.0 / 24 + x * y
    y = 1.0 / 6 + x * y
    y = 0.5 + x * y
    return tl.where(tl.abs(x) < 0.5, x * x * y, tl.exp(x) - 1 - x)


@triton.jit
def apart(d, t, lse, shift):
    """(q - p, p, log q - log p) of a tile; `lse` and `shift` of its queries, shaped to go with it."""
    p = tl.exp(t - lse)
    v = d - shift
    return tl.where(tl.abs(v) < 0.5, p * (v + expm1_less(v)), tl.exp(t + d - lse - shift) - p), p, v


@triton.jit
def log_of_ratio(moved, total, top, total_s, top_s, largest):
    """log of the student's sum over the teacher's: from the mean of exp(d) - 1 where every |d| is small."""
    ratio = moved / total
    # log1p of a small number, from log: exact where 1 + x rounds.
    one = 1 + ratio
    small = tl.where(one == 1, ratio, tl.log(one) * (ratio / tl.where(one == 1, 1.0, one - 1)))
    return tl.where(largest < 0.25, small, top_s - top + tl.log(total_s / total))


@triton.jit
def scores_of_queries(q_s, q_t, k_s, k_t, scale_s, scale_t, CLOSE: tl.constexpr, PRECISION: tl.constexpr):
    """(student - teacher, teacher) scores, [own queries, keys]; if CLOSE `q_s` is q_s - scale_t / scale_s * q_t."""
    t = scale_t * product(q_t, tl.trans(k_t), PRECISION)
    d = scale_s * product(q_s, tl.trans(k_s), PRECISION)
    if CLOSE:  # (q_s - r q_t) k_s + r q_t (k_s - k_t): r enters once, and where it is 1 both differences are exact
        d += scale_t * product(q_t, tl.trans(k_s - k_t), PRECISION)
    else:
        d -= t
    return d, t


@triton.jit
def scores_of_keys(k_s, k_t, q_s, q_t, scale_s, scale_t, CLOSE: tl.constexpr, PRECISION: tl.constexpr):
    """The same, [own keys, queries]; if CLOSE `k_t` is k_s - k_t: of three left sides two fit the registers."""
    t = product(k_t, tl.trans(q_t), PRECISION)
    if CLOSE:
        d = scale_s * product(k_s, tl.trans(q_s - scale_t / scale_s * q_t), PRECISION) + scale_t * t
        t = product(k_s, tl.trans(q_t), PRECISION) - t
    else:
        d = scale_s * product(k_s, tl.trans(q_s), PRECISION) - scale_t * t
    return d, scale_t * t


@triton.jit
def queries_kernel(
    q_s_ptr, k_s_ptr, q_t_ptr, k_t_ptr, query_mask_ptr, key_mask_ptr, scale_ptr, loss_ptr, state_ptr, grad_ptr,
    q_s_batch, q_s_head, q_s_row, k_s_batch, k_s_head, k_s_row, q_t_batch, q_t_head, q_t_row, k_t_batch, k_t_head, k_t_row,
    heads, share_s, share_t, lq, lk, size_s, size_t, scale_s, scale_t, rows,
    KIND: tl.constexpr, CLOSE: tl.constexpr, QUERY_MASK: tl.constexpr, KEY_MASK: tl.constexpr, CAUSAL: tl.constexpr,
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
    if CLOSE:
        q_s -= scale_t / scale_s * q_t
    # log-sum-exp of the teacher's scores, the student's beyond it, sum of q (q - p)
    lse = tl.zeros([BLOCK_Q], tl.float32)
    shift = tl.zeros([BLOCK_Q], tl.float32)
    along = tl.zeros([BLOCK_Q], tl.float32)
    loss = tl.zeros([BLOCK_Q], tl.float32)
    if KIND != SCORES:
        top = tl.full([BLOCK_Q], LOWEST, tl.float32)
        top_s = tl.full([BLOCK_Q], LOWEST, tl.float32)
        largest, total, total_s, moved = loss, loss, loss, loss
        for masked in tl.static_range(FIRST, 2):
            for begin in range(clear if masked and not KEY_MASK else 0, end if masked else clear, BLOCK_K):
                keys = begin + tl.arange(0, BLOCK_K)
                key_counts = counted(key_mask_ptr, batch, keys, lk, KEY_MASK)
                k_s = load_rows(k_s_ptr, keys, key_counts, k_s_row, size_s, DS)
                k_t = load_rows(k_t_ptr, keys, key_counts, k_t_row, size_t, DT)
                d, t = scores_of_queries(q_s, q_t, k_s, k_t, scale_s, scale_t, CLOSE, PRECISION)
                if masked:
                    seen = visible(queries, keys, key_counts, CAUSAL)
                    d, t = tl.where(seen, d, 0.0), tl.where(seen, t, -INF)
                new, new_s = tl.maximum(top, tl.max(t, 1)), tl.maximum(top_s, tl.max(t + d, 1))
                p, again = tl.exp(t - new[:, None]), tl.exp(top - new)
                total_s = total_s * tl.exp(top_s - new_s) + tl.sum(tl.exp(t + d - new_s[:, None]), 1)
                total = total * again + tl.sum(p, 1)
                moved = moved * again + tl.sum(p * tl.where(tl.abs(d) < 0.5, d + expm1_less(d), 0.0), 1)
                largest = tl.maximum(largest, tl.max(tl.abs(d), 1))
                top, top_s = new, new_s
        none = total == 0  # a NaN is some
        total, total_s = tl.where(none, 1.0, total), tl.where(none, 1.0, total_s)
        lse = tl.where(none, INF, top + tl.log(total))
        shift = tl.where(none, 0.0, log_of_ratio(moved, total, top, total_s, top_s, largest))
    grad = tl.zeros([BLOCK_Q, DS], tl.float32)
    if KIND == PROBS:  # a walk more: the gradient needs a sum over its whole row
        for masked in tl.static_range(FIRST, 2):
            for begin in range(clear if masked and not KEY_MASK else 0, end if masked else clear, BLOCK_K):
                keys = begin + tl.arange(0, BLOCK_K)
                key_counts = counted(key_mask_ptr, batch, keys, lk, KEY_MASK)
                k_s = load_rows(k_s_ptr, keys, key_counts, k_s_row, size_s, DS)
                k_t = load_rows(k_t_ptr, keys, key_counts, k_t_row, size_t, DT)
                d, t = scores_of_queries(q_s, q_t, k_s, k_t, scale_s, scale_t, CLOSE, PRECISION)
                if masked:
                    seen = visible(queries, keys, key_counts, CAUSAL)
                    d, t = tl.where(seen, d, 0.0), tl.where(seen, t, -INF)
                g, p, _ = apart(d, t, lse[:, None], shift[:, None])
                loss += tl.sum(g * g, 1)
                along += tl.sum(g * (p + g), 1)
    if GRAD or KIND != PROBS:
        for masked in tl.static_range(FIRST, 2):
            for begin in range(clear if masked and not KEY_MASK else 0, end if masked else clear, BLOCK_K):
                keys = begin + tl.arange(0, BLOCK_K)
                key_counts = counted(key_mask_ptr, batch, keys, lk, KEY_MASK)
                k_s = load_rows(k_s_ptr, keys, key_counts, k_s_row, size_s, DS)
                k_t = load_rows(k_t_ptr, keys, key_counts, k_t_row, size_t, DT)
                d, t = scores_of_queries(q_s, q_t, k_s, k_t, scale_s, scale_t, CLOSE, PRECISION)
                if masked:
                    seen = visible(queries, keys, key_counts, CAUSAL)
                    d, t = tl.where(seen, d, 0.0), tl.where(seen, t, -INF)
                if KIND == SCORES:
                    g = d
                    loss += tl.sum(g * g, 1)
                else:
                    g, p, v = apart(d, t, lse[:, None], shift[:, None])
                    if KIND == KL:
                        terms = tl.where(tl.abs(v) < 0.5, p * expm1_less(v), g - p * v)
                        loss += tl.sum(tl.where(seen, terms, 0.0) if masked else terms, 1)
                    else:
                        g = (p + g) * (g - along[:, None])
                if GRAD:
                    grad += product(g, k_s, PRECISION)
    inside = queries < lq
    at = pair * lq + queries
    tl.store(loss_ptr + at, tl.where(scale != 0, tl.where(query_counts, scale * loss, 0.0), 0.0), mask=inside)
    if GRAD:
        tl.store(state_ptr + at, tl.where(query_counts, lse, INF), mask=inside)
        tl.store(state_ptr + rows + at, tl.where(query_counts, shift, 0.0), mask=inside)
        tl.store(state_ptr + 2 * rows + at, tl.where(query_counts, along, 0.0), mask=inside)
        factor = scale_s * scale if KIND == KL else 2 * scale_s * scale
        grad = tl.where(query_counts[:, None], tl.where(scale != 0, grad * factor, 0.0), 0.0)
        store_rows(grad_ptr, at, grad, inside, size_s, DS)


@triton.jit
def keys_kernel(
    q_s_ptr, k_s_ptr, q_t_ptr, k_t_ptr, query_mask_ptr, key_mask_ptr, scale_ptr, state_ptr, grad_ptr,
    q_s_batch, q_s_head, q_s_row, k_s_batch, k_s_head, k_s_row, q_t_batch, q_t_head, q_t_row, k_t_batch, k_t_head, k_t_row,
    heads, share_s, share_t, lq, lk, size_s, size_t, scale_s, scale_t, rows,
    KIND: tl.constexpr, CLOSE: tl.constexpr, QUERY_MASK: tl.constexpr, KEY_MASK: tl.constexpr, CAUSAL: tl.constexpr,
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
    grad = tl.zeros([BLOCK_K, DS], tl.float32)
    for index in range(key_head * share_s, (key_head + 1) * share_s):
        head = tl.cast(index, tl.int64)  # as key_head is; the interpreter counts in less
        pair = batch * heads + head
        k_t = load_rows(k_t_ptr + batch * k_t_batch + head // share_t * k_t_head, keys, key_counts, k_t_row, size_t, DT)
        if CLOSE:
            k_t = k_s - k_t
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
                g, t = scores_of_keys(k_s, k_t, q_s, q_t, scale_s, scale_t, CLOSE, PRECISION)
                if KIND != SCORES:
                    lse = tl.load(at, mask=queries < lq, other=INF)
                    shift = tl.load(at + rows, mask=queries < lq, other=0.0)
                    g, p, _ = apart(g, t, lse[None, :], shift[None, :])
                    if KIND == PROBS:
                        g = (p + g) * (g - tl.load(at + 2 * rows, mask=queries < lq, other=0.0)[None, :])
                g *= factor
                if not clean:
                    g = tl.where(keys[:, None] <= queries[None, :], g, 0.0)
                # Scaled head by head before the product: one sum of all heads, not one more for the head at hand.
                grad += product(g, q_s, PRECISION)
    store_rows(grad_ptr, own * lk + keys, tl.where(key_counts[:, None], grad, 0.0), keys < lk, size_s, DS)
