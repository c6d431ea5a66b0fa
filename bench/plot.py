"""A picture of a results file: each contestant's time relative to kdfast, and how near kdfast is to the machine's limit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from bench.report import Row


def draw(rows: Sequence[Row], path: str | Path) -> bool:
    """Writes a PNG with one panel per case; False when there is nothing to draw or matplotlib is not installed."""
    measured = [r for r in rows if not math.isnan(r.median_ms)]
    cases = list(dict.fromkeys(r.case for r in measured))
    if not cases:
        return False
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    height = sum(0.9 + 0.28 * sum(r.case == c for r in measured) for c in cases)
    figure, axes = pyplot.subplots(
        len(cases),
        1,
        figsize=(9, height),
        squeeze=False,
        gridspec_kw={"height_ratios": [2 + sum(r.case == c for r in measured) for c in cases]},
    )
    for axis, case in zip(axes[:, 0], cases, strict=True):
        of_case = [r for r in measured if r.case == case][::-1]
        colours = ["#1b6ca8" if r.contestant.startswith("kdfast") else "#b9b9b9" for r in of_case]
        bars = axis.barh([r.contestant for r in of_case], [r.median_ms for r in of_case], color=colours)
        axis.bar_label(bars, [_label(r) for r in of_case], padding=3, fontsize=8)
        axis.set_title(" ".join(x for x in case if x), fontsize=9, loc="left")
        axis.set_xlabel("median, ms", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    first = measured[0]
    figure.suptitle(f"{first.device}, torch {first.torch}, kdfast at {first.commit}", fontsize=10)
    figure.tight_layout()
    path = Path(path)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=110, format="png")
    pyplot.close(figure)
    part.replace(path)
    return True


def _label(row: Row) -> str:
    share = "" if math.isnan(row.limit_share) else f", {row.limit_share:.2f} of limit"
    times = "" if math.isnan(row.time_ratio) else f" ({row.time_ratio:.2f}x)"
    return f"{row.median_ms:.3g}{times}{share}"
