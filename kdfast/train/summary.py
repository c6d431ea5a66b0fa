"""What a finished run comes to, for people: `summary.json`, and its curves as `curves.png`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdfast.extras import need
from kdfast.files import read_json, read_lines, write_json, written
from kdfast.train import best
from kdfast.train.recipe import Phase, Recipe
from kdfast.train.tasks.task import Evaluation
from kdfast.train.teachers.scores import SCORES_FILE

#: Settings and clocks of a step, which say nothing of how well it went.
_UNDRAWN = (
    "step", "seconds", "lr", "grad_norm", "tokens_per_s", "data_wait_s", "temperature", "soft_weight", "hard_weight",
    "lse_squared",
)  # fmt: skip
_PREFIX = "validation_"
#: Files of a run's folder that its summary has too.
_BESIDE = {"best": best.FILE, "teachers_evaluation": SCORES_FILE}


def step_note(recipe: Recipe, number: int, row: dict[str, Any]) -> str:
    """What stands beside the bar: the loss of the last step, and the phase where there are several."""
    parts = recipe.parts
    phase = f"phase {number + 1} of {len(parts)} ({phase_name(parts[number])}), " if len(parts) > 1 else ""
    return f"{phase}loss {row['loss']:.4g}"


def phase_name(phase: Phase) -> str:
    """A phase in a word or two: its method, and which stage of it."""
    stage = getattr(phase.method.options, "stage", None)
    return f"{phase.method.name} {stage}" if stage else phase.method.name


def write_summary(
    folder: Path, recipe: Recipe, student: nn.Module, seconds: float, evaluation: Evaluation | None, about: dict[str, Any]
) -> None:
    """Writes `summary.json` and `curves.png` into a run's folder.

    summary.json: method (of each phase where there are several, with `phase_steps`), task, teachers, seed, steps, seconds (of
    training steps), rows_per_step, parameters and trained_parameters of the student, last_step (its metrics), evaluation (the
    last), evaluations (each with its step), best (keep_best), teachers_evaluation (eval_teacher), and what it was made with.

    Args:
        about: versions, commit and machine.
    """
    rows = read_lines(folder / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    evaluations = [
        {name.removeprefix(_PREFIX): value for name, value in row.items() if name != "seconds"}
        for row in rows
        if "loss" not in row
    ]
    parameters = list(student.parameters())
    write_json(folder / "summary.json", {
        "method": [phase_name(phase) for phase in recipe.parts] if recipe.phases else recipe.method.name,
        **({"phase_steps": [phase.steps for phase in recipe.parts]} if recipe.phases else {}),
        "task": recipe.task.name, "seed": recipe.seed, "steps": recipe.total_steps, "seconds": round(seconds, 2),
        "teachers": [teacher.cache or teacher.path or teacher.function for teacher in recipe.all_teachers],
        "rows_per_step": recipe.batch_size * recipe.accumulation,
        "parameters": sum(p.numel() for p in parameters),
        "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "last_step": steps[-1] if steps else None, "evaluation": evaluation, "evaluations": evaluations,
        **{name: read_json(folder / file) for name, file in _BESIDE.items() if (folder / file).is_file()}, **about,
    })  # fmt: skip
    draw(steps, evaluations, folder / "curves.png", str(folder), recipe.parts)


def draw(
    steps: list[dict[str, Any]], evaluations: list[dict[str, Any]], file: Path, title: str, phases: Sequence[Phase] = ()
) -> None:  # fmt: skip
    """A panel for every score, then one for every metric of a step, its running mean over a fiftieth of the run.

    One each: a loss of 6 nats and a KL of 0.001 on the same axis show neither. What never changes is left out, and so is what
    another panel shows (a KL at T = 1 twice). Where a phase ends there is a line.
    """
    scores = [("validation", name) for name in _names(evaluations) if name not in ("step", "tokens", "rows")]
    metrics = [("training", name) for name in _names(steps) if name not in _UNDRAWN and name[-4:] != "_ppl"]
    panels: list[tuple[str, str, list[tuple[int, float]]]] = []
    for what, name in scores + metrics:
        points = _points(evaluations if what == "validation" else steps, name)
        values = [value for _, value in points]
        like = [[value for _, value in drawn] for of, _, drawn in panels if of == what and len(drawn) == len(points)]
        if len(points) > 1 and not any(_close(values, other) for other in (values[:1] * len(values), *like)):
            panels.append((what, name, points))
    if not panels:
        return
    ends = list(itertools.accumulate(phase.steps for phase in phases))[:-1]
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure = need("matplotlib.figure", extra="train", what="a picture of a run").Figure(
        figsize=(4.5 * columns, 3.2 * lines), layout="constrained"
    )
    figure.suptitle(title, fontsize=9)
    for number, (what, name, points) in enumerate(panels):
        axes = figure.add_subplot(lines, columns, number + 1)
        x, y = zip(*points, strict=True)
        of_steps = what == "training"
        mean = _running_mean(y, len(steps) // 50) if of_steps else y
        axes.plot(x, mean, marker="" if len(x) > 60 or of_steps else ".", color="C0" if of_steps else "C1", linewidth=1.2)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("step")
        axes.set_title(f"{what}: {name}", fontsize=9)
        axes.grid(alpha=0.3)
        for end in ends:
            axes.axvline(end, color="0.5", linewidth=0.8, linestyle="--")
    if ends:
        stages = zip([0, *ends], phases, strict=True)
        named = ", ".join(f"{phase_name(phase)} from {start + 1}" for start, phase in stages)
        figure.suptitle(f"{title}\n{named}", fontsize=9)
    with written(file) as part:
        figure.savefig(part, format="png", dpi=110)


def _names(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _points(rows: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


def _close(values: Sequence[float], others: Sequence[float]) -> bool:
    """Whether they are the same but for rounding."""
    return all(math.isclose(value, other, rel_tol=1e-5, abs_tol=1e-9) for value, other in zip(values, others, strict=True))


def _running_mean(values: tuple[float, ...], window: int) -> list[float]:
    """Over `window` values up to each one, fewer at the beginning."""
    found = torch.tensor(values, dtype=torch.float64)
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), found.cumsum(0)])
    ends = torch.arange(1, len(found) + 1)
    starts = (ends - max(window, 1)).clamp(min=0)
    means: list[float] = ((sums[ends] - sums[starts]) / (ends - starts)).tolist()
    return means
