"""Packages that only some of kdfast needs: found, or named together with what installs them."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType


class MissingExtra(ImportError):
    """An optional package is not installed; one line that says what needs it and what installs it."""


def need(package: str, extra: str, what: str) -> ModuleType:
    """`import package`, for what works only with it.

        yaml = need("yaml", extra="train", what="a recipe")

    Args:
        package: the module's name, dots allowed.
        extra: the extra of kdfast that installs it.
        what: what needs it, in words.

    Raises:
        MissingExtra: it is not installed, or something that it needs is not.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        missing = (error.name or package).partition(".")[0]
        if missing in ("kdfast", "bench"):
            raise  # ours is broken, no package is missing
        raise MissingExtra(
            f"{what} needs {missing}, which is not installed: pip install 'kdfast[{extra}]'", name=missing
        ) from None


def has(package: str) -> bool:
    """Whether a package can be imported, without doing so: for what does without it."""
    return importlib.util.find_spec(package) is not None
