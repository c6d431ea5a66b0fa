"""`kdfast train RECIPE.yaml [key=value ...]`, and the keys of a recipe."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "train", help="train a student (or a teacher) from a recipe",
        epilog="a recipe, a student with half the layers of its teacher (docs/training.md says what goes together):\n"
        "  teacher: {path: models/teacher}                 or {cache: teacher.cache}, as kdfast cache build wrote it\n"
        "  student: {from_teacher: {layers: [0, 2, 4]}}    or {path: ...}, {model_type: llama, config: {...}}\n"
        "  method: {name: word_kd, temperature: 2, hard_weight: 0.1}\n"
        "  data: {train: corpus/}                          *.txt in it; leave it out with a cache\n"
        "  steps: 1000\n"
        "  out: runs/student\n\n"
        "examples:\n"
        "  kdfast train student.yaml steps=2000 optimizer.lr=5e-4 method.temperature=2\n"
        "  kdfast train student.yaml check=true            two steps: memory, alignment, time left\n"
        "  kdfast train --keys                             every key of a recipe: type, default, meaning\n"
        "  kdfast train --keys word_kd                     the options of a method, or data and options of a task\n"
        "  torchrun --nproc-per-node 4 -m kdfast.cli train student.yaml shard=fsdp\n",
        description="Trains what a recipe says; stopped or killed and run again, it goes on from the last checkpoint to the"
        " same result.", formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("recipe", nargs="?", help="a YAML recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, values as in YAML")
    parser.add_argument(
        "--keys", nargs="?", const="recipe", metavar="NAME", help="list the keys of a recipe, or of what NAME is: a method, a"
        " task, `method` or `task` for all of them",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.keys is not None:
        from kdfast.cli.train_keys import show

        show(args.keys, args.json)
        return 0
    if args.recipe is None:
        raise ValueError("recipe: expected a YAML file, got none; see kdfast train --help")

    from kdfast.cli.progress import bar
    from kdfast.files import json_text
    from kdfast.train import Recipe, distill

    # A `module:function` or `module:Class` may lie beside the recipe that names it.
    sys.path.append(str(Path(args.recipe).resolve().parent))
    recipe = Recipe.load(args.recipe, args.overrides)
    result = distill(recipe, bar=bar, say=lambda line: print(line, file=sys.stderr if args.json else sys.stdout))
    if args.json and result.main_process:
        print(json_text({"out": str(result.out), "model": str(result.model), "steps": result.steps,
                         "seconds": result.seconds, "validation": result.evaluation}))  # fmt: skip
    elif not recipe.check and result.main_process:
        shown = f", validation {result.headline}" if result.headline else ""
        print(f"{result.model}: {result.steps} steps in {result.seconds:.0f} s{shown}")
    return 0
