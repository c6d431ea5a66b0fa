"""The ranges that public docstrings promise, checked before anything is computed.

Numbers are compared and nothing else: under `torch.compile` an option that changes from call to call is a symbol, which
comparisons guard and functions such as `math.isfinite` cannot take. Values of tensors are looked at where that costs no
synchronisation (`rows.values_are_checked`), and not while a graph is traced.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast.ops import rows
from kdfast.ops.targets import TopKTargets

#: Room for entries that were rounded to bfloat16, whose log-probabilities are off by 1 in 256.
_MOST_MASS = 1.05


def check_positive(name: str, value: float) -> None:
    """Raises unless `value` is a finite number above 0."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")


def _seen(tensor: Tensor) -> bool:
    return not torch.compiler.is_compiling() and rows.values_are_checked(tensor.device)


def check_weighting(token_weight: Tensor | None, num_items: int | float | Tensor | None) -> None:
    """Raises where a row's weight or the mean's divisor is negative or NaN, or no weight or divisor at all."""
    if token_weight is not None:
        if not isinstance(token_weight, Tensor):
            raise ValueError(f"token_weight: expected a tensor or None, got {type(token_weight).__name__}")
        if _seen(token_weight):
            bad = ~(token_weight >= 0) | (token_weight == math.inf)
            if bool(bad.any()):
                value = token_weight[bad].reshape(-1)[0].item()
                raise ValueError(
                    f"token_weight: expected finite weights >= 0, got {value:g}; a row that must not count has weight 0"
                )
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items: expected one number, got a tensor of shape {list(num_items.shape)}")
        if not _seen(num_items):
            return
        num_items = num_items.item()
    if num_items is not None and not 0 <= num_items < math.inf:
        raise ValueError(f"num_items: expected a finite number >= 0, the rows that count in the whole step, got {num_items}")


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


def check_targets(targets: Sequence[TopKTargets], temperature: float, scale: Tensor) -> None:
    """Raises where what stands for log-probabilities, log masses or weights in a row that counts cannot be that."""
    for i, t in enumerate(targets):
        name = rows.member("targets", i, len(targets))
        if t.vocab_size < 1:
            raise ValueError(f"{name}.vocab_size: expected a number above 0, got {t.vocab_size}")
        if not all(0 < x < math.inf for x in t.temperatures):
            raise ValueError(f"{name}.temperatures: expected finite numbers above 0, got {t.temperatures}")
        if not _seen(t.ids):
            continue
        entries = torch.where(t.ids >= 0, t.logprobs, -math.inf).reshape(-1, t.k)
        column = t.column(temperature)
        at_t = (entries / temperature - t.log_z[..., column].reshape(-1, 1)).exp().sum(-1)
        at_t += t.log_tail[..., column].reshape(-1).exp()
        mass = torch.maximum(entries.exp().sum(-1), at_t)
        bad = ((mass > _MOST_MASS) & (scale != 0)).nonzero()
        if len(bad):
            row = int(bad[0])
            raise ValueError(
                f"{name}: row {row} has entries of probability {float(mass[row]):.4g} together, expected at most 1;"
                " logprobs are logits.log_softmax(-1) over the whole vocabulary, not logits: topk_targets makes them"
            )
        if t.weights is not None and bool(((t.weights < 0).any(-1).reshape(-1) & (scale != 0)).any()):
            raise ValueError(f"{name}.weights: expected weights >= 0, got {float(t.weights.min()):g}")
