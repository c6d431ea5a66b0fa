"""Squared score differences by Gram matrices: the kernels of `attention_mse(on="scores")`, in work linear in both lengths.

`kdfast.grams` has the algebra. Here the basis is never stored: a tile of it is formed from queries (or keys) of both sides as
they are read. Three launches whatever the length:

    gram_kernel       Q^T Q of each head, K^T K of each group of heads that share keys: a partial for each slice of the length
    finish_kernel     the partials summed in the order of the slices; <Q^T Q, K^T K> by tiles; the gradients' small matrices
    gradients_kernel  Q (K^T Ks), K (Q^T Qs) by blocks of rows; the loss from its tiles

A batched GEMM gives a head to a few blocks of threads, which walk its whole length: 8 heads leave most of a GPU idle. Slices
fill it, and their sums do not depend on who comes first.
"""

from __future__ import annotations

import math
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.backends.triton import attention_tiles as tiles
from kdfast.backends.triton.tiles import before_hopper, multiprocessors, on
from kdfast.options import AttentionOptions

#: Rows of a block of gradients, and positions that a Gram matrix takes at a time.
ROWS, STEP = 64, 32
#: The same on a GPU older than Hopper, where more would spill.
OLDER_ROWS = 16
#: Programs a multiprocessor: of two, one multiplies while the other loads.
PROGRAMS = 2
#: Positions below which a partial costs more to store and sum again than to form.
LEAST = 128


def tile(dtype: torch.dtype) -> int:
    """Columns and rows of the tiles a Gram matrix is cut into: 64, and fewer where a number takes two registers."""
    return 32 if dtype == torch.float64 else 64


def slices(matrices: int, length: int, processors: int) -> int:
    """Into how many parts to cut the length so that `matrices` tiles fill the multiprocessors. A pure function."""
    wanted = -(-PROGRAMS * processors // max(matrices, 1))
    return max(1, min(wanted, -(-length // LEAST)))


@triton.jit
def coefficients(second, of_queries, ratio, DIFFERENCE: tl.constexpr):
    """What a half of the basis is made of: (times the student's, times the teacher's)."""
    if DIFFERENCE:  # Q = [Qs - r Qt, r Qt], K = [Ks, Ks - Kt]
        student = tl.where(second & of_queries, 0.0, 1.0)
        teacher = tl.where(of_queries, tl.where(second, ratio, -ratio), tl.where(second, -1.0, 0.0))
    else:  # Q = [Qs, -r Qt], K = [Ks, Kt]
        student = tl.where(second, 0.0, 1.0)
        teacher = tl.where(second, tl.where(of_queries, -ratio, 1.0), 0.0)
    return student, teacher


@triton.jit
def basis_tile(
    s_ptr, t_ptr, s_row, t_row, positions, counts, index, size_s, size_t, of_queries, ratio, ratio_rest,
    DIFFERENCE: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """[positions, TILE] of column tile `index` of the basis, the student's half first; zero where a position does not count."""
    halves = tl.cdiv(size_s, TILE)
    second = index >= halves
    columns = tl.where(second, index - halves, index) * TILE + tl.arange(0, TILE)[None, :]
    student, teacher = coefficients(second, of_queries, ratio, DIFFERENCE)
    rows = positions[:, None].to(tl.int64)
    # Nothing is read that is only multiplied by 0.
    end_s, end_t = tl.where(second, 0, size_s), tl.where(second, size_t, 0)
    if DIFFERENCE:
        end_s, end_t = tl.where(second & of_queries, 0, size_s), tl.where(second | of_queries, size_t, 0)
    s = tl.load(s_ptr + rows * s_row + columns, mask=counts[:, None] & (columns < end_s), other=0.0)
    t = tl.load(t_ptr + rows * t_row + columns, mask=counts[:, None] & (columns < end_t), other=0.0)
    if UNIT and not WIDE:
        return s.to(tl.float32) * student + t.to(tl.float32) * teacher
    # Rounded once, ratio and product included: what they lose is as large as the difference may be.
    ratio = tl.cast(ratio, tl.float64) + ratio_rest
    student, teacher = coefficients(second, of_queries, ratio, DIFFERENCE)
    x = s.to(tl.float64) * student + t.to(tl.float64) * teacher
    return x if WIDE else x.to(tl.float32)


@triton.jit
def far(head, stride):
    """How far a head's first number lies, which may be beyond 2^31."""
    return tl.cast(head, tl.int64) * stride


@triton.jit
def unmasked(
    query_mask_ptr, key_mask_ptr, batch, positions, counts, of_queries, lq, lk, QUERY_MASK: tl.constexpr, KEY_MASK: tl.constexpr
):
    """Which of `counts` the mask of their side, queries or keys, leaves."""
    if QUERY_MASK:
        masked = positions < tl.where(of_queries, lq, 0)
        counts = counts & (tl.load(query_mask_ptr + batch * lq + positions, mask=masked, other=1) != 0)
    if KEY_MASK:
        masked = positions < tl.where(of_queries, 0, lk)
        counts = counts & (tl.load(key_mask_ptr + batch * lk + positions, mask=masked, other=1) != 0)
    return counts


@triton.jit
def gram_kernel(
    q_s_ptr, k_s_ptr, q_t_ptr, k_t_ptr, query_mask_ptr, key_mask_ptr, partial_ptr,
    q_s_batch, q_s_head, q_s_row, k_s_batch, k_s_head, k_s_row, q_t_batch, q_t_head, q_t_row, k_t_batch, k_t_head, k_t_row,
    pairs, heads, share_s, share_t, shared, lq, lk, size_s, size_t, ratio, ratio_rest, parts, count,
    DIFFERENCE: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    QUERY_MASK: tl.constexpr, KEY_MASK: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """partial[owner, part]: X^T X of a part, [count * TILE, count * TILE]; the owners are heads, then groups of heads."""
    part = tl.program_id(0) % parts
    i, j = tl.program_id(0) // parts // count % count, tl.program_id(0) // parts % count
    owner = tl.program_id(0) // (parts * count * count)
    if i > j:  # the other one's transpose
        return
    of_queries = owner < pairs
    groups = heads // shared
    at = tl.where(of_queries, owner, owner - pairs)
    batch = tl.where(of_queries, at // heads, at // groups).to(tl.int64)
    head = tl.where(of_queries, at % heads, at % groups * shared)
    length = tl.where(of_queries, lq, lk)
    s_row, t_row = tl.where(of_queries, q_s_row, k_s_row), tl.where(of_queries, q_t_row, k_t_row)
    if of_queries:
        s_ptr = q_s_ptr + batch * q_s_batch + far(head, q_s_head)
        t_ptr = q_t_ptr + batch * q_t_batch + far(head, q_t_head)
    else:
        s_ptr = k_s_ptr + batch * k_s_batch + far(head // share_s, k_s_head)
        t_ptr = k_t_ptr + batch * k_t_batch + far(head // share_t, k_t_head)
    rows = tl.cdiv(tl.cdiv(length, parts), STEP) * STEP
    total = tl.zeros([TILE, TILE], tl.float64 if WIDE else tl.float32)
    for begin in range(part * rows, tl.minimum((part + 1) * rows, length), STEP):
        positions = begin + tl.arange(0, STEP)
        counts = unmasked(
            query_mask_ptr, key_mask_ptr, batch, positions, positions < length, of_queries, lq, lk, QUERY_MASK, KEY_MASK
        )
        x = basis_tile(s_ptr, t_ptr, s_row, t_row, positions, counts, i, size_s, size_t, of_queries, ratio, ratio_rest,
                       DIFFERENCE, UNIT, WIDE, TILE)  # fmt: skip
        y = basis_tile(s_ptr, t_ptr, s_row, t_row, positions, counts, j, size_s, size_t, of_queries, ratio, ratio_rest,
                       DIFFERENCE, UNIT, WIDE, TILE)  # fmt: skip
        total += tl.dot(tl.trans(x), y, input_precision=PRECISION, out_dtype=tl.float64 if WIDE else tl.float32)
    width = count * TILE
    partial_ptr += (owner * parts + part).to(tl.int64) * width * width
    own, across = i * TILE + tl.arange(0, TILE)[:, None], j * TILE + tl.arange(0, TILE)[None, :]
    tl.store(partial_ptr + own * width + across, total)
    if i < j:
        tl.store(partial_ptr + own + across * width, total)


@triton.jit
def summed(partial_ptr, owner, i, j, parts, count, WIDE: tl.constexpr, TILE: tl.constexpr):
    """Tile (i, j) of an owner's Gram matrix: its parts, first to last."""
    width = count * TILE
    at = (i * TILE + tl.arange(0, TILE)[:, None]) * width + j * TILE + tl.arange(0, TILE)[None, :]
    partial_ptr += owner.to(tl.int64) * parts * width * width
    total = tl.zeros([TILE, TILE], tl.float64 if WIDE else tl.float32)
    for _ in range(parts):
        total += tl.load(partial_ptr + at)
        partial_ptr += width * width
    return total


@triton.jit
def finish_kernel(
    partial_ptr, scale_ptr, share_ptr, by_keys_ptr, by_queries_ptr,
    pairs, heads, shared, size_s, scale_s, parts, count,
    DIFFERENCE: tl.constexpr, WIDE: tl.constexpr, GRAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """share[pair, i, j]: a tile's in <Q^T Q, K^T K>; by_keys[pair] = 2 c^2 scale K^T Ks, by_queries = ... Q^T Qs."""
    pair = tl.program_id(0) // (count * count)
    i, j = tl.program_id(0) // count % count, tl.program_id(0) % count
    group = pairs + pair // heads * (heads // shared) + pair % heads // shared
    gram_q = summed(partial_ptr, pair, i, j, parts, count, WIDE, TILE)
    gram_k = summed(partial_ptr, group, i, j, parts, count, WIDE, TILE)
    tl.store(share_ptr + tl.program_id(0), tl.sum(gram_q * gram_k))
    halves = tl.cdiv(size_s, TILE)
    if GRAD and j < halves:
        if DIFFERENCE:  # Qs is the sum of both halves
            gram_q += summed(partial_ptr, pair, i, j + halves, parts, count, WIDE, TILE)
        scale = tl.load(scale_ptr + pair)
        factor = 2 * scale_s * scale_s * scale
        at = ((pair.to(tl.int64) * count + i) * TILE + tl.arange(0, TILE)[:, None]) * (halves * TILE)
        at += j * TILE + tl.arange(0, TILE)[None, :]
        tl.store(by_keys_ptr + at, tl.where(scale != 0, factor * gram_k, 0.0))
        tl.store(by_queries_ptr + at, tl.where(scale != 0, factor * gram_q, 0.0))


@triton.jit
def gradients_kernel(
    q_s_ptr, k_s_ptr, q_t_ptr, k_t_ptr, query_mask_ptr, key_mask_ptr, scale_ptr, share_ptr, by_keys_ptr, by_queries_ptr,
    loss_ptr, grad_q_ptr, grad_k_ptr,
    q_s_batch, q_s_head, q_s_row, k_s_batch, k_s_head, k_s_row, q_t_batch, q_t_head, q_t_row, k_t_batch, k_t_head, k_t_row,
    pairs, heads, share_s, share_t, lq, lk, size_s, size_t, scale_s, ratio, ratio_rest, count,
    DIFFERENCE: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    QUERY_MASK: tl.constexpr, KEY_MASK: tl.constexpr, GRAD: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    SHARES: tl.constexpr,
):  # fmt: skip
    """A block of rows of one gradient: x @ by, x a head's queries or the keys of each of its heads in turn."""
    halves = tl.cdiv(size_s, TILE)
    program = tl.program_id(0)
    if program < pairs:  # one loss each, whatever else
        at = tl.arange(0, SHARES)
        shares = tl.load(share_ptr + program.to(tl.int64) * (count * count) + at, mask=at < count * count, other=0.0)
        total, scale = tl.sum(shares), tl.load(scale_ptr + program)
        total = tl.where(total < 0, 0.0, total)  # not a maximum, which would lose a NaN
        tl.store(loss_ptr + program, tl.where(scale != 0, (scale_s * scale_s * scale * total).to(tl.float32), 0.0))
    if GRAD:
        queries = pairs * tl.cdiv(lq, ROWS) * halves
        of_queries = program < queries
        program = tl.where(of_queries, program, program - queries)
        length, share = tl.where(of_queries, lq, lk), tl.where(of_queries, 1, share_s)
        blocks = tl.cdiv(length, ROWS)
        own, j = program // (blocks * halves), program % halves
        groups = heads // share
        batch, first = (own // groups).to(tl.int64), own % groups * share
        s_row, t_row = tl.where(of_queries, q_s_row, k_s_row), tl.where(of_queries, q_t_row, k_t_row)
        t_head, t_share = tl.where(of_queries, q_t_head, k_t_head), tl.where(of_queries, 1, share_t)
        if of_queries:
            s_ptr, t_ptr = q_s_ptr + batch * q_s_batch + far(first, q_s_head), q_t_ptr + batch * q_t_batch
            by_ptr, grad_ptr = by_keys_ptr, grad_q_ptr
        else:
            s_ptr, t_ptr = k_s_ptr + batch * k_s_batch + far(first // share_s, k_s_head), k_t_ptr + batch * k_t_batch
            by_ptr, grad_ptr = by_queries_ptr, grad_k_ptr
        positions = program // halves % blocks * ROWS + tl.arange(0, ROWS)
        inside = positions < length
        total = tl.zeros([ROWS, TILE], tl.float64 if WIDE else tl.float32)
        for step in range(share * count):
            head, i = first + step // count, step % count
            x = basis_tile(s_ptr, t_ptr + far(head // t_share, t_head), s_row, t_row, positions, inside, i, size_s, size_t,
                           of_queries, ratio, ratio_rest, DIFFERENCE, UNIT, WIDE, TILE)  # fmt: skip
            x = tl.where(tl.load(scale_ptr + batch * heads + head) != 0, x, 0.0)  # 0 * NaN of a head without weight
            at = ((batch * heads + head) * count + i) * TILE + tl.arange(0, TILE)[:, None]
            by = tl.load(by_ptr + at * (halves * TILE) + j * TILE + tl.arange(0, TILE)[None, :])
            total += tl.dot(x, by, input_precision=PRECISION, out_dtype=tl.float64 if WIDE else tl.float32)
        # A row is of its own position alone: masked at its end, no mask lives through the loop.
        counts = unmasked(query_mask_ptr, key_mask_ptr, batch, positions, inside, of_queries, lq, lk, QUERY_MASK, KEY_MASK)
        columns = j * TILE + tl.arange(0, TILE)[None, :]
        at = (own.to(tl.int64) * length + positions)[:, None] * size_s + columns
        total = tl.where(counts[:, None], total, 0.0)
        tl.store(grad_ptr + at, total.to(grad_ptr.dtype.element_ty), mask=inside[:, None] & (columns < size_s))


def flags(dtype: torch.dtype, difference: bool, unit: bool, query_mask: bool, key_mask: bool, gpu: bool) -> dict[str, object]:
    """Compile-time arguments that the kernels that read queries and keys share; `dtype` is that of the sums."""
    return {
        "DIFFERENCE": difference, "UNIT": unit, "WIDE": dtype == torch.float64, "QUERY_MASK": query_mask, "KEY_MASK": key_mask,
        "TILE": tile(dtype), "PRECISION": "ieee" if dtype == torch.float64 else tiles.precision(torch.float32, gpu),
    }  # fmt: skip


OPTIONS: dict[str, int | bool] = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
FINISH_OPTIONS: dict[str, int | bool] = {"num_warps": 8, "enable_fp_fusion": True}


def score_mse(
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
    """Loss `[B, H]` and gradients of all pairs; strides along the last dimension are 1."""
    batch, heads, lq, ds = q_s.shape
    lk, dt = k_s.shape[2], q_t.shape[3]
    share_s, share_t = heads // k_s.shape[1], heads // k_t.shape[1]
    shared = math.gcd(share_s, share_t)
    pairs, owners = batch * heads, batch * heads + batch * (heads // shared)
    # Of unequal sizes no difference can be formed before the products: what cancels is kept in float64.
    dtype = torch.float32 if ds == dt else torch.float64
    ratio = options.scale_t / options.scale_s
    size = tile(dtype)
    count, halves = -(-ds // size) + -(-dt // size), -(-ds // size)
    parts = slices(owners * count * (count + 1) // 2, max(lq, lk), multiprocessors(q_s.device))
    new = q_s.new_empty if q_s.dtype == dtype else lambda *shape: q_s.new_empty(*shape, dtype=dtype)
    partial, shares = new(owners, parts, count * size, count * size), new(pairs, count * count)
    small = (pairs, count * size, halves * size) if need_grad else (0,)
    by_keys, by_queries = new(small), new(small)
    loss = torch.empty_like(scale)
    grad_q = torch.empty(q_s.shape if need_grad else (0,), dtype=q_s.dtype, device=q_s.device)
    grad_k = torch.empty(k_s.shape if need_grad else (0,), dtype=k_s.dtype, device=k_s.device)
    (near,) = struct.unpack("f", struct.pack("f", ratio))  # a kernel takes it in float32
    strides = [s for x in (q_s, k_s, q_t, k_t) for s in x.stride()[:3]]
    masks = (query_mask if query_mask is not None else scale, key_mask if key_mask is not None else scale)
    shared_flags = flags(dtype, ds == dt, ratio == 1, query_mask is not None, key_mask is not None, q_s.is_cuda)
    own = {"DIFFERENCE": ds == dt, "WIDE": dtype == torch.float64, "GRAD": need_grad, "TILE": size}
    with on(q_s):
        gram_kernel[(owners * count * count * parts,)](
            q_s, k_s, q_t, k_t, *masks, partial, *strides, pairs, heads, share_s, share_t, shared, lq, lk, ds, dt,
            near, ratio - near, parts, count, **shared_flags, STEP=STEP, **OPTIONS,
        )  # fmt: skip
        finish_kernel[(pairs * count * count,)](
            partial,
            scale,
            shares,
            by_keys,
            by_queries,
            pairs,
            heads,
            shared,
            ds,
            options.scale_s,
            parts,
            count,
            **own,
            **FINISH_OPTIONS,
        )
        rows = OLDER_ROWS if before_hopper(q_s.device) else ROWS
        programs = (
            halves * (pairs * triton.cdiv(lq, rows) + batch * k_s.shape[1] * triton.cdiv(lk, rows)) if need_grad else pairs
        )
        gradients_kernel[(programs,)](
            q_s, k_s, q_t, k_t, *masks, scale, shares, by_keys, by_queries, loss, grad_q, grad_k, *strides,
            pairs, heads, share_s, share_t, lq, lk, ds, dt, options.scale_s, near, ratio - near, count,
            **shared_flags, GRAD=need_grad, ROWS=rows, SHARES=triton.next_power_of_2(count * count), **OPTIONS,
        )  # fmt: skip
    return loss, grad_q, grad_k
