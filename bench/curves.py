"""Time an element of kd_loss (soft and hard, forward and backward) against V and against N, beside PyTorch, with a picture.

kdfast bench curves --csv bench/results/cpu-curves.csv --plot docs/figures/cost-logits.png
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from kdfast.files import written

from .contest import positive
from .logits import contestants
from .measure import Work, compare, release
from .peers import Peer, logits_peers
from .report import Row, stamp

VOCABULARIES = tuple(1 << i for i in range(10, 19))
ROWS = tuple(1 << i for i in range(0, 11, 2))
_NAMES = ("kdfast", "kdfast overwrite_logits", "eager log_target")


@dataclass(frozen=True)
class Point:
    """One contestant at one shape: nanoseconds an element of the N x V logits, and what produced it."""

    curve: str
    contestant: str
    rows: int
    vocab: int
    ns: float
    ns_p10: float
    ns_p90: float
    device: str
    torch: str
    commit: str


def measure(curve: str, shapes: Sequence[tuple[int, int]], device: str, repeats: int) -> list[Point]:
    """Every contestant at every shape, the contestants of a shape in turns."""
    points = []
    for done, (n, vocab) in enumerate(shapes):
        _progress(f"{curve}: N={n} V={vocab} ({done + 1} of {len(shapes)})")
        peers = [p for p in logits_peers(device, compiled=()) if p.name in _NAMES]
        case = contestants(n, vocab, torch.float32, device, peers).make(0)
        works = {p.name: Work(p.run, [_inputs(p, case)]) for p in peers}
        timings = compare(works, repeats=repeats, warmup=1, device=device, budget_s=20)
        row = stamp(Row("logits", "", dtype="float32", shape=""), device)
        for name, timing in timings.items():
            low, middle, high = (1e9 * x / (n * vocab) for x in (timing.percentile(10), timing.median, timing.percentile(90)))
            points.append(Point(curve, name, n, vocab, middle, low, high, row.device, row.torch, row.commit))
        release(device)
    _progress("")
    return points


def _inputs(peer: Peer, case: object) -> object:
    return case.fresh if peer.fresh else lambda: case  # type: ignore[attr-defined]


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def write(points: Sequence[Point], path: Path) -> None:
    """The points as CSV."""
    with written(path) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Point)])
        writer.writeheader()
        writer.writerows(asdict(p) for p in points)


def read(path: Path) -> list[Point]:
    """What `write` wrote."""
    with path.open(newline="") as file:
        return [
            Point(**{f.name: {"int": int, "float": float}.get(str(f.type), str)(row[f.name]) for f in fields(Point)})
            for row in csv.DictReader(file)
        ]


def draw(points: Sequence[Point], path: Path) -> None:
    """Two panels: against V at a fixed number of elements, against N at a fixed V."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axis, (curve, of) in zip(axes, (("V", "vocab"), ("N", "rows")), strict=True):
        for name, colour in zip(_NAMES, ("#1b6ca8", "#63a4d4", "#9a9a9a"), strict=True):
            found = [p for p in points if p.curve == curve and p.contestant == name]
            x = [getattr(p, of) for p in found]
            axis.plot(x, [p.ns for p in found], "o-", color=colour, label=name, markersize=4)
            axis.fill_between(x, [p.ns_p10 for p in found], [p.ns_p90 for p in found], color=colour, alpha=0.15)
        fixed = "N * V fixed" if curve == "V" else f"V = {next(p.vocab for p in points if p.curve == 'N')}"
        axis.set(xscale="log", yscale="log", xlabel=f"{curve} ({fixed})", title=f"against {curve}")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("ns an element, forward and backward")
    axes[0].legend(frameon=False)
    figure.suptitle(f"{points[0].device}, torch {points[0].torch}, float32, kdfast at {points[0].commit}", fontsize=10)
    figure.tight_layout()
    with written(path) as part:
        figure.savefig(part, dpi=110, format="png")
    pyplot.close(figure)


def main(argv: list[str]) -> int:
    p = argparse.ArgumentParser(
        prog="kdfast bench curves", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--quick", action="store_true", help="one million elements instead of 32")
    p.add_argument("--csv", metavar="FILE", type=Path, help="write the points to FILE")
    p.add_argument("--plot", metavar="FILE", type=Path, help="write the picture to FILE (PNG)")
    p.add_argument("--repeats", type=positive, metavar="N", default=5, help="timed rounds (default 5)")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    args = p.parse_args(argv)
    elements = 1 << 20 if args.quick else 32 << 20
    shapes = [(elements // v, v) for v in VOCABULARIES if v <= elements]
    points = measure("V", shapes, args.device, args.repeats)
    vocab = 4096 if args.quick else 32768
    points += measure("N", [(n, vocab) for n in ROWS if n * vocab <= elements], args.device, args.repeats)
    for point in points:
        print(f"{point.curve} {point.contestant:<24} N={point.rows:<6} V={point.vocab:<7} {point.ns:8.3f} ns an element")
    if args.csv:
        write(points, args.csv)
    if args.plot:
        draw(points, args.plot)
    return 0
