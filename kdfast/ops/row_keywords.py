"""The keywords of the row losses for type checkers, each once: with `return_parts` a loss returns a pair, without it a tensor.

The functions themselves spell their keywords out, for `help()` and for readers; a test keeps both in step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from kdfast.options import Head


class RowKeywords(TypedDict, total=False):
    """Of every row loss."""

    divergence: str
    temperature: float
    soft_weight: float
    hard_weight: float
    beta: float
    scale_by_t2: bool
    ignore_index: int
    shift_labels: bool
    token_weight: Tensor | None
    label_smoothing: float
    z_loss: float
    student_head: Head
    teacher_weights: Sequence[float] | None
    reduction: str
    num_items: int | float | Tensor | None
    tp_group: Any


class _DenseKeywords(RowKeywords, total=False):
    skew: float
    ab_alpha: float
    ab_beta: float
    teacher_head: Head
    teacher_mix: str


class _LinearKeywords(TypedDict, total=False):
    student_bias: Tensor | None
    logits_dtype: torch.dtype
    workspace_mb: float | None
    row_index: Tensor | None
    reduce_hidden_grad: bool


class KDKeywords(_DenseKeywords, total=False):
    """Of `kd_loss`."""

    overwrite_logits: bool


class LinearKDKeywords(_DenseKeywords, _LinearKeywords, total=False):
    """Of `linear_kd_loss`."""

    teacher_bias: Tensor | Sequence[Tensor | None] | None


class TopKKDKeywords(RowKeywords, total=False):
    """Of `topk_kd_loss`."""

    tail: str
    overwrite_logits: bool


class LinearTopKKDKeywords(RowKeywords, _LinearKeywords, total=False):
    """Of `linear_topk_kd_loss`."""

    tail: str
