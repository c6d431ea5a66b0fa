"""The `kdfast` command. Each subcommand is a module that is imported when it is used.

A command module has `add_parser(subparsers)` and `run(args) -> int`; exit codes are 0 (ok), 1 (failed), 2 (wrong usage
or bad input). Errors are one line on stderr; `--debug` gives the traceback.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence

import kdfast

#: Command -> what it does. The module of the same name is imported only when its command is on the command line.
COMMANDS = {
    "env": "versions, processor, threads and every backend, with reasons and remedies",
    "quickstart": "teacher, cache, students with and without distillation, on text every machine has",
    "cache": "capture a teacher's targets, and look at what was captured",
    "train": "train a student (or a teacher) from a recipe",
    "bench": "measure kdfast against its peers on this machine",
    "plan": "cache size, time, memory and bandwidth of a distillation, before it is run",
    "eval": "perplexity and top-1 accuracy of a model on text files",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(next((word for word in words if not word.startswith("-")), None))
    try:
        args = parser.parse_args(words)
    except SystemExit as stop:  # argparse has printed the usage; --help ends here too
        return int(stop.code or 0)
    if args.command is None:
        parser.print_help()
        return 2
    try:
        code: int = args.run(args)
        return code
    except KeyboardInterrupt:
        print("kdfast: interrupted", file=sys.stderr)
        return 1
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if args.debug:
            raise
        print(f"kdfast {args.command}: {_one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, ValueError | OSError) else 1


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {(error.strerror or 'cannot be used').lower()}; check the path and its permissions"
    return " ".join(str(error).split())


def _parser(command: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kdfast",
        description="Knowledge distillation that costs what the arithmetic costs.",
        epilog="example: kdfast quickstart",
    )
    parser.add_argument("--version", action="version", version=f"kdfast {kdfast.__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(command=None)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, summary in COMMANDS.items():
        if name == command:
            importlib.import_module(f"{__name__}.{name}").add_parser(subparsers)
            subparsers.choices[name].add_argument(
                "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
            )
        else:
            subparsers.add_parser(name, help=summary)
    return parser
