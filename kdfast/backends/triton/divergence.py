"""The divergences D(p, q) of a row, elementwise: the summand and its slope, defined once for every kernel.

p is the teacher, q the student, d = log p - log q, u the student's logits over T. The derivative of a divergence is
dD/du = h - q * sum(h), h = q * df/dq of the summand f, up to a constant in df/dq that makes h vanish where both agree.
Forward KL has sum(h) = 0 and needs no sum. Summands are >= 0: p * d alone cancels to noise near agreement.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdfast.backends.triton.tiles import INF, LOG2E
from kdfast.options import RowOptions

FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
JSD = tl.constexpr(2)
SKEW_FORWARD_KL = tl.constexpr(3)
SKEW_REVERSE_KL = tl.constexpr(4)
TVD = tl.constexpr(5)
ALPHA_BETA = tl.constexpr(6)
ALPHA_0 = tl.constexpr(7)
BETA_0 = tl.constexpr(8)
BOTH_0 = tl.constexpr(9)
_KINDS = {
    "forward_kl": FORWARD_KL, "reverse_kl": REVERSE_KL, "jsd": JSD, "skew_forward_kl": SKEW_FORWARD_KL,
    "skew_reverse_kl": SKEW_REVERSE_KL, "tvd": TVD, "alpha_beta": ALPHA_BETA,
}  # fmt: skip
_ALPHA_BETA_LIMITS = {(True, False): ALPHA_0, (False, True): BETA_0, (True, True): BOTH_0}


def kind_of(options: RowOptions) -> int:
    """The divergence, and the limit of alpha_beta, as the kernels know it."""
    kind = _KINDS[options.kind]
    if options.kind == "alpha_beta":
        kind = _ALPHA_BETA_LIMITS.get((options.ab_alpha == 0, options.ab_beta == 0), kind)
    return int(kind.value)


@triton.jit
def forward_kl(p, q, d):
    """Terms p*(d + expm1(-d)) of KL(p || q) and q - p, elementwise, from p, q and d = log p - log q.

    The terms are >= 0 and sum to the divergence, while p*d cancels to noise once student and teacher agree. q - p is
    the derivative with respect to the student's tempered logit. p = 0 gives q (the limit), q = 0 < p gives inf when d
    is inf, NaN stays NaN.
    """
    # Without p only q is left, and d is inf - inf where both logits are -inf.
    d = tl.where(p == 0, -1.0, d)
    # (expm1(-d) + d) / d^2 for |d| < 1/2, minimax: 8e-7 of itself.
    f = d * d * (0.49999997 + d * (-0.1666628 + d * (0.041667476 + d * (-0.008395411 + d * 0.0013914653))))
    near = tl.abs(d) < 0.5
    diff = tl.where(near, p * (f - d), q - p)
    return tl.where(near, p * f, p * d + diff), diff


@triton.jit
def divergence(p, q, log2_p, log2_q, d, a, b, KIND: tl.constexpr):
    """(summand, h); `a` and `b` are `RowOptions.coefficients`."""
    if KIND == FORWARD_KL:
        value, slope = forward_kl(p, q, d)
    else:
        d = tl.where((log2_p == -INF) & (log2_q == -INF), 0.0, d)
        if KIND == REVERSE_KL:
            value, _ = forward_kl(q, p, -d)
            slope = _where_not_zero(q, -q * d)
        elif KIND == TVD:
            value = -0.5 * tl.maximum(p, q) * _expm1(-tl.abs(d))
            slope = q * tl.where(d > 0, -0.5, tl.where(d < 0, 0.5, 0.0))
        elif KIND >= ALPHA_BETA:
            value, slope = _alpha_beta(log2_p, log2_q, d, a, b, KIND)
        else:
            value, slope = _against_mixture(p, q, d, a, b, KIND)
    return value, slope


@triton.jit
def _where_not_zero(x, value):
    return tl.where(x == 0, 0.0, value)


@triton.jit
def _expm1(x):
    series = 1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720)))))
    return tl.where(tl.abs(x) < 0.25, x * series, tl.exp2(x * LOG2E) - 1)


@triton.jit
def _log1p(y):
    """log(1 + y) for -1 < y <= 0; near 0 the series of 2 * atanh(y / (2 + y))."""
    r = y / (2 + y)
    r2 = r * r
    series = 2 * r * (1 + r2 * (1 / 3 + r2 * (1 / 5 + r2 * (1 / 7 + r2 * (1 / 9)))))
    return tl.where(y > -0.25, series, tl.log(1 + y))


@triton.jit
def _against_mixture(p, q, d, of_p, of_q, KIND: tl.constexpr):
    """The divergences from M = of_p * p + of_q * q, from the smaller of p and q over the larger."""
    e = _expm1(-tl.abs(d))
    teacher_larger = d >= 0
    of_smaller = tl.where(teacher_larger, of_q, of_p)
    log_larger = -_log1p(of_smaller * e)  # log(larger / M)
    log_smaller = log_larger - tl.abs(d)
    log_p_m = tl.where(teacher_larger, log_larger, log_smaller)
    log_q_m = tl.where(teacher_larger, log_smaller, log_larger)
    excess = e / (1 + of_smaller * e)  # (smaller - larger) / M
    excess = tl.where(teacher_larger, excess, -excess)  # (q - p) / M
    m = of_p * p + of_q * q
    if KIND == SKEW_FORWARD_KL:
        value, _ = forward_kl(p, m, log_p_m)
        slope = of_q * of_q * q * excess
    elif KIND == SKEW_REVERSE_KL:
        value, _ = forward_kl(q, m, log_q_m)
        slope = _where_not_zero(q, q * (log_q_m - of_q * of_p * excess))
    else:
        of_teacher, _ = forward_kl(p, m, log_p_m)
        of_student, _ = forward_kl(q, m, log_q_m)
        value = of_p * of_teacher + of_q * of_student
        slope = _where_not_zero(q, of_q * q * log_q_m)
    return value, slope


@triton.jit
def _alpha_beta(log2_p, log2_q, d, a, b, KIND: tl.constexpr):
    """alpha_beta and its limits where a, b or both are 0; x^0 is 1, also for x = 0."""
    if KIND == BOTH_0:
        value = 0.5 * d * d
        slope = -d
    elif KIND == ALPHA_0:
        p_b = tl.exp2(b * log2_p)
        q_b = tl.exp2(b * log2_q)
        slope = _where_not_zero(q_b, -q_b * d)
        far = (b * slope + p_b - q_b) / (b * b)
        value = tl.where(b * tl.abs(d) < 0.125, _alpha_beta_series(d, a, b) * q_b, far)
    elif KIND == BETA_0:
        p_a = tl.exp2(a * log2_p)
        q_a = tl.exp2(a * log2_q)
        far = (_where_not_zero(p_a, p_a * a * d) + q_a - p_a) / (a * a)
        value = tl.where(a * tl.abs(d) < 0.125, _alpha_beta_series(d, a, b) * q_a, far)
        slope = tl.where(a * tl.abs(d) < 1, -q_a * _expm1(a * d), q_a - p_a) / a
    else:
        s = a + b
        p_s = tl.exp2(s * log2_p)
        q_s = tl.exp2(s * log2_q)
        cross = tl.exp2(a * log2_p + b * log2_q)
        far = (a / s * p_s + b / s * q_s - cross) / (a * b)
        value = tl.where(s * tl.abs(d) < 0.125, _alpha_beta_series(d, a, b) * q_s, far)
        slope = tl.where(a * tl.abs(d) < 1, -q_s * _expm1(a * d), q_s - cross) / a
    return value, slope


@triton.jit
def _alpha_beta_series(d, a, b):
    """The summand over q^s, s = a + b, for small d: sum over n >= 2 of (s^(n-1) - a^(n-1)) / (b * n!) * d^n."""
    s = a + b
    n_3 = s + a  # (s^2 - a^2) / b, and so on: each is s times the one before, plus a power of a
    n_4 = s * n_3 + a * a
    n_5 = s * n_4 + a * a * a
    n_6 = s * n_5 + a * a * a * a
    n_7 = s * n_6 + a * a * a * a * a
    tail = d * (n_5 / 120 + d * (n_6 / 720 + d * (n_7 / 5040)))
    return d * d * (1 / 2 + d * (n_3 / 6 + d * (n_4 / 24 + tail)))
