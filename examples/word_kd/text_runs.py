"""What the studies on text share: the parts of the corpus, pieces that are kept when done, scores, tables, pictures."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from kdfast import files
from kdfast.cli.progress import bar
from kdfast.extras import need
from kdfast.models.load import from_function, load_folder, load_weights
from kdfast.text.files import list_files, split_files
from kdfast.text.tokenizers import load_tokenizer
from kdfast.train import Recipe, distill, evaluate
from kdfast.train.tasks.causal_lm import CausalLM

HERE = Path(__file__).resolve().parent
SEEDS = (1, 2, 3)
#: Nats that twice the steps have to gain; fewer, and validation has stopped improving.
FLAT = 0.01
#: Which files are in the part that is trained on, and which held-out ones are looked at while training.
SPLIT_SEED = 1


@dataclass(frozen=True)
class Text:
    """The parts of the corpus.

    share: of the files that `prepare.py` trains on. files: most in each part. length: tokens of a row.
    """

    share: float = 1 / 3
    files: int | None = None
    length: int = 128


#: What a study reads unless it says otherwise: little enough that models come to the end of their way within an hour.
THIRD = Text()


@dataclass(frozen=True)
class Piece:
    """Something to be done once. `seconds` is a guess, by which the time that is left is told."""

    name: str
    seconds: float
    work: Callable[[], dict[str, Any]]


class Study:
    """Pieces in the folder `out`, kept in its `study.json` when they are done; runs in `out/runs`.

    Args:
        corpus: folder that `prepare.py` made, or makes now. changes: of every recipe.
    """

    def __init__(
        self, out: Path, corpus: Path, text: Text, changes: Sequence[str] = (), say: Callable[[str], None] = print
    ) -> None:
        self.out, self.changes, self.say = out, list(changes), say
        self.file = out / "study.json"
        self.kept: dict[str, Any] = json.loads(self.file.read_text()) if self.file.is_file() else {}
        made = {"corpus": str(corpus.resolve()), "text": dataclasses.asdict(text), "changes": self.changes}
        if self.kept.setdefault("of", made) != made:
            raise SystemExit(f"--out: {out} holds a study of other sizes or of another corpus; name another folder")
        self.tokenizer = corpus / "tokenizer.json"
        if not self.tokenizer.is_file():
            subprocess.run([sys.executable, str(HERE / "prepare.py"), str(corpus)], check=True)
        self.parts = {name: out / "text" / name for name in ("train", "validation", "test")}
        if not all(folder.is_dir() for folder in self.parts.values()):
            _split(corpus, self.parts, text)
        self.recipe_changes = [
            f"tokenizer={self.tokenizer}", f"data.train={self.parts['train']}", f"data.validation={self.parts['validation']}",
            "data.glob='*.py'", f"data.sequence_length={text.length}", "tracker=none", "keep=1",
        ]  # fmt: skip
        data = CausalLM.Data(validation=(str(self.parts["test"]),), glob="*.py", sequence_length=text.length)
        self.test = CausalLM(None, data).open(*load_tokenizer(self.tokenizer), out / "text" / "rows", False).validation

    def once(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `work` returned when this piece was done, now or before."""
        if name not in self.kept:
            began = time.perf_counter()
            self.kept[name] = {**work(), "whole_s": round(time.perf_counter() - began, 1)}
            files.write_json(self.file, self.kept)
        return dict(self.kept[name])

    def carry_out(self, pieces: Sequence[Piece], report: Callable[[], None]) -> None:
        """What is not done yet, in turn; `report` after each."""
        for number, piece in enumerate(pieces, 1):
            if piece.name not in self.kept:
                self.say(f"{number} of {len(pieces)}, {piece.name}; {self.time_left(pieces)}")
                self.once(piece.name, piece.work)
                report()
        report()

    def time_left(self, pieces: Sequence[Piece]) -> str:
        """By the guesses, and by how far those were off so far."""
        done = [piece for piece in pieces if piece.name in self.kept]
        taken, guessed = sum(self.kept[piece.name]["whole_s"] for piece in done), sum(piece.seconds for piece in done)
        left = sum(piece.seconds for piece in pieces if piece not in done) * (taken / guessed if guessed else 1.0)
        return f"about {max(round(left / 60), 1)} min left"

    def run(self, recipe: Path, name: str, *changes: str, test: bool = True) -> dict[str, Any]:
        """Trains what `recipe` says with `changes`; scores, on the test files unless it is a try."""
        found = self._run(recipe, name, *changes)
        return self._tidied(name, {**found, "test": self.score(self.model(name))} if test else found)

    def _run(self, recipe: Path, name: str, *changes: str) -> dict[str, Any]:
        wanted = [*self.recipe_changes, f"out={self.folder(name)}", *changes, *self.changes]
        result = distill(Recipe.load(recipe, wanted), bar=bar, say=self.say)
        assert result.evaluation is not None
        size = json.loads((result.out / "summary.json").read_text())["parameters"]
        return {"validation": result.evaluation["nll"], "steps": result.steps, "seconds": result.seconds, "parameters": size}

    def until_flat(self, recipe: Path, name: str, steps: int, most: int, *changes: str) -> dict[str, Any]:
        """A run that is gone on with to twice its steps as long as that gains `FLAT` nats; the best of its lengths."""
        lengths: list[dict[str, Any]] = []
        while True:
            work = partial(self._length, recipe, name, steps, *changes)
            lengths.append(self.once(f"{name}, {steps} steps", work))
            gained = lengths[-2]["validation"] - lengths[-1]["validation"] if len(lengths) > 1 else math.inf
            if gained < FLAT or 2 * steps > most:
                break
            steps *= 2
        best = min(lengths, key=lambda length: length["validation"])
        scores = {**best, "test": self.score(self.model(f"{name}-{best['steps']}")), "flat": gained < FLAT}
        return self._tidied(name, {**scores, "model": f"{name}-{best['steps']}"})

    def _length(self, recipe: Path, name: str, steps: int, *changes: str) -> dict[str, Any]:
        """The run up to `steps`, and its model as it is then."""
        found = self._run(recipe, name, f"steps={steps}", *changes)
        copy = self.folder(f"{name}-{steps}")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.folder(name) / "model", copy / "model")
        shutil.copyfile(self.folder(name) / "recipe.yaml", copy / "recipe.yaml")
        return found

    def _tidied(self, name: str, found: dict[str, Any]) -> dict[str, Any]:
        """`found`, after what only an unfinished run needs is gone."""
        for what in ("checkpoints", "data"):
            for folder in list(self.folder(name).rglob(what)):
                shutil.rmtree(folder)
        return found

    def folder(self, name: str) -> Path:
        return self.out / "runs" / name

    def model(self, name: str) -> nn.Module:
        """The student of a run."""
        folder = self.folder(name)
        spec = Recipe.load(folder / "recipe.yaml").student
        if not spec.function:
            return load_folder(folder / "model", "model", kind="causal_lm").eval()
        model = from_function(spec.function, spec.arguments, "student.function")
        load_weights(model, folder / "model", "model")
        return model.eval()

    def score(self, model: nn.Module) -> float:
        """Nats a token of the test files."""
        return float(evaluate(model, self.test)["nll"])

    def best(self, names: Sequence[str]) -> str:
        """The piece whose validation loss is least."""
        return min(names, key=lambda name: self.kept[name]["validation"])

    def points(self, name: str) -> list[dict[str, Any]]:
        """The evaluations of a run: step, seconds, validation_ppl and the others."""
        file = self.folder(name) / "metrics.jsonl"
        return [row for row in files.read_lines(file) if "validation_ppl" in row] if file.is_file() else []


def command(
    description: str, out: str, scales: tuple[Any, Any], made: Callable[[Study, Any, list[int]], Any],
    words: Sequence[str] | None, say: Callable[[str], None],
) -> None:  # fmt: skip
    """The command line of a study.

    Args:
        description: its first line is printed. out: the default folder. scales: of the study and of `--small`; each has the
            `text` and the `changes` of a `Study`. made: from that, the scale and the seeds, what is `run()`.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument(
        "--corpus", type=Path, default=Path("corpus"), help="made by word_kd's prepare.py, now if it is not there"
    )
    parser.add_argument("--seeds", type=seed_of, nargs="+", default=list(SEEDS))
    parser.add_argument("--small", action="store_true", help="the same road in some minutes")
    args = parser.parse_args(words)
    scale = scales[args.small]
    made(Study(args.out, args.corpus, scale.text, scale.changes, say), scale, args.seeds).run()
    say((args.out / "study.md").read_text(encoding="utf-8"))


def _split(corpus: Path, parts: dict[str, Path], text: Text) -> None:
    """Copies the files of each part; what `prepare.py` holds out is half for validation and half for the test."""
    train = split_files(list_files([corpus / "train"], "*.py"), [text.share], SPLIT_SEED)[0]
    test, validation = split_files(list_files([corpus / "validation"], "*.py"), [0.5], SPLIT_SEED)
    for name, found in (("train", train), ("validation", validation), ("test", test)):
        with files.written_folder(parts[name]) as part:
            for file in found[: text.files]:
                shutil.copyfile(file, part / file.name)


def seed_of(text: str) -> int:
    """Of an argument: 1 or more; 0 is the one that choices are made with."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Mean and standard deviation, which has no sign."""
    deviation = f" ± {statistics.stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{deviation}"


def perplexities(scores: Sequence[float]) -> str:
    return spread([math.exp(score) for score in scores])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)) + "\n"


@contextlib.contextmanager
def picture(file: Path, panels: int) -> Iterator[Sequence[Any]]:
    """Axes side by side, saved after the block."""
    figure = need("matplotlib.figure", extra="train", what=file.name).Figure(figsize=(6 * panels, 4.3), layout="constrained")
    yield list(figure.subplots(1, panels, squeeze=False)[0])
    with files.written(file) as part:
        figure.savefig(part, format="png", dpi=140)


def label_perplexities(axes: Any, x: str, logarithmic: bool = False) -> None:
    """Validation perplexity over `x`, with numbers that are read at a glance."""
    axes.set(xlabel=x, ylabel="validation perplexity", yscale="log", xscale="log" if logarithmic else "linear")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    if logarithmic:
        ticker = need("matplotlib.ticker", extra="train", what="a picture")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    axes.tick_params(which="both", labelsize=8)
    axes.grid(alpha=0.3, which="both")
    if axes.get_legend_handles_labels()[0]:  # nothing is finished yet
        axes.legend(fontsize=8)
