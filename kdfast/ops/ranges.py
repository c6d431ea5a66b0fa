"""The ranges that public docstrings promise, checked before anything is computed.

Numbers are compared and nothing else: under `torch.compile` an option that changes from call to call is a symbol, which
comparisons guard and functions such as `math.isfinite` cannot take. What is in tensors is looked at where they are used:
`rows.row_scale` and the kernels, whose loss is NaN in a row that has none.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_positive(name: str, value: float) -> None:
    """Raises unless `value` is a finite number above 0."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")


def shifted_labels(labels: Tensor | None, lead: torch.Size, ignore_index: int) -> Tensor:
    """`[..., L]` labels of which row t gets that of t + 1, and the last row none."""
    if labels is None:
        raise ValueError("shift_labels: expected labels to shift, got labels None; leave shift_labels out or pass input_ids")
    if len(lead) < 2:
        raise ValueError(
            f"shift_labels: expected rows [B, L, ...], so that no label crosses into another sequence, got {list(lead)};"
            " restore the batch dimension, or shift the labels yourself"
        )
    if labels.shape != lead:
        raise ValueError(f"labels: expected shape {list(lead)} (the leading dimensions), got {list(labels.shape)}")
    return torch.nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index) if lead[-1] else labels
