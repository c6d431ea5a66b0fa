"""What the documentation says of keys is what the dataclasses say."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from tasks_page import PAGE, current, missing


def test_the_tables_of_tasks_are_the_dataclasses() -> None:
    page = PAGE.read_text()
    assert not missing(page), "docs/tasks.md has no section for them"
    assert current(page) == page, "python -m tests.tasks_page --write"
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 60
    assert not [row for row in rows if row.rstrip().endswith("|  |")], "a key without a meaning"
