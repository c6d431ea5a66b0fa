"""Capture of a row: its k most likely ids, exact, ties to the lower id; and ids drawn from the others.

A row is read 2 (bfloat16), 3 (float16) or 4 (float32, or behind a head) times to select by radix, once to collect, once for
every temperature; draws take two reads, and one more for every temperature. torch sorts the N x k values that are left.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kdfast.backends.triton import drawing, tiles
from kdfast.backends.triton.selection_rows import select_kernel, sums_kernel
from kdfast.options import Head

#: 8-bit digits that tell the values of a dtype apart once they are float32.
DIGITS = {torch.bfloat16: 2, torch.float16: 3, torch.float32: 4}
SELECT_BLOCK, SELECT_WARPS = 2048, 8


def capture(
    logits: Tensor,
    k: int,
    temperatures: tuple[float, ...],
    draws: Tensor | None = None,
    sample_temperature: float = 1.0,
    head: Head = Head(),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    ids, values, kept, tops = _select(logits, k, head)
    at = dict.fromkeys((1.0, *temperatures))
    log_sums, log_tails = _sums(logits, kept, tops, tuple(at), head)
    # The kernel leaves id order, so a stable sort by value gives ties to the lower id.
    order = values.sort(dim=-1, descending=True, stable=True).indices
    base = tops[:, :1] + log_sums[1.0][:, None]
    logprobs = (values - tops[:, :1] - log_sums[1.0][:, None]).gather(1, order)
    log_z = torch.stack([log_sums[t] - log_sums[1.0] / t for t in temperatures], -1)
    ids = ids.gather(1, order)
    if draws is None:
        return ids, logprobs, log_z, torch.stack([log_tails[t] for t in temperatures], -1), base.new_empty(0)
    drawn, log_left = drawing.draw(logits, kept, tops, draws, sample_temperature, head, _digits(logits, head))
    drawn, counts = _distinct(drawn)
    z = _through(logits.gather(1, drawn.clamp(min=0).long()).float(), head)
    found = drawn >= 0
    logp = torch.where(found, z - tops[:, :1] - log_sums[1.0][:, None], -torch.inf)
    log_r = (z - tops[:, 1:]).double() / sample_temperature - log_left[:, None]
    log_weight = (counts / draws.shape[1]).log() + logp - log_r
    weights = torch.cat([logprobs.exp(), torch.where(found, log_weight.exp(), 0).float()], 1)
    ids, logprobs = torch.cat([ids, drawn], 1), torch.cat([logprobs, logp], 1)
    logprobs = torch.where(base.isfinite(), logprobs, torch.nan)  # a bad row, also where it has no entries
    log_tail = torch.stack(
        [(drawing.unlisted(logits, ids, t, head) - tops[:, 0].double() / t - log_sums[t]).float() for t in temperatures], -1
    )
    return ids, logprobs, log_z, log_tail, weights


def _through(z: Tensor, head: Head) -> Tensor:
    z = z * head.scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def _digits(logits: Tensor, head: Head) -> int:
    return DIGITS[logits.dtype] if drawing.head_flag(head) == 0 else DIGITS[torch.float32]


def _select(logits: Tensor, k: int, head: Head) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids and values of the k largest in id order; what tells them apart (key, last tie); maxima of all and of the rest."""
    rows, width = logits.shape
    new = functools.partial(torch.empty, device=logits.device)
    ids, values = new(rows, k, dtype=torch.int32), new(rows, k, dtype=torch.float32)
    if k == 0:  # no key is above all bits set
        top = _through(logits.amax(-1).float(), head).clamp(min=torch.finfo(torch.float32).min)
        return ids, values, new(rows, 2, dtype=torch.int32).fill_(-1), torch.stack([top, top], -1)
    kept, tops = new(rows, 2, dtype=torch.int32), new(rows, 2, dtype=torch.float32)
    if rows:
        with tiles.on(logits):
            select_kernel[(rows,)](
                logits, ids, values, kept, tops, width, logits.stride(0), k, head.softcap or 0.0, head.scale,
                HEAD=drawing.head_flag(head), DIGITS=_digits(logits, head), BLOCK=SELECT_BLOCK,
                num_warps=SELECT_WARPS, enable_fp_fusion=True,
            )  # fmt: skip
    return ids, values, kept, tops


def _sums(
    logits: Tensor, kept: Tensor, tops: Tensor, temperatures: tuple[float, ...], head: Head
) -> tuple[dict[float, Tensor], dict[float, Tensor]]:
    """At each T: log of sum exp((x - max) / T), and the log mass of what is not selected."""
    rows, width = logits.shape
    size = tiles.launch_for(width, logits)
    log_sums, log_tails = ({t: torch.empty(rows, device=logits.device) for t in temperatures} for _ in range(2))
    for t in temperatures if rows else ():
        with tiles.on(logits):
            sums_kernel[(rows,)](
                logits, kept, tops, log_sums[t], log_tails[t], width, logits.stride(0), 1 / t, head.softcap or 0.0, head.scale,
                HEAD=drawing.head_flag(head), DIGITS=_digits(logits, head), **size.shape, **size.options,
            )  # fmt: skip
    return log_sums, log_tails


def _distinct(drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending columns without repetition, -1 in the places left over, and how often each was drawn."""
    first = torch.cat([torch.ones_like(drawn[:, :1], dtype=torch.bool), drawn[:, 1:] != drawn[:, :-1]], 1)
    place = first.cumsum(1) - 1
    ids = torch.full_like(drawn, -1).scatter_(1, place, drawn)
    counts = torch.zeros(drawn.shape, dtype=torch.float64, device=drawn.device)
    return ids, counts.scatter_add_(1, place, torch.ones_like(counts))
