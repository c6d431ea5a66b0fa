"""New results against committed ones: ratios between contestants of one run, never absolute times.

kdfast bench full logits --csv new.csv && kdfast bench check new.csv
kdfast bench check second.csv --against first.csv --band 1.10    # how many ratios of two runs agree
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .performance import RESULTS, read
from .report import Row, read_csv

#: Two runs of the same code were seen this far apart.
BAND = 1.25


@dataclass(frozen=True)
class Change:
    """A peer's time over kdfast's, before and now."""

    row: Row
    before: float
    now: float

    @property
    def factor(self) -> float:
        return self.now / self.before


def changes(old: Sequence[Row], new: Sequence[Row]) -> list[Change]:
    """Every peer that both runs timed in the same case, on processors or GPUs of the same name."""
    known = {(*r.case, r.contestant, r.device, r.threads): r for r in old}
    found = []
    for row in new:
        before = known.get((*row.case, row.contestant, row.device, row.threads))
        if before is not None and not row.contestant.startswith("kdfast"):
            change = Change(row, before.time_ratio, row.time_ratio)
            if math.isfinite(change.factor):
                found.append(change)
    return found


def lost(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Rows of kdfast that have no time now and had one: no peer's ratio to them can show it."""
    known = {(*r.case, r.contestant, r.device, r.threads) for r in old if math.isfinite(r.median_ms)}
    return [
        r for r in new
        if r.contestant.startswith("kdfast") and not math.isfinite(r.median_ms)
        and (*r.case, r.contestant, r.device, r.threads) in known
    ]  # fmt: skip


def main(argv: list[str]) -> int:
    p = argparse.ArgumentParser(
        prog="kdfast bench check", description=(__doc__ or "").split("\n")[0],
        epilog="exit codes: 0 nothing fell behind, 1 something did or failed, or nothing could be compared, 2 wrong usage",
    )  # fmt: skip
    p.add_argument("new", type=Path, metavar="CSV", help="results of this checkout")
    p.add_argument("--against", type=Path, default=RESULTS, metavar="CSV", help="a file or folder (default bench/results)")
    p.add_argument("--band", type=float, default=BAND, help=f"what counts as noise (default {BAND})")
    args = p.parse_args(argv)
    for path in (args.new, args.against):
        if not path.exists():
            p.error(f"{path}: no such file; expected results written by --csv")
    try:
        old, new = read(args.against) if args.against.is_dir() else read_csv(args.against), read_csv(args.new)
    except ValueError as error:
        p.error(str(error))
    found, failed = changes(old, new), lost(old, new)
    for row in failed:
        print(f"FAILED {' '.join(x for x in row.case if x)}  {row.contestant}: {row.error or 'no time'}")
    if not found and not failed:
        print("bench check: no case of both files has the same op, shape, dtype, peer, device and thread count")
        return 1
    for change in found:
        word = "SLOWER" if change.factor < 1 / args.band else "faster" if change.factor > args.band else "same"
        case = " ".join(x for x in change.row.case if x)
        print(f"{word:<7}{case}  {change.row.contestant}: {change.before:.2f}x -> {change.now:.2f}x")
    agree = sum(1 / args.band <= c.factor <= args.band for c in found)
    print(f"{agree} of {len(found)} ratios agree within a factor of {args.band:g}")
    return 1 if failed or any(c.factor < 1 / args.band for c in found) else 0
