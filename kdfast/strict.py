"""Frozen dataclasses from plain mappings, strictly: every error is one line that names the dotted path."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any


def ranged(
    default: Any, *, low: float | None = None, above: float | None = None, high: float | None = None, below: float | None = None
) -> Any:  # fmt: skip
    """A field whose number must be >= low, > above, <= high and < below."""
    return dataclasses.field(default=default, metadata={"low": low, "above": above, "high": high, "below": below})


def one_of(default: Any, *choices: str) -> Any:
    """A field that takes one of a few words."""
    return dataclasses.field(default=default, metadata={"choices": choices})


def build(cls: type, values: Any, path: str = "", *, beside: Sequence[str] = ()) -> Any:
    """An instance of the dataclass `cls` from a mapping, checked key by key; `beside` are keys that were taken out before.

    Raises:
        ValueError: an unknown key (the nearest valid one is named), a missing one, a wrong type, a number out of range.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{path or 'recipe'}: expected a mapping of keys to values, got {_show(values)}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in values:
        if key not in fields:
            raise ValueError(unknown_key(_join(path, str(key)), str(key), [*fields, *beside], _below(hints, str(key), path)))
    made = {}
    for name, field in fields.items():
        where = _join(path, name)
        if name not in values:
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise ValueError(f"{where}: expected {_type_name(hints[name])}, got nothing; add it to the recipe")
            continue
        made[name] = _convert(hints[name], values[name], where)
        _check_range(field.metadata, made[name], where)
    try:
        return cls(**made)
    except ValueError as error:  # from __post_init__, which knows its own keys only
        said = str(error)
        own = any(said.startswith((f"{name}:", f"{name}.")) for name in fields)
        raise ValueError(_join(path, said) if own or not path else f"{path}: {said}") from None


def _below(hints: Mapping[str, Any], key: str, path: str) -> str:
    """Where a mapping under one of these keys has a key of this name."""
    for name, hint in hints.items():
        for kind in (hint, *typing.get_args(hint)):
            if isinstance(kind, type) and dataclasses.is_dataclass(kind) and key in {f.name for f in dataclasses.fields(kind)}:
                return _join(_join(path, name), key)
    return ""


def refuse_unused(options: Any, names: typing.Iterable[str], why: str, path: str = "") -> None:
    """Raises for the first of these fields that was given something else than its default, which has no effect.

    Raises:
        ValueError: names the field, `why` nothing reads it, what was given and the remedy.
    """
    fields = {f.name: f for f in dataclasses.fields(options)}
    for name in names:
        field, value = fields[name], getattr(options, name)
        if value != (field.default if field.default_factory is dataclasses.MISSING else field.default_factory()):
            raise ValueError(f"{_join(path, name)}: {why}, got {plain(value)!r}, which nothing would read; leave it out")


def unknown_key(where: str, key: str, valid: typing.Iterable[str], below: str = "") -> str:
    """The message for a key that does not exist. `below`: a key of that name which lies deeper."""
    valid = list(valid)
    near = [below] if below else difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"valid keys are {', '.join(valid)}" if valid else "it has no keys"
    return f"{where}: unknown key; {hint}"


def override(values: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """`values` with `dotted.key=value` settings applied; a value is read as YAML."""
    import yaml  # models are loaded by these dataclasses too, and need none

    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise ValueError(f"override {setting!r}: expected key=value with a dotted key, e.g. optimizer.lr=1e-3")
        *parents, last = key.split(".")
        node = values
        for parent in parents:
            if isinstance(node, list):
                node = node[_place(node, parent, key)]
            else:
                if node.get(parent) is None:
                    node[parent] = {}
                node = node[parent]
            if not isinstance(node, dict | list):
                raise ValueError(f"{key}: {parent} holds {_show(node)}, not a mapping, so nothing can be set inside it")
        try:
            node[_place(node, last, key) if isinstance(node, list) else last] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(
                f"{key}: expected a YAML value, got {text!r} ({error.__class__.__name__}); put the whole override in quotes"
                " where it has spaces"
            ) from None
    return values


def _place(items: list[Any], word: str, key: str) -> int:
    """The number of one of a list's items."""
    if not word.isdigit() or int(word) >= len(items):
        raise ValueError(f"{key}: expected the number of one of {len(items)} items, from 0, got {word!r}")
    return int(word)


def plain(value: Any) -> Any:
    """A dataclass as mappings, lists and scalars, ready for YAML; one that says itself what it is in YAML has `plain()`."""
    if hasattr(value, "plain"):
        return plain(value.plain())
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(_member(args, value), value, where)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    if hint is Any:
        return value
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            remedy = "[] for none" if value is None else f"[{value}]"
            raise ValueError(f"{where}: expected a list of {_type_name(args[0])}, got {_show(value)}; write {remedy}")
        return tuple(_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}: expected a mapping, got {_show(value)}")
        return dict(value)
    return _scalar(hint, value, where)


def _member(members: Sequence[Any], value: Any) -> Any:
    """The member of a union that a value is meant for: a mapping for a dataclass, a list for a tuple, else a scalar."""
    able = [m for m in members if m is not type(None)]
    for wanted, fits in ((Mapping, dataclasses.is_dataclass), (list | tuple, lambda m: typing.get_origin(m) is tuple)):
        if isinstance(value, wanted):
            return next((m for m in able if fits(m)), able[0])
    return next((m for m in able if not dataclasses.is_dataclass(m)), able[0])


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):
        try:  # YAML 1.1 reads 1e-3 as a string: it wants 1.0e-3
            value = float(value)
        except ValueError:
            raise ValueError(f"{where}: expected a number, got {_show(value)}") from None
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        quoted = hint is str and isinstance(value, int | float) and not isinstance(value, bool)
        remedy = f"; quote it: '{value}'" if quoted else "; leave it out for its default" if value is None else ""
        raise ValueError(f"{where}: expected {_type_name(hint)}, got {_show(value)}{remedy}")
    if hint is float and not math.isfinite(value):
        raise ValueError(f"{where}: expected a finite number, got {value}")
    return value


def _check_range(limits: Mapping[str, Any], value: Any, where: str) -> None:
    if value is None:
        return
    if dataclasses.is_dataclass(value):
        for end in getattr(value, "extremes", ()):
            _check_range(limits, end, where)
        return
    if "choices" in limits and value not in limits["choices"]:
        near = difflib.get_close_matches(str(value), limits["choices"], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{where}: expected one of {', '.join(limits['choices'])}, got {value!r}{hint}")
    for name, sign, holds in (
        ("low", ">=", lambda limit: value >= limit),
        ("above", ">", lambda limit: value > limit),
        ("high", "<=", lambda limit: value <= limit),
        ("below", "<", lambda limit: value < limit),
    ):
        if limits.get(name) is not None and not holds(limits[name]):
            raise ValueError(f"{where}: expected a number {sign} {limits[name]}, got {value}")


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _show(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {value!r}"


def _type_name(hint: Any) -> str:
    if dataclasses.is_dataclass(hint):
        return "mapping"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(hint, str(hint))
