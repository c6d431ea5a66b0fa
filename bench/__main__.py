"""`python -m bench COMMAND`: `kdfast bench COMMAND` from a checkout; an op's name is its comparison at length."""

from __future__ import annotations

import sys

from .commands import COMMANDS, run, usage


def main(argv: list[str]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    words = argv[1:] if argv[:1] == ["full"] else argv
    if not words or words[0] not in COMMANDS:
        got = repr(words[0]) if words else "nothing"
        print(f"bench: COMMAND: expected one of {', '.join(COMMANDS)}, got {got}; see python -m bench --help", file=sys.stderr)
        return 2
    return run(words[0], words[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
