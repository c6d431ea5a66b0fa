"""What a student loses by learning from sparse targets in place of the whole teacher: perplexity, calibration, gradient bias.

    python -m bench sparse_targets --seeds 1,2,3 --csv bench/results/sparse-targets.csv --plot docs/figures/sparse-targets.png

Text, tokenizer and teacher are the quickstart's with a larger vocabulary (Python's standard library, split by file). Every
student sees the same sequences in the same order from the same initialisation, so a pair of students differs by its targets
alone. Finished students are in the CSV; run again, it goes on with the others.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdfast
from kdfast.cache import CacheReader, CacheWriter
from kdfast.cli.progress import bar
from kdfast.cli.quickstart import read_seeds
from kdfast.cli.quickstart_job import Corpus, Job, Plan
from kdfast.train.models import build_student, load_folder
from kdfast.train.recipe import Model

from .contest import positive

_BINS = 15


@dataclass(frozen=True)
class Method:
    """How a student's targets come about: k likeliest ids, `samples` draws, and what stands for all others.

    k = samples = 0: the whole teacher, or hard labels without a teacher.
    """

    name: str
    k: int = 0
    samples: int = 0
    tail: str = "ghost"

    @property
    def sparse(self) -> bool:
        return self.k + self.samples > 0


METHODS = (
    Method("hard labels"),
    Method("whole teacher"),
    *(Method(f"top {k}", k) for k in (4, 12, 24, 50, 64, 300)),
    *(Method(f"top {k}, renormalised", k, tail="renormalize") for k in (12, 50)),
    *(Method(f"{n} drawn", 0, n, "none") for n in (12, 50)),
    *(Method(f"top {k} and {n} drawn", k, n, "none") for k, n in ((8, 12), (12, 24))),
)


@dataclass(frozen=True)
class Result:
    """One student. bytes: a token's in a cache, all in; ppl, ece on held-out files; steps of 8 x 128 tokens.

    bias, noise: ||E[g] - g_full|| / ||g_full|| of the gradient of the last hidden states of a student that has learned from the
    whole teacher, and the same of one draw around its mean; NaN for the methods that have no targets.
    """

    method: str
    seed: int
    steps: int
    bytes: float = math.nan
    ppl: float = math.nan
    ece: float = math.nan
    bias: float = math.nan
    noise: float = math.nan


@dataclass(frozen=True)
class Side:
    """A model that ends in a head without bias."""

    body: nn.Module
    weight: Tensor

    @classmethod
    def of(cls, model: Any) -> Side:
        return cls(model.model, model.lm_head.weight)

    def hidden(self, ids: Tensor) -> Tensor:
        return self.body(input_ids=ids, use_cache=False).last_hidden_state


class Study:
    """The quickstart's data and teacher, and the teacher's last hidden states on what students see."""

    def __init__(self, out: Path, steps: int, teacher_steps: int) -> None:
        plan = dataclasses.replace(Plan(), vocab_size=16384, teacher_steps=teacher_steps, student_steps=steps)
        self.plan, self.steps = plan, steps
        self.job = Job(out, plan, [1], bar, lambda line: print(line, file=sys.stderr))
        self.job.prepare(fresh=False)
        self.corpus: Corpus = self.job.corpus()
        self.teacher = Side.of(load_folder(self.job.teacher(self.corpus).model, "teacher").eval().requires_grad_(False))
        self.ids = self.job.students_data(self.corpus, steps).ids.long()
        self.states = self._states()

    @torch.no_grad()
    def _states(self) -> Tensor:
        with bar("teacher", len(self.ids), "sequences") as shown:
            parts = []
            for begin in range(0, len(self.ids), 32):
                parts.append(self.teacher.hidden(self.ids[begin : begin + 32]))
                shown.update(begin + len(parts[-1]))
        return torch.cat(parts)

    def targets(self, method: Method, states: Tensor, seed: int) -> kdfast.TopKTargets:
        draws = torch.Generator().manual_seed(seed)
        return kdfast.linear_topk_targets(
            states, self.teacher.weight, method.k, samples=method.samples, generator=draws if method.samples else None
        )

    def loss(self, method: Method, student: Side, hidden: Tensor, rows: slice, seed: int) -> Tensor:
        states, ids = self.states[rows], self.ids[rows]
        if method.sparse:
            targets = self.targets(method, states, seed)
            return kdfast.linear_topk_kd_loss(hidden, student.weight, targets, tail=method.tail)
        if method.name == "whole teacher":
            return kdfast.linear_kd_loss(hidden, student.weight, states, self.teacher.weight)
        return F.cross_entropy((hidden[:, :-1] @ student.weight.T).flatten(0, 1), ids[:, 1:].flatten())

    def train(self, method: Method, seed: int, advance: Callable[[int], None]) -> nn.Module:
        """A student after all steps: AdamW, linear warm-up, cosine to a twentieth."""
        torch.manual_seed(seed)
        model = build_student(Model(model_type="llama", config=self.plan.student), self.plan.vocab_size)
        student, size = Side.of(model), self.plan.batch_size
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.plan.student_lr, betas=(0.9, 0.95), weight_decay=0.01)
        warm = max(self.steps // 15, 1)

        def rate(step: int) -> float:
            return min((step + 1) / warm, 0.05 + 0.95 * (1 + math.cos(math.pi * step / self.steps)) / 2)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        for step in range(self.steps):
            rows = slice(step * size, (step + 1) * size)
            optimizer.zero_grad(set_to_none=True)
            self.loss(method, student, student.hidden(self.ids[rows]), rows, seed * 1_000_003 + step).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            advance(step + 1)
        return model.eval()

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """(perplexity, expected calibration error of the top-1 probability) on the held-out files."""
        side, nll, count = Side.of(model), 0.0, 0
        bins = torch.zeros(_BINS, 3, dtype=torch.float64)  # tokens, confidence, hits
        for ids in self.corpus.test.ids.long().split(16):
            logp = (side.hidden(ids)[:, :-1] @ side.weight.T).log_softmax(-1).flatten(0, 1)
            labels = ids[:, 1:].flatten()
            nll -= float(logp.gather(1, labels[:, None]).double().sum())
            count += len(labels)
            best, at = logp.max(-1)
            confidence = best.exp().double()
            index = (confidence * _BINS).long().clamp(max=_BINS - 1)
            facts = torch.stack([torch.ones_like(confidence), confidence, (at == labels).double()], 1)
            bins.index_add_(0, index, facts)
        return math.exp(nll / count), float((bins[:, 1] - bins[:, 2]).abs().sum() / count)

    def bias(self, method: Method, model: nn.Module, draws: int = 32) -> tuple[float, float]:
        """(bias, noise) of the gradient at a student that has learned from the whole teacher."""
        rows, side = slice(0, self.plan.batch_size), Side.of(model)

        def gradient(which: Method, seed: int) -> Tensor:
            hidden = side.hidden(self.ids[rows]).detach().requires_grad_()
            return torch.autograd.grad(self.loss(which, side, hidden, rows, seed), hidden)[0].double()

        full = gradient(METHODS[1], 0)
        found = torch.stack([gradient(method, seed) for seed in range(draws if method.samples else 1)])
        mean = found.mean(0)
        return float((mean - full).norm() / full.norm()), float((found[0] - mean).norm() / full.norm())

    def bytes_a_token(self, method: Method) -> float:
        """Of a cache of 32 sequences with these targets, all in."""
        with tempfile.TemporaryDirectory() as folder:
            kind = "topk" if not method.samples else "mixed" if method.k else "sampled"
            with CacheWriter(
                Path(folder) / "cache", vocab_size=self.plan.vocab_size, k=method.k + method.samples, teacher="teacher",
                tokenizer_hash="tokenizer", kind=kind, samples=method.samples,
            ) as writer:  # fmt: skip
                for i in range(32):
                    writer.add(self.ids[i], self.targets(method, self.states[i], i))
            return CacheReader(Path(folder) / "cache").info.bytes_per_token


def run(study: Study, methods: Sequence[Method], seeds: Sequence[int], path: Path | None) -> list[Result]:
    """Every student that is not in the file yet; the file is rewritten after each."""
    results = read(path) if path is not None and path.exists() else []
    done = {(r.method, r.seed) for r in results if r.steps == study.steps}
    learned: nn.Module | None = None  # from the whole teacher: where biases are measured
    for seed in seeds:
        for method in methods:
            if (method.name, seed) in done and not (method.name == METHODS[1].name and learned is None):
                continue
            with bar(f"{method.name}, seed {seed}", study.steps, "steps") as shown:
                model = study.train(method, seed, shown.update)
            if method.name == METHODS[1].name and learned is None:
                learned = model
            if (method.name, seed) in done:
                continue
            result = Result(method.name, seed, study.steps, math.nan, *study.evaluate(model))
            if method.sparse:
                bias = study.bias(method, learned if learned is not None else model)
                result = dataclasses.replace(result, bytes=study.bytes_a_token(method), bias=bias[0], noise=bias[1])
            results.append(result)
            print(line(result), flush=True)
            if path is not None:
                write(results, path)
    return results


def line(r: Result) -> str:
    return (
        f"{r.method:<24} seed {r.seed}  {r.bytes:6.1f} bytes  ppl {r.ppl:8.2f}  ECE {r.ece:6.2%}"
        f"  bias {r.bias:.3f}  noise {r.noise:.3f}"
    )


def write(results: Sequence[Result], path: Path) -> None:
    """As CSV, by way of a temporary name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in dataclasses.fields(Result)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(r) for r in results)
    part.replace(path)


def read(path: Path) -> list[Result]:
    """What `write` wrote."""
    with path.open(newline="") as file:
        return [
            Result(row["method"], int(row["seed"]), int(row["steps"]),
                   *(float(row[name]) for name in ("bytes", "ppl", "ece", "bias", "noise")))
            for row in csv.DictReader(file)
        ]  # fmt: skip


def draw(results: Sequence[Result], path: Path) -> None:
    """Perplexity, calibration error and gradient bias against bytes a token; the whole teacher and hard labels as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_method = {m: [r for r in results if r.method == m.name] for m in METHODS}
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.6))
    for axis, name, title in zip(
        axes, ("ppl", "ece", "bias"), ("perplexity", "calibration error (ECE)", "gradient bias"), strict=True
    ):
        for method, of_method in by_method.items():
            values = [getattr(r, name) for r in of_method if not math.isnan(getattr(r, name))]
            if not values:
                continue
            mean, spread = sum(values) / len(values), (min(values), max(values))
            if not method.sparse:
                colour = "#333333" if method == METHODS[1] else "#b9b9b9"
                axis.axhspan(*spread, color=colour, alpha=0.15)
                axis.axhline(mean, color=colour, linewidth=1, label=method.name)
                continue
            colour = "#c0562f" if method.tail == "renormalize" else "#1b6ca8" if not method.samples else "#2e8b57"
            axis.errorbar(of_method[0].bytes, mean, [[mean - spread[0]], [spread[1] - mean]], fmt="o", color=colour, capsize=3)
            axis.annotate(method.name, (of_method[0].bytes, mean), xytext=(4, 4), textcoords="offset points", fontsize=7)
        axis.set(xscale="log", xlabel="bytes a token in the cache", title=title)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=110, format="png")
    pyplot.close(figure)
    part.replace(path)


def main(argv: list[str]) -> int:
    p = argparse.ArgumentParser(
        prog="python -m bench sparse_targets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--out", type=Path, default=Path("runs/sparse-targets"), help="tokenizer, text and teacher (default %(default)s)"
    )
    p.add_argument("--steps", type=positive, default=300, help="steps of a student (default 300)")
    p.add_argument("--teacher-steps", type=positive, default=450, help="steps of the teacher (default 450)")
    p.add_argument("--seeds", type=read_seeds, default=[1], help="comma-separated (default 1)")
    p.add_argument("--method", action="append", choices=[m.name for m in METHODS], help="may be repeated (default all)")
    p.add_argument("--csv", metavar="FILE", type=Path, help="write every student to FILE; students in it are not trained again")
    p.add_argument("--plot", metavar="FILE", type=Path, help="draw what there is (PNG)")
    args = p.parse_args(argv)
    methods = [m for m in METHODS if args.method is None or m.name in args.method]
    results = run(Study(args.out, args.steps, args.teacher_steps), methods, args.seeds, args.csv)
    if args.plot:
        draw(results, args.plot)
    return 0
