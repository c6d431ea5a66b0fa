"""Ratios between contestants timed in the same rounds: a paired median, and the interval it lies in."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: One interval in so many lies wholly above the true ratio, and one wholly below it: 95% hold it.
_TAIL = 40


@dataclass(frozen=True)
class Ratio:
    """How many times as long one contestant takes as another, and between what that lies; NaN where there is no telling."""

    median: float = math.nan
    low: float = math.nan
    high: float = math.nan

    def within(self, share: float) -> bool:
        """Whether both ends are closer to the median than `share` of it; never without an interval."""
        return self.low >= self.median * (1 - share) and self.high <= self.median * (1 + share)


def paired(of: Sequence[float], to: Sequence[float]) -> Ratio:
    """The median over rounds of `of` over `to` in the same round, from times in the order of their rounds.

    What disturbs a whole round (a clock that drops, a neighbour) divides out, where a ratio of medians takes its two
    medians from different moments. The interval lies between order statistics: at either end of the sorted ratios as
    many are cut off as leave the true median inside 95 times in 100, however the noise is distributed; it takes the
    rounds for independent.
    """
    if not of or not to:
        return Ratio()
    ratios = sorted(x / y for x, y in zip(of, to, strict=True))
    count = len(ratios)
    median = (ratios[(count - 1) // 2] + ratios[count // 2]) / 2
    cut = _cut(count)
    return Ratio(median) if cut < 0 else Ratio(median, ratios[cut], ratios[-1 - cut])


@functools.lru_cache(maxsize=4096)
def _cut(count: int) -> int:
    """How many sorted values lie outside the interval at each end; -1 below 6, where not even the range will do."""
    outside, cut = 1, -1  # of the 2^count ways to fall below or above the true median, those with cut + 1 or fewer below
    while outside * _TAIL <= 1 << count:
        cut += 1
        outside += math.comb(count, cut + 1)
    return cut


@dataclass(frozen=True)
class Settled:
    """When `compare` may stop: every ratio to `base` is known to `share` of itself, after `least` rounds and `seconds`.

    Rounds that follow each other within a moment are alike, and say less than their number claims: hence the seconds.
    """

    base: str
    share: float = 0.025
    least: int = 15
    seconds: float = 2.0

    def __call__(self, times: Mapping[str, Sequence[float]], passed: float) -> bool:
        base = times.get(self.base, ())
        if len(base) < self.least or passed < self.seconds:
            return False
        return all(paired(seconds, base).within(self.share) for name, seconds in times.items() if name != self.base)
