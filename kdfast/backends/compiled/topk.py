"""Top-k capture and the ghost-bucket loss in C++ (`csrc/cpu/topk.cpp`). Contract: `kdfast.backends`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast import _C
from kdfast.backends.compiled.extension import address, matrix, threads, weights
from kdfast.options import PARTS, RowOptions


def capture(logits: Tensor, k: int, temperatures: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, n_t = logits.shape[0], len(temperatures)
    at = torch.tensor(temperatures, dtype=torch.float64)
    ids, logprobs = torch.empty(n, k, dtype=torch.int32), torch.empty(n, k)
    log_z, log_tail = torch.empty(n, n_t), torch.empty(n, n_t)
    _C.topk_capture(
        n, matrix(logits), k, address(at), n_t, address(ids), address(logprobs), address(log_z), address(log_tail), threads()
    )
    return ids, logprobs, log_z, log_tail


def forward(
    student: Tensor,
    targets: Sequence[Tensor],
    labels: Tensor | None,
    scale: Tensor,
    options: RowOptions,
    vocab_size: int,
    need_parts: bool,
    grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    ids, logprobs, log_z, log_tail = targets
    n = student.shape[0]
    loss = torch.empty(n)
    stats = torch.empty(n, 3, dtype=torch.float64)
    parts = torch.empty((n, len(PARTS)) if need_parts else (0,))
    _C.topk(
        True, n, matrix(student), matrix(grad), address(ids), address(logprobs), address(log_z),
        address(log_tail), ids.shape[1], vocab_size, address(labels), address(scale), address(loss), address(stats),
        address(parts if need_parts else None), *weights(options), threads(),
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
    grad: Tensor,
) -> None:
    ids, logprobs, log_z, log_tail = targets
    _C.topk(
        False, student.shape[0], matrix(student), matrix(grad), address(ids), address(logprobs),
        address(log_z), address(log_tail), ids.shape[1], vocab_size, address(labels), address(scale), 0, address(stats), 0,
        *weights(options), threads(),
    )  # fmt: skip
