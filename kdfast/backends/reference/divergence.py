"""The divergences D(p, q) between teacher p and student q: value, and derivative with respect to the student's logits.

Everything is written in d = log p - log q, and values are sums of non-negative terms: p * d alone cancels to noise (and
can turn negative) once student and teacher agree.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.options import RowOptions


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum_v p * (log p - log q) over the last dimension."""
    return _kl_terms(log_p.exp(), log_q.exp(), _difference(log_p, log_q)).sum(-1)


def value(options: RowOptions, log_p: Tensor, log_q: Tensor) -> Tensor:
    """D(p, q) over the last dimension."""
    p, q, d = log_p.exp(), log_q.exp(), _difference(log_p, log_q)
    match options.kind:
        case "forward_kl":
            terms = _kl_terms(p, q, d)
        case "reverse_kl":
            terms = _kl_terms(q, p, -d)
        case "tvd":
            terms = 0.5 * torch.maximum(p, q) * -torch.expm1(-d.abs())
        case "alpha_beta":
            terms = _alpha_beta_terms(log_p, log_q, d, options.ab_alpha, options.ab_beta)
        case kind:
            w, _ = options.coefficients
            m = w * p + (1 - w) * q
            mix = _Mixture(d, w)
            of_p, of_q = _kl_terms(p, m, mix.log_p), _kl_terms(q, m, mix.log_q)
            terms = {"skew_forward_kl": of_p, "skew_reverse_kl": of_q, "jsd": w * of_p + (1 - w) * of_q}[kind]
    return terms.sum(-1)


def derivative(options: RowOptions, log_p: Tensor, log_q: Tensor) -> Tensor:
    """dD/du with u the student's logits over T: h - q * sum(h), with h = q * df/dq of the summand f(p, q).

    A constant may be added to df/dq; it is chosen so that h vanishes where student and teacher agree.
    """
    p, q, d = log_p.exp(), log_q.exp(), _difference(log_p, log_q)
    if options.kind == "forward_kl":
        return q - p
    h = _student_slope(options, p, q, d, log_p, log_q)
    return h - q * h.sum(-1, keepdim=True)


def _student_slope(options: RowOptions, p: Tensor, q: Tensor, d: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    kind = options.kind
    if kind == "alpha_beta":
        return _alpha_beta_slope(log_p, log_q, d, options.ab_alpha, options.ab_beta)
    if kind == "reverse_kl":
        slope = -d
    elif kind == "tvd":
        slope = -0.5 * d.sign()
    else:
        w, of_q = options.coefficients
        mix = _Mixture(d, w)
        slope = {
            "jsd": of_q * mix.log_q,
            "skew_forward_kl": -of_q * mix.p_excess,
            "skew_reverse_kl": mix.log_q - of_q * mix.q_excess,
        }[kind]
    return torch.where(q == 0, 0, q * slope)


def _difference(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log p - log q; 0 where both are -inf, which no divergence counts."""
    return torch.where(log_p.isneginf() & log_q.isneginf(), 0, log_p - log_q)


def _kl_terms(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """p * (d + expm1(-d)), which is p * d + (q - p), with d = log p - log q."""
    terms = torch.where(d.abs() < 1, p * (d + torch.expm1(-d)), p * d + (q - p))
    # At p = 0 the limit is q, whatever d. A NaN is not 0 and stays; q = 0 < p is a true infinity.
    return torch.where(p == 0, q, terms)


class _Mixture:
    """p and q against M = w*p + (1-w)*q, for 0 < w < 1, from the smaller over the larger of both."""

    def __init__(self, d: Tensor, w: float) -> None:
        e = torch.expm1(-d.abs())
        teacher_larger = d >= 0
        of_smaller = torch.full_like(d, w).masked_fill(teacher_larger, 1 - w)
        log_larger = -torch.log1p(of_smaller * e)
        excess = e / (1 + of_smaller * e)  # (smaller - larger) / M
        self.log_p = torch.where(teacher_larger, log_larger, log_larger + d)
        self.log_q = torch.where(teacher_larger, log_larger - d, log_larger)
        #: p/M - 1 and q/M - 1
        self.p_excess = (1 - w) * torch.where(teacher_larger, -excess, excess)
        self.q_excess = w * torch.where(teacher_larger, excess, -excess)


def _power(log_x: Tensor, exponent: float) -> Tensor:
    """x^exponent; 0^0 = 1."""
    return torch.ones_like(log_x) if exponent == 0 else (exponent * log_x).exp()


def _times_log(x: Tensor, log: Tensor) -> Tensor:
    return torch.where(x == 0, 0, x * log)


def _alpha_beta_terms(log_p: Tensor, log_q: Tensor, d: Tensor, a: float, b: float) -> Tensor:
    s = a + b
    near = _alpha_beta_series(d, a, b) * _power(log_q, s)
    if a == 0 and b == 0:
        return 0.5 * d * d
    if b == 0:
        far = (_times_log(_power(log_p, a), a * d) - _power(log_p, a) + _power(log_q, a)) / a**2
    elif a == 0:
        far = (_times_log(_power(log_q, b), -b * d) - _power(log_q, b) + _power(log_p, b)) / b**2
    else:
        cross = _power(log_p, a) * _power(log_q, b)
        far = (a / s * _power(log_p, s) + b / s * _power(log_q, s) - cross) / (a * b)
    return torch.where(s * d.abs() < 0.125, near, far)


def _alpha_beta_series(d: Tensor, a: float, b: float) -> Tensor:
    """The term over q^(a+b) for small d: sum over n >= 2 of (s^(n-1) - a^(n-1)) / (b * n!) * d^n, with s = a + b."""
    s, total, factor = a + b, torch.zeros_like(d), 1.0
    for n in range(2, 9):
        factor /= n
        quotient = sum(s**i * a ** (n - 2 - i) for i in range(n - 1))  # (s^(n-1) - a^(n-1)) / (s - a)
        total = total + factor * quotient * d**n
    return total


def _alpha_beta_slope(log_p: Tensor, log_q: Tensor, d: Tensor, a: float, b: float) -> Tensor:
    if a == 0:
        return _times_log(_power(log_q, b), -d)
    near = -_power(log_q, a + b) * torch.expm1(a * d) / a
    far = (_power(log_q, a + b) - _power(log_p, a) * _power(log_q, b)) / a
    return torch.where(a * d.abs() < 1, near, far)
