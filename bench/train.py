"""A whole training step (forward, loss, backward, optimizer) of a small student: tokens a second by way of distillation.

Plain cross-entropy and cross-entropy through the head, eager distillation from a live teacher, kdfast from a live teacher,
kdfast from a cache on disk that the step reads, and the sparse loss that one writes by hand with its targets already in
memory. Every contestant's loss and gradients are those of float64 before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .contest import Settings, measure_limits, parser, positive, report, settings_of
from .measure import Timing, Work, compare, failures, peak_bytes, ratio, reason, relative_error, release
from .report import Limits, Model, Row, stamp, timed

PLAIN, HEAD, EAGER, LIVE, CACHED, SPARSE = CONTESTANTS = (
    "plain cross-entropy", "F.linear_cross_entropy", "eager KD, live teacher", "kdfast live teacher", "kdfast cached",
    "eager sparse KD",
)  # fmt: skip
#: A step from a cache may take this many times a step without distillation, the faster of the two.
MARK = 1.05
#: How far a loss or gradient may be from float64: a whole model in float32, or its products in bfloat16.
_GATE = {False: 1e-3, True: 0.1}
#: Sequences of the check.
_CHECKED = 2


def missing() -> str:
    """Why this cannot run here, "" when it can."""
    away = [name for name in ("transformers", "tokenizers", "safetensors") if importlib.util.find_spec(name) is None]
    return f"{', '.join(away)} not installed: pip install 'kdfast[train]'" if away else ""


def unmeasured_rows(why: str, device: str) -> list[Row]:
    """The rows of a step that was not run, each with the reason."""
    return [stamp(Row("train", name, error=why), device) for name in CONTESTANTS]


def disagreement(b: Any, name: str, loss: Callable[..., Tensor], seen: dict[str, float]) -> str:
    """ "" when the loss and gradients of a contestant are those of float64; puts the gradients' error into `seen`."""
    from .train_step import TRUTH

    few = dataclasses.replace(b, spec=dataclasses.replace(b.spec, batch=min(_CHECKED, b.spec.batch), half=False))
    exact = dataclasses.replace(few, teacher=copy.deepcopy(b.teacher).double())
    half = dataclasses.replace(few, spec=dataclasses.replace(few.spec, half=b.spec.half))
    found = []
    for bench, function, student in (
        (half, loss, copy.deepcopy(b.student)),
        (exact, TRUTH[name], copy.deepcopy(b.student).double()),
    ):
        with bench.autocast():
            value = function(bench, student, 0)
        found.append((value.detach(), torch.autograd.grad(value, list(student.parameters()))))
    (value, grads), (truth, true_grads) = found
    error, seen[name] = relative_error([value], [truth]), relative_error(grads, true_grads)
    for what, off in (("loss", error), ("gradient", seen[name])):
        if not off <= _GATE[b.spec.half]:  # NaN is off too
            return f"disagrees: {what} off by {off:.2g} of its norm, allowed {_GATE[b.spec.half]:.0e}"
    return ""


def model(b: Any, name: str) -> Model:
    """Six operations a weight and token for the student, two for a live teacher; embeddings are looked up, not multiplied."""
    worked = 6 * _weights(b.student) * b.spec.tokens
    text = f"6*N*P = {worked / 1e9:.4g} GFLOP (student)"
    if name in (EAGER, LIVE):
        teacher = 2 * _weights(b.teacher) * b.spec.tokens
        worked, text = worked + teacher, f"6*N*P + 2*N*Pt = {(worked + teacher) / 1e9:.4g} GFLOP (student and teacher)"
    return Model(flops=worked, text=text)


def _weights(model: Any) -> int:
    """Parameters; a tied head counts once, and it is the head that is multiplied."""
    return sum(p.numel() for p in model.parameters())


def shape(b: Any) -> str:
    """The row's shape: everything the times depend on."""
    s, weights = b.spec, _weights(b.student)
    head = b.student.lm_head.weight.numel() / weights
    return (
        f"B={s.batch} L={s.length} V={s.vocab} student {s.student[0]}x{s.student[1]} ({weights / 1e6:.3g}M, head {head:.0%})"
        f" teacher {s.teacher[0]}x{s.teacher[1]} ({_weights(b.teacher) / 1e6:.3g}M) k={s.k}"
    )


def measure(spec: Any, settings: Settings, limits: Limits, say: Callable[[str], None]) -> list[Row]:
    """The rows of all contestants, prepared in a folder that is gone afterwards."""
    from .train_step import prepare

    with tempfile.TemporaryDirectory(prefix="kdfast-bench-train-") as folder:
        return rows(prepare(spec, Path(folder), say), settings, limits)


def rows(b: Any, settings: Settings, limits: Limits) -> list[Row]:
    """Check, time in turns, and measure memory; a contestant that disagrees has no number."""
    from .train_step import Trainee, losses

    by_name, errors, seen = losses(b), {}, {}
    for name, loss in by_name.items():
        try:
            errors[name] = disagreement(b, name, loss, seen)
        except failures() as error:
            errors[name] = reason(error)
        release(b.spec.device)
    turns = [functools.partial(int, turn) for turn in range(b.spec.batches)]
    works = {name: Work(Trainee(b, loss), turns) for name, loss in by_name.items() if not errors[name]}
    again = f"{CACHED} (again)"
    if CACHED in works:
        works[again] = Work(Trainee(b, by_name[CACHED]), turns)
    # Wall time to the end of the device's work: a step's host part is part of it.
    timings = compare(works, repeats=settings.repeats, warmup=settings.warmup, budget_s=settings.budget_s)
    notes = {
        SPARSE: "targets in memory; renormalised over the k",
        CACHED: f"reads {b.reader.info.bytes_per_token:.0f} bytes a token from files the system has in memory",
        again: "the same once more: the spread of this run",
    }
    found = []
    for name in [*by_name, *({again} & set(works))]:
        row = Row("train", name, dtype="bfloat16 autocast" if b.spec.half else "float32", shape=shape(b),
                  error_f64=seen.get(name, float("nan")), error=errors.get(name, ""), note=notes.get(name, ""))  # fmt: skip
        found.append(stamp(_finished(row, b, timings, works, (CACHED, PLAIN), limits), b.spec.device))
    return found


def _finished(
    row: Row, b: Any, timings: dict[str, Timing], works: dict[str, Work], names: tuple[str, str], limits: Limits
) -> Row:
    """The row with its time, tokens a second and memory."""
    if row.error:
        return row
    timing = timings[row.contestant]
    row = timed(row, timing, model(b, row.contestant), limits)
    if row.error:
        return row
    cached, plain = (timings.get(name, Timing(())) for name in names)
    said = [f"{b.spec.tokens / timing.median:.0f} tokens/s", f"{ratio(timing, plain):.2f}x plain", row.note]
    row = dataclasses.replace(row, time_ratio=ratio(timing, cached), note="; ".join(filter(None, said)))
    try:
        peak = peak_bytes(works[row.contestant], b.spec.device)
    except failures() as error:
        return dataclasses.replace(row, note=f"{row.note}; peak memory: {reason(error)}")
    return row if peak is None else dataclasses.replace(row, peak_mib=peak / 2**20)


def verdict(found: list[Row]) -> str:
    """The mark, as one line."""
    times = {r.contestant: r.median_ms for r in found if r.median_ms == r.median_ms}
    fastest = min((name for name in (PLAIN, HEAD) if name in times), key=times.__getitem__, default=PLAIN)
    if CACHED not in times or fastest not in times:
        return f"mark: {CACHED} at most {MARK}x of {PLAIN}: not measured"
    share = times[CACHED] / times[fastest]
    return f"mark: {CACHED} at most {MARK}x of {fastest}: {share:.2f}x, {'met' if share <= MARK else 'MISSED'}"


def main(argv: list[str]) -> int:
    p = parser("train", __doc__ or "", ["--quick", "--csv train.csv --plot train.png", "--batch 16 --length 256 --half"])
    p.add_argument("--batch", type=positive, metavar="B", help="sequences of a step (default 8)")
    p.add_argument("--length", type=positive, metavar="L", help="tokens of a sequence (default 128, quick 64)")
    p.add_argument("--half", action="store_true", help="autocast to bfloat16 (default float32)")
    p.add_argument("--plot", metavar="FILE", help="draw the steps as bars")
    args = p.parse_args(argv)
    settings = settings_of(args)
    if missing():
        print(f"bench train: {missing()}", file=sys.stderr)
        return 2
    return run(args, settings)


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Measures, prints and draws."""
    from .plot import draw
    from .train_step import Spec

    spec = Spec.quick() if args.quick else Spec.gpu() if args.device == "cuda" else Spec()
    given = {name: getattr(args, name) for name in ("batch", "length") if getattr(args, name)}
    spec = dataclasses.replace(spec, half=args.half or spec.half, device=args.device, **given)
    limits = measure_limits(args.device, gemm=torch.bfloat16 if spec.half else torch.float32)
    found = measure(spec, settings, limits, lambda line: print(f"bench train: {line}", file=sys.stderr))
    code = report([found], limits, args)
    if args.plot and not draw(found, args.plot):
        print("bench train: --plot: nothing drawn; pip install 'kdfast[bench]' brings matplotlib", file=sys.stderr)
    if not args.json:
        print(f"\n{verdict(found)}")
    return code
