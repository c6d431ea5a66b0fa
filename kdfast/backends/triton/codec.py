"""Rows of the teacher cache decoded on the device (`codec_rows`). Contract: `kdfast.backends`.

A row of 64 entries of 151936 ids is about 165 bytes read and 520 written. One warp a row: nothing in it is wider than a
block of 64 numbers, and rows are many.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdfast.backends.triton import tiles
from kdfast.backends.triton.codec_rows import decode_kernel
from kdfast.options import CODEC_SLACK, CodecLayout

#: Bits of the ids' upper parts that are looked at together.
BITS = 128
#: The specification rounds every product before it is added to.
OPTIONS: dict[str, int | bool] = {"num_warps": 1, "enable_fp_fusion": False}


@dataclass(frozen=True)
class Flags:
    """What the kernel is compiled for.

    Args:
        inverses: 1 / T of every temperature; the one that is 1 stands at `one`.
        drawn, mixed: the rows have draws, and exact entries beside them; drawn at the temperature at `column`.
    """

    inverses: tuple[float, ...]
    one: int
    drawn: bool
    mixed: bool
    column: int

    @classmethod
    def of(cls, layout: CodecLayout) -> Flags:
        inverses = tuple(1 / t for t in layout.temperatures)
        return cls(inverses, layout.temperatures.index(1.0), layout.samples > 0, layout.mixed, layout.sample_column)


def decode(data: Tensor, offsets: Tensor, counts: Tensor, layout: CodecLayout) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, k, n_t = len(offsets), layout.k, len(layout.temperatures)
    ids = torch.empty(n, k, dtype=torch.int32, device=data.device)
    logprobs = torch.empty(n, k, device=data.device)
    log_z, log_tail = (torch.empty(n, n_t, device=data.device) for _ in range(2))
    weights = torch.empty((n, k) if layout.samples else 0, device=data.device)
    if n:
        with tiles.on(data):
            decode_kernel[(n,)](
                data, offsets, counts, ids, logprobs, log_z, log_tail, weights,
                data.numel() - CODEC_SLACK, k, layout.vocab_size, layout.samples, F=Flags.of(layout), BITS=BITS, **OPTIONS,
            )  # fmt: skip
    return ids, logprobs, log_z, log_tail, weights
