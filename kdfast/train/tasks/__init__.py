"""One file per task: what the data are, what a label is, which model fits, how it is scored."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

from kdfast.train.tasks.task import Task

_MACHINERY = ("task", "language", "classes")


def names() -> list[str]:
    """The tasks there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _MACHINERY)


def task_class(name: str) -> type[Task[Any]]:
    """The task in the file `name` of this folder.

    Raises:
        ValueError: there is none.
    """
    if name not in names():
        raise ValueError(f"task {name!r}: unknown task; expected one of {', '.join(names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    return next(
        c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, Task) and c.__module__ == module.__name__
    )
