"""`kdfast bench`: what kdfast saves on this machine, beside everybody who can run here."""

from __future__ import annotations

import argparse
import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import kdfast
from kdfast.extras import need


def take_over(words: Sequence[str]) -> Callable[[], int] | None:
    """The commands that have options of their own: `kdfast bench gpu ...`, `kdfast bench full logits ...`.

    Raises:
        ValueError: `full` without the name of a command.
    """
    commands = _module("commands")
    if words[:1] == ["full"]:
        if not words[1:] or words[1] not in commands.COMMANDS:
            got = repr(words[1]) if words[1:] else "nothing"
            raise ValueError(f"full: expected one of {', '.join(commands.COMMANDS)}, got {got}")
        words = words[1:]
    elif not words or words[0] not in commands.COMMANDS or words[0] in commands.IN_SUITE:
        return None
    return functools.partial(commands.run, words[0], list(words[1:]))


def add_parser(subparsers: Any) -> None:
    p = subparsers.add_parser(
        "bench", help="measure kdfast against its peers on this machine",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: kdfast bench logits attention --quick --plot bench.png\n\nbeside the suite, each with --help:\n"
        + _module("commands").listing(),
        description="Times every op, forward and backward, against PyTorch, torch.compile and Liger. A peer is timed only after"
        " its result agreed with float64. A row is red where kdfast is not first.",
    )  # fmt: skip
    p.add_argument(
        "op", nargs="*", help="logits, linear, topk, attention, hidden, linear_logit_mse (default all)", metavar="OP"
    )
    p.add_argument("--quick", action="store_true", help="small shapes, under 3 minutes on two cores")
    p.add_argument("--details", action="store_true", help="print every contestant of every case, with notes")
    p.add_argument("--json", action="store_true", help="rows as JSON on standard output, nothing else")
    p.add_argument("--csv", metavar="FILE", help="write the rows to FILE")
    p.add_argument("--plot", metavar="FILE", help="draw the rows (PNG)")
    p.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: torch's choice)")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    code: int = _module("suite").run(args)
    return code


def _module(name: str) -> ModuleType:
    """One of the benchmarks: in `kdfast.bench` in an installation, in the folder `bench` beside the package in a checkout."""
    here = Path(kdfast.__file__).resolve().parent
    for package in ("kdfast.bench", "bench"):  # another package may be called bench, and another kdfast be installed
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin and Path(spec.origin).resolve().parent in (here / "bench", here.parent / "bench"):
            return need(f"{package}.{name}", extra="bench", what="it")
    raise ImportError("the benchmarks are not here: install kdfast from its wheel, or run it in the source tree")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)
