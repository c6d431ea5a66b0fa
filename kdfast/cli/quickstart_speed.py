"""The quickstart's few seconds of timing: the fused losses against the plain PyTorch they equal."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import kdfast

_T = 2.0


def speed(rows: int = 256, vocab: int = 32000, width: int = 128, repeats: int = 5) -> dict[str, float]:
    """How many times faster than the faster of two plain spellings; forward and backward, medians of `repeats`."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(rows, vocab, generator=generator), torch.randn(rows, vocab, generator=generator)
    labels = torch.randint(vocab, (rows,), generator=generator)
    hidden_s, hidden_t = torch.randn(rows, width, generator=generator), torch.randn(rows, 2 * width, generator=generator)
    weight_s = torch.randn(vocab, width, generator=generator) / width**0.5
    weight_t = torch.randn(vocab, 2 * width, generator=generator) / width**0.5

    def fused(logits: Tensor) -> Tensor:
        return kdfast.kd_loss(logits, teacher, labels, temperature=_T, soft_weight=0.5, hard_weight=0.5)

    def fused_linear(hidden: Tensor, weight: Tensor) -> Tensor:
        return kdfast.linear_kd_loss(
            hidden, weight, hidden_t, weight_t, labels, temperature=_T, soft_weight=0.5, hard_weight=0.5
        )

    logits = _medians(
        {
            "fused": fused,
            "kl_div": lambda z: _with_kl_div(z, teacher, labels),
            "by hand": lambda z: _by_hand(z, teacher, labels),
        },
        (student,),
        repeats,
    )
    linear = _medians(
        {
            "fused": fused_linear,
            "kl_div": lambda h, w: _with_kl_div(h @ w.T, hidden_t @ weight_t.T, labels),
            "by hand": lambda h, w: _by_hand(h @ w.T, hidden_t @ weight_t.T, labels),
        },
        (hidden_s, weight_s),
        repeats,
    )
    return {
        "logits_vs_eager": min(logits["kl_div"], logits["by hand"]) / logits["fused"],
        "linear_vs_eager": min(linear["kl_div"], linear["by hand"]) / linear["fused"],
        "rows": rows,
        "vocab": vocab,
        "repeats": repeats,
    }


def _with_kl_div(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    q, p = F.log_softmax(student / _T, -1), F.log_softmax(teacher / _T, -1)
    soft = F.kl_div(q, p, log_target=True, reduction="batchmean")
    return 0.5 * _T**2 * soft + 0.5 * F.cross_entropy(student, labels)


def _by_hand(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    p = F.softmax(teacher / _T, -1)
    soft = (p * (p.log() - F.log_softmax(student / _T, -1))).sum(-1).mean()
    return 0.5 * _T**2 * soft + 0.5 * F.cross_entropy(student, labels)


def _medians(losses: dict[str, Callable[..., Tensor]], inputs: tuple[Tensor, ...], repeats: int) -> dict[str, float]:
    """Median seconds of each loss, taken in turns so that a busy machine slows all of them alike; the first turn is warm-up."""
    times: dict[str, list[float]] = {name: [] for name in losses}
    for turn in range(repeats + 1):
        for name, loss in losses.items():
            leaves = [x.detach().requires_grad_() for x in inputs]
            began = time.perf_counter()
            loss(*leaves).backward()
            if turn:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(spent) for name, spent in times.items()}
