"""The two visits to a GPU, which needs no network; each stage in a process of its own, in order of worth.

    kdfast bench gpu --contact --out DIR     is everything right, and where does the time go: under 4 minutes
    kdfast bench gpu --record --out DIR      every op beside its peers: under 7 minutes
    kdfast bench gpu --record --dry-run --out DIR    the plan, its seconds, what to carry; then all of it in small on the CPU

Writes <gpu>-<date>.csv, rewritten after every stage, its log, and a plot. What did not run says why in its row.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from . import visit
from .commands import Parser
from .plot import draw
from .report import Limits, Row, commit, device_name, heading, table


def stem(device: str, today: datetime.date) -> str:
    """File name without ending: the device's name in safe characters, and the date."""
    return f"{re.sub(r'[^a-z0-9]+', '-', device_name(device).lower()).strip('-')}-{today.isoformat()}"


def show(rows: Sequence[Row], target: Path) -> None:
    """Prints every measured case as a table, and where the files are."""
    copy = next((r.gb_per_s * 1e9 for r in rows if r.contestant == "copy bandwidth"), float("nan"))
    measured = [row for row in rows if row.op not in ("stage", "limits")]
    print(heading(rows, Limits(copy)))
    for case in dict.fromkeys(row.case for row in measured):
        print("\n" + table([row for row in measured if row.case == case]))
    print(f"\nwrote {target}")


#: A dry run may take as many times a visit's seconds: a busy CPU ends it late, not wrong.
_DRY_PATIENCE = 10.0


def run(kind: str, out: Path, device: str, size: str, seconds: float) -> list[Row]:
    """One visit; its rows."""
    path = out / f"{stem(device, datetime.date.today())}{'-contact' if kind == 'contact' else ''}.csv"
    for of_another in (".log", ".png"):
        path.with_suffix(of_another).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        stages = visit.plan(kind, device, size, Path(scratch))
        patience = _DRY_PATIENCE if device == "cpu" else 1.0
        rows = visit.Visit(kind, device, path, Path(scratch), seconds, patience).run(stages)
    draw([row for row in rows if row.op != "stage"], path.with_suffix(".png"))
    show(rows, path)
    return rows


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text!r}")
    return seconds


def _commit(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError(f"expected a commit, got {text!r}")
    return text.strip()


def writable(out: Path) -> None:
    """Makes the folder, and sees that a file can be written there: found out after minutes on a card, it is too late.

    Raises:
        ValueError: one of them is not possible.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"expected a folder that can be written, got {out}: {error.strerror}") from error


def main(argv: list[str]) -> int:
    p = Parser(
        prog="kdfast bench gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit codes: 0 measured, 1 the tests or kdfast failed somewhere, or the seconds did not reach the tests, "
               "2 wrong usage or no GPU, 130 interrupted",
    )  # fmt: skip
    which = p.add_mutually_exclusive_group()
    which.add_argument("--contact", action="store_const", const="contact", dest="kind", help="right? and where is the time?")
    which.add_argument("--record", action="store_const", const="record", dest="kind", help="beside the peers (default)")
    p.add_argument("--out", metavar="DIR", help="folder for the results (default: the environment's OUT)")
    p.add_argument("--commit", metavar="SHA", type=_commit, help="the commit measured, where the history did not come along")
    p.add_argument("--wheels", metavar="DIR", type=Path, help="folder with wheels of the peers")
    p.add_argument("--seconds", type=_seconds, metavar="S", help="wall-clock budget (default: that of the visit)")
    p.add_argument("--dry-run", action="store_true", help="print the plan, then run all of it in small on the CPU")
    args = p.parse_args(argv)
    kind, out = args.kind or "record", args.out or os.environ.get("OUT")
    if not out:
        p.error("argument --out: expected a folder for the results, got none (and OUT is not set)")
    if not args.dry_run and not torch.cuda.is_available():
        print("bench gpu: torch sees no CUDA device; run it on a machine with a GPU and a CUDA build of torch", file=sys.stderr)
        return 2
    try:
        writable(Path(out))
    except ValueError as error:
        p.error(f"argument --out: {error}")
    if args.commit:
        os.environ["KDFAST_COMMIT"] = args.commit
        commit.cache_clear()
    seconds = args.seconds or visit.SECONDS[kind]
    device, size = ("cpu", "tiny") if args.dry_run else ("cuda", "full")
    with tempfile.TemporaryDirectory() as folder:
        if args.wheels is not None:
            try:
                visit.unpack(args.wheels, Path(folder))
            except ValueError as error:
                p.error(f"argument --wheels: {error}")
        if args.dry_run:
            print(visit.describe(kind, visit.plan(kind, "cuda", "full", Path(out)), seconds), flush=True)
        rows = run(kind, Path(out), device, size, seconds)
    wrong = [f"{' '.join(x for x in row.case if x)}, {row.contestant}: {row.error}" for row in visit.failed(rows)]
    if why := visit.unproven(rows):
        wrong.append(f"{why}; give it more --seconds")
    for line in wrong:
        print(f"bench gpu: {line}", file=sys.stderr)
    return 1 if wrong else 0
