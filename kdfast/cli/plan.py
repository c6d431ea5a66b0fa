"""`kdfast plan`: bytes, hours and bandwidth of a distillation from a cache, before anything is run."""

from __future__ import annotations

import argparse
import dataclasses
import math
from typing import Any

from kdfast.cli.plan_model import GPUS, Job, Plan, body_params, plan
from kdfast.files import json_text

#: It runs without torch.
LIGHT = True
_SUFFIXES = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_EXAMPLE = """examples:
  kdfast plan --tokens 100B --vocab 151936 --k 64 --teacher-hidden 4096 --student-hidden 2048 --gpu h200 --count 64
  kdfast plan --tokens 5B --vocab 32000 --teacher-params 6.5B --student-params 1.1B --json

Nothing is measured here: times are published peak rates (roofline), and those divided by --efficiency. docs/scaling.md
derives the model."""


def add_parser(subparsers: Any) -> None:
    p = subparsers.add_parser(
        "plan", help="cache size, time, memory and bandwidth of a distillation, before it is run", epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Estimates what a distillation from a cache takes.",
    )  # fmt: skip
    p.add_argument("--tokens", type=_number, required=True, metavar="N", help="tokens to capture, such as 100B or 2.5T")
    p.add_argument("--vocab", type=_whole, default=151936, metavar="V", help="vocabulary (default 151936)")
    p.add_argument("--k", type=_whole, default=64, help="entries a token in the cache (default 64)")
    p.add_argument("--teacher-hidden", type=_whole, default=4096, metavar="D", help="teacher's hidden size (default 4096)")
    p.add_argument("--student-hidden", type=_whole, default=2048, metavar="D", help="student's hidden size (default 2048)")
    for side in ("teacher", "student"):
        p.add_argument(
            f"--{side}-params", type=_number, metavar="N",
            help=f"the {side}'s parameters without embeddings and head (default: hidden/128 layers of 13 hidden^2)",
        )  # fmt: skip
    p.add_argument("--gpu", choices=tuple(GPUS), default="h200", help="default h200")
    p.add_argument("--count", type=_whole, default=8, metavar="N", help="GPUs (default 8)")
    p.add_argument("--epochs", type=_number, default=1.0, metavar="N", help="passes over the tokens in training (default 1)")
    p.add_argument("--temperatures", type=_whole, default=1, metavar="N", help="captured temperatures (default 1)")
    p.add_argument("--micro-batch", type=_whole, default=16384, metavar="N", help="tokens a GPU at a time (default 16384)")
    p.add_argument("--efficiency", type=_share, default=0.4, metavar="X", help="share of the roofline reached (default 0.4)")
    p.add_argument("--bytes-per-token", type=_number, metavar="N", help="what `kdfast cache info` says (default: estimated)")
    p.add_argument("--json", action="store_true", help="print JSON")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    job = Job(
        tokens=args.tokens, vocab=args.vocab, k=args.k, teacher_hidden=args.teacher_hidden, student_hidden=args.student_hidden,
        teacher_params=args.teacher_params or body_params(args.teacher_hidden),
        student_params=args.student_params or body_params(args.student_hidden),
        gpu=GPUS[args.gpu], count=args.count, epochs=args.epochs, temperatures=args.temperatures,
        micro_batch=args.micro_batch, efficiency=args.efficiency, bytes_per_token=args.bytes_per_token,
    )  # fmt: skip
    made = plan(job)
    if args.json:
        facts = {"job": dataclasses.asdict(job) | {"bytes_per_token": job.token_bytes}, "plan": dataclasses.asdict(made)}
        facts["plan"]["break_even_epochs"] = made.break_even_epochs  # null where it never pays
        print(json_text(facts, indent=2))
    else:
        print(_text(job, made, args.gpu))
    return 0


def _text(job: Job, made: Plan, gpu: str) -> str:
    epochs = f"{job.epochs:g} pass{'' if job.epochs == 1 else 'es'}"
    lines = [
        f"{_count(job.tokens)} tokens, V={job.vocab}, k={job.k}; teacher {_count(job.teacher_params)} wide"
        f" {job.teacher_hidden}, student {_count(job.student_params)} wide {job.student_hidden}; {job.count} x {gpu}",
        "",
        f"{'':28}{'roofline':>14}{f'at {job.efficiency:.0%} of it':>16}{'TFLOP a token':>16}",
    ]
    for name, phase in (
        ("capture", made.capture),
        (f"train from cache, {epochs}", made.train_cached),
        (f"train, live teacher, {epochs}", made.train_live),
    ):
        lines.append(f"{name:<28}{_time(phase.roofline_s):>14}{_time(phase.expected_s):>16}{phase.flops_a_token / 1e12:>16.3g}")
    even = made.break_even_epochs
    pays = "never" if math.isinf(even) else f"after {even:.2g} passes, by one student or several"
    return "\n".join(
        [
            *lines,
            "",
            f"cache                       {_bytes(made.cache_bytes)} ({job.token_bytes:.0f} bytes a token)",
            f"the capture has paid off    {pays}",
            f"reading while training      {_bytes(made.read_bytes_per_s)}/s over all GPUs,"
            f" {_bytes(made.read_bytes_per_s / job.count)}/s each",
            f"loss layer, {job.micro_batch} tokens    {_bytes(made.loss_bytes_plain)} plain,"
            f" {_bytes(made.loss_bytes_kdfast)} with linear_kd_loss, of {_bytes(job.gpu.memory)} a GPU",
            "",
            "an estimate from published peak rates, nothing was measured; docs/scaling.md derives it",
        ]
    )


def _number(text: str) -> float:
    """A number above 0, which may end in k, M, B or T."""
    factor = _SUFFIXES.get(text[-1:].lower(), 0.0)
    try:
        value = float(text[:-1]) * factor if factor else float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"expected a number above 0 such as 100B or 2.5T, got {text!r}")
    return value


def _whole(text: str) -> int:
    value = _number(text)
    if value != int(value):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(value)


def _share(text: str) -> float:
    value = _number(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and up to 1, got {text!r}")
    return value


def _scaled(value: float, units: tuple[str, ...], step: float) -> str:
    for unit in units[:-1]:
        if value < step:
            return f"{value:.3g}{unit}"
        value /= step
    return f"{value:.4g}{units[-1]}"


def _count(value: float) -> str:
    return _scaled(value, ("", "k", "M", "B", "T"), 1000)


def _bytes(value: float) -> str:
    return _scaled(value, (" B", " kB", " MB", " GB", " TB", " PB"), 1000)


def _time(seconds: float) -> str:
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86400:.4g} days"
