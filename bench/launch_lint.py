"""What may be handed to a Triton kernel, and on what grid: rules that neither the interpreter nor a compiler knows."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kdfast

from .stand_in import INDEXED, opened, reads, replaced

_PACKAGE = Path(kdfast.__file__).parent
#: Where a wait of the host has no branch for CPUs to stand in.
_NEVER = (str(_PACKAGE / "backends" / "triton"), str(_PACKAGE / "logit_grams.py"), str(_PACKAGE / "head_grams.py"))

_FROZEN = operator.attrgetter("__dataclass_params__.frozen")
#: Blocks along x, y and z of a CUDA grid.
LARGEST_GRID = ((1 << 31) - 1, 65535, 65535)


def refused(name: str, value: Any) -> str:
    """Why Triton's binder would not take an argument, or would take it for something else; "" where it is fine."""
    if value is None or isinstance(value, (bool, int, float, str, torch.Tensor, torch.dtype)):
        return ""
    if isinstance(value, tuple):
        return next((why for i, x in enumerate(value) if (why := refused(f"{name}[{i}]", x))), "")
    if dataclasses.is_dataclass(value) and _FROZEN(value):
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


class NoWaits(TorchDispatchMode):
    """On a CPU, under the interpreter: what a Triton backend asks of its tensors' values outside its kernels is an error."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if (out := opened(self, func, args, kwargs or {})) is not NotImplemented:
            return out
        by_mask = func in INDEXED and any(x is not None and x.dtype == torch.bool for x in args[1])
        if (reads(func) or by_mask) and (line := _asking()):
            raise RuntimeError(f"{line}: {func} would make the host wait for the device")
        return func(*args, **(kwargs or {}))


def _refusing(what: str, call: Callable[..., Any], waits: Callable[..., bool]) -> Callable[..., Any]:
    """A way to a tensor's values, or to a copy of the host's, that torch's dispatcher does not see."""

    def refused(*args: Any, **options: Any) -> Any:
        if waits(*args, **options) and (line := _asking()):
            raise RuntimeError(f"{line}: {what} would make the host wait for the device")
        return call(*args, **options)

    return refused


@contextlib.contextmanager
def no_waits() -> Iterator[None]:
    """Within the block `NoWaits`, and what goes around torch's dispatcher: lists and arrays of a tensor's values, tensors of
    the host's numbers for a device.
    """
    with contextlib.ExitStack() as stack:
        for name in ("tolist", "numpy", "cpu"):
            call = getattr(torch.Tensor, name)
            stack.enter_context(replaced(torch.Tensor, **{name: _refusing(f"Tensor.{name}", call, lambda *_, **__: True)}))
        for name in ("tensor", "as_tensor"):
            call = getattr(torch, name)
            told = _refusing(f"torch.{name}", call, lambda *_, device=None, **__: device is not None)
            stack.enter_context(replaced(torch, **{name: told}))
        new = _refusing("Tensor.new_tensor", torch.Tensor.new_tensor, lambda *_, **__: True)
        stack.enter_context(replaced(torch.Tensor, new_tensor=new))
        stack.enter_context(NoWaits())
        yield


def _asking() -> str:
    """The innermost line of kdfast, where that is one that must not ask; "" within a kernel."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.endswith("triton/runtime/interpreter.py"):
            return ""
        if name.startswith(str(_PACKAGE)):
            return f"{Path(name).relative_to(_PACKAGE)}:{frame.f_lineno}" if name.startswith(_NEVER) else ""
        frame = frame.f_back
    return ""


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Within the block launches of the interpreter are held to the same rules, and the host code around them to `no_waits`.

    Raises:
        TypeError, ValueError, RuntimeError: from the launch, or the line that waits.
    """
    from triton.runtime.interpreter import GridExecutor

    call = GridExecutor.__call__

    def checked(self: Any, *args: Any, **options: Any) -> Any:
        why = arguments(self.arg_names, args, options)
        if why:
            raise TypeError(f"{self.fn.__name__}: {why}")
        blocks = self.grid(dict(zip(self.arg_names, args, strict=False)) | options) if callable(self.grid) else self.grid
        if why := grid((blocks,) if isinstance(blocks, int) else tuple(blocks)):
            raise ValueError(f"{self.fn.__name__}: {why}")
        return call(self, *args, **options)

    GridExecutor.__call__ = checked
    try:
        with no_waits():
            yield
    finally:
        GridExecutor.__call__ = call
