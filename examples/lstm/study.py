"""The study behind docs/results.md: an LSTM language model, and a smaller one alone and distilled from it, over seeds.

python study.py --out runs/study [--corpus FOLDER] [--seeds 1 2 3] [--small]

Everything lands under OUT: the runs, the cache, `study.json` (one entry for each finished piece), `study.md` (the table) and
`curves.png`. Stopped or killed and started again it goes on where it was. The student alone and the distilled one get as many
steps and as many tries: three learning rates, then three changes at the best of them, short runs of seed 0, chosen by their
loss on the validation files; the teacher's rate is chosen so too. The test files are looked at by nobody but the table. The
teacher, and the student alone once more, are gone on with to twice their steps for as long as that gains 0.01 nats on the
validation files. The cache has the 12 likeliest ids and 50 drawn ones of each token: of a teacher as flat as this one the
likeliest 64 leave too much out (docs/sparse-targets.md). `--small` is the same road in some minutes, too small for a claim.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "word_kd"))

from text_runs import THIRD, Piece, Study, Text, command, label_perplexities, perplexities, picture, spread, table  # noqa: E402

from kdfast import files  # noqa: E402
from kdfast.cache import CacheReader, CacheWriter, capture  # noqa: E402
from kdfast.models.heads import find_head  # noqa: E402
from kdfast.models.load import weights_hash  # noqa: E402
from kdfast.text import TextData  # noqa: E402
from kdfast.text.documents import Corpus  # noqa: E402
from kdfast.text.tokenizers import file_hash, load_tokenizer  # noqa: E402


@dataclass(frozen=True)
class Scale:
    """Sizes; `changes` are made to every recipe. `teacher_most`, `longer_most`: steps at which going on ends in any
    case. `dropout`: of the teacher.
    `cache_s`: a guess of how long the capture takes.
    """

    text: Text = THIRD
    teacher_steps: int = 1500
    teacher_most: int = 6000
    steps: int = 1200
    tuning_steps: int = 600
    longer_most: int = 9600
    evaluations: int = 12
    teacher_width: int = 256
    dropout: float = 0.2
    width: int = 128
    cache_s: float = 60
    changes: tuple[str, ...] = ("eval_sequences=0",)


SMALL = Scale(
    Text(files=6, length=32), 6, 12, 6, 4, 12, 2, 24, 0.1, 16, 0.1,
    ("batch_size=2", "eval_sequences=8", "optimizer.warmup_steps=2"),
)  # fmt: skip

#: Seconds of a step on one core, by which the time that is left is guessed: teacher, student alone, live, cached.
TEACHER_S, ALONE_S, LIVE_S, CACHED_S = 0.17, 0.065, 0.11, 0.075
ALONE = ("method={name: supervised}", "teacher=null")
STUDENT_RATES = ("5.0e-3", "1.0e-2", "2.0e-2")
RATES = {"teacher": ("3.0e-3", "6.0e-3", "1.2e-2"), "alone": STUDENT_RATES, "distilled": STUDENT_RATES}
#: What is tried at the best rate, beside the recipe as it is.
CHANGES: dict[str, tuple[list[str], ...]] = {
    "teacher": (),
    "alone": (["method.label_smoothing=0.1"], ["student.arguments.dropout=0.1"], ["optimizer.weight_decay=0.3"]),
    "distilled": (
        ["method.temperature=2.0"],
        ["method.soft_weight=1.0", "method.hard_weight=0.0"],
        ["method.soft_weight=0.5", "method.hard_weight=0.5"],
    ),
}
WAYS = {
    "teacher": "the teacher",
    "alone": "the student alone",
    "distilled": "distilled, live teacher",
    "cached": "distilled, from the cache",
    "longer": "the student alone, until validation stops improving",
}


class LSTMStudy:
    def __init__(self, study: Study, scale: Scale, seeds: Sequence[int]) -> None:
        self.study, self.scale, self.seeds = study, scale, list(seeds)

    def pieces(self) -> list[Piece]:
        scale = self.scale
        found = []
        for way, each in (("teacher", TEACHER_S), ("alone", ALONE_S), ("distilled", LIVE_S)):
            for i, name in enumerate(self.named_tries(way)):
                found.append(Piece(name, each * scale.tuning_steps, partial(self.tried, way, i)))
            if way == "teacher":
                found.append(Piece("teacher", TEACHER_S * scale.teacher_most, self.teacher))
        found.append(Piece("cache", scale.cache_s, self.cache))
        for seed in self.seeds:
            found.append(Piece(f"alone {seed}", ALONE_S * scale.steps, partial(self.student, "alone", seed)))
            found.append(Piece(f"distilled {seed}", LIVE_S * scale.steps, partial(self.student, "distilled", seed)))
            found.append(Piece(f"cached {seed}", CACHED_S * scale.steps, partial(self.student, "cached", seed)))
            found.append(Piece(f"longer {seed}", ALONE_S * scale.longer_most / 2, partial(self.longer, seed)))
        return found

    def run(self) -> None:
        self.study.carry_out(self.pieces(), self.report)

    def teacher(self) -> dict[str, Any]:
        steps, most = self.scale.teacher_steps, self.scale.teacher_most
        changes = [*self.changes("teacher"), *self.settings("teacher"), *self.every(most)]
        return self.study.until_flat(self.recipe("teacher"), "teacher", steps, most, *changes)

    def every(self, steps: int) -> list[str]:
        """How often a run of so many steps is scored and kept."""
        each = max(steps // self.scale.evaluations, 1)
        return [f"eval_every={each}", f"save_every={each}"]

    @staticmethod
    def recipe(way: str) -> Path:
        return HERE / ("teacher.yaml" if way == "teacher" else "recipe.yaml")

    def changes(self, way: str) -> list[str]:
        """What makes `recipe(way)` the recipe of a way."""
        if way == "teacher":
            return [f"student.arguments.{name}={value}" for name, value in self.teacher_shape()]
        width = f"student.arguments.width={self.scale.width}"
        if way == "alone":
            return [*ALONE, width]
        if way == "cached":
            return [f"teacher={{cache: {self.study.out / 'cache'}}}", "data.train=[]", width]
        weights = self.study.folder(self.study.kept["teacher"]["model"]) / "model"
        shape = [f"teacher.arguments.{name}={value}" for name, value in self.teacher_shape()]
        return [f"teacher.weights={weights}", *shape, width]

    def teacher_shape(self) -> list[tuple[str, float]]:
        return [("width", self.scale.teacher_width), ("dropout", self.scale.dropout)]

    @staticmethod
    def try_(way: str, number: int) -> str:
        rates = len(RATES[way])
        settings = f"lr {RATES[way][number]}" if number < rates else " ".join(CHANGES[way][number - rates])
        return f"try of {way}: {settings}"

    def named_tries(self, way: str) -> list[str]:
        return [self.try_(way, i) for i in range(len(RATES[way]) + len(CHANGES[way]))]

    def tries(self, way: str) -> dict[str, list[str]]:
        """Tries that are done -> their settings."""
        rates = {self.try_(way, i): [f"optimizer.lr={rate}"] for i, rate in enumerate(RATES[way])}
        best = rates[self.study.best(list(rates))]
        changed = {self.try_(way, len(RATES[way]) + i): [*best, *change] for i, change in enumerate(CHANGES[way])}
        return {name: settings for name, settings in {**rates, **changed}.items() if name in self.study.kept}

    def tried(self, way: str, number: int) -> dict[str, Any]:
        rates = len(RATES[way])
        if number < rates:
            settings = [f"optimizer.lr={RATES[way][number]}"]
        else:
            settings = [*self.settings(way, RATES[way]), *CHANGES[way][number - rates]]
        steps = self.scale.tuning_steps
        changes = [*self.changes(way), *settings, "seed=0", f"steps={steps}", "eval_every=0", "save_every=0"]
        return self.study.run(self.recipe(way), f"tries/{way}-{number}", *changes, test=False)

    def settings(self, way: str, among: Sequence[str] = ()) -> list[str]:
        """The best of the tries on the validation files, of all or of the rates alone."""
        tries = self.tries(way)
        names = list(tries)[: len(among)] if among else list(tries)
        return tries[self.study.best(names)]

    def student(self, way: str, seed: int) -> dict[str, Any]:
        settings = self.settings("distilled" if way == "cached" else way)
        steps = self.scale.steps
        changes = [*self.changes(way), *settings, f"seed={seed}", f"steps={steps}", *self.every(steps)]
        return self.study.run(HERE / "recipe.yaml", f"{way}-{seed}", *changes)

    def longer(self, seed: int) -> dict[str, Any]:
        steps, most = 2 * self.scale.steps, self.scale.longer_most
        changes = [*self.changes("alone"), *self.settings("alone"), f"seed={seed}", *self.every(steps)]
        return self.study.until_flat(HERE / "recipe.yaml", f"longer-{seed}", steps, most, *changes)

    def cache(self) -> dict[str, Any]:
        """What `kdfast cache build` does, of a teacher that is made by a function."""
        study, file = self.study, self.study.tokenizer
        name = study.kept["teacher"]["model"]
        chosen = [float(s.partition("=")[2]) for s in self.settings("distilled") if s.startswith("method.temperature=")]
        data = TextData(paths=(str(study.parts["train"]),), glob="*.py", sequence_length=self.scale.text.length)
        teacher, documents = study.model(name), Corpus(data, load_tokenizer(file)[0], file.parent)
        head = find_head(teacher, {"input_ids": next(iter(documents)).input_ids[None, :8]})
        assert head is not None
        described = {"teacher": weights_hash(study.folder(name) / "model"), "tokenizer_hash": file_hash(file)}
        folder, temperature = study.out / "cache", chosen[0] if chosen else 1.0
        drawn = {"kind": "mixed", "k": 62, "samples": 50, "sample_temperature": temperature, "temperatures": (temperature,)}
        with CacheWriter(folder, vocab_size=head.weight.shape[0], **drawn, **described) as writer:
            capture(teacher, documents, writer, batch_size=16, window=64, head=head)
        return {"bytes_per_token": CacheReader(folder).info.bytes_per_token}

    def report(self) -> None:
        """`study.md` and `curves.png`, of what is there so far."""
        kept = self.study.kept
        groups = {way: [kept[key] for key in [way, *(f"{way} {s}" for s in self.seeds)] if key in kept] for way in WAYS}
        mean = {way: statistics.fmean(x["test"] for x in found) for way, found in groups.items() if found}
        rows = []
        for way, found in groups.items():
            if not found:
                continue
            gap = mean["alone"] - mean["teacher"] if "alone" in mean else 0.0
            share = f"{(mean['alone'] - mean[way]) / gap:.0%}" if way not in ("teacher", "alone") and gap > 0 else ""
            steps = " / ".join(f"{x['steps']}" for x in found) if way == "longer" else f"{found[0]['steps']}"
            minutes = f"{statistics.fmean(x['seconds'] for x in found) / 60:.1f}"
            scores = [perplexities([x[part] for x in found]) for part in ("test", "validation")]
            rows.append([WAYS[way], f"{found[0]['parameters']:,}", *scores, share, steps, minutes])
        head = ["", "parameters", "test perplexity", "validation perplexity", "share of the gap", "steps", "minutes"]
        text = [table(head, rows), *self.remarks(groups)]
        files.write_text(self.study.out / "study.md", "\n".join(text) + "\n")
        self.draw()

    def remarks(self, groups: dict[str, list[dict[str, Any]]]) -> list[str]:
        kept = self.study.kept
        lines = []
        if len(groups["alone"]) > 1:
            alone = [x["test"] for x in groups["alone"]]
            gap, deviation = statistics.fmean(alone) - groups["teacher"][0]["test"], statistics.stdev(alone)
            lines.append(
                f"- The teacher is {gap:.3f} nats ahead of the student alone, {gap / max(deviation, 1e-9):.0f} spreads."
            )
        if len(groups["distilled"]) == len(groups["cached"]) > 0:
            apart = [c["test"] - d["test"] for c, d in zip(groups["cached"], groups["distilled"], strict=True)]
            lines.append(f"- From the cache less live, seed by seed: {spread(apart, '+.4f')} nats.")
        if "cache" in kept:
            lines.append(f"- The cache: {kept['cache']['bytes_per_token']:.0f} bytes a token.")
        for what, found in (("teacher", groups["teacher"]), ("student alone", groups["longer"])):
            if rising := sum(not x["flat"] for x in found):
                lines.append(f"- The {what} was still improving when it had the most steps, in {rising} of {len(found)} runs.")
        for way in RATES:
            names = [name for name in self.named_tries(way) if name in kept]
            tried = [f"{name.partition(': ')[2]} {math.exp(kept[name]['validation']):.2f}" for name in names]
            if tried:
                lines.append(f"- Tries of {way}, validation perplexity: {', '.join(tried)}.")
        return lines

    def draw(self) -> None:
        with picture(self.study.out / "curves.png", 1) as (axes,):
            for number, (way, label) in enumerate(WAYS.items()):
                for name in ["teacher"] if way == "teacher" else [f"{way}-{seed}" for seed in self.seeds]:
                    points = [(row["step"], row["validation_ppl"]) for row in self.study.points(name)]
                    if points:
                        axes.plot(*zip(*points, strict=True), ".-", color=f"C{number}", markersize=3, linewidth=1, label=label)
                        label = ""
            label_perplexities(axes, "steps", logarithmic=True)


def main(words: Sequence[str] | None = None, say: Callable[[str], None] = print) -> None:
    command(__doc__ or "", "runs/study", (Scale(), SMALL), LSTMStudy, words, say)


if __name__ == "__main__":
    main()
