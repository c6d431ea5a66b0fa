"""The quickstart's table and picture."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
from matplotlib import pyplot as plt

#: Key in the summary -> what a reader calls it, and its colour in every panel.
LABELS = {
    "teacher": ("teacher", "#7a7a7a"),
    "student_ce": ("student, hard labels", "#d1495b"),
    "student_ce_longer": ("student, hard labels + capture time", "#edae49"),
    "student_kd": ("student, from the cache", "#00798c"),
}


def show(summary: dict[str, Any], out: Path) -> None:
    """Prints the table."""
    table = Table(title=f"held-out files, seeds {', '.join(map(str, summary['seeds']))}")
    table.add_column("model", no_wrap=True)
    for name in ("perplexity", "spread", "top-1", "steps", "seconds"):
        table.add_column(name, justify="right")
    for key, (label, _) in LABELS.items():
        row = summary[key]
        spread = f"{row['ppl_spread']:.2f}" if "ppl_spread" in row and len(summary["seeds"]) > 1 else "-"
        table.add_row(label, f"{row['ppl']:.2f}", spread, f"{row['top1']:.1%}", f"{row['steps']:.0f}", f"{row['seconds']:.1f}")
    cache, speed = summary["cache"], summary["speed"]
    console = Console()
    # Piped, rich would cut the table at 80 columns.
    (console if console.is_terminal else Console(width=110)).print(table)
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
    """Writes `report.png`: loss against steps and against seconds, perplexities."""
    figure, (by_step, by_second, bars) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for key in ("student_ce", "student_kd"):
        label, colour = LABELS[key]
        for seed in seeds:
            rows = _history(out / f"{key}-seed{seed}")
            loss = _smooth([row["hard"] for row in rows])
            shown = label if seed == seeds[0] else None
            by_step.plot([row["step"] for row in rows], loss, color=colour, label=shown, linewidth=1.2)
            by_second.plot([row["seconds"] for row in rows], loss, color=colour, label=shown, linewidth=1.2)
    by_step.set(xlabel="steps", ylabel="cross-entropy on training labels, nats (smoothed)", title="equal steps")
    by_second.set(xlabel="seconds of training", title="equal seconds")
    by_step.legend(frameon=False)
    heights = [summary[key]["ppl"] for key in LABELS]
    drawn = bars.bar(range(len(LABELS)), heights, color=[colour for _, colour in LABELS.values()])
    bars.bar_label(drawn, fmt="%.1f")
    bars.set_xticks(range(len(LABELS)), ["teacher", "hard labels", "hard labels\n+ capture time", "from the cache"])
    bars.set(ylabel="perplexity", title="held-out files")
    for axes in (by_step, by_second, bars):
        axes.spines[["top", "right"]].set_visible(False)
    part = out / ".report.part.png"
    figure.savefig(part, dpi=130)
    plt.close(figure)
    os.replace(part, out / "report.png")


def _history(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "hard" in row]


def _smooth(values: list[float], window: int = 20) -> list[float]:
    """Mean over the last `window` values."""
    return [sum(values[max(i - window + 1, 0) : i + 1]) / min(i + 1, window) for i in range(len(values))]
