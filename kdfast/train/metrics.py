"""Metrics of every step, read back from the device only every few steps."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from kdfast.train.recipe import Recipe
from kdfast.train.step import Metrics

#: Part of a step -> the name it is logged under, and whether it is logged as exp(mean).
_NAMES = {
    "soft": ("kl_at_T", False),
    "hard": ("student_ppl", True),
    "z": ("lse_squared", False),
    "kl_at_1": ("kl_at_1", False),
    "teacher_nll": ("teacher_ppl", True),
    "teacher_entropy": ("teacher_entropy", False),
    "top1_agreement": ("top1_agreement", False),
}


class MetricLog:
    """Collects one device vector a step; `flush` reads them all back at once and writes `metrics.jsonl` and the tracker."""

    def __init__(self, recipe: Recipe, folder: Path, accelerator: Accelerator) -> None:
        self.file = folder / "metrics.jsonl"
        self.accelerator = accelerator
        self.constants = {} if recipe.method == "supervised" else {
            "temperature": recipe.temperature, "soft_weight": recipe.soft_weight, "hard_weight": recipe.hard_weight,
        }  # fmt: skip
        self.seconds = 0.0
        self._pending: list[tuple[int, float, Tensor]] = []
        self._names: tuple[str, ...] = ()
        self._since = time.perf_counter()

    def truncate(self, step: int, seconds: float) -> None:
        """Forgets everything after `step`: what a killed run logged beyond its last checkpoint will be logged again."""
        self.seconds = seconds
        if not self.accelerator.is_main_process or not self.file.exists():
            return
        kept = []
        for line in self.file.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # the line a kill cut short
                break
            if row["step"] <= step:
                kept.append(line)
        part = self.file.with_suffix(".part")
        part.write_text("".join(line + "\n" for line in kept))
        os.replace(part, self.file)

    def add(self, step: int, lr: float, loss: Tensor, grad_norm: Tensor, metrics: list[Metrics], tokens: Tensor) -> None:
        """One optimiser step, its micro-batches summed; nothing is read back here."""
        self._names = tuple(metrics[0])
        sums = [sum(m[name].sum for m in metrics) for name in self._names]
        counts = [sum(m[name].count for m in metrics) for name in self._names]
        vector = torch.stack([torch.as_tensor(x, device=loss.device).float() for x in (loss, tokens, *sums, *counts)])
        self._pending.append((step, lr, torch.cat([vector, grad_norm.detach().float().reshape(1)])))

    def start_clock(self) -> None:
        """Steps are timed from here; evaluation and saving are not training time."""
        self._since = time.perf_counter()

    def flush(self) -> dict[str, Any]:
        """Writes the steps collected so far; returns the last one's row."""
        if not self._pending:
            return {}
        stacked = torch.stack([vector for *_, vector in self._pending])
        grad_norms = stacked[:, -1].tolist()
        rows = self.accelerator.reduce(stacked[:, :-1], "sum").tolist()
        spent = time.perf_counter() - self._since
        rate = sum(row[1] for row in rows) / max(spent, 1e-9)
        lines, row = [], {}
        for i, ((step, lr, _), values) in enumerate(zip(self._pending, rows, strict=True)):
            seconds = self.seconds + spent * (i + 1) / len(rows)
            row = {"step": step, "seconds": round(seconds, 4), "loss": values[0] / self.accelerator.num_processes,
                   **self._means(values[2:]), "lr": lr, "grad_norm": grad_norms[i], "tokens_per_s": round(rate, 1),
                   **self.constants}  # fmt: skip
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
        k = len(self._names)
        out: dict[str, float] = {}
        for name, total, count in zip(self._names, values[:k], values[k:], strict=True):
            if count:
                shown, exponent = _NAMES[name]
                mean = total / count
                out[shown] = math.exp(min(mean, 700.0)) if exponent else mean
                if name == "hard":
                    out["hard"] = mean
        return out

    def _write(self, lines: list[dict[str, Any]]) -> None:
        if self.accelerator.is_main_process:
            with self.file.open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        for line in lines:
            self.accelerator.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])
