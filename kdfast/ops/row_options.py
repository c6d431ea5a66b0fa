"""From the keyword arguments of a row-wise loss to one checked `RowOptions`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from kdfast.ops import ranges, rows
from kdfast.options import DIVERGENCES, TEACHER_MIXES, Head, RowOptions


def row_options(
    *,
    student_head: Head = Head(),
    teacher_head: Head = Head(),
    teachers: int = 1,
    teacher_weights: Sequence[float] | None = None,
    **fields: Any,
) -> RowOptions:
    """`RowOptions` of a call; `fields` go by the names they have there.

    Raises:
        ValueError: an option is out of range.
    """
    for name, value in fields.items():
        if isinstance(value, int) and not isinstance(value, bool) and name != "ignore_index":
            fields[name] = float(value)
    fields |= head_fields("student_", student_head) | head_fields("teacher_", teacher_head)
    options = RowOptions(**fields, teacher_weights=_normalised(teacher_weights, teachers))
    rows.check_choice("divergence", options.divergence, DIVERGENCES)
    rows.check_choice("teacher_mix", options.teacher_mix, TEACHER_MIXES)
    ranges.check_positive("temperature", options.temperature)
    for name in ("soft_weight", "hard_weight", "z_loss", "ab_alpha", "ab_beta"):
        _check_below(fields, name, "a finite number >= 0", math.inf)
    for name in ("skew", "label_smoothing"):
        _check_below(fields, name, "a number >= 0 and below 1", 1)
    if not 0 <= options.beta <= 1:
        raise ValueError(f"beta: expected a number from 0 to 1, got {options.beta}")
    return options


def _check_below(fields: dict[str, Any], name: str, expected: str, high: float) -> None:
    if name in fields and not 0 <= fields[name] < high:
        raise ValueError(f"{name}: expected {expected}, got {fields[name]}")


def head_fields(side: str, head: Head) -> dict[str, float]:
    """softcap (0: none) and scale of a head, under their names in `RowOptions` for the side "student_" or "teacher_"."""
    if not isinstance(head, Head):
        raise ValueError(f"{side}head: expected kdfast.Head(softcap=..., scale=...), got {head!r}")
    if head.softcap is not None and not 0 < head.softcap < math.inf:
        raise ValueError(f"{side}head: expected a finite softcap above 0 or None, got {head.softcap}")
    if not 0 < head.scale < math.inf:
        raise ValueError(f"{side}head: expected a finite scale above 0, got {head.scale}")
    return {f"{side}softcap": float(head.softcap or 0.0), f"{side}scale": float(head.scale)}


def _normalised(weights: Sequence[float] | None, teachers: int) -> tuple[float, ...]:
    """One weight per teacher, summing to 1."""
    if teachers == 0:
        raise ValueError("teacher: expected at least one teacher, got an empty sequence")
    if weights is None:
        return (1.0 / teachers,) * teachers
    weights = tuple(float(w) for w in weights)
    if len(weights) != teachers:
        raise ValueError(f"teacher_weights: expected {teachers} numbers, one per teacher, got {len(weights)}")
    total = sum(weights)
    if not (all(w > 0 for w in weights) and total < math.inf):
        raise ValueError(f"teacher_weights: expected finite numbers above 0, got {weights}")
    return tuple(w / total for w in weights)
