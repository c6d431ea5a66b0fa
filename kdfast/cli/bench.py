"""`kdfast bench`: what kdfast saves on this machine, beside everybody who can run here."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from types import ModuleType
from typing import Any


def add_parser(subparsers: Any) -> None:
    p = subparsers.add_parser(
        "bench", help="measure kdfast against its peers on this machine",
        epilog="example: kdfast bench logits attention --quick --plot bench.png",
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
    code: int = _suite().run(args)
    return code


def _suite() -> ModuleType:
    """The benchmarks: `kdfast.bench` in an installation, the folder `bench` beside the package in a checkout."""
    for name in ("kdfast.bench", "bench"):
        if importlib.util.find_spec(name) is None:
            continue
        try:
            return importlib.import_module(f"{name}.suite")
        except ModuleNotFoundError as error:
            raise ImportError(f"it needs {(error.name or '?').partition('.')[0]}: pip install 'kdfast[bench]'") from None
    raise ImportError("the benchmarks are not here: pip install 'kdfast[bench]', or run it in the source tree")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)
