"""The suite behind `kdfast bench`: every op at one or two shapes against everybody who can run here; a table and a picture."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kdfast.cli.progress import bar

from . import attention, hidden, linear, linear_logit_mse, logits, topk
from .contest import AGAIN, Contest, Settings, contest, measure_limits
from .peers import linear_peers, logits_peers, topk_peers
from .plot import draw
from .report import Limits, Row, heading, interval, table, to_json, write_csv
from .shapes import LLAMA3, QWEN3

_HALF = torch.bfloat16
_WIDTH = 170
#: Seconds of rounds a case, on average.
_QUICK_S, _FULL_S = 9.0, 30.0


def _logits(quick: bool, device: str) -> list[Contest]:
    n, vocab = (64, 32000) if quick else (256, LLAMA3.vocab)
    if device == "cuda":
        n = 4096
    compiled = ("log_target",) if quick else ("log_target", "probs")
    return [
        logits.contestants(n, vocab, dtype, device, logits_peers(device, compiled=compiled))
        for dtype in ((torch.float32,) if quick else (torch.float32, _HALF))
    ]


def _linear(quick: bool, device: str) -> list[Contest]:
    shape = (256, 16000, 256, 512) if quick else (1024, 32000, 512, 1024)
    if device == "cuda":
        shape = (8192, LLAMA3.vocab, 2048, 4096)
    return [
        linear.contestants(*shape, dtype, device, linear_peers(device, half=dtype == _HALF))
        for dtype in ((torch.float32,) if quick else (torch.float32, _HALF))
    ]


def _topk(quick: bool, device: str) -> list[Contest]:
    n, vocab = (16, 50257) if quick else (64, QWEN3.vocab)
    if device == "cuda":
        n = 4096
    return [
        topk.capture_contestants(n, vocab, 64, torch.float32, device),
        topk.contestants(n, vocab, 64, torch.float32, device, topk_peers(compiled=not quick)),
    ]


def _attention(quick: bool, device: str) -> list[Contest]:
    lengths = (512,) if quick else (128, 2048)
    return [
        attention.contestants(kind, length, device=device)
        for kind in (("scores", "kl") if quick else attention.KINDS)
        for length in lengths
    ]


def _hidden(quick: bool, device: str) -> list[Contest]:
    n = 2048 if quick else 8192
    return [hidden.contestants(kind, n, 312, 768, torch.float32, device) for kind in hidden.KINDS]


def _linear_logit_mse(quick: bool, device: str) -> list[Contest]:
    shape = (2048, 16000, 256, 256) if quick else (4096, 32000, 512, 512)
    return [linear_logit_mse.contestants(*shape, 1.0, torch.float32, device)]


OPS: dict[str, Callable[[bool, str], list[Contest]]] = {
    "logits": _logits, "topk": _topk, "attention": _attention, "hidden": _hidden, "linear_logit_mse": _linear_logit_mse,
    "linear": _linear,  # last: the slowest rounds get the time that the others have left
}  # fmt: skip


@dataclass
class Pool:
    """Seconds of rounds for all cases together: what a case that is settled early leaves is shared by those after it."""

    seconds: float

    def share(self, cases_left: int) -> float:
        return max(self.seconds, 0.0) / cases_left

    def spend(self, seconds: float) -> None:
        self.seconds -= seconds


def measure(ops: Sequence[str], quick: bool, device: str) -> tuple[list[list[Row]], Limits]:
    """The rows of every case, and the limits measured beside them; a progress bar on a terminal.

    Raises:
        ValueError: an op or a device that is not there.
    """
    unknown = [op for op in ops if op not in OPS]
    if unknown:
        raise ValueError(f"op: expected one of {', '.join(OPS)}, got {unknown[0]!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a device torch can see, got cuda (no GPU is visible); use --device cpu")
    jobs = [job for op in ops or OPS for job in OPS[op](quick, device)]
    pool = Pool((_QUICK_S if quick else _FULL_S) * len(jobs))
    settings = Settings(repeats=7, warmup=3, device=device, spend=pool.spend)
    cases = []
    with bar("bench", len(jobs), "cases") as progress:
        limits = measure_limits(device, copy=True, gemm=torch.float32)
        for done, job in enumerate(jobs):
            cases.append(contest(job, limits, dataclasses.replace(settings, settle_s=pool.share(len(jobs) - done))))
            torch.compiler.reset()  # past some recompilations of one function Dynamo quietly runs it uncompiled
            progress.update(done + 1)
    return cases, limits


def run(args: argparse.Namespace) -> int:
    """Measures, prints and writes as the options of `kdfast bench` say; 1 when a result of kdfast's was wrong or missing."""
    if args.threads:
        torch.set_num_threads(args.threads)
    cases, limits = measure(args.op, args.quick, args.device)
    flat = [row for case in cases for row in case]
    if args.csv:
        write_csv(flat, args.csv)
    if args.plot and not draw(flat, args.plot):
        print("kdfast bench: --plot: nothing drawn; pip install 'kdfast[bench]' brings matplotlib", file=sys.stderr)
    if args.json:
        print(to_json(flat))
    else:
        print(heading(flat, limits))
        if args.details:
            print(*("\n" + table(case) for case in cases), sep="\n")
        print_summary(cases)
    failed = [r for r in flat if r.error and r.contestant.startswith("kdfast")]
    for row in failed:
        print(f"kdfast bench: {row.op}, {row.contestant}, {row.dtype}, {row.shape}: {row.error}", file=sys.stderr)
    return 1 if failed else 0


def print_summary(cases: Sequence[Sequence[Row]]) -> None:
    """One line a case: kdfast, the fastest peer, the machine; red where kdfast is not first."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)  # a file has no width: nothing is cut
    summary = Table(caption="Forward and backward, medians. x: the peer's time over kdfast's in the same round, the median,"
                    " and between what it lies 95 times in 100. Rate: in brackets the share of"
                    " the copy or matrix product rate of this run. Error: gradients against float64.")  # fmt: skip
    for name in ("case", "fastest peer"):
        summary.add_column(name, overflow="fold")
    for name in ("ms", "peer's", "x", "between", "rate", "MiB", "peer's", "error"):
        summary.add_column(name, justify="right", no_wrap=True)
    for case in cases:
        ours, peer = case[0], fastest_peer(case) or Row(case[0].op, "none ran")
        cells = (f"{' '.join(x for x in ours.case if x)}", peer.contestant, _number(ours.median_ms), _number(peer.median_ms),
                 _number(peer.time_ratio), interval(peer) or "-", _rate(ours), _number(ours.peak_mib), _number(peer.peak_mib),
                 f"{ours.error_f64:.0e}")  # fmt: skip
        summary.add_row(*cells, style="red" if ours.behind or ours.error else "")
    console.print(summary)
    for case in cases:
        if case[0].behind:
            console.print(f"not first: {' '.join(case[0].case)}: {case[0].behind}", style="red")


def fastest_peer(case: Sequence[Row]) -> Row | None:
    """Of those that compute the same: a floor does less work, kdfast's own variants are no peers."""
    peers = [
        r for r in case
        if not r.contestant.startswith("kdfast") and r.contestant != AGAIN and not math.isnan(r.median_ms)
        and not math.isnan(r.error_f64)
    ]  # fmt: skip
    return min(peers, key=lambda r: r.median_ms if math.isnan(r.time_ratio) else r.time_ratio, default=None)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else format(value, ".3g" if abs(value) < 1000 else ".0f")


def _rate(row: Row) -> str:
    share = "" if math.isnan(row.limit_share) else f" ({row.limit_share:.0%})"
    if not math.isnan(row.tflop_per_s):
        return f"{row.tflop_per_s * 1e3:.0f} GFLOP/s{share}"
    return "-" if math.isnan(row.gb_per_s) else f"{row.gb_per_s:.3g} GB/s{share}"
