"""Sparse targets in C++: capture (`csrc/cpu/topk_capture.cpp`) and loss (`csrc/cpu/topk.cpp`). Contract: `kdfast.backends`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast import _C
from kdfast.backends.compiled.extension import address, matrix, row_options, threads
from kdfast.options import PARTS, Head, RowOptions

_STATS = 4


def capture(
    logits: Tensor,
    k: int,
    temperatures: tuple[float, ...],
    draws: Tensor | None = None,
    sample_temperature: float = 1.0,
    head: Head = Head(),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, n_t = logits.shape[0], len(temperatures)
    n_draws = 0 if draws is None else draws.shape[1]
    slots = k + n_draws
    at = torch.tensor(temperatures, dtype=torch.float64)
    ids, logprobs = torch.empty(n, slots, dtype=torch.int32), torch.empty(n, slots)
    log_z, log_tail = torch.empty(n, n_t), torch.empty(n, n_t)
    weights = torch.empty(0) if draws is None else torch.empty(n, slots)
    _C.topk_capture(
        n, matrix(logits), head.softcap or 0.0, head.scale, k, address(at), n_t, address(draws), n_draws, sample_temperature,
        address(ids), address(logprobs), address(log_z), address(log_tail), address(None if draws is None else weights),
        threads(),
    )  # fmt: skip
    return ids, logprobs, log_z, log_tail, weights


def _tables(targets: Sequence[Tensor]) -> tuple[int, int, int, int, int]:
    """Where the tables of the targets are, and the slots of a row."""
    ids, log_p, log_tail, mass = targets
    return address(ids), address(log_p), address(log_tail), address(mass), ids.shape[1]


def forward(
    student: Tensor,
    targets: Sequence[Tensor],
    labels: Tensor | None,
    scale: Tensor,
    options: RowOptions,
    vocab_size: int,
    spread: bool,
    need_parts: bool,
    grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    n = student.shape[0]
    loss = torch.empty(n)
    stats = torch.empty(n, _STATS, dtype=torch.float64)
    parts = torch.empty((n, len(PARTS)) if need_parts else (0,))
    _C.topk(
        True, n, matrix(student), matrix(grad), *_tables(targets), vocab_size, spread,
        options.teacher_weights, address(labels), address(scale), address(loss), address(stats),
        address(parts if need_parts else None), row_options(options), threads(),
    )  # fmt: skip
    return loss, stats, parts


def backward(
    student: Tensor,
    targets: Sequence[Tensor],
    labels: Tensor | None,
    scale: Tensor,
    stats: Tensor,
    options: RowOptions,
    vocab_size: int,
    spread: bool,
    grad: Tensor,
) -> None:
    _C.topk(
        False, student.shape[0], matrix(student), matrix(grad), *_tables(targets), vocab_size, spread,
        options.teacher_weights, address(labels), address(scale), 0, address(stats), 0, row_options(options), threads(),
    )  # fmt: skip
