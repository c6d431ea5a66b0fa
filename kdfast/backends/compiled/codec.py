"""Rows of the teacher cache decoded in C++ (`csrc/cpu/codec_decode.cpp`). Contract: `kdfast.backends`."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast import _C, memory
from kdfast.backends.compiled.extension import address, threads
from kdfast.options import CODEC_SLACK, CodecLayout


def decode(data: Tensor, offsets: Tensor, counts: Tensor, layout: CodecLayout) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, k, n_t = len(offsets), layout.k, len(layout.temperatures)
    ids = memory.empty((n, k), dtype=torch.int32, device=data.device)
    logprobs = memory.empty((n, k), dtype=torch.float32, device=data.device)
    log_z, log_tail = torch.empty(n, n_t), torch.empty(n, n_t)
    weights = memory.empty((n, k) if layout.samples else (0,), dtype=torch.float32, device=data.device)
    rows = [address(x) for x in (ids, logprobs, log_z, log_tail, weights)]
    _C.codec_decode_indexed(
        layout.native, address(data), data.numel() - CODEC_SLACK, address(offsets), address(counts), n, rows, threads()
    )
    return ids, logprobs, log_z, log_tail, weights
