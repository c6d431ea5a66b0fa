"""Metrics of every step, read back from the device only every few steps."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from kdfast import files
from kdfast.train.objective import Metrics
from kdfast.train.recipe import Recipe

#: What every row has, whatever the method reports.
_COLUMNS = ("step", "seconds", "loss", "lr", "grad_norm", "tokens_per_s")


class MetricLog:
    """Collects one device vector a step; `flush` reads them all back at once and writes `metrics.jsonl` and the tracker.

    Metrics are matched by name: a step, a phase or a process may report what another does not.
    """

    def __init__(self, recipe: Recipe, folder: Path, accelerator: Accelerator) -> None:
        self.file = folder / "metrics.jsonl"
        self.accelerator = accelerator
        self.seconds = 0.0
        self._pending: list[_Pending] = []
        self._since = time.perf_counter()

    def truncate(self, step: int, seconds: float) -> None:
        """Forgets everything after `step`: what a killed run logged beyond its last checkpoint will be logged again."""
        self.seconds = seconds
        if not self.accelerator.is_main_process or not self.file.exists():
            return
        kept = [row for row in files.read_lines(self.file) if row["step"] <= step]
        with files.written(self.file) as part:
            part.write_text("".join(files.json_text(row) + "\n" for row in kept))

    def add(
        self,
        step: int,
        lr: float,
        loss: Tensor,
        grad_norm: Tensor,
        metrics: list[Metrics],
        tokens: Tensor,
        constants: dict[str, float] | None = None,
    ) -> None:
        """One optimiser step, its micro-batches summed; nothing is read back here. `constants` are known on the host."""
        shown = {name: getattr(metric, "show", "mean") for found in metrics for name, metric in found.items()}
        taken = next((name for name in (*_COLUMNS, *(constants or {})) if name in shown), None)
        if taken is not None:
            raise ValueError(f"method: a metric is called {taken!r}, a column that every step has; expected another name")
        sums = [sum(found[name][0] for found in metrics if name in found) for name in shown]
        counts = [sum(found[name][1] for found in metrics if name in found) for name in shown]
        norm = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm
        values = [torch.as_tensor(x, device=loss.device).detach().double() for x in (loss, tokens, norm, *sums, *counts)]
        self._pending.append(_Pending(step, lr, torch.stack(values), shown, constants or {}))

    def start_clock(self) -> None:
        """Steps are timed from here; evaluation and saving are not training time."""
        self._since = time.perf_counter()

    def flush(self) -> dict[str, Any]:
        """Writes the steps collected so far; returns the last one's row."""
        if not self._pending:
            return {}
        # One copy from the device; what is summed over processes is summed by name.
        flat = torch.cat([found.values for found in self._pending]).tolist()
        own, at = [], 0
        for found in self._pending:
            (loss, tokens, norm), rest = flat[at : at + 3], flat[at + 3 : at + len(found.values)]
            at += len(found.values)
            half = len(rest) // 2
            metrics = zip(rest[:half], rest[half:], found.shown.values(), strict=True)
            own.append((loss, tokens, norm, dict(zip(found.shown, metrics, strict=True))))
        everybody = gather_object([own]) if self.accelerator.num_processes > 1 else [own]
        spent = time.perf_counter() - self._since
        steps = list(zip(*everybody, strict=True))
        rate = sum(part[1] for parts in steps for part in parts) / max(spent, 1e-9)
        lines, row = [], {}
        for i, (found, parts) in enumerate(zip(self._pending, steps, strict=True)):
            seconds = self.seconds + spent * (i + 1) / len(steps)
            row = {"step": found.step, "seconds": round(seconds, 4), "loss": sum(p[0] for p in parts) / len(parts),
                   **_means([p[3] for p in parts]), "lr": found.lr, "grad_norm": parts[0][2],
                   "tokens_per_s": round(rate, 1), **found.constants}  # fmt: skip
            lines.append(row)
        self.seconds += spent
        self._pending.clear()
        self._write(lines)
        self.start_clock()
        return row

    def evaluated(self, step: int) -> bool:
        """Whether the file holds an evaluation of `step`."""
        rows = files.read_lines(self.file)
        return any(row["step"] == step and "loss" not in row for row in rows)

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """One evaluation's numbers, as a line of their own."""
        self._write([{"step": step, "seconds": round(self.seconds, 4), **values}])

    def _write(self, lines: list[dict[str, Any]]) -> None:
        if self.accelerator.is_main_process:
            files.append_lines(self.file, lines, sync=False)
        for line in files.json_value(lines):  # what is NaN is null
            self.accelerator.log({k: v for k, v in line.items() if k != "step" and v is not None}, step=line["step"])


def check_finite(row: dict[str, Any], precision: str) -> None:
    """Raises before weights that are NaN are saved; a loss scale's first steps may overflow, and are left out."""
    found = {"loss": row["loss"], "gradient's norm": row["grad_norm"] if precision != "fp16" else 0.0}
    for name, value in found.items():
        if value is None or not math.isfinite(value):
            raise RuntimeError(f"step {row['step']}: the {name} is {value}; lower optimizer.lr or set optimizer.clip")


class _Pending(NamedTuple):
    """A step as it waits: loss, tokens, norm, then the sums and the counts of the metrics in `shown`."""

    step: int
    lr: float
    values: Tensor
    shown: dict[str, str]
    constants: dict[str, float]


def _means(parts: list[dict[str, tuple[float, float, str]]]) -> dict[str, float]:
    """Each metric over all processes; what nothing was counted for is left out."""
    out: dict[str, float] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        totals, counts, shows = zip(*(part[name] for part in parts if name in part), strict=True)
        if sum(counts):
            mean = sum(totals) / sum(counts)
            out[name] = math.exp(min(mean, 700.0)) if shows[0] == "exp" else mean
    return out
