"""Scales a gradient that was formed in the forward pass. Contract: `kdfast.backends`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kdfast.backends.triton.tiles import on

BLOCK, WARPS = 2048, 8


@triton.jit
def scale_kernel(grad_ptr, upstream_ptr, n, BLOCK: tl.constexpr):
    # The host never learns the value, so every call launches; the common 1.0 costs one load.
    upstream = tl.load(upstream_ptr).to(tl.float32)
    if upstream != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(grad_ptr + at, mask=at < n).to(tl.float32)
        tl.store(grad_ptr + at, (x * upstream).to(grad_ptr.dtype.element_ty), mask=at < n)


def scale_(grad: Tensor, upstream: Tensor) -> None:
    if not grad.is_contiguous():
        grad.mul_(upstream.reshape(1))  # of no dimensions it would be rounded to the dtype of `grad` before the product
    elif grad.numel():
        grid = (triton.cdiv(grad.numel(), BLOCK),)
        with on(grad):
            scale_kernel[grid](grad, upstream, grad.numel(), BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True)
