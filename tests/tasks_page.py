"""The tables of keys in docs/tasks.md: `python -m tests.tasks_page --write` makes them anew from the dataclasses.

They stand between `<!-- keys NAME -->` and `<!-- end -->`; all else on the page is written by hand.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from kdfast.cli.train_keys import markdown
from kdfast.train import tasks

PAGE = Path(__file__).parents[1] / "docs" / "tasks.md"


def current(page: str) -> str:
    """The page with every table as the dataclasses have it."""
    parts = re.split(r"(<!-- keys \w+ -->\n)(.*?)(<!-- end -->)", page, flags=re.S)
    for at in range(1, len(parts), 4):
        name = parts[at].split()[2]
        parts[at + 1] = markdown(name) + "\n"
    return "".join(parts)


def missing(page: str) -> list[str]:
    """Tasks without a table."""
    return [name for name in tasks.names() if f"<!-- keys {name} -->" not in page]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", required=True)
    parser.parse_args()
    PAGE.write_text(current(PAGE.read_text()))
    print(f"{PAGE}: tables of {', '.join(tasks.names())}; missing: {', '.join(missing(PAGE.read_text())) or 'none'}")
