"""Numbers that change while a run goes on: a temperature, a weight."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from kdfast.strict import one_of, ranged, refuse_unused


@dataclass(frozen=True)
class Schedule:
    """From `start` to `end` over `steps` optimiser steps (0: the whole phase), then `end`.

    `linear`, `cosine` (slow at both ends) or `constant` (`start` throughout).
    """

    start: float
    end: float
    shape: str = one_of("linear", "linear", "cosine", "constant")
    steps: int = ranged(0, low=0)

    def __post_init__(self) -> None:
        if self.shape == "constant":
            refuse_unused(self, ("steps",), "with shape constant expected none")

    def at(self, step: int, steps: int) -> float:
        """The value at `step` (1-based) of `steps`."""
        if self.shape == "constant":
            return self.start
        length = self.steps or steps
        done = min((step - 1) / max(length - 1, 1), 1.0)
        share = done if self.shape == "linear" else 0.5 * (1 - math.cos(math.pi * done))
        return self.start + (self.end - self.start) * share

    @property
    def extremes(self) -> tuple[float, float]:
        return min(self.start, self.end), max(self.start, self.end)


Scheduled = float | Schedule


def scheduled(default: float, *, low: float | None = None, above: float | None = None) -> Any:
    """A field that takes a number, or a schedule whose both ends are in range."""
    return dataclasses.field(default=default, metadata={"low": low, "above": above, "high": None})


def values_at(options: Any, step: int, steps: int) -> dict[str, Any]:
    """The fields of an options dataclass with every schedule replaced by its value at `step`."""
    fields = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    return {name: value.at(step, steps) if isinstance(value, Schedule) else value for name, value in fields.items()}
