"""`kdfast train RECIPE.yaml [key=value ...]`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "train", help="train a student (or a teacher) from a recipe",
        epilog="example: kdfast train student.yaml steps=2000 optimizer.lr=5e-4 check=true",
        description="Trains what a recipe says; killed and run again, it goes on from the last checkpoint to the same result.",
    )  # fmt: skip
    parser.add_argument("recipe", help="a YAML recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, values as in YAML")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from kdfast.cli.progress import bar
    from kdfast.train import Recipe, distill

    recipe = Recipe.load(args.recipe, args.overrides)
    result = distill(recipe, bar=bar, say=lambda line: print(line, file=sys.stderr if args.json else sys.stdout))
    evaluation = result.evaluation
    if args.json and result.main_process:
        print(json.dumps({"out": str(result.out), "model": str(result.model), "steps": result.steps,
                          "seconds": result.seconds, "validation": evaluation}))  # fmt: skip
    elif not recipe.check and result.main_process:
        shown = f", validation {result.headline}" if result.headline else ""
        print(f"{result.model}: {result.steps} steps in {result.seconds:.0f} s{shown}")
    return 0
