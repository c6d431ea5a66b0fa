"""`kdfast bench issue`: how many instructions a column costs, from the machine code, and what that allows; no GPU needed.

Each row kernel is compiled for sm_90 and its loops over columns are counted: instructions, those of the integer and compare
pipe, and special functions (exp2); of attention those over tiles of scores, with their products. Over the card's rates they
bound the time from below, as its bytes do. A kernel that needs more a column than docs/gpu.md says fails the check, and so does
one whose loops or products are not found as they were.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from kdfast.files import write_text

from . import issue_model as model
from .issue_counts import Count, count, count_scores, counts_csv, gram_launches, read_counts, row_case, score_cases
from .issue_model import ALU, H100, H200, ISSUE, RESULTS, SPECIAL, Row
from .issue_targets import attention_times, linear_before, targets

COUNTS, FIRST = RESULTS / "issue.csv", RESULTS / "issue-first.csv"
PAGE = Path(__file__).parents[1] / "docs" / "gpu.md"
#: How far a count may lie above the committed one: what another ptxas makes of the same kernel.
SLACK = 1.03
_PER_COLUMN = ("instructions", "alu", "special", "products")
_ATTENTION = {f"attention_{kind} bf16 B=2 H=4 L=4096 D=64": kind for kind in ("scores", "probs", "kl")}


def rows() -> Iterator[Row]:
    n, half = 4096, 2
    for vocab, case, reach in ((128256, 151936, 0.65), (32000, 57344, 0.8), (50257, 50257, 0.8)):
        v = n * vocab
        yield Row(f"kd_loss bf16 T=2 {n} x {vocab}", "logits_rows.forward_kernel", f"bf16 V={case} hard T=2", v, 3 * v * half,
                  2 * v * half, 4, ("logits", "bfloat16", f"N={n} V={vocab}"), reach)  # fmt: skip
    v = n * 128256
    yield Row(f"kd_loss bf16 T=3 {n} x 128256", "logits_rows.forward_kernel", "bf16 V=151936 hard", v, 3 * v * half,
              2 * v * half, 4, reach=0.65)  # fmt: skip
    yield Row(f"kd_loss fp32 T=2 {n} x 128256", "logits_rows.forward_kernel", "fp32 V=151936 hard T=2", v, 3 * v * 4,
              2 * v * 4, 8, reach=0.65)  # fmt: skip
    v = n * 151936
    yield Row(f"topk_kd_loss bf16 {n} x 151936 k=64", "topk_rows.forward_kernel", "bf16 V=151936 k=64 hard T=2", v,
              2 * v * half, v * half, 2, ("topk", "bfloat16", f"N={n} V=151936 k=64"), 0.75)  # fmt: skip
    yield from capture_rows(n, 151936)
    v = n * 128256
    yield Row(f"scale bf16 {n} x 128256", "scale.scale_kernel", "bf16", v, 2 * v * half, 0, 2,
              ("scale", "bfloat16", f"N={n} V=128256"), 0.9)  # fmt: skip
    n, v = 8192, 8192 * 128256
    for short, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        size = dtype.itemsize
        yield Row(f"linear rows {short} {n} x 128256 T=2", "logits_rows.forward_kernel", f"{short} V=151936 hard T=2", v,
                  v * (2 * size + half), 2 * v * size, 2 * size, rows=n, pointers=(("grad", torch.bfloat16),))  # fmt: skip


def capture_rows(n: int, vocab: int) -> Iterator[Row]:
    v = n * vocab
    measured = ("topk_capture", "bfloat16", f"N={n} V={vocab} k=64 T=1,2")
    yield Row(f"topk_targets bf16 {n} x {vocab} k=64", "capture_rows.capture_kernel", f"bf16 V={vocab} k=64 head=0", v,
              2 * v, 0, 2, measured, 0.6)  # fmt: skip


def measure(wanted: Callable[[str], bool]) -> Iterator[tuple[str, Count]]:
    for row in rows():
        if wanted(row.name):
            yield row.name, count(row_case(row.kernel, row.case, **dict(row.pointers)), row.per_column)
    for name, kind in _ATTENTION.items():
        if wanted(name) and kind == "scores":
            yield name, Count(0, 0, 0, 0, gram_launches())
        elif wanted(name):
            yield name, count_scores(score_cases(kind))


def calls() -> list[str]:
    """Names of all that is counted."""
    return [*(row.name for row in rows()), *_ATTENTION]


def _table(*heads: str) -> list[str]:
    return ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]


def page(now: dict[str, Count], first: dict[str, Count]) -> str:
    """docs/gpu.md."""
    lines = [_HEAD, "## Aims", "", _AIMS_HEAD]
    lines += _table("call", "meant to reach", "before, H200", "predicted, H100", "predicted, H200", "by the model")
    lines += ["| " + " | ".join(target.cells()) + " |" for target in targets(list(rows()), now, first)]
    lines += ["", "## Counts", "", _COUNTS_HEAD]
    lines += _table("call", "instructions", "integer, compare", "special functions", "products", "registers", "before")
    for name in calls():
        c, b = now[name], first.get(name)
        if c.instructions == 0 and c.loops:
            lines.append(f"| `{name}` | {c.loops} launches | | | | | {b.loops if b else ''} launches |")
            continue
        was = "" if b is None or not b.instructions else f"{b.instructions:.1f}, {b.alu:.1f}, {b.special:.2f}"
        products = f"{c.products:.0f}" if c.products else ""
        lines.append(
            f"| `{name}` | {c.instructions:.1f} | {c.alu:.1f} | {c.special:.2f} | {products} | {c.registers} | {was} |"
        )
    lines += ["", "## What they allow", "", _TIMES_HEAD]
    lines += _table("call", "card", "bytes", "with the second pass", "issue", "integer", "special", "ahead", "predicted ms")
    for row in rows():
        for card in (H100, H200):
            c = now[row.name]
            low, high = model.predicted(row, c, card)
            pipes = model.work(row.columns, c, card)
            again = model.bytes_ms(row, model.kept(row, c, card, card.l2 / 2), card)
            ahead = min(1.0, c.ahead * c.programs / card.to_be_ahead)
            lines.append(
                f"| `{row.name}` | {card.name} | {model.bytes_ms(row, 1, card):.2f} | {again:.2f} | {pipes['issue']:.2f} "
                f"| {pipes['alu']:.2f} | {pipes['special']:.2f} | {ahead:.2f} | {low:.2f} - {high:.2f} |"
            )
    lines += ["", "## How far off the model is", "", _ERROR_HEAD]
    lines += _table("call", "predicted ms", "measured ms", "measured over the lower", "over the upper")
    for name, (low, high), ms in _known(first):
        lines.append(f"| `{name}` | {low:.2f} - {high:.2f} | {ms:.2f} | {ms / low:.2f} | {ms / high:.2f} |")
    return "\n".join(lines) + "\n"


def _known(first: dict[str, Count]) -> Iterator[tuple[str, tuple[float, float], float]]:
    """Calls whose kernels of before were measured, with what the model says of those."""
    ours = model.measured()
    for row in rows():
        if row.measured in ours and row.name in first:
            yield row.name, model.before(row, first[row.name], H200), ours[row.measured]
    linear = ("linear", "bfloat16", "N=8192 V=128256 Ds=2048 Dt=4096")
    yield "linear_kd_loss bf16, fp32 logits", linear_before(first, list(rows())), ours[linear]
    for name, kind in _ATTENTION.items():
        if kind != "scores":
            yield name, attention_times(first[name], H200), ours[f"attention_{kind}", "bfloat16", "B=2 H=4 L=4096 D=64"]


_HEAD = """# What the kernels cost a GPU, counted

Written by `kdfast bench issue --write`; `kdfast bench issue --check` fails where a kernel has come to need more. What is
marked as measured was, on an H200 with kernels from before these (committed in `bench/results`;
[performance.md](performance.md) has them beside their peers). Everything else is predicted: no kernel as it stands now has been
timed.
"""
_AIMS_HEAD = """Of a floor: the time that the bytes that must move take at the copy rate, or the products at the product rate;
or as many times as fast as plain PyTorch. The range is of what L2 keeps between two passes, half of its 50 MB (each of its
halves may keep a copy of what the other fetched) or all of it, and for attention of whether products and arithmetic overlap.
The last column: *reached* by the lower end, or by the upper one if L2 keeps what is said; *bound* where no kernel of this form
can, with the arithmetic; *short* where it does not and nothing found here forbids it.
"""
_COUNTS_HEAD = """Machine code for sm_90 as the pinned Triton makes it: the loops over columns, all passes of a row together,
per column; for attention the loops over tiles, forward and backward, per score, no mask. What a branch steps over in a row's
loop (the tile that holds the label) is not counted. *Products*: FLOPs on tensor cores, in those of bfloat16 warpgroup products
(TF32 takes twice as long, a product of a single warp 1.6 times). *Before*: the first three counts of the kernels that the H200
measured; those of `topk_targets` are of its selection alone, without the shared atomics of its histograms and the passes for
sums. `linear rows` are those behind `linear_kd_loss`, whose gradients leave in bfloat16.
"""
_TIMES_HEAD = f"""Milliseconds. A multiprocessor issues {ISSUE} lanes a clock, {ALU} of them integers, compares and selects,
and {SPECIAL} special functions; 132 of them at 1.755 GHz. Bytes at the copy rate (H100 3.0 TB/s, H200 4.28 TB/s).

- *With the second pass*: a program holds a row of each side between its passes, and 132 or 264 programs run at once. Were the
  second pass to begin where the first did, rows of 128256 (68 MB together) would all be gone from L2, and 3 of 5 tensors,
  0.60 of the bytes, would be the most. It walks a row from its end and finds what was read last: 25 of 68 MB with half of L2,
  4.3 tensors. Rows of 32000 (34 MB) come to 3.5 tensors, or to 3.
- *Ahead*: bytes on their way while the tile before is worked on, over what a multiprocessor needs for its share of the
  bandwidth at 0.8 us from a load to its value (Little's law; the 0.8 us are assumed). At 1 memory and arithmetic overlap and
  the larger counts; below, that share of the smaller is hidden.
- What a row costs beside its columns (reductions over a block, first loads) is what a straight line through the measured times
  over vocabularies leaves: {132e3 * model.row_cost():.1f} us a row and multiprocessor; a second program hides it.

*Predicted*: with all of L2 for rows - with half of it. Launches and the end of the grid are not in it, nor is what
`topk_targets` does after its pass over a row.
"""
_ERROR_HEAD = """The kernels of *before* on an H200, whose measurements are committed: nothing loaded ahead, both passes from
the front. The range is from everything overlapping with the second pass in L2 to nothing overlapping with all of it from
memory. Near 1 over the upper bound: the kernel neither overlapped its loads with its arithmetic nor found the row in L2 again.
Above 1: something else cost more than both; attention waited for products of which it had none in flight.
"""


def _worse(now: Count, committed: Count | None) -> list[str]:
    """What a count has come to need more of than the committed one, and what says that the two are not of the same loops."""
    if committed is None:
        return ["no committed count; kdfast bench issue --write"]
    pairs = [(name, getattr(now, name), getattr(committed, name)) for name in _PER_COLUMN]
    worse = [f"{name} {a:g} a column, committed {b:g}" for name, a, b in pairs if _more(a, b) or bool(a) != bool(b)
             or (name == "products" and _more(b, a))]  # fmt: skip
    if now.loops != committed.loops:
        what = "loops" if committed.instructions or now.instructions else "launches"
        worse.append(f"{now.loops} {what}, committed {committed.loops}")
    return worse


def _more(a: float, b: float) -> bool:
    return a > SLACK * b + 0.05


def main(argv: Sequence[str] | None = None) -> int:
    """0: counted, and all is as committed or below. 1: something is not. 2: Triton is missing or wrong usage."""
    p = argparse.ArgumentParser(
        prog="kdfast bench issue", description=__doc__, epilog="example: kdfast bench issue --check --quick",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    p.add_argument(
        "--check", action="store_true", help="fail where a count is above the committed one, or is not of as many loops"
    )
    p.add_argument("--quick", action="store_true", help="only the calls that cost the most instructions")
    p.add_argument("--row", default="", help="only calls whose name holds this")
    p.add_argument("--write", action="store_true", help="write bench/results/issue.csv and docs/gpu.md")
    options = p.parse_args(argv)
    if importlib.util.find_spec("triton") is None:
        print("issue: triton is not installed; expected it to compile the kernels; pip install triton", file=sys.stderr)
        return 2
    committed, failed = read_counts(COUNTS), 0
    quick = ("kd_loss bf16 T=2 4096 x 128256", "topk")
    wanted = [name for name in calls() if options.row in name and (not options.quick or name.startswith(quick))]
    if not wanted:
        where = "a name in docs/gpu.md" + (" that --quick counts" if options.quick else "")
        print(f"issue: --row: expected part of {where}, got {options.row!r}", file=sys.stderr)
        return 2
    missing = [name for name in calls() if name not in committed and name not in wanted]
    if options.write and missing:
        print(
            f"issue: --write: expected counts of every call, got none of {missing[0]}; leave out --row and --quick",
            file=sys.stderr,
        )
        return 2
    now = {}
    by_name = {row.name: row for row in rows()}
    print("by column, of attention by score; milliseconds as predicted")
    for name, found in measure(wanted.__contains__):
        now[name] = found
        times = [model.predicted(by_name[name], found, card) if name in by_name else attention_times(found, card)
                 for card in (H100, H200)]  # fmt: skip
        predicted = ", ".join(
            f"{card.name} {low:.2f} - {high:.2f} ms" for card, (low, high) in zip((H100, H200), times, strict=True)
        )
        worse = _worse(found, committed.get(name)) if options.check else []
        failed += bool(worse)
        print(
            f"{name:50} {found.instructions:6.1f} instructions, {found.alu:5.1f} alu, {found.special:5.2f} special, "
            f"{found.products:5.0f} products, {found.loops} loops, {found.registers} registers; "
            f"{predicted}  {'; '.join(worse)}",
            flush=True,
        )  # fmt: skip
    if options.check:
        print(f"{len(now)} calls, {failed} of them above the committed count or not of as many loops")
    if options.write:
        counts = committed | now
        write_text(COUNTS, counts_csv({name: counts[name] for name in calls()}))
        write_text(PAGE, page(counts, read_counts(FIRST)))
    return 1 if failed else 0
