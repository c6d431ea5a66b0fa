"""The quickstart's table and picture."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from kdfast import files
from kdfast.cli.quickstart_job import history

#: Key in the summary -> what a reader calls it.
LABELS = {
    "teacher": "teacher",
    "student_ce": "student, hard labels, equal steps",
    "student_ce_longer": "student, hard labels, equal seconds",
    "student_kd": "student, from the cache",
}
#: Okabe and Ito's colours, which colour-blind readers tell apart; lines differ in their dashes too.
_TEACHER, _HARD, _CACHE = "#555555", "#D55E00", "#0072B2"
#: Behind a label, so that no line runs through it.
_CLEAR = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}


def show(summary: dict[str, Any], out: Path) -> None:
    """Prints the table."""
    seeds = ", ".join(map(str, summary["seeds"]))
    table = Table(title=f"test files, seeds {seeds}; best: at the step that the validation files chose")
    table.add_column("model", no_wrap=True)
    several = len(summary["seeds"]) > 1
    spread = ["spread"] if several else []
    for name in ("perplexity", *spread, "best", *spread, "top-1", "steps", "seconds, + capture"):
        table.add_column(name, justify="right")
    capture_seconds = summary["cache"]["capture_seconds"]
    for key, label in LABELS.items():
        row = summary[key]
        spreads = [[f"{row[k]:.2f}" if k in row else "-"] if several else [] for k in ("ppl_spread", "best_ppl_spread")]
        best = f"{row['best_ppl']:.2f}" if "best_ppl" in row else "-"
        seconds = f"{row['seconds']:.0f}" + (f" + {capture_seconds:.0f}" if key == "student_kd" else "")
        table.add_row(
            label, f"{row['ppl']:.2f}", *spreads[0], best, *spreads[1], f"{row['top1']:.1%}", f"{row['steps']:.0f}", seconds
        )
    cache, speed, data = summary["cache"], summary["speed"], summary["data"]
    console = Console()
    # Piped, rich would cut the table at 80 columns.
    (console if console.is_terminal else Console(width=120)).print(table)
    print(
        f"the teacher has read {data['teacher_tokens_read']:,} tokens; students have {data['student_tokens']:,} others and read"
        f" them {data['student_epochs']:.0f} times"
    )
    print(
        f"cache: {cache['tokens']:,} tokens, {cache['bytes_per_token']:.1f} bytes a token at k={cache['k']},"
        f" KL {cache['kl']:.1e}, captured in {cache['capture_seconds']:.0f} s ({cache['capture_tokens_per_s']:,.0f} tokens/s)"
    )
    print(
        f"speed against plain PyTorch, {speed['rows']} x {speed['vocab']}, forward and backward:"
        f" kd_loss {speed['logits_vs_eager']:.1f}x, linear_kd_loss {speed['linear_vs_eager']:.1f}x"
    )
    print(f"{summary['seconds']:.0f} s in all; {out / 'summary.json'}, {out / 'report.png'}")


def draw(out: Path, seeds: list[int], summary: dict[str, Any]) -> None:
    """Writes `report.png`: perplexity on the validation files against seconds, the capture's included."""
    captured = summary["cache"]["capture_seconds"]
    hard, cached = ([history(out / f"{key}-seed{seed}") for seed in seeds] for key in ("student_ce_longer", "student_kd"))
    teacher = history(out / "teacher")[-1]["validation_ppl"]
    with plt.rc_context({"font.size": 15}):
        figure, axes = plt.subplots(figsize=(12, 7.5), layout="constrained")
        right = max(captured + cached[0][-1]["seconds"], *(rows[-1]["seconds"] for rows in hard))
        axes.set_xlim(0, right * 1.6)
        _limit(axes, [teacher, *(rows[-1]["validation_ppl"] for rows in hard + cached)])
        axes.axhline(teacher, color=_TEACHER, linewidth=2, linestyle=":")
        axes.annotate(f"teacher: {teacher:.0f}", (right * 1.6, teacher), (-4, 4), textcoords="offset points", color=_TEACHER,
                      ha="right", va="bottom")  # fmt: skip
        axes.axvspan(0, captured, color=_CACHE, alpha=0.15, linewidth=0)
        axes.text(captured / 2, 0.5, "capture, paid once", transform=axes.get_xaxis_transform(), color=_CACHE, rotation=90,
                  ha="center", va="center")  # fmt: skip
        ends = [_curves(axes, hard, _HARD, "--", 0.0), _curves(axes, cached, _CACHE, "-", captured)]
        _name_ends(axes, ends, [(_HARD, "student,\nhard labels"), (_CACHE, "same student,\nfrom the cache")])
        best = min((row for rows in hard for row in rows), key=lambda row: row["validation_ppl"])
        axes.plot(best["seconds"], best["validation_ppl"], "o", color=_HARD, markersize=11)
        axes.annotate(f"lowest: {best['validation_ppl']:.0f}", (best["seconds"], best["validation_ppl"]), (0, -14),
                      textcoords="offset points", color=_HARD, ha="center", va="top", bbox=_CLEAR)  # fmt: skip
        axes.set_xlabel("seconds of training, capture included")
        axes.set_ylabel("perplexity on validation files\n(lower is better)")
        axes.set_title(_headline(summary), loc="left", fontweight="bold", fontsize=19, pad=18)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        figure.text(0.01, -0.01, _footnote(summary), fontsize=12.5, color="#333333", va="top")
        with files.written(out / "report.png") as part:
            figure.savefig(part, format="png", dpi=110, bbox_inches="tight")
        plt.close(figure)


def _curves(axes: Any, runs: list[list[dict[str, Any]]], colour: str, dashes: str, shift: float) -> tuple[float, float]:
    """One line for each seed; returns where they end on the mean."""
    for rows in runs:
        axes.plot([row["seconds"] + shift for row in rows], [row["validation_ppl"] for row in rows], dashes, color=colour,
                  linewidth=3.5 if len(runs) == 1 else 2.2)  # fmt: skip
    return max(rows[-1]["seconds"] + shift for rows in runs), statistics.fmean(rows[-1]["validation_ppl"] for rows in runs)


def _name_ends(axes: Any, ends: list[tuple[float, float]], names: list[tuple[str, str]]) -> None:
    """A large number and a name beside the end of each curve, moved apart where they would lie on each other."""
    low, high = axes.get_ylim()
    apart = 0.13 * (high - low)
    heights = [y for _, y in ends]
    if abs(heights[0] - heights[1]) < apart:
        middle, up = sum(heights) / 2, 1 if heights[0] >= heights[1] else -1
        heights = [middle + up * apart / 2, middle - up * apart / 2]
    for (x, y), height, (colour, name) in zip(ends, heights, names, strict=True):
        for text, at, size in ((f"{y:.0f}", 10, 30), (name, 84, 16)):
            axes.annotate(text, (x, height), (at, 0), textcoords="offset points", color=colour, fontsize=size,
                          fontweight="bold", va="center", bbox=_CLEAR)  # fmt: skip


def _limit(axes: Any, values: list[float]) -> None:
    """The y axis from below everything, cut above: the first evaluations are far off and say little."""
    low, high = min(values), max(values)
    axes.set_ylim(max(low - 0.35 * (high - low), 0), high + 0.9 * (high - low))


def _headline(summary: dict[str, Any]) -> str:
    kd, hard = summary["student_kd"]["ppl"], summary["student_ce_longer"]["ppl"]
    if summary["short"]:
        return "A short run: it shows that everything works, and no more"
    if kd < hard:
        return f"Same student, same text, same time: {1 - kd / hard:.0%} lower perplexity from the cache"
    return "Same student, same text, same time"


def _footnote(summary: dict[str, Any]) -> str:
    kd, equal, longer = (summary[key] for key in ("student_kd", "student_ce", "student_ce_longer"))
    data = summary["data"]
    seeds = len(summary["seeds"])
    return (
        f"On test files, which nothing was chosen on{f' (means of {seeds} seeds)' if seeds > 1 else ''}: from the cache"
        f" {kd['ppl']:.1f}; hard labels {equal['ppl']:.1f} after as many steps,\n{longer['ppl']:.1f} after as many seconds,"
        f" {min(equal['best_ppl'], longer['best_ppl']):.1f} at the step that validation chose; teacher"
        f" {summary['teacher']['ppl']:.1f}. Students have {data['student_tokens']:,} tokens\nof Python source and read them"
        f" {data['student_epochs']:.0f} times; the teacher has read {data['teacher_tokens_read']:,} others."
    )
