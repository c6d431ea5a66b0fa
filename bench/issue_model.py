"""What counts allow on a card: times from bytes, instructions, products and launches, with what was measured beside them.

A pass that finds a tile already there overlaps memory and arithmetic; what a second pass over a row finds in L2 depends on the
bytes that all programs hold between their passes. Both are computed from sizes, not fitted.
"""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from pathlib import Path

from .issue_counts import Count

RESULTS = Path(__file__).parent / "results"
MEASURED = RESULTS / "nvidia-h200-2026-11-27.csv"


@dataclass(frozen=True)
class Card:
    """Rates of a card: bytes and FLOPs (bfloat16 products) a second measured by `kdfast bench gpu`, the rest from its sheet."""

    name: str
    bandwidth: float
    products: float
    processors: int = 132
    clock: float = 1.755e9
    l2: float = 50e6

    def per_second(self, lanes: int) -> float:
        return lanes * self.processors * self.clock

    @property
    def to_be_ahead(self) -> float:
        """Bytes a multiprocessor must have on their way for its share of the bandwidth, at `_LATENCY`."""
        return self.bandwidth / self.processors * _LATENCY


H100, H200 = Card("H100", 3.0e12, 798e12), Card("H200", 4.278e12, 796e12)
#: Lanes a clock and multiprocessor: any instruction; integers, compares, selects, moves of bytes; special functions.
ISSUE, ALU, SPECIAL = 128, 64, 16
#: Seconds from a load to its value while memory is busy; an assumption.
_LATENCY = 0.8e-6


@dataclass(frozen=True)
class Row:
    """One public call at one shape: the kernel behind it, and what has to move.

    Args:
        case: label of `aot_cases`; pointers: tensors of other dtypes than there.
        columns: of all rows together (scores for attention).
        moved: bytes that must move, read or written once. again: those a second pass reads once more, where L2 has lost them.
        per_column: bytes of a column that one pass loads.
        measured: (op, shape) in the committed measurements.
        reach: share of the floor this kernel is meant to come to; 0: part of another call.
        rows: of the call.
    """

    name: str
    kernel: str
    case: str
    columns: int
    moved: int
    again: int
    per_column: int
    measured: tuple[str, str, str] = ("", "", "")
    reach: float = 0.0
    rows: int = 4096
    pointers: tuple[tuple[str, object], ...] = ()


@functools.cache
def measured(contestant: str = "kdfast") -> dict[tuple[str, str, str], float]:
    """Milliseconds by (op, dtype, shape); the first of a contestant's rows."""
    found: dict[tuple[str, str, str], float] = {}
    with MEASURED.open(newline="") as file:
        for r in csv.DictReader(file):
            if r["contestant"] == contestant and r["median_ms"]:
                found.setdefault((r["op"], r["dtype"], r["shape"]), float(r["median_ms"]))
    return found


@functools.cache
def row_cost() -> float:
    """Milliseconds that a row costs beside its columns, on all multiprocessors together: what a straight line through the
    measured times of `kd_loss` over its vocabularies leaves at none. Reductions over a block, and loads that nothing hides."""
    points = [
        (int(shape.split("V=")[1]), ms) for (op, dtype, shape), ms in measured().items()
        if op == "logits" and dtype == "bfloat16" and shape.startswith("N=4096 ") and "V=50257" not in shape
    ]  # fmt: skip
    mean_v, mean_ms = (sum(p[i] for p in points) / len(points) for i in (0, 1))
    slope = sum((v - mean_v) * (ms - mean_ms) for v, ms in points) / sum((v - mean_v) ** 2 for v, _ in points)
    return (mean_ms - slope * mean_v) / 4096


def work(columns: int, found: Count, card: Card) -> dict[str, float]:
    """Milliseconds of each pipe."""
    return {
        "issue": found.instructions * columns / card.per_second(ISSUE) * 1e3,
        "alu": found.alu * columns / card.per_second(ALU) * 1e3,
        "special": found.special * columns / card.per_second(SPECIAL) * 1e3,
        "products": found.products * columns / card.products * 1e3,
    }


def in_flight(row: Row, found: Count, card: Card) -> float:
    """Bytes that all programs hold between the two passes over their rows."""
    return card.processors * found.programs * row.again / row.rows


def kept(row: Row, found: Count, card: Card, l2: float) -> float:
    """Share of a row that the second pass, which walks it from its end, finds in L2: the bytes read last."""
    return min(1.0, l2 / in_flight(row, found, card)) if row.again else 1.0


def bytes_ms(row: Row, share_kept: float, card: Card) -> float:
    return (row.moved + (1 - share_kept) * row.again) / card.bandwidth * 1e3


def predicted(row: Row, found: Count, card: Card) -> tuple[float, float]:
    """Milliseconds (with the whole of L2 for rows; with half of it, where both halves keep what is read)."""
    pipes = max(work(row.columns, found, card).values())
    hidden = min(1.0, found.ahead * found.programs / card.to_be_ahead)
    # While one program reduces, the others load.
    by_others = min(1.0, found.ahead * (found.programs - 1) / card.to_be_ahead)
    fixed = row.rows * row_cost() * (1 - by_others) if row.again else 0.0
    times = []
    for l2 in (card.l2, card.l2 / 2):
        memory = bytes_ms(row, kept(row, found, card, l2), card)
        times.append(max(memory, pipes) + (1 - hidden) * min(memory, pipes) + fixed)
    return times[0], times[1]


def before(row: Row, found: Count, card: Card) -> tuple[float, float]:
    """The kernels that were measured loaded nothing ahead and walked both passes from the front: (everything overlaps and the
    second pass is in L2; nothing and all of it from memory)."""
    pipes = max(work(row.columns, found, card).values())
    fixed = row.rows * row_cost() if row.again else 0.0
    return max(bytes_ms(row, 1, card), pipes), bytes_ms(row, 0, card) + pipes + fixed


@dataclass(frozen=True)
class Outcome:
    """How a call stands to its aim on a card; in all of them more is better.

    Args:
        worst, best: predicted.
        limit: what no kernel of this form exceeds. why: the arithmetic of it. lacking: what `worst` lacks to `best`.
        largest: what takes the time.
    """

    worst: float
    best: float
    limit: float = float("inf")
    why: str = ""
    lacking: str = ""
    largest: str = ""

    def verdict(self, reach: float) -> str:
        if self.limit < reach:
            return f"bound {self.limit:.2f}: {self.why}"
        if round(self.worst, 2) >= reach:
            return "reached"
        if round(self.best, 2) >= reach:
            return f"reached if {self.lacking}" if self.lacking else "reached at best"
        return f"short: {self.largest}" if self.largest else "short"


def row_outcome(row: Row, found: Count, card: Card) -> Outcome:
    best, worst = predicted(row, found, card)
    floor = bytes_ms(row, 1, card)
    whole = kept(row, found, card, card.l2)
    flight = in_flight(row, found, card) / 1e6
    parts = work(row.columns, found, card) | {"memory": bytes_ms(row, kept(row, found, card, card.l2 / 2), card)}
    name, most = max(parts.items(), key=lambda x: x[1])
    tensors = (row.moved + (1 - whole) * row.again) / row.moved
    return Outcome(
        floor / worst, floor / best, 1 / tensors,
        f"{flight:.0f} MB of rows between their passes, L2 holds {card.l2 / 1e6:.0f}: {1 - whole:.2f} of the second pass is"
        f" from memory, {tensors:.2f} times the bytes",
        f"L2 keeps more than half of its {card.l2 / 1e6:.0f} MB for the {flight:.0f} MB of rows between their passes",
        f"{name} {most:.2f} ms + {worst - most:.2f} that is not hidden behind it, floor {floor:.2f}",
    )  # fmt: skip
