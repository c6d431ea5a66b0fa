"""`check: true`: what a run would take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kdfast.train import run_folder
from kdfast.train.recipe import Recipe
from kdfast.train.summary import phase_name


class NoLog:
    """Takes the metrics of steps that are tried, and keeps none."""

    def add(self, *args: object) -> None: ...


def check(
    recipe: Recipe, step: Callable[[int], Tensor], rows: Sequence[int | None], world: int, device: torch.device,
    say: Callable[[str], None],
) -> float:  # fmt: skip
    """Two steps of each phase, then its loss, time and rows, and what all come to with the memory; the seconds of all.

    Args:
        step: does the step of that number, and gives its loss. rows: of each phase; None where they are packed.
        world: number of processes.
    """
    several, first, whole = len(recipe.parts) > 1, 1, 0.0
    for number, (phase, n) in enumerate(zip(recipe.parts, rows, strict=True), 1):
        step(first)
        began = time.perf_counter()
        loss = float(step(first + min(1, phase.steps - 1)))
        seconds = time.perf_counter() - began
        read = phase.steps * recipe.batch_size * recipe.accumulation * world
        often = "" if n is None else f", which read the {n} rows {read / n:.3g} times"
        where = f"phase {number}, {phase_name(phase)}: " if several else ""
        say(
            f"{where}loss {loss:.4f}, {seconds:.3f} s a step, {phase.steps * seconds / 60:.1f} minutes for {phase.steps}"
            f" steps{often}"
        )
        first, whole = first + phase.steps, whole + phase.steps * seconds
    together = f", {whole / 60:.1f} minutes for {recipe.total_steps} steps" if several else ""
    say(f"peak memory {run_folder.peak_memory_gb():.2f} GB on {device}{together}")
    return whole
