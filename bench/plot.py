"""Pictures of a results file: times relative to kdfast and to the machine's limit; time and memory by length."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdfast.files import written

from .report import Row


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
    _save(figure, measured[0], path)
    return True


def draw_scaling(rows: Sequence[Row], path: str | Path) -> bool:
    """Writes a PNG of time and memory against the length L of each case, one column an op; False as for `draw`."""
    measured = [(int(found[1]), r) for r in rows if (found := re.search(r"\bL=(\d+)", r.shape)) and not math.isnan(r.median_ms)]
    ops = list(dict.fromkeys(r.op for _, r in measured))
    if not ops:
        return False
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(ops), figsize=(4.2 * len(ops), 6.5), squeeze=False, sharex=True)
    for column, op in enumerate(ops):
        of_op = [(length, r) for length, r in measured if r.op == op and "(again)" not in r.contestant]
        for name in dict.fromkeys(r.contestant for _, r in of_op):
            points = sorted((length, r.median_ms, r.peak_mib) for length, r in of_op if r.contestant == name)
            lengths, times, peaks = zip(*points, strict=True)
            style = {"marker": "o", "linewidth": 2 if name.startswith("kdfast") else 1, "label": name}
            axes[0, column].plot(lengths, times, **style)
            axes[1, column].plot(lengths, peaks, **style)
        axes[0, column].set_title(op, fontsize=10)
        axes[1, column].set_xlabel("length L")
    for axis in axes.flat:
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("median, ms")
    axes[1, 0].set_ylabel("peak memory, MiB")
    axes[0, 0].legend(fontsize=8)
    _save(figure, measured[0][1], path)
    return True


def _save(figure: Any, first: Row, path: str | Path) -> None:
    from matplotlib import pyplot

    figure.suptitle(f"{first.device}, torch {first.torch}, kdfast at {first.commit}", fontsize=10)
    figure.tight_layout()
    with written(path) as part:
        figure.savefig(part, dpi=110, format="png")
    pyplot.close(figure)


def _label(row: Row) -> str:
    share = "" if math.isnan(row.limit_share) else f", {row.limit_share:.2f} of limit"
    times = "" if math.isnan(row.time_ratio) else f" ({row.time_ratio:.2f}x)"
    return f"{row.median_ms:.3g}{times}{share}"
