"""`kdfast bench issue`: how many instructions a column costs, from the machine code, and what that allows; no GPU needed.

Each row kernel is compiled for sm_90 and its loops over columns are counted: instructions, those of the integer and compare
pipe, and special functions (exp2). Over the card's rates they bound the time from below, as its bytes do. A kernel that needs
more instructions a column than docs/gpu.md says fails the check.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib.util
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdfast.files import write_text

from .aot import _cuobjdump
from .aot_cases import Case, cases

RESULTS = Path(__file__).parent / "results"
COUNTS, FIRST, MEASURED = RESULTS / "issue.csv", RESULTS / "issue-first.csv", RESULTS / "nvidia-h200-2026-11-27.csv"
PAGE = Path(__file__).parents[1] / "docs" / "gpu.md"
#: How far a count may lie above the committed one: what another ptxas makes of the same kernel.
SLACK = 1.03


_PER_COLUMN = ("instructions", "alu", "special")


@dataclass(frozen=True)
class Card:
    """Rates of a card: bytes and FLOPs (bfloat16 products) a second measured by `kdfast bench gpu`, the rest from its sheet."""

    name: str
    bandwidth: float
    products: float
    processors: int = 132
    clock: float = 1.755e9

    def per_second(self, lanes: int) -> float:
        return lanes * self.processors * self.clock


H100, H200 = Card("H100", 3.0e12, 798e12), Card("H200", 4.278e12, 796e12)
#: Lanes a clock and multiprocessor: any instruction; integers, compares, selects, moves of bytes; special functions.
ISSUE, ALU, SPECIAL = 128, 64, 16
_ALU_OPS = re.compile(r"(FMNMX|FSEL|FSETP|SEL|ISETP|PLOP3|LOP3|SHF|PRMT|IADD3|VIADD|VIMNMX|LEA|F2FP|MOV|POPC|HMNMX2|HSETP2)\b")


@dataclass(frozen=True)
class Row:
    """One public call at one shape: the kernel behind it, and what has to move.

    Args:
        case: label of `aot_cases`.
        columns: of all rows together (scores for attention).
        moved: bytes that must move, read or written once. again: those a second pass reads once more, where L2 has lost them.
        per_column: bytes of a column that one pass loads.
        measured: (op, shape) in the committed measurements.
        reach: share of the floor this kernel is meant to come to.
    """

    name: str
    kernel: str
    case: str
    columns: int
    moved: int
    again: int
    per_column: int
    measured: tuple[str, str, str]
    reach: float
    flops: int = 0


@dataclass(frozen=True)
class Count:
    """Per column, all loops together."""

    instructions: float
    alu: float
    special: float
    registers: int
    loops: int


def rows() -> Iterator[Row]:
    n, half = 4096, 2
    for vocab, case, reach in ((128256, 151936, 0.65), (32000, 57344, 0.8), (50257, 50257, 0.8)):
        v = n * vocab
        yield Row(f"kd_loss bf16 T=2 {n} x {vocab}", "logits_rows.forward_kernel", f"bf16 V={case} hard T=2", v, 3 * v * half,
                  2 * v * half, 4, ("logits", "bfloat16", f"N={n} V={vocab}"), reach)  # fmt: skip
    v = n * 128256
    yield Row(f"kd_loss bf16 T=3 {n} x 128256", "logits_rows.forward_kernel", "bf16 V=151936 hard", v, 3 * v * half,
              2 * v * half, 4, ("", "", ""), 0.65)  # fmt: skip
    yield Row(f"kd_loss fp32 T=2 {n} x 128256", "logits_rows.forward_kernel", "fp32 V=151936 hard T=2", v, 3 * v * 4,
              2 * v * 4, 8, ("", "", ""), 0.65)  # fmt: skip
    v = n * 151936
    yield Row(f"topk_kd_loss bf16 {n} x 151936 k=64", "topk_rows.forward_kernel", "bf16 V=151936 k=64 hard T=2", v,
              2 * v * half, v * half, 2, ("topk", "bfloat16", f"N={n} V=151936 k=64"), 0.75)  # fmt: skip
    yield from capture_rows(n, 151936)
    v = n * 128256
    yield Row(f"scale bf16 {n} x 128256", "scale.scale_kernel", "bf16", v, 2 * v * half, 0, 2,
              ("scale", "bfloat16", f"N={n} V=128256"), 0.9)  # fmt: skip


def capture_rows(n: int, vocab: int) -> Iterator[Row]:
    v = n * vocab
    measured = ("topk_capture", "bfloat16", f"N={n} V={vocab} k=64 T=1,2")
    yield Row(f"topk_targets bf16 {n} x {vocab} k=64", "capture_rows.capture_kernel", f"bf16 V={vocab} k=64 head=0", v,
              2 * v, 0, 2, measured, 0.6)  # fmt: skip


@dataclass(frozen=True)
class Loop:
    """Innermost loop over a row: its instructions, one string each."""

    first: int
    body: tuple[str, ...]

    @property
    def loaded_bits(self) -> int:
        """Of rows: those are the loads that say how long L2 should keep them."""
        bits = 0
        for op in self.body:
            if re.match(r"LDG\S*\.E[FL]\b", op):
                width = re.search(r"\.(128|64|[US]16|[US]8)\b", op)
                bits += int(width.group(1).lstrip("US")) if width else 32
        return bits


def loops(sass: str) -> list[Loop]:
    """Loops over columns: bodies of backward branches that load from memory and hold no such loop themselves."""
    ops: list[tuple[int, str]] = []
    for line in sass.splitlines():
        found = re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S+)([^;]*);", line)
        if found:
            ops.append((int(found.group(1), 16), found.group(2) + found.group(3)))
    spans = []
    for at, op in ops:
        target = re.match(r"BRA\s+(?:!?U?P\w+,\s*)?(?:`\(\S+\)|0x([0-9a-f]+))", op)
        if target and target.group(1) and int(target.group(1), 16) < at:
            spans.append((int(target.group(1), 16), at))
    skipped = [  # what a branch steps over inside a loop: the label's tile, a repeated id
        (at + 16, int(target.group(1), 16) - 16)
        for at, op in ops if (target := re.match(r"BRA\s+(?:!?U?P\w+,\s*)?0x([0-9a-f]+)", op)) and int(target.group(1), 16) > at
    ]  # fmt: skip
    found_loops = [Loop(a, tuple(op for at, op in ops if a <= at <= b and not _within(at, skipped, a, b))) for a, b in spans]
    found_loops = [loop for loop in found_loops if loop.loaded_bits]
    ends = dict(spans)
    return [
        loop for loop in found_loops
        if not any(o is not loop and loop.first <= o.first and ends[o.first] <= ends[loop.first] for o in found_loops)
    ]  # fmt: skip


def _within(at: int, spans: Sequence[tuple[int, int]], first: int, last: int) -> bool:
    """Whether an address lies in one of the spans that lie in a loop."""
    return any(first <= a and b <= last and a <= at <= b for a, b in spans)


def count(case: Case, per_column: int) -> Count:
    """Compiles a case for sm_90 and counts its loops over columns."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(case.kernel, case.signature(), case.constants, case.hints())
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(case.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage, sass = _cuobjdump("-res-usage", file.name), _cuobjdump("-sass", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    total = [0.0, 0.0, 0.0]
    passes = 0
    before = (0, 0.0)
    for loop in loops(sass):
        columns = max(1, round(loop.loaded_bits / (8 * per_column)))
        special = sum(op.startswith("MUFU") for op in loop.body) / columns
        if before[0] > columns and abs(special - before[1]) < 0.3 * max(special, 0.1):
            continue  # what an unrolled loop leaves over
        before = (columns, special)
        passes += 1
        alu = sum(bool(_ALU_OPS.match(op)) for op in loop.body)
        total = [a + b for a, b in zip(total, (len(loop.body) / columns, alu / columns, special), strict=True)]
    return Count(*(round(x, 2) for x in total), int(registers.group(1)) if registers else 0, passes)


def milliseconds(row: Row, found: Count, card: Card) -> dict[str, float]:
    """Lower bounds of a call's time by what limits it."""
    return {
        "bytes": row.moved / card.bandwidth * 1e3,
        "bytes, second pass from memory": (row.moved + row.again) / card.bandwidth * 1e3,
        "issue": found.instructions * row.columns / card.per_second(ISSUE) * 1e3,
        "alu": found.alu * row.columns / card.per_second(ALU) * 1e3,
        "special": found.special * row.columns / card.per_second(SPECIAL) * 1e3,
        "products": row.flops / card.products * 1e3,
    }


def predicted(row: Row, found: Count, card: Card) -> tuple[float, float]:
    """(all of it overlapping and the second pass in L2; none of it overlapping and the second pass from memory), in ms."""
    ms = milliseconds(row, found, card)
    work = max(ms["issue"], ms["alu"], ms["special"])
    return max(ms["bytes"], work, ms["products"]), ms["bytes, second pass from memory"] + work + ms["products"]


def measure(wanted: Callable[[Row], bool]) -> Iterator[tuple[Row, Count]]:
    by_label = {(f"{c.kernel.__module__.rsplit('.', 1)[-1]}.{c.kernel.__name__}", c.label): c for c in cases()}
    for row in rows():
        if wanted(row):
            yield row, count(by_label[row.kernel, row.case], row.per_column)


def read_counts(path: Path) -> dict[str, Count]:
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {
            r["row"]: Count(
                float(r["instructions"]), float(r["alu"]), float(r["special"]), int(r["registers"]), int(r["loops"])
            )
            for r in csv.DictReader(file)
        }


def _csv(found: dict[str, Count]) -> str:
    names = [f.name for f in dataclasses.fields(Count)]
    lines = [",".join(["row", *names])]
    lines += [",".join([f'"{row}"', *(f"{getattr(c, name):g}" for name in names)]) for row, c in found.items()]
    return "\n".join(lines) + "\n"


def _measured() -> dict[tuple[str, str, str], float]:
    with MEASURED.open(newline="") as file:
        return {
            (r["op"], r["dtype"], r["shape"]): float(r["median_ms"])
            for r in csv.DictReader(file) if r["contestant"] == "kdfast" and r["median_ms"]
        }  # fmt: skip


def page(now: dict[str, Count], first: dict[str, Count]) -> str:
    """docs/gpu.md."""
    measured = _measured()
    lines = [_HEAD, "## Counts", "", _COUNTS_HEAD]
    lines.append("| call | instructions a column | integer, compare | special functions | registers | before |")
    lines.append("|---|---|---|---|---|---|")
    for row in rows():
        c, b = now[row.name], first.get(row.name)
        before = "" if b is None else f"{b.instructions:.1f}, {b.alu:.1f}, {b.special:.2f}"
        lines.append(f"| `{row.name}` | {c.instructions:.1f} | {c.alu:.1f} | {c.special:.2f} | {c.registers} | {before} |")
    lines += ["", "## What they allow", "", _TIMES_HEAD]
    lines.append("| call | card | bytes | issue | special | predicted ms | share of the floor | meant to reach |")
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows():
        for card in (H100, H200):
            ms = milliseconds(row, now[row.name], card)
            low, high = predicted(row, now[row.name], card)
            floor = max(ms["bytes"], ms["products"])
            lines.append(
                f"| `{row.name}` | {card.name} | {ms['bytes']:.2f} | {ms['issue']:.2f} | {ms['special']:.2f} "
                f"| {low:.2f} - {high:.2f} | {floor / high:.2f} - {floor / low:.2f} | {row.reach:g} |"
            )
    lines += ["", "## How far off the model is", "", _ERROR_HEAD]
    lines.append("| call | predicted ms | measured ms | measured over the lower | over the upper |")
    lines.append("|---|---|---|---|---|")
    for row in rows():
        if row.measured in measured and row.name in first:
            low, high = predicted(row, first[row.name], H200)
            was = measured[row.measured]
            lines.append(f"| `{row.name}` | {low:.2f} - {high:.2f} | {was:.2f} | {was / low:.2f} | {was / high:.2f} |")
    return "\n".join(lines) + "\n"


_HEAD = """# What the row kernels cost a GPU, counted

Written by `kdfast bench issue --write`; `kdfast bench issue --check` fails where a kernel has come to need more. Nothing here
is a measurement but the third column of the last table: those are in [performance.md](performance.md).
"""
_COUNTS_HEAD = """Machine code for sm_90 as the pinned Triton makes it: the loops over columns, all passes of a row
together, per column. What a branch steps over in such a loop (the tile that holds the label) is not counted. *Before*: the
first three counts of the kernels that the H200 measured; those of `topk_targets` are of its selection alone, without the shared
atomics of its histograms and the passes for sums.
"""
_TIMES_HEAD = f"""Milliseconds. A multiprocessor issues {ISSUE} lanes a clock, {ALU} of them integers, compares and selects,
and {SPECIAL} special functions; 132 of them at 1.755 GHz. Bytes at the copy rate (H100 3.0 TB/s, H200 4.28 TB/s). *Predicted*
is a range: from the largest of these alone, when everything overlaps and the second pass over a row finds it in L2, to their
sum with the second pass from memory. Reductions between passes, launches and the end of the grid are not in it, nor is what
`topk_targets` does after its pass over a row.
"""
_ERROR_HEAD = """The kernels of *before* on an H200, whose measurements are committed. Near 1 over the upper bound: the kernel
neither overlapped its loads with its arithmetic nor found the row in L2 again. Above 1: something else cost more than both.
"""


def _worse(now: Count, committed: Count) -> list[str]:
    pairs = [(name, getattr(now, name), getattr(committed, name)) for name in _PER_COLUMN]
    return [f"{name} {a:g} a column, committed {b:g}" for name, a, b in pairs if a > SLACK * b + 0.05]


def main(argv: Sequence[str] | None = None) -> int:
    """0: counted, and nothing is above the committed counts. 1: something is. 2: Triton is missing or wrong usage."""
    p = argparse.ArgumentParser(
        prog="kdfast bench issue", description=__doc__, epilog="example: kdfast bench issue --check --quick",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    p.add_argument("--check", action="store_true", help="fail where a count is above the committed one")
    p.add_argument("--quick", action="store_true", help="only the calls that cost the most instructions")
    p.add_argument("--row", default="", help="only calls whose name holds this")
    p.add_argument("--write", action="store_true", help="write bench/results/issue.csv and docs/gpu.md")
    options = p.parse_args(argv)
    if importlib.util.find_spec("triton") is None:
        print("issue: triton is not installed; expected it to compile the kernels; pip install triton", file=sys.stderr)
        return 2
    committed, failed = read_counts(COUNTS), 0
    quick = ("kd_loss bf16 T=2 4096 x 128256", "topk")
    now = {}
    for row, found in measure(lambda r: options.row in r.name and (not options.quick or r.name.startswith(quick))):
        now[row.name] = found
        low, high = predicted(row, found, H200)
        worse = _worse(found, committed[row.name]) if options.check and row.name in committed else []
        failed += bool(worse)
        print(
            f"{row.name:50} {found.instructions:6.1f} instructions, {found.alu:5.1f} alu, {found.special:5.2f} special, "
            f"{found.loops} passes, {found.registers} registers; H200 {low:.2f} - {high:.2f} ms  {'; '.join(worse)}",
            flush=True,
        )  # fmt: skip
    if options.write:
        counts = committed | now
        write_text(COUNTS, _csv({row.name: counts[row.name] for row in rows()}))
        write_text(PAGE, page(counts, read_counts(FIRST)))
    return 1 if failed else 0
