"""docs/performance.md from the committed results: every mark, what was measured, on what, at which commit.

    kdfast bench performance --write docs/performance.md

A mark without a measurement says "not measured". `kdfast bench check` holds new results against these.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .report import Row, between_marks, interval, read_csv

RESULTS = Path(__file__).parent / "results"
#: Written by `bench curves` and `bench sparse_targets`.
_OTHERS = ("cpu-curves.csv", "issue-first.csv", "issue.csv", "sparse-targets.csv")
MARKS = "<!-- performance: begin -->", "<!-- performance: end -->"

Value = Callable[[Sequence[Row]], float]


@dataclass(frozen=True)
class Mark:
    """What is to be reached: `value` of the rows of one case is at least (or at most) `wanted`."""

    work: str
    against: str
    case: tuple[str, str, str]  # op, dtype, the beginning of the shape
    wanted: float
    value: Value
    at_most: bool = False
    unit: str = "x"
    device: str = "cpu"

    def met(self, found: float) -> bool:
        return found <= self.wanted if self.at_most else found >= self.wanted

    @property
    def text(self) -> str:
        return f"{'at most' if self.at_most else 'at least'} {self.wanted:g}{self.unit}"


def slower(*names: str, than: str = "kdfast") -> Value:
    """How many times as long the fastest of the contestants whose names begin so takes, by their ratios to kdfast."""

    def value(rows: Sequence[Row]) -> float:
        times = [r.time_ratio for r in rows if r.contestant.startswith(names) and not math.isnan(r.time_ratio)]
        own = [r.time_ratio for r in rows if r.contestant == than]
        return min(times) / own[0] if times and own else math.nan

    return value


def times_of(name: str, of: str = "kdfast") -> Value:
    """kdfast's time in units of another's."""
    other = slower(name, than=of)
    return lambda rows: 1 / other(rows)


def million_tokens_a_second(contestant: str) -> Value:
    """Of a row whose time is milliseconds a million tokens."""
    return lambda rows: next((1e3 / r.median_ms for r in rows if r.contestant == contestant), math.nan)


def bytes_a_token(rows: Sequence[Row]) -> float:
    """What the notes of the cache's rows say."""
    found = (re.search(r"([\d.]+) bytes a token", r.note) for r in rows)
    return next((float(m[1]) for m in found if m), math.nan)


def share(rows: Sequence[Row]) -> float:
    """kdfast's attained rate over the limit measured in the same run."""
    return next((r.limit_share for r in rows if r.contestant == "kdfast"), math.nan)


def marks() -> list[Mark]:
    """What is to be reached, in the order of the page."""
    found, overwrite = list[Mark](), "kdfast overwrite_logits"
    for dtype in ("float32", "bfloat16"):
        work, case = f"`kd_loss`, KL + CE, 256 x 128256, {dtype}", ("logits", dtype, "N=256 V=128256")
        found += [
            Mark(work, "PyTorch eager, the faster spelling", case, 15, slower("eager")),
            Mark(work, "torch.compile, the faster spelling", case, 5, slower("compile")),
            Mark(f"{work}, overwrite_logits", "PyTorch eager", case, 20, slower("eager", than=overwrite)),
            Mark(f"{work}, overwrite_logits", "torch.compile", case, 8, slower("compile", than=overwrite)),
        ]
    for divergence in ("reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd", "alpha_beta"):
        case = ("logits", "float32", f"N=256 V=128256 {divergence}")
        found.append(Mark(f"`kd_loss`, {divergence}, 256 x 128256, float32", "PyTorch eager", case, 6, slower("eager")))
    linear = "N=1024 V=32000 Ds=512 Dt=1024"
    liger = "Liger FusedLinearJSD compiled"
    half = slower("Liger FusedLinearJSD compiled", than="kdfast bfloat16 logits")
    found += [
        Mark("`linear_kd_loss`, 1024 x 32000, 512 and 1024 wide, float32", "its four matrix products alone, by torch",
             ("linear", "float32", linear), 1.10, times_of("four GEMMs alone"), at_most=True),
        Mark("the same", liger, ("linear", "float32", linear), 1, slower(liger)),
        Mark("the same, bfloat16 with bfloat16 logits", liger, ("linear", "bfloat16", linear), 1, half),
        Mark("`topk_targets`, top 64 and two temperatures, 64 x 151936", "torch.topk and two logsumexps",
             ("topk_capture", "float32", "N=64 V=151936 k=64"), 10, slower("torch.topk + logsumexps")),
        Mark("`linear_topk_targets`, 256 x 151936, 1024 wide", "its matrix product alone, by torch",
             ("linear_topk_capture", "float32", "N=256 V=151936 D=1024 k=64"), 1.10, times_of("one GEMM alone"), at_most=True),
        Mark("`linear_topk_kd_loss`, the same size", "its three matrix products alone, by torch",
             ("linear_topk", "float32", "N=256 V=151936 D=1024 k=64"), 1.10, times_of("three GEMMs alone"), at_most=True),
        Mark("`attention_mse` on scores, L = 2048", "materialised", ("attention_scores", "float32", "B=2 H=4 L=2048"), 15,
             slower("PyTorch")),
        Mark("the same, L = 128", "materialised", ("attention_scores", "float32", "B=2 H=4 L=128"), 1, slower("PyTorch")),
        Mark("`attention_mse` on probabilities, L = 2048", "materialised", ("attention_probs", "float32", "B=2 H=4 L=2048"), 1,
             slower("PyTorch")),
        Mark("`attention_kl`, L = 2048", "materialised", ("attention_kl", "float32", "B=2 H=4 L=2048"), 1, slower("PyTorch")),
        Mark("`linear_logit_mse`, 4096 x 32000, 512 wide", "through logits",
             ("linear_logit_mse", "float32", "N=4096 V=32000 Ds=512 Dt=512 distance=1"), 5, slower("PyTorch")),
        Mark("a TinyBERT step, pretrained encoder, 32 x 48", "its forwards and backward alone",
             ("tinybert", "float32", "B=32 L=48"), 1.25, times_of("forwards and backward"), at_most=True),
    ]  # fmt: skip
    cache, codec = ("cache", "", "V=151936 k=64"), "one core, synthetic law"
    found += [
        Mark("cache: everything, at a mean KL of at most 5e-5", codec, cache, 170, bytes_a_token, at_most=True,
             unit=" bytes a token"),
        Mark("cache: decode, codec alone", codec, cache, 8, million_tokens_a_second("decode, codec alone"), unit=" M tokens/s"),
        Mark("cache: `reader.batch` with checksums", codec, cache, 3,
             million_tokens_a_second("decode, reader.batch with checksums"), unit=" M tokens/s"),
        Mark("cache: encode, codec alone", codec, cache, 1, million_tokens_a_second("encode, codec alone"), unit=" M tokens/s"),
        Mark("a training step from the cache", "a cross-entropy step of the same student, through its head",
             ("train", "float32", "B=8 L=128 V=16384"), 1.05, times_of("F.linear_cross_entropy", of="kdfast cached"),
             at_most=True),
    ]  # fmt: skip
    for vocab, wanted in ((32000, 0.80), (50257, 0.80), (128256, 0.60), (151936, 0.60), (262208, 0.60)):
        case = ("logits", "bfloat16", f"N=4096 V={vocab}")
        found.append(
            Mark(f"`kd_loss`, bfloat16, 4096 x {vocab}, GPU", "copy bandwidth", case, wanted, share, unit="", device="gpu")
        )
    for dims, wanted in (("Ds=2048 Dt=4096", 0.75), ("Ds=4096 Dt=4096", 0.80)):
        case = ("linear", "bfloat16", f"N=8192 V=128256 {dims}")
        found.append(Mark(f"`linear_kd_loss`, bfloat16, 8192 x 128256, {dims}, GPU", "matrix product rate", case, wanted, share,
                          unit="", device="gpu"))  # fmt: skip
    return found


def read(folder: Path = RESULTS) -> list[Row]:
    """The rows of every results file in a folder, but those with columns of their own."""
    return [row for path in sorted(folder.glob("*.csv")) if path.name not in _OTHERS for row in read_csv(path)]


def of_case(rows: Sequence[Row], mark: Mark) -> list[Row]:
    """The rows a mark speaks of; a shape that goes on in words (another divergence) is another case."""
    op, dtype, shape = mark.case
    exact = [r for r in rows if (r.op, r.dtype, r.shape) == (op, dtype, shape)]
    return exact or [r for r in rows if (r.op, r.dtype) == (op, dtype) and r.shape.startswith(shape + " ")]


def is_gpu(row: Row) -> bool:
    return "NVIDIA" in row.device or "AMD Instinct" in row.device


def page(rows: Sequence[Row]) -> str:
    """The table of marks, a line for every machine they were measured on, and every case that was measured."""
    lines = ["", "| work | against | mark | measured | on, at |", "|---|---|---|---|---|"]
    for mark in marks():
        case = of_case([r for r in rows if r.device and (mark.device == "gpu") == is_gpu(r)], mark)
        machines = dict.fromkeys((r.device, r.threads) for r in case)
        found = {machine: [r for r in case if (r.device, r.threads) == machine] for machine in machines}
        measured = [(mark.value(mine), mine[0]) for mine in found.values() if not math.isnan(mark.value(mine))]
        if not measured:
            lines.append(f"| {mark.work} | {mark.against} | {mark.text} | not measured |  |")
        for value, r in measured:
            figure = f"{'' if mark.met(value) else '**short** '}{value:.3g}{mark.unit}"
            where = f"{r.device}, {r.threads} threads, {r.commit}"
            lines.append(f"| {mark.work} | {mark.against} | {mark.text} | {figure} | {where} |")
    lines += ["", "## Every measured case", "", "Milliseconds, forward and backward, medians; the spread is p10 to p90.",
              "x kdfast: the time over kdfast's in the same round, the median over rounds, and between what it lies 95 times",
              "in 100; where that is missing, a ratio of medians.", ""]  # fmt: skip
    lines += ["| case | contestant | ms | spread | x kdfast | between | peak MiB | error | on |", "|---" * 9 + "|"]
    for r in rows:
        if not math.isnan(r.median_ms) and "(again)" not in r.contestant:
            case = " ".join(x for x in r.case if x)
            error = "" if math.isnan(r.error_f64) else f"{r.error_f64:.0e}"
            peak = "" if math.isnan(r.peak_mib) else f"{r.peak_mib:.3g}"
            spread = f"{r.p10_ms:.3g} - {r.p90_ms:.3g}"
            times = f"{r.time_ratio:.2f} | {interval(r)}"
            lines.append(
                f"| {case} | {r.contestant} | {r.median_ms:.3g} | {spread} | {times} | {peak} | {error} | {r.device} |"
            )
    return "\n".join([*lines, ""])


def main(argv: list[str]) -> int:
    p = argparse.ArgumentParser(prog="kdfast bench performance", description=(__doc__ or "").split("\n")[0])
    p.add_argument("--results", metavar="FOLDER", type=Path, default=RESULTS, help="results files (default bench/results)")
    p.add_argument("--write", metavar="FILE", type=Path, help="put the tables between the marks of FILE")
    args = p.parse_args(argv)
    text = page(read(args.results))
    if args.write is None:
        print(text)
        return 0
    try:
        between_marks(args.write, MARKS, text)
    except ValueError as error:
        print(f"bench performance: --write: {error}", file=sys.stderr)
        return 2
    return 0
