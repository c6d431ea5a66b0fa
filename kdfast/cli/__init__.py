"""The `kdfast` command. Each subcommand is a module that is imported when it is used; torch is when it runs.

A command module has `add_parser(subparsers)` and `run(args) -> int`, and imports what takes long inside `run`. It may have
`take_over(words) -> Callable[[], int] | None`, for words that another parser reads. Exit codes are 0 (ok), 1 (failed), 2 (wrong
usage or bad input), 130 (interrupted). Errors are one line on stderr; `--debug` gives the traceback.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import kdfast

#: Command -> what it does. The module of the same name is imported only when its command is on the command line.
COMMANDS = {
    "env": "versions, processor, threads and every backend, with reasons and remedies",
    "quickstart": "teacher, cache, students with and without distillation, on text every machine has",
    "cache": "capture a teacher's targets, and look at what was captured",
    "train": "train a student (or a teacher) from a recipe",
    "bench": "measure kdfast against its peers on this machine",
    "plan": "cache size, time, memory and bandwidth of a distillation, before it is run",
    "eval": "a model's scores on files: perplexity of text, accuracy of classes, of tags, of images, BLEU",
}
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Wrong usage is one line, as every error is."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    at = next((i for i, word in enumerate(words) if not word.startswith("-")), len(words))
    name = words[at] if at < len(words) else None
    debug = "--debug" in words
    try:
        if name is not None and name not in COMMANDS:
            print(_unknown(name), file=sys.stderr)
            return 2
        return _work(name, words, at)()
    except SystemExit as stop:  # argparse has printed what is wrong; --help ends here too
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return int(stop.code or 0)
    except KeyboardInterrupt as stop:  # a run that stops between two steps says where
        print(f"kdfast: interrupted: {stop}" if str(stop) else "kdfast: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output has enough; nothing more is to be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if debug:
            raise
        print(f"kdfast{'' if name is None else ' ' + name}: {_one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, ValueError | OSError) else 1


def _work(name: str | None, words: list[str], at: int) -> Callable[[], int]:
    """What the words ask for."""
    module = None if name is None else importlib.import_module(f"{__name__}.{name}")
    take_over = getattr(module, "take_over", None)
    job: Callable[[], int] | None = None if take_over is None else take_over(words[at + 1 :])
    if job is None:
        parser = _parser(name, module)
        args = parser.parse_args(words)
        if name is None:
            parser.print_help()
            return lambda: 2
        job = lambda: int(args.run(args))  # noqa: E731
    # Libraries beside the command's own output: what matters of a load is checked and said by kdfast.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not getattr(module, "LIGHT", False):
        kdfast.load()
    return job


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, COMMANDS, 1, 0.5)
    meant = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(COMMANDS)};"
    return f"kdfast: there is no command {name!r}; {meant} See kdfast --help"


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "make room and run the same again" if full else "check the path and its permissions"
        return f"{error.filename}: {(error.strerror or 'cannot be used').lower()}; {remedy}"
    return " ".join(str(error).split()) or type(error).__name__


def _parser(command: str | None, module: Any) -> argparse.ArgumentParser:
    parser = _Parser(
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
            module.add_parser(subparsers)
            subparsers.choices[name].add_argument(
                "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
            )
        else:
            subparsers.add_parser(name, help=summary)
    return parser
