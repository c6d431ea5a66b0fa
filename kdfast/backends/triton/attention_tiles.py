"""Tiles of two attention maps: the kernels of `attention`.

A tile holds d = student - teacher scores and t = teacher scores, in float32. In float32 with equal head sizes up to 64 d is
formed from differences of queries and keys, so that it is exact however close the two are; half inputs cannot be that
close. Where scores are close, q - p is p * expm1(log q - log p) and not a difference of exponentials.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kdfast.backends.triton.tiles import INF, LOWEST

SCORES, PROBS, KL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@dataclass(frozen=True)
class Launch:
    """A program: `queries` x `keys` scores a tile, on `warps` warps."""

    queries: int
    keys: int
    warps: int

    @property
    def shape(self) -> dict[str, int]:
        return {"BLOCK_Q": self.queries, "BLOCK_K": self.keys}

    @property
    def options(self) -> dict[str, int | bool]:
        # All the registers there are: left to itself, ptxas spills a few to reach a higher occupancy.
        limit = {} if torch.version.hip else {"maxnreg": 255}
        return {"num_warps": self.warps, "num_stages": 1, "enable_fp_fusion": True, **limit}


def launch(ds: int, dt: int, dtype: torch.dtype) -> Launch:
    """Size of the programs: the largest that hold their tiles in registers. A pure function of its arguments."""
    widest = max(padded(ds), padded(dt))
    if dtype == torch.float32 or widest > 128:
        return Launch(16, 16, 8)
    return Launch(64, 32, 8) if widest <= 64 else Launch(32, 16, 8)


def padded(size: int) -> int:
    """What a product's inner dimension must be: a power of two, 16 or more."""
    return max(16, triton.next_power_of_2(size))


def flags(kind: int, ds: int, dt: int, dtype: torch.dtype, query_mask: bool, key_mask: bool, causal: bool) -> dict[str, object]:
    """Compile-time arguments that both kernels share."""
    return {
        "KIND": kind,
        # Wider heads would spill: an IEEE product has a thread hold whole rows of every operand.
        "CLOSE": ds == dt <= 64 and dtype == torch.float32,
        "QUERY_MASK": query_mask,
        "KEY_MASK": key_mask,
        "CAUSAL": causal,
        "WIDE": dtype == torch.float32,
        "DS": padded(ds),
        "DT": padded(dt),
    }


@triton.jit
def load_rows(ptr, positions, counts, stride, size, D: tl.constexpr):
    """[rows, D] of one head; zero where a row does not count, whatever it holds."""
    columns = tl.arange(0, D)[None, :]
    inside = counts[:, None] & (columns < size)
    return tl.load(ptr + positions[:, None].to(tl.int64) * stride + columns, mask=inside, other=0.0)


@triton.jit
def counted(mask_ptr, batch, positions, length, MASK: tl.constexpr):
    counts = positions < length
    if MASK:
        counts = counts & (tl.load(mask_ptr + batch * length + positions, mask=counts, other=0) != 0)
    return counts


@triton.jit
def product(a, b, WIDE: tl.constexpr):
    """a @ b in float32. TF32 holds every half value exactly and, unlike float16, the range of a gradient."""
    if WIDE:
        return tl.dot(a, b, input_precision="ieee")
    return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32")


@triton.jit
def scores_tile(q_s, k_s, q_t, k_t, scale_s, scale_t, CLOSE: tl.constexpr, WIDE: tl.constexpr):
    """(student - teacher, teacher)."""
    t = scale_t * product(q_t, tl.trans(k_t), WIDE)
    if CLOSE:
        # The scales' ratio enters once: where they are equal the difference of the queries is exact.
        ratio = scale_t / scale_s
        d = product(q_s - ratio * q_t, tl.trans(k_s), WIDE) + ratio * product(q_t, tl.trans(k_s - k_t), WIDE)
        return scale_s * d, t
    return scale_s * product(q_s, tl.trans(k_s), WIDE) - t, t


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
def apart(d, t, seen, lse, shift):
    """(q - p, p, log q - log p) of a tile; zero where nothing is seen."""
    p = tl.where(seen, tl.exp(t - lse[:, None]), 0.0)
    v = tl.where(seen, d - shift[:, None], 0.0)
    q = tl.where(seen, tl.exp(t + d - lse[:, None] - shift[:, None]), 0.0)
    return tl.where(tl.abs(v) < 0.5, p * (v + expm1_less(v)), q - p), p, v


@triton.jit
def score_gradient(d, t, seen, lse, shift, along, KIND: tl.constexpr):
    """Derivative of a row's loss with respect to the student's scores."""
    if KIND == SCORES:
        return 2 * tl.where(seen, d, 0.0)
    e, p, _ = apart(d, t, seen, lse, shift)
    if KIND == KL:
        return e
    return 2 * (p + e) * (e - along[:, None])


@triton.jit
def queries_kernel(
    q_s_ptr, k_s_ptr, q_t_ptr, k_t_ptr, query_mask_ptr, key_mask_ptr, scale_ptr, loss_ptr, state_ptr, grad_ptr,
    q_s_batch, q_s_head, q_s_row, k_s_batch, k_s_head, k_s_row, q_t_batch, q_t_head, q_t_row, k_t_batch, k_t_head, k_t_row,
    heads, share_s, share_t, lq, lk, size_s, size_t, scale_s, scale_t, rows,
    KIND: tl.constexpr, CLOSE: tl.constexpr, QUERY_MASK: tl.constexpr, KEY_MASK: tl.constexpr, CAUSAL: tl.constexpr,
    WIDE: tl.constexpr, DS: tl.constexpr, DT: tl.constexpr, GRAD: tl.constexpr,
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
    end = lk
    if CAUSAL:
        end = tl.minimum(lk, first + BLOCK_Q)
    scale = tl.load(scale_ptr + pair)
    lse = tl.zeros([BLOCK_Q], tl.float32)
    shift = tl.zeros([BLOCK_Q], tl.float32)
    along = tl.zeros([BLOCK_Q], tl.float32)
    if KIND != SCORES:
        top = tl.full([BLOCK_Q], LOWEST, tl.float32)
        top_s = tl.full([BLOCK_Q], LOWEST, tl.float32)
        largest, total, total_s, moved = lse, lse, lse, lse
        for begin in range(0, end, BLOCK_K):
            keys = begin + tl.arange(0, BLOCK_K)
            key_counts = counted(key_mask_ptr, batch, keys, lk, KEY_MASK)
            k_s = load_rows(k_s_ptr, keys, key_counts, k_s_row, size_s, DS)
            k_t = load_rows(k_t_ptr, keys, key_counts, k_t_row, size_t, DT)
            d, t = scores_tile(q_s, k_s, q_t, k_t, scale_s, scale_t, CLOSE, WIDE)
            seen = key_counts[None, :] & query_counts[:, None]
            if CAUSAL:
                seen = seen & (keys[None, :] <= queries[:, None])
            d = tl.where(seen, d, 0.0)
            t = tl.where(seen, t, -INF)
            new, new_s = tl.maximum(top, tl.max(t, 1)), tl.maximum(top_s, tl.max(t + d, 1))
            p = tl.exp(t - new[:, None])
            total = total * tl.exp(top - new) + tl.sum(p, 1)
            total_s = total_s * tl.exp(top_s - new_s) + tl.sum(tl.exp(t + d - new_s[:, None]), 1)
            moved = moved * tl.exp(top - new) + tl.sum(p * tl.where(tl.abs(d) < 0.5, d + expm1_less(d), 0.0), 1)
            largest = tl.maximum(largest, tl.max(tl.abs(d), 1))
            top, top_s = new, new_s
        some = total > 0
        safe = tl.where(some, total, 1.0)
        lse = tl.where(some, top + tl.log(safe), 0.0)
        # log1p of a small number, from log: exact where 1 + x rounds.
        ratio = moved / safe
        one = 1 + ratio
        small = tl.where(one == 1, ratio, tl.log(one) * (ratio / tl.where(one == 1, 1.0, one - 1)))
        far = top_s - top + tl.log(tl.where(some, total_s, 1.0) / safe)
        shift = tl.where(some, tl.where(largest < 0.25, small, far), 0.0)
    loss = tl.zeros([BLOCK_Q], tl.float32)
    grad = tl.zeros([BLOCK_Q, DS], tl.float32)
    for begin in range(0, end, BLOCK_K):
        keys = begin + tl.arange(0, BLOCK_K)
        key_counts = counted(key_mask_ptr, batch, keys, lk, KEY_MASK)
        k_s = load_rows(k_s_ptr, keys, key_counts, k_s_row, size_s, DS)
        k_t = load_rows(k_t_ptr, keys, key_counts, k_t_row, size_t, DT)
        d, t = scores_tile(q_s, k_s, q_t, k_t, scale_s, scale_t, CLOSE, WIDE)
        seen = key_counts[None, :] & query_counts[:, None]
        if CAUSAL:
            seen = seen & (keys[None, :] <= queries[:, None])
        if KIND == SCORES:
            d = tl.where(seen, d, 0.0)
            loss += tl.sum(d * d, 1)
        else:
            e, p, v = apart(d, t, seen, lse, shift)
            if KIND == KL:
                loss += tl.sum(tl.where(tl.abs(v) < 0.5, p * expm1_less(v), e - p * v), 1)
            else:
                loss += tl.sum(e * e, 1)
                along += tl.sum(e * (p + e), 1)
        if GRAD and KIND != PROBS:
            grad += product(score_gradient(d, t, seen, lse, shift, along, KIND), k_s, WIDE)
    if GRAD and KIND == PROBS:
        for begin in range(0, end, BLOCK_K):
            keys = begin + tl.arange(0, BLOCK_K)
            key_counts = counted(key_mask_ptr, batch, keys, lk, KEY_MASK)
            k_s = load_rows(k_s_ptr, keys, key_counts, k_s_row, size_s, DS)
            k_t = load_rows(k_t_ptr, keys, key_counts, k_t_row, size_t, DT)
            d, t = scores_tile(q_s, k_s, q_t, k_t, scale_s, scale_t, CLOSE, WIDE)
            seen = key_counts[None, :] & query_counts[:, None]
            if CAUSAL:
                seen = seen & (keys[None, :] <= queries[:, None])
            grad += product(score_gradient(d, t, seen, lse, shift, along, KIND), k_s, WIDE)
    inside = queries < lq
    at = pair * lq + queries
    tl.store(loss_ptr + at, tl.where(scale != 0, tl.where(query_counts, scale * loss, 0.0), 0.0), mask=inside)
    tl.store(state_ptr + at, lse, mask=inside)
    tl.store(state_ptr + rows + at, shift, mask=inside)
    tl.store(state_ptr + 2 * rows + at, along, mask=inside)
    if GRAD:
        columns = tl.arange(0, DS)[None, :]
        grad = tl.where(scale != 0, grad * (scale_s * scale), 0.0)
        tl.store(
            grad_ptr + at[:, None] * size_s + columns,
            grad.to(grad_ptr.dtype.element_ty),
            mask=inside[:, None] & (columns < size_s),
        )


@triton.jit
def keys_kernel(
    q_s_ptr, k_s_ptr, q_t_ptr, k_t_ptr, query_mask_ptr, key_mask_ptr, scale_ptr, state_ptr, grad_ptr,
    q_s_batch, q_s_head, q_s_row, k_s_batch, k_s_head, k_s_row, q_t_batch, q_t_head, q_t_row, k_t_batch, k_t_head, k_t_row,
    heads, share_s, share_t, lq, lk, size_s, size_t, scale_s, scale_t, rows,
    KIND: tl.constexpr, CLOSE: tl.constexpr, QUERY_MASK: tl.constexpr, KEY_MASK: tl.constexpr, CAUSAL: tl.constexpr,
    WIDE: tl.constexpr, DS: tl.constexpr, DT: tl.constexpr,
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
    start = 0
    if CAUSAL:
        start = first // BLOCK_Q * BLOCK_Q
    grad = tl.zeros([BLOCK_K, DS], tl.float32)
    for head in range(key_head * share_s, (key_head + 1) * share_s):
        pair = batch * heads + head
        k_t = load_rows(k_t_ptr + batch * k_t_batch + head // share_t * k_t_head, keys, key_counts, k_t_row, size_t, DT)
        scale = tl.load(scale_ptr + pair)
        of_head = tl.zeros([BLOCK_K, DS], tl.float32)
        for begin in range(start, lq, BLOCK_Q):
            queries = begin + tl.arange(0, BLOCK_Q)
            query_counts = counted(query_mask_ptr, batch, queries, lq, QUERY_MASK)
            q_s = load_rows(q_s_ptr + batch * q_s_batch + head * q_s_head, queries, query_counts, q_s_row, size_s, DS)
            q_t = load_rows(q_t_ptr + batch * q_t_batch + head * q_t_head, queries, query_counts, q_t_row, size_t, DT)
            d, t = scores_tile(q_s, k_s, q_t, k_t, scale_s, scale_t, CLOSE, WIDE)
            seen = key_counts[None, :] & query_counts[:, None]
            if CAUSAL:
                seen = seen & (keys[None, :] <= queries[:, None])
            at = state_ptr + pair * lq + queries
            lse = tl.load(at, mask=queries < lq, other=0.0)
            shift = tl.load(at + rows, mask=queries < lq, other=0.0)
            along = tl.load(at + 2 * rows, mask=queries < lq, other=0.0)
            g = score_gradient(d, t, seen, lse, shift, along, KIND)
            of_head += product(tl.trans(g), q_s, WIDE)
        grad += tl.where(scale != 0, of_head * (scale_s * scale), 0.0)
    columns = tl.arange(0, DS)[None, :]
    tl.store(
        grad_ptr + (own * lk + keys)[:, None] * size_s + columns,
        grad.to(grad_ptr.dtype.element_ty),
        mask=(keys < lk)[:, None] & (columns < size_s),
    )


@triton.jit
def map_kernel(
    student_ptr, teacher_ptr, mask_ptr, scale_ptr, loss_ptr, grad_ptr,
    student_batch, student_head, student_row, teacher_batch, teacher_head, teacher_row,
    mask_batch, mask_head, mask_row, mask_column, heads, lq, lk,
    MASK: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, head, query = row // (heads * lq), row // lq % heads, row % lq
    student_ptr += batch * student_batch + head * student_head + query * student_row
    teacher_ptr += batch * teacher_batch + head * teacher_head + query * teacher_row
    mask_ptr += batch * mask_batch + head * mask_head + query * mask_row
    scale = tl.load(scale_ptr + row // lq)
    loss = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, lk, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        inside = columns < lk
        counts = inside
        if MASK:
            counts = counts & (tl.load(mask_ptr + columns * mask_column, mask=inside, other=0) != 0)
        s = tl.load(student_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        t = tl.load(teacher_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        d = tl.where(scale != 0, tl.where(counts, s - t, 0.0), 0.0)
        loss += d * d
        if GRAD:
            tl.store(grad_ptr + row * lk + columns, (2 * scale * d).to(grad_ptr.dtype.element_ty), mask=inside)
    tl.store(loss_ptr + row, scale * tl.sum(loss, 0))
