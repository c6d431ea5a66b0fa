"""Forward KL for the kernels: its value and its derivative, defined once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def forward_kl(p, q, d):
    """Terms p*(d + expm1(-d)) of KL(p || q) and q - p, elementwise, from p, q and d = log p - log q.

    The terms are >= 0 and sum to the divergence, while p*d cancels to noise once student and teacher agree. q - p is
    the derivative with respect to the student's tempered logit. p = 0 gives q (the limit), q = 0 < p gives inf when d
    is inf, NaN stays NaN.
    """
    # Taylor series of expm1(-d) + d; below 1/2 its last term is 1e-6 of the sum.
    f = d * d * (1 / 2 + d * (-1 / 6 + d * (1 / 24 + d * (-1 / 120 + d * (1 / 720 + d * (-1 / 5040))))))
    near = tl.abs(d) < 0.5
    diff = tl.where(near, p * (f - d), q - p)
    term = tl.where(near, p * f, p * d + diff)
    # d is inf - inf where both logits are -inf, so test p and not d.
    return tl.where(p == 0, q, term), tl.where(p == 0, q, diff)
