"""`capture.json` beside a cache's manifest: how it was captured. No reader needs it; `merge`, a resumed build and people do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kdfast.cache.format import CorruptCache
from kdfast.files import write_json

NAME = "capture.json"


def read_capture(folder: str | Path) -> dict[str, Any]:
    """What is known of a capture; empty where nobody wrote it down, as for a cache that a `CacheWriter` filled.

    Raises:
        CorruptCache: the file is no object of JSON.
    """
    file = Path(folder) / NAME
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise CorruptCache(f"{file}: expected JSON: {error}") from error
    if not isinstance(found, dict):
        raise CorruptCache(f"{file}: expected an object of JSON, got {type(found).__name__}")
    return found


def write_capture(folder: Path, values: dict[str, Any]) -> None:
    """Replaces what is known of the capture in a folder."""
    write_json(folder / NAME, values)
