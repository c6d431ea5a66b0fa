"""What there is to measure, by name: `kdfast bench NAME`, and from a checkout `python -m bench NAME`. Imports nothing heavy."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import NoReturn

#: Ops of which `kdfast bench OP ...` shows one or two shapes each, beside each other; at length one is `full OP`.
IN_SUITE = ("logits", "linear", "topk", "attention", "hidden", "linear_logit_mse")
COMMANDS = {
    "logits": "kd_loss from logits",
    "linear": "linear_kd_loss from hidden states",
    "topk": "capture of top-k targets, and the loss from them",
    "cache": "the teacher cache: bytes, error, encoding, decoding, batches",
    "attention": "attention losses from queries and keys, by length",
    "hidden": "losses between hidden states",
    "linear_logit_mse": "logit matching through Gram matrices",
    "train": "tokens a second of a whole training step, from a live teacher and from a cache",
    "tinybert": "a whole TinyBERT step of a real model against its forwards and backward",
    "soft_tree": "a soft decision tree's training step against a module per node",
    "numerics": "errors against float64 as student and teacher come to agree",
    "sparse_targets": "students from sparse targets beside one from the whole teacher",
    "curves": "time an element against V and N, with a picture",
    "performance": "docs/performance.md from the committed results",
    "check": "new results against committed ones, by ratios",
    "aot": "compile every Triton kernel with no GPU; registers and spills",
    "issue": "GPU kernels counted in their machine code: instructions and products a column or score; no GPU needed",
    "smoke": "every op in few calls on a GPU against float64; with no GPU through Triton's binder and compiler (--launch)",
    "gpu": "everything that needs a GPU, in two visits of minutes: --contact, --record; --dry-run shows the plan",
}


class Parser(argparse.ArgumentParser):
    """Wrong usage is one line, as every error is."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def spelled(name: str) -> str:
    """How a command is called."""
    return f"kdfast bench {'full ' if name in IN_SUITE else ''}{name}"


def listing() -> str:
    """The commands of `kdfast bench` beside the suite, one a line."""
    lines = [f"  {spelled(name).removeprefix('kdfast bench '):<24}{text}" for name, text in COMMANDS.items()]
    return "\n".join(lines)


def usage() -> str:
    """The help text of `python -m bench`."""
    lines = ["usage: kdfast bench COMMAND [options], in a checkout also python -m bench COMMAND", "", listing()]
    lines += [
        "",
        "examples:",
        "  kdfast bench full logits --quick",
        "  kdfast bench full linear --csv linear.csv",
        "  kdfast bench gpu --record --out bench/results",
        "",
        "`kdfast bench COMMAND --help` shows a command's options.",
        "exit codes: 0 measured, 1 failed, 2 wrong usage, 130 interrupted",
    ]
    return "\n".join(lines)


def run(name: str, words: list[str]) -> int:
    """Runs the command `name` with its own options; returns its exit code."""
    try:
        return int(importlib.import_module(f"{__package__}.{name}").main(words))
    except KeyboardInterrupt:
        print(f"{spelled(name)}: interrupted", file=sys.stderr)
        return 130
