"""A larger student that begins as a smaller, distilled one, beside the same student from random weights.

python warm_start.py --out runs/warm_start [--corpus FOLDER] [--seeds 1 2 3] [--small]

A teacher is trained until validation stops improving and captured once. From its cache learn, for each seed, a small student,
the larger one with `init_from` that small one, and the larger one, which is larger than the teacher too, from random weights.
Both get as many steps and as many tries at the learning rate (short runs of seed 0, chosen by their loss on the validation
files). From random weights once more it gets twice as many steps: how many of them, and how many seconds, it needs to be
where the warm one is when it begins, halfway and at its end is read off their validation curves, seed by seed; the warm one's
are given without and with the small student's own. Everything lands under OUT: runs, cache, `study.json`, `study.md` (the
tables) and `curves.png`. Stopped or killed and started again it goes on where it was.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from text_runs import HERE, THIRD, Piece, Study, Text, command, label_perplexities, perplexities, picture, spread, table

from kdfast import files
from kdfast.cache import build
from kdfast.text import TextData


@dataclass(frozen=True)
class Shape:
    """Of a Llama; heads are 64 wide (`head` otherwise), as a model grows by whole ones."""

    width: int
    layers: int
    inner: int
    head: int = 64

    def changes(self) -> list[str]:
        values = {
            "hidden_size": self.width, "num_hidden_layers": self.layers, "intermediate_size": self.inner,
            "num_attention_heads": self.width // self.head, "num_key_value_heads": self.width // self.head,
            # The usual 0.02 fits widths in the thousands.
            "initializer_range": round(0.7 / math.sqrt(self.width), 3),
        }  # fmt: skip
        return [f"student.config.{name}={value}" for name, value in values.items()]


@dataclass(frozen=True)
class Scale:
    """Sizes; `changes` are made to every recipe. `cache_s`: a guess of how long the capture takes."""

    text: Text = THIRD
    teacher: Shape = Shape(192, 4, 512)
    small: Shape = Shape(128, 2, 336)
    large: Shape = Shape(256, 3, 680)
    teacher_steps: int = 1000
    teacher_most: int = 2000
    small_steps: int = 1000
    steps: int = 600
    tuning_steps: int = 300
    evaluations: int = 12
    cache_s: float = 120
    changes: tuple[str, ...] = ("eval_sequences=0",)


SMALL = Scale(
    Text(files=6, length=32), Shape(16, 2, 24, 8), Shape(16, 1, 24, 8), Shape(24, 2, 32, 8), 6, 12, 6, 8, 4, 4, 0.1,
    ("batch_size=2", "eval_sequences=8", "optimizer.warmup_steps=2"),
)  # fmt: skip

#: Seconds of a step on one core, by which the time that is left is guessed.
TEACHER_S, SMALL_S, LARGE_S = 0.25, 0.12, 0.40
RATES = {"cold": ("2.0e-3", "4.0e-3", "8.0e-3"), "warm": ("1.0e-3", "2.0e-3", "4.0e-3")}
LABELS = {
    "teacher": "the teacher",
    "small": "the small student",
    "cold": "the larger one, from random weights",
    "warm": "the larger one, from the small one",
    "longer": "the larger one, from random weights, longer",
}
#: How many times as many steps that is.
LONGER = 2
#: Shares of the warm run's steps; what it is at there, the longer one is to reach.
MARKS = (0.0, 0.5, 1.0)


class WarmStart:
    def __init__(self, study: Study, scale: Scale, seeds: Sequence[int]) -> None:
        self.study, self.scale, self.seeds = study, scale, list(seeds)

    def run(self) -> None:
        scale = self.scale
        pieces = [Piece("teacher", TEACHER_S * scale.teacher_most, self.teacher), Piece("cache", scale.cache_s, self.cache)]
        small = SMALL_S * scale.small_steps
        pieces.append(Piece("small 0", small, partial(self.small, 0)))
        for way, rates in RATES.items():
            pieces += [
                Piece(f"try of {way}: lr {lr}", LARGE_S * scale.tuning_steps, partial(self.tried, way, lr)) for lr in rates
            ]
        for seed in self.seeds:
            pieces.append(Piece(f"small {seed}", small, partial(self.small, seed)))
            pieces += [Piece(f"{way} {seed}", LARGE_S * scale.steps, partial(self.large, way, seed)) for way in RATES]
        longer = LARGE_S * scale.steps * LONGER
        pieces += [Piece(f"longer {seed}", longer, partial(self.large, "longer", seed)) for seed in self.seeds]
        self.study.carry_out(pieces, self.report)

    def teacher(self) -> dict[str, Any]:
        steps, most = self.scale.teacher_steps, self.scale.teacher_most
        changes = [*self.scale.teacher.changes(), *self.every(most)]
        return self.study.until_flat(HERE / "teacher.yaml", "teacher", steps, most, *changes)

    def cache(self) -> dict[str, Any]:
        teacher, out = self.study.folder(self.study.kept["teacher"]["model"]) / "model", self.study.out / "cache"
        data = TextData(paths=(str(self.study.parts["train"]),), glob="*.py", sequence_length=self.scale.text.length)
        built = build(teacher, data, out, k=64, batch_size=16, say=self.study.say)
        return {"bytes_per_token": built.info.bytes_per_token, "tokens": built.info.tokens}

    def every(self, steps: int) -> list[str]:
        each = max(steps // self.scale.evaluations, 1)
        return [f"eval_every={each}", f"save_every={steps}"]

    def train(self, name: str, shape: Shape, seed: int, steps: int, *changes: str, test: bool = True) -> dict[str, Any]:
        cached = [f"teacher.cache={self.study.out / 'cache'}", "data.train=[]", f"seed={seed}", f"steps={steps}"]
        return self.study.run(HERE / "student.yaml", name, *cached, *shape.changes(), *self.every(steps), *changes, test=test)

    def small(self, seed: int) -> dict[str, Any]:
        return self.train(f"small-{seed}", self.scale.small, seed, self.scale.small_steps, test=seed > 0)

    def start(self, way: str, seed: int) -> list[str]:
        return [f"init_from={self.study.folder(f'small-{seed}') / 'model'}"] if way == "warm" else []

    def tried(self, way: str, lr: str) -> dict[str, Any]:
        changes = [*self.start(way, 0), f"optimizer.lr={lr}"]
        return self.train(f"tries/{way}-{lr}", self.scale.large, 0, self.scale.tuning_steps, *changes, test=False)

    def large(self, way: str, seed: int) -> dict[str, Any]:
        tuned, times = ("cold", LONGER) if way == "longer" else (way, 1)
        best = self.study.best([f"try of {tuned}: lr {lr}" for lr in RATES[tuned]]).rpartition(" ")[2]
        changes = [*self.start(way, seed), f"optimizer.lr={best}"]
        return self.train(f"{way}-{seed}", self.scale.large, seed, times * self.scale.steps, *changes)

    def curve(self, way: str, seed: int) -> list[dict[str, float]]:
        """step, seconds and nll on the validation files; a warm run begins where the small student ended."""
        points = [
            {"step": row["step"], "seconds": row["seconds"], "nll": row["validation_nll"]}
            for row in self.study.points(f"{way}-{seed}")
        ]
        begun = self.study.points(f"small-{seed}") if way == "warm" else []
        return [{"step": 0, "seconds": 0.0, "nll": begun[-1]["validation_nll"]}, *points] if begun else points

    def report(self) -> None:
        """`study.md` and `curves.png`, of what is there so far."""
        kept, rows = self.study.kept, []
        for way, label in LABELS.items():
            found = [kept[key] for key in [way, *(f"{way} {s}" for s in self.seeds)] if key in kept]
            if found:
                scores = [perplexities([x[part] for x in found]) for part in ("test", "validation")]
                minutes = f"{statistics.fmean(x['seconds'] for x in found) / 60:.1f}"
                rows.append([label, f"{found[0]['parameters']:,}", *scores, f"{found[0]['steps']}", minutes])
        text = [table(["", "parameters", "test perplexity", "validation perplexity", "steps", "minutes"], rows)]
        done = [seed for seed in self.seeds if f"longer {seed}" in kept]
        if done:
            text.append(self.equal(done))
        for way, rates in RATES.items():
            names = [name for lr in rates if (name := f"try of {way}: lr {lr}") in kept]
            tried = [f"{name.rpartition(' ')[2]} {math.exp(kept[name]['validation']):.2f}" for name in names]
            text += [f"- Learning rates tried, {LABELS[way]}, validation perplexity: {', '.join(tried)}."] if tried else []
        files.write_text(self.study.out / "study.md", "\n".join(text) + "\n")
        if any(f"{way} {seed}" in kept for way in RATES for seed in self.seeds):
            self.draw()

    def equal(self, seeds: Sequence[int]) -> str:
        """Steps and seconds to equal validation perplexity."""
        rows = []
        for share in MARKS:
            cells: dict[str, list[float]] = {}
            ppl, missed = [], 0
            for seed in seeds:
                longer, warm = self.curve("longer", seed), self.curve("warm", seed)
                mark = min(warm, key=lambda point: abs(point["step"] - share * warm[-1]["step"]))
                there, small = reached(longer, mark["nll"]), self.study.kept[f"small {seed}"]
                ppl.append(math.exp(mark["nll"]))
                if there is None:
                    missed += 1
                for what in ("step", "seconds"):
                    own = small["steps" if what == "step" else "seconds"]
                    values = {"warm": mark[what], "both": mark[what] + own, **({"cold": there[what]} if there else {})}
                    for name, value in values.items():
                        cells.setdefault(f"{what} {name}", []).append(value)
            columns = ["not reached" if name not in cells else spread(cells[name], ".0f") for name in _EQUAL]
            at = f"{spread(ppl)}, the warm one's after {share:.0%} of its steps"
            rows.append([at + (f" ({missed} of {len(seeds)} cold ones never there)" if missed else ""), *columns])
        return table(["validation perplexity", *_EQUAL.values()], rows)

    def draw(self) -> None:
        with picture(self.study.out / "curves.png", 2) as panels:
            for axes, unit in zip(panels, ("step", "seconds"), strict=True):
                for number, (way, label) in enumerate(LABELS.items()):
                    for seed in self.seeds if way in ("cold", "warm", "longer") else ():
                        curve = self.curve(way, seed)
                        if curve:
                            line = [[point[unit] for point in curve], [math.exp(point["nll"]) for point in curve]]
                            axes.plot(*line, ".-", color=f"C{number}", markersize=3, linewidth=1, label=label)
                            label = ""
                label_perplexities(axes, {"step": "steps"}.get(unit, unit))


_EQUAL = {
    "step cold": "steps, cold", "step warm": "steps, warm", "step both": "with the small one's",
    "seconds cold": "seconds, cold", "seconds warm": "seconds, warm", "seconds both": "with the small one's",
}  # fmt: skip


def reached(curve: Sequence[dict[str, float]], nll: float) -> dict[str, float] | None:
    """Where a curve first comes to `nll`, on the line between two evaluations; None: never."""
    if curve and curve[0]["nll"] <= nll:
        return dict(curve[0])
    for before, after in pairwise(curve):
        if after["nll"] <= nll:
            share = (before["nll"] - nll) / (before["nll"] - after["nll"])
            return {name: before[name] + share * (after[name] - before[name]) for name in before}
    return None


def main(words: Sequence[str] | None = None, say: Callable[[str], None] = print) -> None:
    command(__doc__ or "", "runs/warm_start", (Scale(), SMALL), WarmStart, words, say)


if __name__ == "__main__":
    main()
