"""Ids drawn from a row's softmax by inversion: uniform numbers, sorted, against the running sum of what is not taken yet.

Sums of tiles are formed the same way in the pass that adds them up and in the one that looks for the draws, and kept in
float64, so that every draw finds its tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.backends.triton import tiles
from kdfast.backends.triton.logits import Flags, Scalars
from kdfast.backends.triton.selection_rows import ordered
from kdfast.backends.triton.tiles import LN2, LOG2E, load_head
from kdfast.backends.triton.topk_entries import mark, rest_sums, unmark
from kdfast.options import Head, RowOptions

BLOCK, WARPS = 2048, 8


@triton.jit
def _left(
    row_ptr,
    start,
    width,
    top,
    threshold,
    last_tie,
    c,
    cap,
    scale,
    HEAD: tl.constexpr,
    DIGITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """exp((x - top) / T) of the columns that are not among the k."""
    columns = start + tl.arange(0, BLOCK)
    x = load_head(row_ptr, columns, width, cap, scale, HEAD, "evict_last")
    key = ordered(x, DIGITS)
    taken = (key > threshold) | ((key == threshold) & (columns <= last_tie))
    return tl.where(taken, 0.0, tl.exp2((x - top) * c))


@triton.jit
def draw_kernel(
    logits_ptr, kept_ptr, tops_ptr, points_ptr, drawn_ptr, total_ptr, width, stride, n, inv_t, cap, scale,
    HEAD: tl.constexpr, DIGITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The columns of n draws, ascending, where anything is left to draw; the mass of what is left relative to its maximum."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    threshold = tl.load(kept_ptr + row * 2).to(tl.uint32, bitcast=True)
    last_tie = tl.load(kept_ptr + row * 2 + 1)
    top = tl.load(tops_ptr + row * 2 + 1)
    c = inv_t * LOG2E
    total = tl.zeros([], tl.float64)
    for start in range(0, width, BLOCK):
        e = _left(row_ptr, start, width, top, threshold, last_tie, c, cap, scale, HEAD, DIGITS, BLOCK)
        total += tl.sum(e, 0).to(tl.float64)
    tl.store(total_ptr + row, total)
    done = tl.full([], 0, tl.int32)
    below = tl.zeros([], tl.float64)
    places = tl.arange(0, BLOCK)
    for start in range(0, width, BLOCK):
        e = _left(row_ptr, start, width, top, threshold, last_tie, c, cap, scale, HEAD, DIGITS, BLOCK)
        above = below + tl.sum(e, 0).to(tl.float64)
        point = tl.load(points_ptr + row * n + done, mask=done < n, other=1.0) * total
        if point < above:
            running = tl.cumsum(e, 0).to(tl.float64) + below
            last = tl.max(tl.where(e > 0, places, 0), 0)
            while point < above:
                place = tl.min(tl.where((running > point) & (e > 0), places, last), 0)
                tl.store(drawn_ptr + row * n + done, start + place)
                done += 1
                point = tl.load(points_ptr + row * n + done, mask=done < n, other=1.0) * total
        below = above


@triton.jit
def unlisted_kernel(
    logits_ptr, ids_ptr, bits_ptr, log_mass_ptr, rows, width, words, k, stride, o,
    F: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """log of sum exp(x / T) over the columns that stand in no slot."""
    bits_ptr += tl.program_id(0).to(tl.int64) * words
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64)
        ids, inside, _ = mark(bits_ptr, ids_ptr + at * k, k, width, K)
        m, l, _, _, _, _ = rest_sums(logits_ptr + at * stride, bits_ptr, width, o, F, LANES, VEC, RAGGED)
        tl.store(log_mass_ptr + row, m.to(tl.float64) * o.inv_t + l.to(tl.float64) * LN2)
        unmark(bits_ptr, ids, inside)


def draw(
    logits: Tensor, kept: Tensor, tops: Tensor, draws: Tensor, temperature: float, head: Head, digits: int
) -> tuple[Tensor, Tensor]:
    """(columns [N, n], ascending, -1 where nothing is left to draw; log of sum exp((x - top) / T) [N] of what is left)."""
    rows, n = draws.shape
    drawn = torch.full((rows, n), -1, dtype=torch.int32, device=logits.device)
    total = torch.zeros(rows, dtype=torch.float64, device=logits.device)
    # Below 1 by more than the rounding of a product, so that no draw lies beyond the last sum.
    points = draws.clamp(max=1 - 2.0**-50).sort(-1).values
    if rows:
        with tiles.on(logits):
            draw_kernel[(rows,)](
                logits, kept, tops, points, drawn, total, logits.shape[1], logits.stride(0), n, 1 / temperature,
                head.softcap or 0.0, head.scale, HEAD=head_flag(head), DIGITS=digits, BLOCK=BLOCK,
                num_warps=WARPS, enable_fp_fusion=True,
            )  # fmt: skip
    return drawn, total.log()


def head_flag(head: Head) -> int:
    """NO_HEAD, SCALED or CAPPED of `tiles`."""
    options = RowOptions(student_softcap=head.softcap or 0.0, student_scale=head.scale)
    return Flags.of(options, False, False, False, False).student_head


def unlisted(logits: Tensor, ids: Tensor, temperature: float, head: Head) -> Tensor:
    """log of sum exp(x / T) [N], float64, over the columns that are not in `ids` [N, K]."""
    rows, width = logits.shape
    out = torch.empty(rows, dtype=torch.float64, device=logits.device)
    if rows == 0:
        return out
    options = RowOptions(temperature=temperature, student_softcap=head.softcap or 0.0, student_scale=head.scale)
    flags = Flags.of(options, False, False, False, False)
    size = tiles.launch_for(width, logits)
    programs = tiles.grid(rows, logits.device, size.warps)
    bits = torch.zeros(programs[0], triton.cdiv(width, 32), dtype=torch.int32, device=logits.device)
    with tiles.on(logits):
        unlisted_kernel[programs](
            logits, ids, bits, out, rows, width, bits.shape[1], ids.shape[1], logits.stride(0), Scalars.of(options),
            F=flags, K=triton.next_power_of_2(ids.shape[1]), **size.shape, **size.options,
        )  # fmt: skip
    return out
