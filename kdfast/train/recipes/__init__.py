"""One file per method: a subclass of `Objective`, found by the name of its file."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Sequence
from typing import Any

from kdfast.strict import unknown_key
from kdfast.train.objective import Objective, Setting


def names() -> list[str]:
    """The methods there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def objective_class(name: str) -> type[Objective]:
    """The objective in the file `name` of this folder, or `module:Class` of anybody's.

    Raises:
        ValueError: there is none.
    """
    module, colon, wanted = name.partition(":")
    if not colon and name not in names():
        raise ValueError(unknown_key(f"method {name!r}", name, names()).replace("unknown key", "unknown method"))
    try:
        found = importlib.import_module(module if colon else f"{__name__}.{name}")
    except ImportError as error:
        raise ValueError(f"method: {name!r} cannot be imported: {error}") from None
    classes = [
        c for c in vars(found).values()
        if inspect.isclass(c) and issubclass(c, Objective) and c.__module__ == found.__name__ and wanted in ("", c.__name__)
    ]  # fmt: skip
    if not classes:
        raise ValueError(f"method: expected a subclass of kdfast.train.Objective in {module}, found none {wanted}")
    return classes[-1]


def make_objectives(methods: Sequence[Any], setting: Setting) -> list[Objective]:
    """The objective of each phase; a later one is shown those before it."""
    made: list[Objective] = []
    phases = setting.recipe.parts if setting.recipe is not None else [None] * len(methods)
    for method, phase in zip(methods, phases, strict=True):
        made.append(objective_class(method.name)(method.options, setting._replace(earlier=tuple(made), phase=phase)))
    return made
