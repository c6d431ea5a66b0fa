"""`kdfast train --keys`: what a recipe may say, read from the dataclasses that read it."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import types
import typing
from typing import Any, NamedTuple

from kdfast.files import json_text
from kdfast.train import recipes, tasks
from kdfast.train.recipe import Phase, Recipe
from kdfast.train.schedule import Schedule

_WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false", dict: "mapping", Any: "mapping"}


class Key(NamedTuple):
    """A key with its dots: what it takes, what it is when left out, and one line about it."""

    name: str
    type: str
    default: str
    meaning: str


def show(name: str, as_json: bool) -> None:
    """Prints the keys of `recipe`, of a method or of a task; `method` and `task` print those of each.

    Raises:
        ValueError: there is nothing of that name.
    """
    found = sections(name)
    if as_json:
        print(json_text({title: [key._asdict() for key in keys] for title, _, keys in found}))
        return
    print("\n\n".join(_table(*section) for section in found))


def sections(name: str) -> list[tuple[str, str, list[Key]]]:
    """(title, first line of its docstring, keys)."""
    if name == "recipe":
        more = f"method: one of {', '.join(recipes.names())}, or module:Class; task: one of {', '.join(tasks.names())};"
        return [("recipe", f"{more} kdfast train --keys NAME lists their own keys", keys_of(Recipe, skip=("data",)))]
    if name in ("method", "task"):
        return [section for one in (recipes if name == "method" else tasks).names() for section in sections(one)]
    if name in tasks.names():
        task = tasks.task_class(name)
        own = keys_of(task.Options, "task.")
        return [(name, _first_line(inspect.getmodule(task)), own + keys_of(task.Data, "data."))]
    if ":" not in name and name not in recipes.names():
        valid = ", ".join(["method", "task", *recipes.names(), *tasks.names()])
        raise ValueError(f"--keys: expected one of {valid}, got {name!r}")
    method = recipes.objective_class(name)
    return [(name, _first_line(inspect.getmodule(method)), keys_of(method.Options, "method."))]


def markdown(name: str) -> str:
    """The keys of a method or a task as a table, for the documentation."""
    [(_, _, keys)] = sections(name)
    lines = ["| Key | Takes | Default | Meaning |", "|---|---|---|---|"]
    for key in keys:
        cells = (f"`{key.name}`", key.type, f"`{key.default}`", key.meaning)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def keys_of(cls: Any, prefix: str = "", skip: tuple[str, ...] = ()) -> list[Key]:
    """The fields that a mapping may set, those of nested dataclasses behind a dot."""
    hints = typing.get_type_hints(cls)
    meanings = _meanings(cls)
    found: list[Key] = []
    for field in dataclasses.fields(cls):
        if not field.init or field.name in skip:
            continue
        nested = _nested(hints[field.name])
        meaning = meanings.get(field.name, "")
        if nested is not None and nested is not Schedule and field.name not in ("method", "task", "phases", "teachers"):
            found += keys_of(nested, f"{prefix}{field.name}.")
            continue
        if field.name == "phases":
            meaning += f" Each has {', '.join(f.name for f in dataclasses.fields(Phase))}."
        found.append(Key(prefix + field.name, _type(hints[field.name], field), _default(field), meaning))
    return found


def _meanings(cls: Any) -> dict[str, str]:
    """Field -> what the docstrings of the class and its bases say behind `name:` or `name, name:`."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        names = "|".join(f.name for f in dataclasses.fields(base)) if dataclasses.is_dataclass(base) else ""
        text = " ".join((base.__doc__ or "").split())
        if not names:
            continue
        marks = list(re.finditer(rf"(?:(?<=^)|(?<=[.):] ))((?:{names})(?:, (?:{names}))*): ", text))
        ends = [*(mark.start() for mark in marks[1:]), len(text)]
        for mark, end in zip(marks, ends, strict=False):
            said = text[mark.end() : end].strip().rstrip(".")
            found |= dict.fromkeys(mark[1].split(", "), said)
    return found


def _nested(hint: Any) -> Any:
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next((m for m in members if dataclasses.is_dataclass(m)), None)


def _type(hint: Any, field: Any) -> str:
    if "choices" in field.metadata:
        return " | ".join(field.metadata["choices"])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_type(m, _PLAIN) if m is not type(None) else "null" for m in typing.get_args(hint)) + _range(field)
    if typing.get_origin(hint) is tuple:
        return "list"
    if typing.get_origin(hint) is dict:
        return "mapping"
    if hint is Schedule:
        return "schedule"
    if dataclasses.is_dataclass(hint):
        return "name or mapping"
    return _WORDS.get(hint, str(hint)) + _range(field)


_PLAIN: Any = dataclasses.field()


def _range(field: Any) -> str:
    signs = (("low", ">="), ("above", ">"), ("high", "<="), ("below", "<"))
    limits = [f"{sign} {field.metadata[name]:g}" for name, sign in signs if field.metadata.get(name) is not None]
    return f" {', '.join(limits)}" if limits else ""


def _default(field: Any) -> str:
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "required"
    value = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    if dataclasses.is_dataclass(value):
        return str(getattr(value, "name", ""))
    shown = {None: "null", True: "true", False: "false", (): "none"}
    if isinstance(value, dict):
        return "none" if not value else str(value)
    return shown[value] if value is None or value is True or value is False or value == () else f"{value}"


def _first_line(module: Any) -> str:
    return (module.__doc__ or "").strip().splitlines()[0] if module is not None and module.__doc__ else ""


def _table(title: str, about: str, keys: list[Key], width: int = 110) -> str:
    lines = [textwrap.fill(f"{title}: {about}", width)]
    if not keys:
        lines.append("  no keys of its own")
    for key in keys:
        lines.append(f"  {key.name}  ({key.type}; {key.default})")
        lines += textwrap.wrap(key.meaning, width, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)
