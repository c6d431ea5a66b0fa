"""docs/environment.md names every environment variable that the sources read, and no other."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
#: In a quoted string or a shell's ${...}: a macro of the C++ sources is neither.
_READ = re.compile(r"""["'](KDFAST_[A-Z][A-Z0-9_]*)["']|\$\{?(KDFAST_[A-Z][A-Z0-9_]*)""")
_SUFFIXES = (".py", ".cpp", ".h", ".cu", ".cuh")


def sources() -> list[Path]:
    folders = [p for name in ("kdfast", "bench", "csrc", "tests", "examples", ".ci") for p in (ROOT / name).rglob("*")]
    found = [p for p in folders if p.suffix in _SUFFIXES and p != Path(__file__)]
    return [*found, ROOT / "setup.py", ROOT / "Makefile", ROOT / ".ci" / "run"]


def test_the_table_is_complete() -> None:
    read = {name for path in sources() for groups in _READ.findall(path.read_text()) for name in groups if name}
    table = re.findall(r"^\| `(KDFAST_[A-Z0-9_]+)` \|", (ROOT / "docs" / "environment.md").read_text(), re.MULTILINE)
    assert {"KDFAST_BUILD", "KDFAST_ISA", "KDFAST_CHECK"} <= read
    assert table == sorted(read)
