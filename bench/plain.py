"""The divergences in plain PyTorch, as people write them: what eager and torch.compile are timed on."""

from __future__ import annotations

import math
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class Spec(Protocol):
    """Which divergence, and its parameters."""

    @property
    def divergence(self) -> str: ...
    @property
    def beta(self) -> float: ...
    @property
    def skew(self) -> float: ...
    @property
    def ab_alpha(self) -> float: ...
    @property
    def ab_beta(self) -> float: ...


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


def _mixture(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    """log(weight * p + (1 - weight) * q)."""
    return (log_p + math.log(weight)).logaddexp(log_q + math.log1p(-weight))


def from_logs(spec: Spec, log_p: Tensor, log_q: Tensor) -> Tensor:
    """D(p, q) of each row from log-probabilities."""
    match spec.divergence:
        case "forward_kl":
            return _kl(log_p, log_q)
        case "reverse_kl":
            return _kl(log_q, log_p)
        case "jsd":
            log_m = _mixture(log_p, log_q, spec.beta)
            return spec.beta * _kl(log_p, log_m) + (1 - spec.beta) * _kl(log_q, log_m)
        case "skew_forward_kl":
            return _kl(log_p, _mixture(log_p, log_q, spec.skew))
        case "skew_reverse_kl":
            return _kl(log_q, _mixture(log_p, log_q, 1 - spec.skew))
        case _:
            return from_probs(spec, log_p, log_q)


def from_probs(spec: Spec, log_p: Tensor, log_q: Tensor) -> Tensor:
    """D(p, q) of each row, with the probabilities formed."""
    p, q = log_p.exp(), log_q.exp()
    match spec.divergence:
        case "forward_kl":
            return (p * (log_p - log_q)).sum(-1)
        case "reverse_kl":
            return (q * (log_q - log_p)).sum(-1)
        case "jsd":
            log_m = (spec.beta * p + (1 - spec.beta) * q).log()
            return (spec.beta * p * (log_p - log_m) + (1 - spec.beta) * q * (log_q - log_m)).sum(-1)
        case "skew_forward_kl":
            return (p * (log_p - (spec.skew * p + (1 - spec.skew) * q).log())).sum(-1)
        case "skew_reverse_kl":
            return (q * (log_q - (spec.skew * q + (1 - spec.skew) * p).log())).sum(-1)
        case "tvd":
            return (p - q).abs().sum(-1) / 2
        case "alpha_beta":
            a, b = spec.ab_alpha, spec.ab_beta
            return -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)).sum(-1) / (a * b)
    raise ValueError(f"divergence: expected one of kd_loss's, got {spec.divergence!r}")
