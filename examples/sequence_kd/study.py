"""The study behind docs/results.md: teacher, then every way of distilling it into the one-layer decoder, over seeds.

python study.py --data MULTI30K --out runs/study [--seeds 1 2 3] [--only plain word sequence] [--small]

Everything lands under OUT: the runs, the hypotheses, the cache, `study.json` (one entry for each finished piece), `study.md`
(the table) and `curves.png`. Stopped or killed and started again it goes on where it was; once the teacher is there, two may
run at once in one folder, each with ways of its own. Every way gets as many steps, and as many tries at its learning rate and
weights: short runs of seed 0, chosen by greedy BLEU on the validation set. Test figures are looked at by nobody but the table.
`--small` is the same road in minutes, too small for a claim.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from prepare import prepare

from kdfast import files
from kdfast.cache import build
from kdfast.cli.progress import bar
from kdfast.extras import need
from kdfast.models.generate import Decoding, write
from kdfast.models.load import load_folder
from kdfast.text import TextData
from kdfast.text.tokenizers import load_tokenizer
from kdfast.train import Recipe, distill

HERE = Path(__file__).resolve().parent
LABELS = ("method={name: supervised}", "teacher=null")


@dataclass(frozen=True)
class Scale:
    """Sizes; `changes` are made to every recipe."""

    pairs: int = 29000
    teacher_steps: int = 6000
    steps: int = 3000
    tuning_steps: int = 1500
    scored: int = 1000
    changes: tuple[str, ...] = ()


SMALL = Scale(
    300, 30, 12, 6, 24,
    ("eval_every=6", "save_every=6", "batch_size=32", "eval_sequences=24", "data.sequence_length=16",
     "student.config.d_model=64", "alignment=false"),  # so little data and a teacher of 30 steps: nothing fits yet
)  # fmt: skip


@dataclass(frozen=True)
class Way:
    """How a student is trained: overrides of `recipe.yaml`, two settings to choose from, and whose choice is taken instead."""

    overrides: tuple[str, ...]
    settings: tuple[str, ...] = ()
    like: str | None = None
    longer: int = 1


RATES = ("2.0e-3", "4.0e-3", "8.0e-3")
SMOOTHED = ("method.label_smoothing=0.0", "method.label_smoothing=0.1")
HALF, UNLABELLED = "data.train=corpus/half.jsonl", "data.train=corpus/half_unlabelled.jsonl"
WAYS = {
    "plain": Way(LABELS, SMOOTHED),
    # Chosen from the cache, whose steps cost half of those beside the teacher.
    "word_cached": Way(
        ("method={name: word_kd}", "teacher={cache: cache}", "data.train=[]"),
        ("method.hard_weight=0.0", "method.hard_weight=0.5"),
    ),
    "word": Way(("method={name: word_kd}",), like="word_cached"),
    "sequence": Way((), SMOOTHED),
    "sequence_nbest": Way(("method.nbest=5",), like="sequence"),
    "sequence_word": Way((), ("method.soft_weight=0.5", "method.soft_weight=1.0")),
    "interpolation": Way(("method.interpolation=true",), SMOOTHED),
    "plain_longer": Way(LABELS, like="plain", longer=3),
    "half_plain": Way((*LABELS, HALF), like="plain"),
    "half_sequence": Way((HALF, "method.decoded=decoded-half"), like="sequence"),
    # The other half without its targets, at which `sequence` never looks: the same run, done only when asked for.
    "half_unlabelled": Way((UNLABELLED, "data.unlabelled=true", "method.decoded=decoded-unlabelled"), like="sequence"),
}
USUAL = [name for name in WAYS if name != "half_unlabelled"]


class Study:
    """One study in the current folder."""

    def __init__(self, scale: Scale, seeds: Sequence[int], ways: Sequence[str], say: Callable[[str], None] = print) -> None:
        self.scale, self.seeds, self.ways, self.say = scale, list(seeds), list(ways), say
        self.file = Path("study.json")

    @property
    def kept(self) -> dict[str, Any]:
        """Every piece that is done, by whichever of the studies in this folder."""
        return dict(json.loads(self.file.read_text())) if self.file.is_file() else {}

    def once(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `work` returned when this piece was done, now or before."""
        if name not in self.kept:
            began = time.perf_counter()
            found = {**work(), "whole_s": round(time.perf_counter() - began, 1)}
            files.write_json(self.file, {**self.kept, name: found})
        return dict(self.kept[name])

    def run(self) -> None:
        teacher = self.once("teacher", self.teacher)
        self.say(f"teacher: {teacher['test_greedy']:.2f} greedy, {teacher['test_beam5']:.2f} beam 5 on test")
        chosen = [WAYS[name].like or name for name in self.ways]
        for name in dict.fromkeys(chosen):
            self.once(f"choice {name}", lambda name=name: self.choose(name))
        left = [(name, seed) for seed in self.seeds for name in self.ways]
        for name, seed in left:
            self.say(f"{name}, seed {seed}; {self.time_left(left)}")
            found = self.once(f"{name} {seed}", lambda name=name, seed=seed: self.student(name, seed))
            self.say(f"{name}, seed {seed}: test {found['test_greedy']:.2f} greedy, {found['test_beam5']:.2f} beam 5")
            self.report()

    def time_left(self, pieces: Sequence[tuple[str, int]]) -> str:
        """By the step time of the students that are done."""
        kept = self.kept
        done = [(WAYS[n].longer, kept[f"{n} {s}"]["whole_s"]) for n, s in pieces if f"{n} {s}" in kept]
        open_ = [WAYS[n].longer for n, s in pieces if f"{n} {s}" not in kept]
        if not done:
            return f"{len(open_)} students to go"
        each = sum(s for _, s in done) / sum(length for length, _ in done)
        return f"{len(open_)} students to go, about {max(round(each * sum(open_) / 60), 1)} min"

    def teacher(self) -> dict[str, Any]:
        changes = [f"steps={self.scale.teacher_steps}", "out=teacher", *self.scale.changes]
        if not Path("teacher/result.json").is_file():
            distill(Recipe.load(HERE / "teacher.yaml", changes), bar=bar, say=self.say)
        return {**json.loads(Path("teacher/result.json").read_text()), **self.scores(Path("teacher/model"))}

    def cache(self) -> dict[str, Any]:
        corpus = TextData(paths=("corpus/train.jsonl",), sequence_length=64)
        built = build("teacher/model", corpus, "cache", k=64, temperatures=(1.0, 2.0), batch_size=64, say=self.say)
        return {"bytes_per_token": built.info.bytes_per_token, "tokens": built.info.tokens}

    def choose(self, name: str) -> dict[str, Any]:
        """Three rates with the first setting, then the second setting at the best of them."""
        first, second = WAYS[name].settings
        found = {lr: self.tried(name, lr, first) for lr in RATES}
        lr = max(found, key=lambda lr: found[lr])
        other = self.tried(name, lr, second)
        tries = {f"{rate}, {first}": bleu for rate, bleu in found.items()} | {f"{lr}, {second}": other}
        return {"settings": [f"optimizer.lr={lr}", second if other > found[lr] else first], "tries": tries}

    def tried(self, name: str, lr: str, setting: str) -> float:
        """Greedy BLEU on the validation set."""
        settings = [f"optimizer.lr={lr}", setting]
        bleu = self.once(f"try of {name}: {' '.join(settings)}", lambda: self.try_(name, settings))["validation_greedy"]
        self.say(f"{name}, {', '.join(settings)}: validation {bleu:.2f} greedy")
        return float(bleu)

    def try_(self, name: str, settings: Sequence[str]) -> dict[str, Any]:
        out = self.train(name, 0, settings, self.scale.tuning_steps, f"tries/{name}-{'-'.join(settings)}")
        return self.scores(out / "model", test=False)

    def student(self, name: str, seed: int) -> dict[str, Any]:
        settings = self.kept[f"choice {WAYS[name].like or name}"]["settings"]
        out = self.train(name, seed, settings, self.scale.steps * WAYS[name].longer, f"students/{name}-{seed}")
        return {**json.loads((out / "result.json").read_text()), **self.scores(out / "model")}

    def train(self, name: str, seed: int, settings: Sequence[str], steps: int, out: str) -> Path:
        if "cached" in name:
            self.once("cache", self.cache)
        changes = ["teacher.path=teacher/model", "method.decoded=decoded", f"steps={steps}", f"seed={seed}", f"out={out}"]
        recipe = Recipe.load(HERE / "recipe.yaml", [*changes, *self.scale.changes, *WAYS[name].overrides, *settings])
        return distill(recipe, bar=bar, say=self.say).out

    def scores(self, model: Path, test: bool = True) -> dict[str, Any]:
        """BLEU against the sentences as they are, and how fast they are written."""
        found: dict[str, Any] = {}
        for split in ("validation", "test") if test else ("validation",):
            for name, beams in (("greedy", 1), ("beam5", 5)) if test else (("greedy", 1),):
                bleu, seconds, number = translate(model, split, beams, self.scale.scored)
                found |= {f"{split}_{name}": bleu, f"{split}_{name}_per_s": round(number / seconds, 2)}
        found["parameters"] = sum(p.numel() for p in load_folder(model, "model", kind="seq2seq").parameters())
        return found

    def report(self) -> None:
        """`study.md` and `curves.png`, of what is there so far."""
        rows = [
            "| | greedy | beam 5 | beam - greedy | validation greedy | beam 5 | sentences/s greedy, beam 5 | minutes |",
            "|" + "---|" * 8,
        ]
        kept = self.kept
        groups = {"teacher": [kept["teacher"]]}
        groups |= {name: [kept[f"{name} {s}"] for s in self.seeds if f"{name} {s}" in kept] for name in WAYS}
        for name, found in groups.items():
            if found:
                gap = [x["test_beam5"] - x["test_greedy"] for x in found]
                speed = " / ".join(f"{statistics.mean(x[f'test_{b}_per_s'] for x in found):.0f}" for b in ("greedy", "beam5"))
                columns = [spread([x[key] for x in found]) for key in ("test_greedy", "test_beam5")]
                columns += [spread(gap), *(spread([x[f"validation_{b}"] for x in found]) for b in ("greedy", "beam5")), speed]
                rows.append(f"| {name} | {' | '.join(columns)} | {statistics.mean(x['seconds'] for x in found) / 60:.1f} |")
        choices = []
        for name, found in ((key.removeprefix("choice "), found) for key, found in kept.items() if key.startswith("choice ")):
            tried = "; ".join(f"{what} {bleu:.2f}" for what, bleu in found["tries"].items())
            choices.append(f"- {name}: {', '.join(found['settings'])} (validation BLEU, greedy: {tried})")
        files.write_text("study.md", "\n".join([*rows, "", "Chosen on validation:", "", *choices]) + "\n")
        self.draw()

    def draw(self) -> None:
        """BLEU of every seed, and how the students came to it."""
        plt = need("matplotlib.pyplot", extra="train", what="curves.png")
        kept = self.kept
        shown = [name for name in USUAL if any(f"{name} {seed}" in kept for seed in self.seeds)]
        figure, (bleu, curves) = plt.subplots(1, 2, figsize=(11, 4.3), layout="constrained")
        for number, name in enumerate(shown):
            for i, seed in enumerate(seed for seed in self.seeds if f"{name} {seed}" in kept):
                found, color, first = kept[f"{name} {seed}"], f"C{number}", not i
                beside = number + 0.12 * (i - 1)
                bleu.plot(beside, found["test_greedy"], "o", color=color)
                bleu.plot(beside, found["test_beam5"], "^", color=color, fillstyle="none")
                rows = files.read_lines(f"students/{name}-{seed}/metrics.jsonl")
                points = [(row["step"], row["validation_ppl"]) for row in rows if "validation_ppl" in row]
                curves.plot(*zip(*points, strict=True), color=color, label=name if first else "")
        for key, line, mark, what in (("test_greedy", "-", "o", "greedy"), ("test_beam5", "--", "^", "beam 5")):
            bleu.axhline(kept["teacher"][key], color="C7", linestyle=line, linewidth=1, label=f"the teacher, {what}")
            bleu.plot([], [], mark, color="C7", fillstyle="full" if mark == "o" else "none", label=f"a student, {what}")
        bleu.set_xticks(range(len(shown)), [name.replace("_", "\n") for name in shown], fontsize=8, rotation=35)
        bleu.set(ylabel="BLEU on the test set")
        curves.set(xlabel="steps", ylabel="validation perplexity of the gold translations", yscale="log")
        curves.yaxis.set_major_formatter("{x:g}")
        curves.yaxis.set_minor_formatter("{x:g}")
        for axes in (bleu, curves):
            axes.grid(alpha=0.3, which="both")
        bleu.legend(fontsize=8)
        curves.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
        with files.written("curves.png") as part:
            figure.savefig(part, format="png", dpi=110)
        plt.close(figure)


def spread(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def translate(folder: Path, split: str, beams: int, most: int, batch_size: int = 64) -> tuple[float, float, int]:
    """(BLEU, seconds, sentences) of a model on the first `most` pairs of a split, sorted by length."""
    sacrebleu = need("sacrebleu", extra="bleu", what="BLEU")
    rows = [json.loads(line) for line in Path(f"corpus/{split}.jsonl").read_text(encoding="utf-8").splitlines()][:most]
    tokenizer, model = load_tokenizer(folder)[0], load_folder(folder, "model", kind="seq2seq").eval()
    sources = [torch.tensor(tokenizer.encode(row["source"]).ids) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: -len(sources[i]))
    said: dict[int, str] = {}
    began = time.perf_counter()
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        ids = torch.nn.utils.rnn.pad_sequence([sources[i] for i in part], batch_first=True)
        lengths = torch.tensor([len(sources[i]) for i in part])
        inputs = {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}
        groups = write(model, inputs, Decoding(beams, 1, 64), [0], scores=False)
        said |= {i: tokenizer.decode(group[0].ids.tolist()) for i, group in zip(part, groups, strict=True)}
    seconds = time.perf_counter() - began
    bleu = sacrebleu.corpus_bleu([said[i] for i in range(len(rows))], [[row["target"] for row in rows]])
    return float(bleu.score), seconds, len(rows)


def corpus(data: Path, pairs: int) -> None:
    """The corpus, its first `pairs`, and what the half of it looks like whose targets are known."""
    if Path("corpus/half_unlabelled.jsonl").is_file():
        return
    prepare(data, Path("corpus"))
    lines = Path("corpus/train.jsonl").read_text(encoding="utf-8").splitlines()[:pairs]
    half = len(lines) // 2
    sources = [json.dumps({"source": json.loads(line)["source"]}, ensure_ascii=False) for line in lines[half:]]
    for name, part in (("train", lines), ("half", lines[:half]), ("half_unlabelled", [*lines[:half], *sources])):
        files.write_text(f"corpus/{name}.jsonl", "\n".join(part) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("KDFAST_DATA"), help="Multi30k's files (KDFAST_DATA)")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=USUAL, help="which ways")
    parser.add_argument("--small", action="store_true", help="the same road in minutes")
    args = parser.parse_args()
    if args.data is None:
        parser.error("--data: expected the folder of Multi30k, got none; set it or KDFAST_DATA")
    data, scale = Path(args.data).resolve(), SMALL if args.small else Scale()
    args.out.mkdir(parents=True, exist_ok=True)
    os.chdir(args.out)
    corpus(data, scale.pairs)
    Study(scale, args.seeds, args.only).run()
    print(Path("study.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
