"""Scales a gradient that was formed in the forward pass. Contract: `kdfast.backends`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kdfast.backends.triton.tiles import grid, on

BLOCK, WARPS = 4096, 8


@triton.jit
def scale_kernel(grad_ptr, upstream_ptr, n, BLOCK: tl.constexpr):
    # The host never learns the value, so every call launches; the common 1.0 costs each of few programs one load.
    upstream = tl.load(upstream_ptr).to(tl.float32)
    if upstream != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for begin in range(tl.program_id(0).to(tl.int64) * BLOCK, n, step):
            at = begin + tl.arange(0, BLOCK)
            x = tl.load(grad_ptr + at, mask=at < n, eviction_policy="evict_first").to(tl.float32)
            tl.store(grad_ptr + at, (x * upstream).to(grad_ptr.dtype.element_ty), mask=at < n, eviction_policy="evict_first")


def scale_(grad: Tensor, upstream: Tensor) -> None:
    if not grad.is_contiguous():
        grad.mul_(upstream.reshape(1))  # of no dimensions it would be rounded to the dtype of `grad` before the product
    elif grad.numel():
        with on(grad):
            # All the threads a multiprocessor holds: four times the programs of a kernel that needs 128 registers.
            programs = 4 * grid(triton.cdiv(grad.numel(), BLOCK), grad.device, WARPS)[0]
            scale_kernel[(programs,)](grad, upstream, grad.numel(), BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True)
