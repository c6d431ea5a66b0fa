"""What may be handed to a Triton kernel, and on what grid: rules that the interpreter and a compiler called directly do not know."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

#: Blocks along x, y and z of a CUDA grid.
LARGEST_GRID = ((1 << 31) - 1, 65535, 65535)


def refused(name: str, value: Any) -> str:
    """Why Triton's binder would not take an argument, or would take it for something else; "" where it is fine."""
    if value is None or isinstance(value, (bool, int, float, str, torch.Tensor, torch.dtype)):
        return ""
    if isinstance(value, tuple):
        return next((why for i, x in enumerate(value) if (why := refused(f"{name}[{i}]", x))), "")
    if dataclasses.is_dataclass(value) and value.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        return ""  # a constant of flags
    if type(value).__name__ in ("constexpr", "dtype"):
        return ""
    return f"{name}: a {type(value).__name__}; expected int, float, bool, str, a tensor or a tuple of them"


def arguments(names: list[str], args: tuple[Any, ...], options: dict[str, Any]) -> str:
    """The first argument of a launch that is refused, or ""."""
    given = [*zip(names, args, strict=False), *((n, v) for n, v in options.items() if n in names)]
    return next((why for name, value in given if (why := refused(name, value))), "")


def grid(blocks: tuple[int, ...]) -> str:
    """Why a grid cannot be launched, or ""."""
    for axis, n, most in zip("xyz", blocks, LARGEST_GRID, strict=False):
        if not 0 < n <= most:
            return f"grid: {n} blocks along {axis}, expected 1 to {most}"
    return ""


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Within the block launches of the interpreter are held to the same rules.

    Raises:
        TypeError, ValueError: from the launch.
    """
    from triton.runtime.interpreter import GridExecutor

    call = GridExecutor.__call__

    def checked(self: Any, *args: Any, **options: Any) -> Any:
        why = arguments(self.arg_names, args, options)
        if why:
            raise TypeError(f"{self.fn.__name__}: {why}")
        blocks = (self.grid,) if isinstance(self.grid, int) else self.grid
        if not callable(blocks) and (why := grid(tuple(blocks))):
            raise ValueError(f"{self.fn.__name__}: {why}")
        return call(self, *args, **options)

    GridExecutor.__call__ = checked
    try:
        yield
    finally:
        GridExecutor.__call__ = call
