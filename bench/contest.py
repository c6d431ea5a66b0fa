"""One case, all contestants: check them, time them, measure memory and error, and turn it all into rows."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .cases import Outcome
from .commands import spelled
from .measure import (
    Timing,
    Work,
    compare,
    copy_bandwidth,
    failures,
    gemm_rate,
    peak_bytes,
    reason,
    relative_error,
    release,
)
from .peers import Peer, agree, differs
from .ratios import Ratio, Settled, paired
from .report import Limits, Model, Row, dtype_name, heading, stamp, table, timed, to_json, write_csv

#: How far a measured loss or gradient may be from float64 before its time means nothing. The error itself is printed.
_GATE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}

AGAIN = "kdfast (again)"
#: How far apart two medians of the same contestant may be before a run is too disturbed to quote.
_QUOTABLE = 1.15
#: More rounds than a case has time for, unless its calls take microseconds.
_MANY = 4000
#: Seconds a case of `kdfast bench full OP` may go on until its ratios are known.
_SETTLE_S = 20.0


@dataclass(frozen=True)
class Settings:
    """How long to measure: `repeats` rounds, fewer once `budget_s` is spent (but at least 3).

    Args:
        settle_s: above 0, all `repeats` rounds are made, and more until every ratio to kdfast is known
            (`ratios.Settled`) or so many seconds are over.
        spend: told the seconds that the rounds took.
    """

    repeats: int = 7
    warmup: int = 1
    budget_s: float = math.inf
    device: str = "cpu"
    settle_s: float = 0.0
    spend: Callable[[float], object] | None = None


@dataclass(frozen=True)
class Contest:
    """One op at one shape and dtype.

    Args:
        make: seed -> a case of this shape; called once per set of inputs.
        small: the float64 case, odd-sized and with rows that do not count, on which peers must agree with kdfast.
    """

    op: str
    peers: Sequence[Peer]
    make: Callable[[int], Any]
    small: Callable[[], Any]
    model: Model
    dtype: torch.dtype
    shape: str


def contest(job: Contest, limits: Limits, settings: Settings) -> list[Row]:
    """Rows of one case, kdfast first; every peer has its row whatever happens to it."""
    try:
        # On a GPU two sets of inputs take turns, so that neither is warm in L2; on a CPU they exceed any cache already.
        cases = [job.make(seed) for seed in range(2 if settings.device == "cuda" else 1)]
        truth = cases[0].truth()
    except failures() as error:
        return unmeasured(job, f"no inputs or no float64 truth: {reason(error)}", settings.device)
    errors = {p.name: p.missing or _disagreement(p, job) for p in job.peers}
    ready = [p for p in job.peers if not errors[p.name]]
    accuracy = _measure_accuracy(ready, cases[0], truth, job.dtype, errors, settings.device)
    works = {p.name: Work(p.run, [_inputs(p, c) for c in cases]) for p in ready if not errors[p.name]}
    if "kdfast" in works:
        works[AGAIN] = works["kdfast"]
    timings = _time(works, settings) if works else {}
    rows = []
    for peer in _with_again(job.peers):
        row = Row(job.op, peer.name, dtype=dtype_name(job.dtype), shape=job.shape, note=peer.note)
        row = dataclasses.replace(
            row, error_f64=accuracy.get(peer.name, math.nan), error=errors["kdfast" if peer.name == AGAIN else peer.name]
        )
        if not row.error and peer.name in timings:
            row = timed(row, timings[peer.name], job.model if peer.modelled else Model(), limits)
            if not row.error and peer.name != AGAIN:
                row = _with_peak(row, works[peer.name], settings.device)
        rows.append(stamp(row, settings.device))
    release(settings.device)
    return compared(rows, job.peers, timings)


def _time(works: dict[str, Work], settings: Settings) -> dict[str, Timing]:
    started, warmup, device = time.monotonic(), settings.warmup, settings.device
    if settings.settle_s > 0:
        timings = compare(
            works, repeats=_MANY, warmup=warmup, device=device, budget_s=settings.settle_s, least=settings.repeats,
            enough=Settled("kdfast"),
        )  # fmt: skip
    else:
        timings = compare(works, repeats=settings.repeats, warmup=warmup, device=device, budget_s=settings.budget_s)
    if settings.spend is not None:
        settings.spend(time.monotonic() - started)
    return timings


def _with_peak(row: Row, work: Work, device: str) -> Row:
    try:
        peak = peak_bytes(work, device)
    except failures() as error:
        return dataclasses.replace(row, note=f"{row.note}; peak memory: {reason(error)}".lstrip("; "))
    return row if peak is None else dataclasses.replace(row, peak_mib=peak / 2**20)


def unmeasured(job: Contest, why: str, device: str) -> list[Row]:
    """The rows of a case that was not run, each with the reason."""
    return [
        stamp(Row(job.op, p.name, dtype=dtype_name(job.dtype), shape=job.shape, note=p.note, error=p.missing or why), device)
        for p in job.peers
    ]


def _inputs(peer: Peer, case: Any) -> Callable[[], Any]:
    return case.fresh if peer.fresh else lambda: case


def _with_again(peers: Sequence[Peer]) -> list[Peer]:
    again = [
        dataclasses.replace(p, name=AGAIN, note="the same once more: the spread of this run")
        for p in peers
        if p.name == "kdfast"
    ]
    return [*peers, *again]


def _disagreement(peer: Peer, job: Contest) -> str:
    ours = next(p for p in job.peers if p.ours)
    if ours.missing or not peer.comparable:
        return ""
    try:
        return agree(peer, ours, job.small())
    except failures() as error:
        return reason(error)


def _measure_accuracy(
    peers: Sequence[Peer], case: Any, truth: Outcome, dtype: torch.dtype, errors: dict[str, str], device: str
) -> dict[str, float]:
    """Error against float64 on the very inputs that are timed; a peer beyond the gate loses its time."""
    accuracy = {}
    for peer in peers:
        if not peer.comparable:
            continue
        try:
            loss, grads = peer.run(_inputs(peer, case)())
            got = (loss, case.comparable(grads))
            accuracy[peer.name] = relative_error(got[1], truth[1])
            errors[peer.name] = differs(got, truth, _GATE[dtype])
            del loss, grads, got
        except failures() as error:
            errors[peer.name] = reason(error)
        release(device)
    return accuracy


def compared(rows: Sequence[Row], peers: Sequence[Peer], timings: dict[str, Timing]) -> list[Row]:
    """Rows with times relative to kdfast's in the same rounds, and kdfast's row marked with whoever is ahead of it."""
    base = timings.get("kdfast")
    if base is None or not base.seconds:
        return list(rows)
    ratios = {name: paired(timing.seconds, base.seconds) for name, timing in timings.items()}
    rivals = [p.name for p in peers if p.comparable and not p.ours and p.name in timings and timings[p.name].seconds]
    behind = _behind(min(rivals, key=lambda name: ratios[name].median), ratios) if rivals else ""
    spread = ratios[AGAIN].median if AGAIN in ratios else 1.0
    spread = max(spread, 1 / spread)
    wide = f"; SPREAD TOO WIDE TO QUOTE: {spread:.2f}x" if spread > _QUOTABLE else ""
    found = []
    for row in rows:
        to_base = ratios.get(row.contestant, Ratio())
        row = dataclasses.replace(row, time_ratio=to_base.median)
        if row.contestant == "kdfast":
            row = dataclasses.replace(row, behind=behind)  # its ratio to itself has no interval
        else:
            row = dataclasses.replace(row, ratio_low=to_base.low, ratio_high=to_base.high)
        found.append(dataclasses.replace(row, note=row.note + wide if row.contestant == AGAIN else row.note))
    return found


def _behind(fastest: str, ratios: Mapping[str, Ratio]) -> str:
    """Who is ahead of kdfast, and whether that may be noise; "" when nobody is."""
    found = ratios[fastest]
    if found.median >= 1:
        return ""
    noise = f", within noise: {found.low:.2f} to {found.high:.2f}" if found.high >= 1 else ""
    return f"{fastest} takes {found.median:.2f} of its time{noise}"


def measure_limits(device: str, *, copy: bool = False, gemm: torch.dtype | None = None) -> Limits:
    """The limits of this machine that a comparison needs."""
    return Limits(
        copy=copy_bandwidth(device) if copy else math.nan,
        gemm=gemm_rate(gemm, device=device) if gemm is not None else math.nan,
    )


def parser(op: str, text: str, examples: Sequence[str]) -> argparse.ArgumentParser:
    """The options every comparison shares."""
    p = argparse.ArgumentParser(
        prog=spelled(op), description=text, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n" + "\n".join(f"  {spelled(op)} {e}".rstrip() for e in examples)
        + "\n\nexit codes: 0 measured, 1 kdfast failed or disagreed with float64, 2 wrong usage",
    )  # fmt: skip
    p.add_argument("--quick", action="store_true", help="small shapes, under 30 s; no torch.compile")
    p.add_argument("--json", action="store_true", help="rows as JSON on standard output, nothing else")
    p.add_argument("--csv", metavar="FILE", help="write the rows to FILE as well")
    rounds = f"timed rounds (default 7, then on until the ratios are known or {_SETTLE_S:.0f} s are over; quick 3)"
    p.add_argument("--repeats", type=positive, metavar="N", help=rounds)
    p.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: torch's choice)")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    return p


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def settings_of(args: argparse.Namespace) -> Settings:
    """Settings from the shared options; sets the thread count.

    Raises:
        SystemExit: 2, with one line, for a device that is not there.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            "bench: --device: expected a device torch can see, got cuda (no GPU is visible); use --device cpu", file=sys.stderr
        )
        raise SystemExit(2)
    if args.threads:
        torch.set_num_threads(args.threads)
    settle_s = 0.0 if args.repeats or args.quick else _SETTLE_S
    return Settings(args.repeats or (3 if args.quick else 7), 1, 6.0 if args.quick else 60.0, args.device, settle_s)


def report(rows: list[list[Row]], limits: Limits, args: argparse.Namespace) -> int:
    """Prints and writes what was measured; the exit code."""
    flat = [row for case in rows for row in case]
    if args.csv:
        write_csv(flat, args.csv)
    if args.json:
        print(to_json(flat))
    else:
        print(heading(flat, limits))
        for case in rows:
            print("\n" + table(case))
    failed = [r for r in flat if r.error and r.contestant.startswith("kdfast")]
    for row in failed:
        print(f"bench {row.op}: {row.contestant}, {row.dtype}, {row.shape}: {row.error}", file=sys.stderr)
    return 1 if failed else 0
