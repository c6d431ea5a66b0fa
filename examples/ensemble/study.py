"""The study behind docs/results.md: ensembles over generations and born-again networks, language models on text, over seeds.

python study.py --out runs/study [--corpus FOLDER] [--seeds 1 2 3] [--small]

Three LSTMs of two shapes learn from the labels, the next three from their mean and the labels, and so on for three
generations; the last student, of the first member's shape, learns from the last three. Born again: three students of that
shape, each the next one's teacher. Every student of every generation gets as many steps, at the rate that is best for the
first ones, which learn from labels (three rates, both shapes, seed 0, by their loss on the validation files): a choice in
favour of the labels. Members are scored alone and together on the test files, with their agreement there. Everything lands
under OUT: the runs, `study.json`, `study.md` (the tables) and `generations.png`. Stopped or killed and started again it goes
on where it was.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE.parent / "word_kd"), str(HERE.parent / "lstm")]

from text_runs import THIRD, Piece, Study, Text, command, perplexities, picture, spread, table  # noqa: E402

from kdfast import files  # noqa: E402
from kdfast.models.ensemble import Ensemble  # noqa: E402
from kdfast.train.generations import agreement  # noqa: E402


@dataclass(frozen=True)
class Scale:
    """Sizes; `changes` are made to every recipe. `shapes`: of the members, instead of the recipe's."""

    text: Text = THIRD
    generations: int = 3
    steps: int = 650
    evaluations: int = 5
    changes: tuple[str, ...] = ("eval_sequences=0",)
    shapes: tuple[dict[str, Any], ...] = ()


SMALL = Scale(
    Text(files=6, length=32), 3, 6, 2, ("batch_size=2", "eval_sequences=8", "optimizer.warmup_steps=2"),
    tuple({"function": "lstm:make", "arguments": {"vocab_size": 4096, "width": 16 // n, "layers": n}} for n in (1, 2, 1)),
)  # fmt: skip

#: Seconds of a step on one core: of the members from labels, on the mean, and of one taught by three, by one.
LABELS_S, TAUGHT_S, BORN_S = 0.07, 0.16, 0.11
RATES = ("5.0e-3", "1.0e-2", "2.0e-2")
SUPERVISED = ("method={name: supervised}",)
#: Of the method, instead of the recipe's.
BORN_AGAIN = "method={{name: born_again, generations: {}, soft_weight: 0.5, hard_weight: 0.5}}"


class Generations:
    def __init__(self, study: Study, scale: Scale, seeds: Sequence[int]) -> None:
        self.study, self.scale, self.seeds = study, scale, list(seeds)
        recipe = yaml.safe_load((HERE / "text.yaml").read_text(encoding="utf-8"))
        self.shapes = list(scale.shapes) or recipe["method"]["members"]
        #: The first member of each shape.
        self.tried_members = [i for i, shape in enumerate(self.shapes) if self.shapes.index(shape) == i]

    def run(self) -> None:
        steps, later, count = self.scale.steps, self.scale.generations - 1, len(self.shapes)
        pieces = [
            Piece(self.try_(lr, i), LABELS_S * steps, partial(self.tried, lr, i)) for lr in RATES for i in self.tried_members
        ]
        for seed in self.seeds:
            seconds = steps * (count * (LABELS_S + later * TAUGHT_S) + TAUGHT_S)
            pieces.append(Piece(f"ensemble {seed}", seconds, partial(self.ensemble, seed)))
            pieces.append(Piece(f"born again {seed}", steps * (LABELS_S + later * BORN_S), partial(self.born_again, seed)))
        self.study.carry_out(pieces, self.report)

    def train(self, name: str, shape: dict[str, Any], seed: int, *changes: str) -> dict[str, Any]:
        steps = self.scale.steps
        every = max(steps // self.scale.evaluations, 1)
        own = [f"student={json.dumps(shape)}", f"seed={seed}", f"steps={steps}", f"eval_every={every}", f"save_every={every}"]
        return self.study.run(HERE / "text.yaml", name, *own, *changes, test=seed > 0)

    @staticmethod
    def try_(lr: str, member: int) -> str:
        return f"try: lr {lr}, member {member}"

    def tried(self, lr: str, member: int) -> dict[str, Any]:
        return self.train(f"tries/{lr}-{member}", self.shapes[member], 0, *SUPERVISED, f"optimizer.lr={lr}")

    def tries(self) -> dict[str, float]:
        """Rate -> mean validation loss of the shapes, of those that are done."""
        kept, members = self.study.kept, self.tried_members
        done = [lr for lr in RATES if all(self.try_(lr, i) in kept for i in members)]
        return {lr: statistics.fmean(kept[self.try_(lr, i)]["validation"] for i in members) for lr in done}

    def rate(self) -> str:
        tries = self.tries()
        return f"optimizer.lr={min(tries, key=lambda lr: tries[lr])}"

    def ensemble(self, seed: int) -> dict[str, Any]:
        name, count = f"ensemble-{seed}", self.scale.generations
        changes = [f"method.generations={count}", f"method.members={json.dumps(self.shapes)}", self.rate()]
        student = self.train(name, self.shapes[0], seed, *changes)
        members = range(len(self.shapes))
        folders = [[f"{name}/prepared/0/generation-{g}/member-{i}" for i in members] for g in range(1, count + 1)]
        return {**student, "generations": [self.together([self.study.model(f) for f in of]) for of in folders]}

    def born_again(self, seed: int) -> dict[str, Any]:
        name, count = f"born-again-{seed}", self.scale.generations
        student = self.train(name, self.shapes[0], seed, BORN_AGAIN.format(count), self.rate())
        folders = [f"{name}/prepared/0/generation-{g}/member-0" for g in range(1, count)]
        return {**student, "together": self.together([self.study.model(f) for f in [*folders, name]])}

    def together(self, models: Sequence[nn.Module]) -> dict[str, Any]:
        """Test loss of each and of the mean of their probabilities, and how far they are one."""
        scores = [self.study.score(model) for model in models]
        return {
            "members": scores, "ensemble": self.study.score(Ensemble(models).eval()), **agreement(models, self.study.test),
        }  # fmt: skip

    def report(self) -> None:
        """`study.md` and `generations.png`, of what is there so far."""
        kept = self.study.kept
        ensembles = [kept[f"ensemble {s}"] for s in self.seeds if f"ensemble {s}" in kept]
        again = [kept[f"born again {s}"] for s in self.seeds if f"born again {s}" in kept]
        text = []
        if ensembles:
            rows = [
                self.row(f"generation {g + 1}", [x["generations"][g] for x in ensembles]) for g in range(self.scale.generations)
            ]
            alone = [x["generations"][0]["members"][0] for x in ensembles]
            gain = [a - x["test"] for a, x in zip(alone, ensembles, strict=True)]
            text += [
                "Three members of two shapes, test perplexity:\n",
                table(["", "members", "the best", "together", "gain over the best, nats", "top-1 agreement", "JS, nats"], rows),
                f"The last student, from generation {self.scale.generations}: {perplexities([x['test'] for x in ensembles])};"
                f" the same shape from labels: {perplexities(alone)}; {spread(gain, '+.4f')} nats gained.\n",
            ]
        if again:
            count = len(again[0]["together"]["members"])
            rows = [[f"f{k + 1}", perplexities([x["together"]["members"][k] for x in again])] for k in range(count)]
            rows.append(["all together", perplexities([x["together"]["ensemble"] for x in again])])
            same = spread([100 * x["together"]["top1_agreement"] for x in again], ".1f")
            apart = spread([x["together"]["js"] for x in again], ".4f")
            text += ["Born again, test perplexity:\n", table(["", "perplexity"], rows),
                     f"They agree on {same} % of the likeliest words; JS {apart} nats.\n"]  # fmt: skip
        tries = [f"{lr} {math.exp(nll):.2f}" for lr, nll in self.tries().items()]
        text += [f"- Learning rates tried from labels, mean validation perplexity of the shapes: {', '.join(tries)}."]
        files.write_text(self.study.out / "study.md", "\n".join(text) + "\n")
        if ensembles:
            self.draw(ensembles, again)

    @staticmethod
    def row(name: str, found: Sequence[dict[str, Any]]) -> list[str]:
        count = len(found[0]["members"])
        members = ", ".join(f"{math.exp(statistics.fmean(x['members'][i] for x in found)):.2f}" for i in range(count))
        best = [min(x["members"]) for x in found]
        gain = [b - x["ensemble"] for b, x in zip(best, found, strict=True)]
        return [
            name, members, perplexities(best), perplexities([x["ensemble"] for x in found]), spread(gain, ".4f"),
            spread([100 * x["top1_agreement"] for x in found], ".1f") + " %", spread([x["js"] for x in found], ".4f"),
        ]  # fmt: skip

    def draw(self, ensembles: Sequence[dict[str, Any]], again: Sequence[dict[str, Any]]) -> None:
        numbers = range(1, self.scale.generations + 1)
        with picture(self.study.out / "generations.png", 3) as (scores, gains, alike):
            for seed, found in enumerate(ensembles):
                of = found["generations"]
                first = seed == 0
                for i in range(len(self.shapes)):
                    line = [math.exp(x["members"][i]) for x in of]
                    scores.plot(numbers, line, ".-", color=f"C{i}", linewidth=1, label=f"member {i + 1}" if first else "")
                scores.plot(numbers, [math.exp(x["ensemble"]) for x in of], "k.-", label="together" if first else "")
                gains.plot(
                    numbers,
                    [min(x["members"]) - x["ensemble"] for x in of],
                    "k.-",
                    label="over the best member" if first else "",
                )
                alike.plot(numbers, [100 * x["top1_agreement"] for x in of], "C0.-", label="of the members" if first else "")
            for seed, found in enumerate(again):
                line = [math.exp(nll) for nll in found["together"]["members"]]
                scores.plot(range(1, len(line) + 1), line, "C7.--", linewidth=1, label="" if seed else "born again")
            scores.set(ylabel="test perplexity")
            gains.set(ylabel="gain of the ensemble, nats")
            gains.axhline(0, color="C7", linewidth=1)
            alike.set(ylabel="top-1 agreement, %")
            for axes in (scores, gains, alike):
                axes.set(xlabel="generation", xticks=list(numbers))
                axes.grid(alpha=0.3)
                axes.legend(fontsize=8)


def main(words: Sequence[str] | None = None, say: Callable[[str], None] = print) -> None:
    command(__doc__ or "", "runs/study", (Scale(), SMALL), Generations, words, say)


if __name__ == "__main__":
    main()
