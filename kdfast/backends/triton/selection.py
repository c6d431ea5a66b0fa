"""Capture of a row: its k most likely ids, exact, ties to the lower id; and ids drawn from the others.

Bytes a row of V columns: V, and about k of the lanes' columns once more (`capture_rows`). Rows that it leaves, those of long
ties or of a k near V, are selected by radix (`selection_rows`): 2 to 4 reads, one to collect, one for every temperature; a
launch of those kernels costs a row that is done one load. Draws take two reads, and one more for every temperature.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kdfast.backends.triton import drawing, tiles
from kdfast.backends.triton.capture_rows import capture_kernel, order_kernel
from kdfast.backends.triton.selection_rows import select_kernel, sums_kernel
from kdfast.backends.triton.tiles import LOG2E
from kdfast.options import Head

#: 8-bit digits that tell the values of a dtype apart once they are float32.
DIGITS = {torch.bfloat16: 2, torch.float16: 3, torch.float32: 4}
SELECT_BLOCK, SELECT_WARPS = 2048, 8
ORDER_BLOCK, ORDER_WARPS = 256, 4
#: The largest k of the pass that ranks its survivors by comparing them with each other: beyond, they do not fit the registers.
MOST = 512


def capture(
    logits: Tensor,
    k: int,
    temperatures: tuple[float, ...],
    draws: Tensor | None = None,
    sample_temperature: float = 1.0,
    head: Head = Head(),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    # Descending, so that a temperature that is half of the one before takes its terms squared.
    at = tuple(sorted({1.0, *temperatures}, reverse=True))
    found = _Captured.empty(logits, k, len(at))
    if logits.shape[0]:
        with tiles.on(logits):
            _in_one_pass(logits, k, at, head, found)
            _the_others(logits, k, at, head, found)
    ids, logprobs, log_sums = found.ids, found.logprobs, found.log_sums
    log_sum_1 = log_sums[:, at.index(1.0)]
    wanted = [at.index(t) for t in temperatures]
    log_z = torch.stack([log_sums[:, j] - log_sum_1 / t for j, t in zip(wanted, temperatures, strict=True)], -1)
    if draws is None:
        log_tail = torch.stack([found.log_tails[:, j] for j in wanted], -1)
        return ids, logprobs, log_z, log_tail, logprobs.new_empty(0)
    tops = found.tops
    base = tops[:, :1] + log_sum_1[:, None]
    drawn, log_left = drawing.draw(logits, found.kept, tops, draws, sample_temperature, head, _digits(logits, head))
    drawn, counts = _distinct(drawn)
    z = _through(logits.gather(1, drawn.clamp(min=0).long()).float(), head)
    there = drawn >= 0
    logp = torch.where(there, z - tops[:, :1] - log_sum_1[:, None], -torch.inf)
    log_r = (z - tops[:, 1:]).double() / sample_temperature - log_left[:, None]
    log_weight = (counts / draws.shape[1]).log() + logp - log_r
    weights = torch.cat([logprobs.exp(), torch.where(there, log_weight.exp(), 0).float()], 1)
    ids, logprobs = torch.cat([ids, drawn], 1), torch.cat([logprobs, logp], 1)
    logprobs = torch.where(base.isfinite(), logprobs, torch.nan)  # a bad row, also where it has no entries
    unlisted = [drawing.unlisted(logits, ids, t, head) for t in temperatures]
    log_tail = torch.stack(
        [
            (u - tops[:, 0].double() / t - log_sums[:, j]).float()
            for u, j, t in zip(unlisted, wanted, temperatures, strict=True)
        ],
        -1,
    )
    return ids, logprobs, log_z, log_tail, weights


@dataclass(frozen=True)
class _Captured:
    """What the kernels write of each row.

    ids, logprobs [N, k] largest first; log_sums, log_tails [N, T]; kept [N, 2]: the last key and id that are selected; tops
    [N, 2]: maxima of all and of the rest; done [N]: whether the pass over the row sufficed.
    """

    ids: Tensor
    logprobs: Tensor
    log_sums: Tensor
    log_tails: Tensor
    kept: Tensor
    tops: Tensor
    done: Tensor

    @classmethod
    def empty(cls, logits: Tensor, k: int, n_temperatures: int) -> _Captured:
        n = logits.shape[0]
        new = functools.partial(torch.empty, device=logits.device)
        return cls(
            new(n, k, dtype=torch.int32), new(n, k), new(n, n_temperatures), new(n, n_temperatures),
            new(n, 2, dtype=torch.int32), new(n, 2), torch.zeros(n, dtype=torch.int32, device=logits.device),
        )  # fmt: skip


def rank_block(room: int, warps: int) -> int:
    """How many values `room` of them are compared with at a time: 16 a thread."""
    return max(1, min(32, 512 * warps // room))


def room_of(k: int) -> int:
    """Survivors there is room for: k, those of its last value's ties, and of lanes that hold several."""
    return max(256, 2 * triton.next_power_of_2(k))


def squares(at: tuple[float, ...]) -> int:
    """Bit j: at[j] is half of at[j - 1]."""
    return sum(1 << j for j in range(1, len(at)) if at[j - 1] == 2 * at[j])


def in_pairs(size: tiles.Launch) -> tiles.Launch:
    """At most 8 warps, so that a multiprocessor holds two programs: while one ranks, the other reads."""
    return dataclasses.replace(size, warps=min(size.warps, 8))


def _in_one_pass(logits: Tensor, k: int, at: tuple[float, ...], head: Head, out: _Captured) -> None:
    rows, width = logits.shape
    if not 0 < k <= MOST:
        return
    size = in_pairs(tiles.launch_for(width, logits))
    grid = tiles.grid(rows, logits.device, size.warps)
    room = room_of(k)
    lanes = torch.empty(grid[0], size.lanes, dtype=torch.int32, device=logits.device)
    keys = torch.empty(grid[0], room, dtype=torch.int64, device=logits.device)
    capture_kernel[grid](
        logits, out.ids, out.logprobs, out.log_sums, out.log_tails, out.kept, out.tops, out.done, lanes, keys,
        rows, width, logits.stride(0), k, head.softcap or 0.0, head.scale, tuple(LOG2E.value / t for t in at),
        T=len(at), ONE=at.index(1.0), SQUARED=squares(at), HEAD=drawing.head_flag(head), DIGITS=_digits(logits, head),
        ROOM=room, RANK=rank_block(room, size.warps), BLOCK=32 * size.warps, **size.shape, **size.options,
    )  # fmt: skip


def _the_others(logits: Tensor, k: int, at: tuple[float, ...], head: Head, out: _Captured) -> None:
    """The rows that are not done; each of the others costs a launched program one load."""
    rows, width = logits.shape
    flag, cap = drawing.head_flag(head), head.softcap or 0.0
    ids, values = torch.empty_like(out.ids), torch.empty_like(out.logprobs)
    if k == 0:  # no key is above all bits set
        top = _through(logits.amax(-1).float(), head).clamp(min=torch.finfo(torch.float32).min)
        out.kept.fill_(-1)
        out.tops.copy_(torch.stack([top, top], -1))
    else:
        select_kernel[(rows,)](
            logits, ids, values, out.kept, out.tops, out.done, width, logits.stride(0), k, cap, head.scale,
            HEAD=flag, DIGITS=_digits(logits, head), BLOCK=SELECT_BLOCK, num_warps=SELECT_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    size = tiles.launch_for(width, logits)
    for j, t in enumerate(at):
        sums_kernel[(rows,)](
            logits, out.kept, out.tops, out.done, out.log_sums, out.log_tails, width, logits.stride(0), 1 / t, cap, head.scale,
            T=len(at), NUMBER=j, HEAD=flag, DIGITS=_digits(logits, head), **size.shape, **size.options,
        )  # fmt: skip
    if k:
        order_kernel[(rows,)](
            ids, values, out.tops, out.log_sums, out.done, out.ids, out.logprobs, k, T=len(at), ONE=at.index(1.0),
            BLOCK=ORDER_BLOCK, RANK=rank_block(ORDER_BLOCK, ORDER_WARPS), num_warps=ORDER_WARPS, enable_fp_fusion=True,
        )  # fmt: skip


def _through(z: Tensor, head: Head) -> Tensor:
    z = z * head.scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def _digits(logits: Tensor, head: Head) -> int:
    return DIGITS[logits.dtype] if drawing.head_flag(head) == 0 else DIGITS[torch.float32]


def _distinct(drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending columns without repetition, -1 in the places left over, and how often each was drawn."""
    first = torch.cat([torch.ones_like(drawn[:, :1], dtype=torch.bool), drawn[:, 1:] != drawn[:, :-1]], 1)
    place = first.cumsum(1) - 1
    ids = torch.full_like(drawn, -1).scatter_(1, place, drawn)
    counts = torch.zeros(drawn.shape, dtype=torch.float64, device=drawn.device)
    return ids, counts.scatter_add_(1, place, torch.ones_like(counts))
