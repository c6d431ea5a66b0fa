"""Everything that needs a GPU, in one run of at most 8 minutes that needs no network.

Builds the extension in place, runs the GPU tests, measures the card's limits, then every op against its peers, and
writes `<gpu>-<date>.csv` and a plot. Ops run in order of worth, related ones in a process of their own, so that a kernel
that hangs or faults costs their rows only; what did not run says why in its row, "out of time" where the budget ended.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from . import sweep
from .contest import measure_limits
from .measure import failures, reason
from .plot import draw
from .report import Limits, Row, device_name, dtype_name, heading, read_csv, stamp, table, write_csv

_ROOT = Path(__file__).parent.parent
#: Seconds the whole run may take, and what is kept back for the plot and the last files.
_LIMIT, _RESERVE = 450.0, 10.0
_BUILD_S, _TESTS_S = 90.0, 120.0


@dataclass(frozen=True)
class Budget:
    """Wall-clock seconds: what is left of `limit` since `start`."""

    limit: float
    start: float
    now: Callable[[], float] = time.monotonic

    @property
    def left(self) -> float:
        return self.limit - (self.now() - self.start)

    def refuses(self, needed: float) -> str:
        """Why something that takes `needed` seconds does not start any more, or ""."""
        if self.left >= needed:
            return ""
        return sweep.out_of_time(self.left, needed, "the")


def stem(device: str, today: datetime.date) -> str:
    """File name without ending: the device's name in safe characters, and the date."""
    return f"{re.sub(r'[^a-z0-9]+', '-', device_name(device).lower()).strip('-')}-{today.isoformat()}"


def command_row(op: str, contestant: str, command: Sequence[str], timeout: float, device: str, log: Path) -> Row:
    """Runs a command from the repository's root, its output in `log`; the last line is the note, or the error's end."""
    start = time.monotonic()
    with log.open("w+", errors="replace") as file:
        try:
            code = subprocess.run(command, cwd=_ROOT, timeout=timeout, stdout=file, stderr=subprocess.STDOUT).returncode
            failed = f"exit code {code}: " if code else ""
        except subprocess.TimeoutExpired:
            failed = f"stopped after {timeout:.0f} s: "
        file.seek(0)
        lines = [line.strip() for line in file if line.strip()]
    last, took = lines[-1][:200] if lines else "no output", f"took {time.monotonic() - start:.0f} s"
    if failed:
        return stamp(Row(op, contestant, note=f"{took}, see {log.name}", error=failed + last), device)
    return stamp(Row(op, contestant, note=f"{last}; {took}"), device)


def prepare(budget: Budget, device: str, tests: bool, target: Path) -> list[Row]:
    """The rows of the build and, correctness first, of the tests on the device; their output beside the results."""
    # The unproven kernels are measured here, and nowhere built without being asked for.
    os.environ.setdefault("KDFAST_BUILD", "cuda" if shutil.which("nvcc") else "cpu")
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    log = target.with_suffix(".build.log")
    rows = [command_row("build", "extension", build, min(_BUILD_S, budget.left), device, log)]
    if tests:
        suite = [sys.executable, "-m", "pytest", "-m", "gpu", "--tb=short", "--continue-on-collection-errors", "tests"]
        log = target.with_suffix(".tests.log")
        rows.append(command_row("tests", "pytest -m gpu", suite, min(_TESTS_S, budget.left), device, log))
    return rows


def limit_rows(limits: dict[torch.dtype, Limits], device: str) -> list[Row]:
    """The measured limits as rows, so that the file carries what its shares are shares of."""
    copy = next(iter(limits.values())).copy
    rows = [Row("limits", "copy bandwidth", gb_per_s=copy / 1e9, note="read plus written")]
    rows += [
        Row("limits", "matrix product", dtype=dtype_name(dtype), tflop_per_s=limit.gemm / 1e12)
        for dtype, limit in limits.items()
    ]
    return [stamp(row, device) for row in rows]


def measure_all(dtypes: Sequence[torch.dtype], device: str) -> dict[torch.dtype, Limits]:
    """Copy bandwidth once, the matrix product rate per dtype."""
    copy = measure_limits(device, copy=True).copy
    return {dtype: Limits(copy, measure_limits(device, gemm=dtype).gemm) for dtype in dtypes}


def run_op(ops: str, size: str, device: str, limits: dict[torch.dtype, Limits], seconds: float) -> list[Row]:
    """All cases of one op, or of a group, in a process of its own, stopped after `seconds`; every planned case has its rows."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.csv"
        command = [sys.executable, "-m", f"{__package__}.sweep", ops, size, device, f"{seconds - _RESERVE:.0f}", str(path)]
        command += [f"{dtype_name(d)}={limit.copy:.6g},{limit.gemm:.6g}" for d, limit in limits.items()]
        try:
            done = subprocess.run(command, cwd=_ROOT, timeout=seconds, stderr=subprocess.PIPE, text=True, errors="replace")
            last = (done.stderr.strip().splitlines() or [""])[-1][:160]
            why = f"its process ended with code {done.returncode}: {last}"
        except subprocess.TimeoutExpired:
            why = f"its process was stopped after {seconds:.0f} s"
        rows = read_csv(path) if path.exists() else []
    return rows + sweep.unreached(ops, size, device, rows, why)


def run(args: argparse.Namespace) -> list[Row]:
    """The whole run; the CSV is rewritten after every step, so that a kill loses the step in progress only."""
    budget = Budget(args.minutes * 60, time.monotonic())
    target = Path(args.out) / f"{stem(args.device, datetime.date.today())}.csv"
    target.parent.mkdir(parents=True, exist_ok=True)
    rows = [] if args.skip_build else prepare(budget, args.device, args.device == "cuda", target)
    write_csv(rows, target)
    dtypes = sweep.dtypes(args.size)
    try:
        limits = measure_all(dtypes, args.device)
        rows += limit_rows(limits, args.device)
    except failures() as error:
        limits = dict.fromkeys(dtypes, Limits())
        rows.append(stamp(Row("limits", "copy bandwidth, matrix product", error=reason(error)), args.device))
    torch.cuda.empty_cache()
    for group in sweep.GROUPS:
        refusal = budget.refuses(3 * _RESERVE)
        if refusal:
            rows += sweep.unreached(group, args.size, args.device, [], refusal)
        else:
            seconds = (budget.left - _RESERVE) * sweep.SHARE[group]
            rows += run_op(group, args.size, args.device, limits, seconds)
        write_csv(rows, target)
        print(f"bench gpu: {group} done, {budget.left:.0f} s left", file=sys.stderr)
    draw(rows, target.with_suffix(".png"))
    show(rows, next(iter(limits.values())), target)
    return rows


def show(rows: Sequence[Row], limits: Limits, target: Path) -> None:
    """Prints every case as a table, and where the files are."""
    print(heading(rows, limits))
    for case in dict.fromkeys(row.case for row in rows):
        print("\n" + table([row for row in rows if row.case == case]))
    print(f"\nwrote {target} and {target.with_suffix('.png')}")


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= _LIMIT / 60:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and at most {_LIMIT / 60:g}, got {text!r}")
    return value


def main(argv: list[str]) -> int:
    p = argparse.ArgumentParser(
        prog="kdfast bench gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  kdfast bench gpu --out bench/results\n  kdfast bench gpu --out /tmp/results --minutes 4"
        "\n\nexit codes: 0 measured, 1 the tests or kdfast failed somewhere, 2 wrong usage or no GPU",
    )  # fmt: skip
    p.add_argument("--out", required=True, metavar="DIR", help="folder for <gpu>-<date>.csv and .png")
    p.add_argument("--minutes", type=_minutes, default=_LIMIT / 60, help=f"wall-clock budget (default {_LIMIT / 60:g})")
    p.add_argument("--skip-build", action="store_true", help="neither build the extension nor run the tests")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help=argparse.SUPPRESS)
    p.add_argument("--size", choices=tuple(sweep.SIZES), default="full", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench gpu: torch sees no CUDA device; run it on a machine with a GPU and a CUDA build of torch", file=sys.stderr)
        return 2
    rows = run(args)
    return 1 if any(r.error and (r.contestant.startswith("kdfast") or r.op == "tests") for r in rows) else 0
