"""One tile of a row in the kernels of `logits`: what it adds to the row's sums, and its gradient.

`F` are the constants of `logits.Flags`, `o` the numbers of `logits.Scalars`, EXACT what `halves` says.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdfast.backends.triton.divergence import FORWARD_KL, divergence, forward_kl
from kdfast.backends.triton.teachers import log_pair
from kdfast.backends.triton.tiles import INF, LN2, LOG2E, back_through_head, load_head

NO_COLUMN = tl.constexpr(2147483647)


@triton.constexpr_function
def halves(s_ptr, t_ptr, F):
    """Whether a row's logits are halves as they are stored (see `log_pair`)."""
    return F.plain_rows and s_ptr.dtype.element_ty.primitive_bitwidth == 16 and t_ptr.dtype.element_ty.primitive_bitwidth == 16


@triton.jit
def load_student(s_ptr, columns, width, o, F: tl.constexpr, policy: tl.constexpr):
    return load_head(s_ptr, columns, width, o.student_cap, o.student_scale, tl.constexpr(F.student_head), policy)


@triton.jit
def at_1_weights(weights_1, m_s, l_s, m_h, l_h, F: tl.constexpr):
    """The weights at T = 1; the first is for the square of the softmax at T = 2 where that stands for the softmax at 1."""
    of_q = weights_1[0]
    if F.squared:
        of_q = of_q * tl.exp2((m_s - m_h) * LOG2E + (2 * l_s - l_h))
    return (of_q, weights_1[1], weights_1[2])


@triton.jit
def store_grad(
    g_ptr, s, q, h, h_sum, start, columns, end, label, m_h, l_h, soft_weight, at_1, o, F: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """The gradient of a tile of columns from `start` on, from h and the row's sum of h; TILE 0: the edges of a row."""
    g = tl.zeros_like(s)
    if F.soft:
        if F.kind != FORWARD_KL:
            h -= q * h_sum
        g = soft_weight * h
    if F.grad_at_1:
        if F.squared:
            q = q * q
        elif F.own_q_at_1:
            q = tl.exp2((s - m_h) * LOG2E - l_h)
        g += at_1[0] * q
        if F.smooth:
            g -= at_1[2]
        if TILE == 0 or ((label >= start) & (label < start + TILE)):
            g -= tl.where(columns == label, at_1[1], 0.0)
    g = back_through_head(g, s, o.student_cap, o.student_scale, tl.constexpr(F.student_head))
    tl.store(g_ptr + columns, g.to(g_ptr.dtype.element_ty), mask=columns < end, eviction_policy="evict_first")


@triton.jit
def gradient_tile(
    g_ptr, s, tiles, start, columns, end, label, m_s, l_s, m_h, l_h, h_sum, m_t, l_t, soft_weight, at_1, o, weights,
    F: tl.constexpr, EXACT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    log2_p, log2_q, d = log_pair(s, tiles, m_s, l_s, m_t, l_t, weights, o.inv_t, F, EXACT)
    q = tl.exp2(log2_q)
    _, h = divergence(tl.exp2(log2_p), q, log2_p, log2_q, d, o.a, o.b, tl.constexpr(F.kind))
    store_grad(g_ptr, s, q, h, h_sum, start, columns, end, label, m_h, l_h, soft_weight, at_1, o, F, TILE)


@triton.jit
def value_tile(
    sums, best, g_ptr, s, tiles, start, columns, end, lead, label, m_s, l_s, l_s1, m_h, l_h, m_t, l_t, l_t1,
    soft_weight, at_1, o, weights, F: tl.constexpr, EXACT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`sums` and `best` of `_value_pass` with a tile more, its columns counted from `lead` on."""
    soft, h_sum, kl_1, entropy, student_entropy = sums
    best_s, best_t, top_t = best
    log2_p, log2_q, d = log_pair(s, tiles, m_s, l_s, m_t, l_t, weights, o.inv_t, F, EXACT)
    p = tl.exp2(log2_p)
    q = tl.exp2(log2_q)
    term, h = divergence(p, q, log2_p, log2_q, d, o.a, o.b, tl.constexpr(F.kind))
    soft += tl.sum(term, 1)
    if F.kind != FORWARD_KL:
        h_sum += tl.sum(h, 1)
    if F.grad_in_value_pass:
        store_grad(g_ptr, s, q, h, 0.0, start, columns, end, label, m_h, l_h, soft_weight, at_1, o, F, TILE)
    if F.parts:
        if F.own_kl_at_1:
            log2_p, log2_q, d = log_pair(s, tiles, m_s, l_s1, m_t, l_t1, weights, 1.0, F, EXACT)
            p = tl.exp2(log2_p)
            q = tl.exp2(log2_q)
            term, _ = forward_kl(p, q, d)
            kl_1 += tl.sum(term, 1)
        entropy -= LN2 * tl.sum(tl.where(p == 0, 0.0, p * log2_p), 1)
        student_entropy -= LN2 * tl.sum(tl.where(q == 0, 0.0, q * log2_q), 1)
        absolute = columns + lead
        best_s = tl.minimum(best_s, tl.min(tl.where(s == m_s, absolute, NO_COLUMN), 1))
        if F.teachers == 1:
            best_t = tl.minimum(best_t, tl.min(tl.where(tiles[0] == m_t[0], absolute, NO_COLUMN), 1))
        else:
            here = tl.max(log2_p, 1)
            first = tl.min(tl.where(log2_p == here[:, None], absolute, NO_COLUMN), 1)
            tie = (here == top_t) & (here != -INF)
            best_t = tl.where(here > top_t, first, tl.where(tie, tl.minimum(best_t, first), best_t))
            top_t = tl.maximum(top_t, here)
    return (soft, h_sum, kl_1, entropy, student_entropy), (best_s, best_t, top_t)
