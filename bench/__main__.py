"""`python -m bench OP`: measured comparisons of one op, the ahead-of-time compile check, or the whole GPU run."""

from __future__ import annotations

import importlib
import sys

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
    "numerics": "errors against float64 as student and teacher come to agree",
    "sparse_targets": "students from sparse targets beside one from the whole teacher",
    "curves": "time an element against V and N, with a picture",
    "performance": "docs/performance.md from the committed results",
    "check": "new results against committed ones, by ratios",
    "aot": "compile every Triton kernel with no GPU; registers and spills",
    "gpu": "everything that needs a GPU, in one run of at most 8 minutes",
}


def usage() -> str:
    """The help text."""
    lines = ["usage: python -m bench COMMAND [options]", ""]
    lines += [f"  {name:<18}{text}" for name, text in COMMANDS.items()]
    lines += [
        "",
        "examples:",
        "  python -m bench logits --quick",
        "  python -m bench linear --csv linear.csv",
        "  python -m bench gpu --out bench/results",
        "",
        "`python -m bench COMMAND --help` shows a command's options.",
        "exit codes: 0 measured, 1 failed, 2 wrong usage",
    ]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if not argv or argv[0] not in COMMANDS:
        got = repr(argv[0]) if argv else "nothing"
        print(f"bench: COMMAND: expected one of {', '.join(COMMANDS)}, got {got}; see python -m bench --help", file=sys.stderr)
        return 2
    return int(importlib.import_module(f"{__package__}.{argv[0]}").main(argv[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
