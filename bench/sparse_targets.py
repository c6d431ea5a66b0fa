"""What a student loses by learning from sparse targets in place of the whole teacher: perplexity, calibration, gradient bias.

    kdfast bench sparse_targets --seeds 1,2,3 --csv bench/results/sparse-targets.csv --plot docs/figures/sparse-targets.png

Every kind of targets is captured once to a real cache, which the students of all seeds read. Finished students are in the CSV;
run again, it goes on with the others, and several processes may share the work (`--seeds 1` beside `--seeds 2`).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdfast.cli.progress import bar
from kdfast.cli.quickstart import read_seeds
from kdfast.files import locked, written

from .contest import positive
from .sparse_study import HARD, WHOLE, Method, Study

METHODS = (
    WHOLE,
    HARD,
    Method("hard labels, two epochs", hard=1.0, epochs=2),
    *(
        method
        for share, hard in (("half labels, half", 0.5), ("a tenth labels,", 0.1))
        for method in (
            Method(f"{share} whole teacher", hard=hard),
            Method(f"{share} top 1 and 32 drawn", 1, 32, "none", hard=hard, max_kl=1e-3),
            Method(f"{share} top 24", 24, hard=hard),
        )
    ),
    Method("top 1 and 32 drawn", 1, 32, "none", max_kl=1e-3),
    Method("whole teacher, two epochs", epochs=2),
    Method("top 1 and 32 drawn, two epochs", 1, 32, "none", max_kl=1e-3, epochs=2),
    Method("top 4 and 22 drawn", 4, 22, "none", max_kl=1e-3),
    Method("top 24", 24),
    *(Method(f"top {k}", k) for k in (4, 12, 50, 64, 300)),
    *(Method(f"top {k}, renormalised", k, tail="renormalize") for k in (12, 50)),
    *(Method(f"{n} drawn", 0, n, "none") for n in (12, 50)),
    Method("top 12 and 50 drawn", 12, 50, "none"),
)


@dataclass(frozen=True)
class Result:
    """One student. bytes: a token's in the cache, all in; ppl, ece on held-out files; tokens: what it was trained on.

    bias, noise: ||E[g] - g_full|| / ||g_full|| of the gradient of the last hidden states of a student that has learned from the
    whole teacher, and the same of one draw around its mean; NaN for the methods that have no targets.
    """

    method: str
    seed: int
    steps: int
    tokens: int
    bytes: float = math.nan
    ppl: float = math.nan
    ece: float = math.nan
    bias: float = math.nan
    noise: float = math.nan


def run(study: Study, methods: Sequence[Method], seeds: Sequence[int], path: Path | None) -> list[Result]:
    """Every student that is not in the file yet; the file is rewritten after each."""
    with locked(study.out):
        study.capture(methods)
    results = read(path) if path is not None else []
    done = {(r.method, r.seed) for r in results if r.steps == study.steps}
    for seed in seeds:
        for method in methods:
            if (method.name, seed) in done:
                continue
            with bar(f"{method.name}, seed {seed}", study.steps * method.epochs, "steps") as shown:
                model = study.train(method, seed, shown.update)
            if method == WHOLE:
                study.keep(model)
            result = Result(method.name, seed, study.steps, study.ids.numel() * method.epochs, math.nan, *study.evaluate(model))
            if method.sparse:
                bias, noise = study.bias(method)
                size = study.reader(method).info.bytes_per_token
                result = dataclasses.replace(result, bytes=size, bias=bias, noise=noise)
            print(line(result), flush=True)
            results = record(result, path) if path is not None else [*results, result]
    return results


def line(r: Result) -> str:
    return (
        f"{r.method:<36} seed {r.seed}  {r.bytes:6.1f} bytes  ppl {r.ppl:8.2f}  ECE {r.ece:6.2%}"
        f"  bias {r.bias:.3f}  noise {r.noise:.3f}"
    )


def record(result: Result, path: Path) -> list[Result]:
    """The file's results with one more, of several processes one at a time; written by way of a temporary name."""
    with locked(path.parent):
        results = [*read(path), result]
        with written(path) as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in dataclasses.fields(Result)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(dataclasses.asdict(r) for r in results)
    return results


def read(path: Path) -> list[Result]:
    """What `record` wrote; nothing where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            Result(row["method"], *(int(row[name]) for name in ("seed", "steps", "tokens")),
                   *(float(row[name]) for name in ("bytes", "ppl", "ece", "bias", "noise")))
            for row in csv.DictReader(file)
        ]  # fmt: skip


def table(results: Sequence[Result]) -> str:
    """Means and spreads over the seeds, as Markdown; perplexities against the whole teacher's students of the same seeds."""
    lines = ["| targets | bytes a token | seeds | perplexity | of the whole teacher's | ECE | bias | noise |", "|---" * 8 + "|"]
    for method in METHODS:
        best = next(m for m in METHODS if not m.sparse and (m.hard, m.epochs) == (method.hard % 1, method.epochs))
        whole = {r.seed: r.ppl for r in results if r.method == best.name}
        mine = [r for r in results if r.method == method.name]
        if not mine:
            continue
        ppl, ece = [r.ppl for r in mine], statistics.fmean(r.ece for r in mine)
        paired = [r.ppl / whole[r.seed] - 1 for r in mine if r.seed in whole]
        first = mine[0]
        cells = (
            method.name,
            _cell(first.bytes, ".1f"),
            len(mine),
            f"{statistics.fmean(ppl):.2f} ({min(ppl):.2f} to {max(ppl):.2f})",
            f"{statistics.fmean(paired):+.2%}" if paired else "",
            f"{ece:.2%}",
            _cell(first.bias, ".2f"),
            _cell(first.noise, ".2f"),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _cell(x: float, form: str) -> str:
    return "" if math.isnan(x) else format(x, form)


def draw(results: Sequence[Result], path: Path) -> None:
    """Perplexity, calibration error and gradient bias against bytes a token, of students that saw the sequences once
    and nothing but targets; the whole teacher and hard labels as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [m for m in METHODS if m.epochs == 1 and m.hard in (0, 1)]
    by_method = {m: [r for r in results if r.method == m.name] for m in shown}
    text: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7}
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
                colour = "#b9b9b9" if method.hard else "#333333"
                axis.axhspan(*spread, color=colour, alpha=0.15)
                axis.axhline(mean, color=colour, linewidth=1, label=method.name)
                continue
            colour = "#c0562f" if method.tail == "renormalize" else "#1b6ca8" if not method.samples else "#2e8b57"
            bars = [[max(mean - spread[0], 0)], [max(spread[1] - mean, 0)]]  # a mean of equal numbers may be rounded past them
            axis.errorbar(of_method[0].bytes, mean, bars, fmt="o", color=colour, capsize=3)
            axis.annotate(method.name, (of_method[0].bytes, mean), xytext=(4, 4 if method.k != 4 else -9), **text)
        sizes = [r.bytes for r in results if not math.isnan(r.bytes)]
        if sizes:  # room on the right for the last names
            wide = max(sizes) > 2 * min(sizes)
            axis.set_xscale("log" if wide else "linear")
            right = max(sizes) * (max(sizes) / min(sizes)) ** 0.5 if wide else max(sizes) + (max(sizes) - min(sizes) + 1) * 1.2
            axis.set_xlim(min(sizes) * 0.98, right)
        axis.set(xlabel="bytes a token in the cache", title=title)
        if name == "ppl":
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    with written(path) as part:
        figure.savefig(part, dpi=110, format="png")
    pyplot.close(figure)


def main(argv: list[str]) -> int:
    p = argparse.ArgumentParser(
        prog="kdfast bench sparse_targets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--out", type=Path, default=Path("runs/sparse-targets"), help="tokenizer, text and teacher (default %(default)s)"
    )
    p.add_argument("--steps", type=positive, default=800, help="steps of a student (default 800)")
    p.add_argument("--batch-size", type=positive, default=16, help="sequences of 128 tokens a step (default 16)")
    p.add_argument("--teacher-steps", type=positive, default=1800, help="steps of the teacher (default 1800)")
    p.add_argument("--seeds", type=read_seeds, default=[1], help="comma-separated (default 1)")
    p.add_argument("--method", action="append", choices=[m.name for m in METHODS], help="may be repeated (default all)")
    p.add_argument("--csv", metavar="FILE", type=Path, help="write every student to FILE; students in it are not trained again")
    p.add_argument("--plot", metavar="FILE", type=Path, help="draw what there is (PNG)")
    args = p.parse_args(argv)
    methods = [m for m in METHODS if args.method is None or m.name in args.method]
    study = Study(args.out, args.steps, args.batch_size, args.teacher_steps)
    results = run(study, methods, args.seeds, args.csv)
    print(table(results))
    if args.plot:
        draw(results, args.plot)
    return 0
