"""Metrics of every step, read back from the device only every few steps."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from kdfast import files
from kdfast.train.objective import Metrics
from kdfast.train.recipe import Recipe


class MetricLog:
    """Collects one device vector a step; `flush` reads them all back at once and writes `metrics.jsonl` and the tracker."""

    def __init__(self, recipe: Recipe, folder: Path, accelerator: Accelerator) -> None:
        self.file = folder / "metrics.jsonl"
        self.accelerator = accelerator
        self.seconds = 0.0
        self._pending: list[tuple[int, float, Tensor, dict[str, float]]] = []
        self._shown: dict[str, str] = {}
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
        shown = {name: getattr(metric, "show", "mean") for name, metric in metrics[0].items()}
        if shown != self._shown:  # another phase
            self.flush()
            self._shown = shown
        sums = [sum(m[name][0] for m in metrics) for name in shown]
        counts = [sum(m[name][1] for m in metrics) for name in shown]
        vector = torch.stack([torch.as_tensor(x, device=loss.device).float() for x in (loss, tokens, *sums, *counts)])
        norm = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm
        self._pending.append((step, lr, torch.cat([vector, norm.detach().float().reshape(1)]), constants or {}))

    def start_clock(self) -> None:
        """Steps are timed from here; evaluation and saving are not training time."""
        self._since = time.perf_counter()

    def flush(self) -> dict[str, Any]:
        """Writes the steps collected so far; returns the last one's row."""
        if not self._pending:
            return {}
        stacked = torch.stack([vector for _, _, vector, _ in self._pending])
        grad_norms = stacked[:, -1].tolist()
        rows = self.accelerator.reduce(stacked[:, :-1], "sum").tolist()
        spent = time.perf_counter() - self._since
        rate = sum(row[1] for row in rows) / max(spent, 1e-9)
        lines, row = [], {}
        for i, ((step, lr, _, constants), values) in enumerate(zip(self._pending, rows, strict=True)):
            seconds = self.seconds + spent * (i + 1) / len(rows)
            row = {"step": step, "seconds": round(seconds, 4), "loss": values[0] / self.accelerator.num_processes,
                   **self._means(values[2:]), "lr": lr, "grad_norm": grad_norms[i], "tokens_per_s": round(rate, 1),
                   **constants}  # fmt: skip
            lines.append(row)
        self.seconds += spent
        self._pending.clear()
        self._write(lines)
        self.start_clock()
        return row

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """One evaluation's numbers, as a line of their own."""
        self._write([{"step": step, "seconds": round(self.seconds, 4), **values}])

    def _means(self, values: list[float]) -> dict[str, float]:
        k = len(self._shown)
        out: dict[str, float] = {}
        for (name, show), total, count in zip(self._shown.items(), values[:k], values[k:], strict=True):
            if count:
                mean = total / count
                out[name] = math.exp(min(mean, 700.0)) if show == "exp" else mean
        return out

    def _write(self, lines: list[dict[str, Any]]) -> None:
        if self.accelerator.is_main_process:
            files.append_lines(self.file, lines, sync=False)
        for line in lines:
            self.accelerator.log({k: v for k, v in line.items() if k != "step" and v is not None}, step=line["step"])
