"""The table (op, backend) -> kernel module, and the choice between backends.

A backend is a package under `kdfast/backends` with one module per op, named like the op. It registers itself
here by name; a module is imported when its kernel is first used, so that `import kdfast` stays light and a
machine without Triton or a compiler pays for neither.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch

#: Order of preference per device. `reference` is the last resort everywhere.
_ORDER = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}
_ANY = ("reference",)


@dataclass(frozen=True)
class Backend:
    """What a backend offers.

    Args:
        name: what `use_backend` and `backends()` call it.
        package: the package whose modules are the kernels, one module per op.
        ops: the ops it has.
        devices: device types it runs on; empty means any.
        dtypes: dtypes of the student it takes; empty means any floating dtype.
        missing: returns why it cannot run on this machine, with the remedy, or None when it can.
        proven: False keeps it out of the default order, so that only `use_backend` reaches it.
        gives_way_to: the backend that runs the ops it does not have, also when it is forced.
    """

    name: str
    package: str
    ops: tuple[str, ...]
    devices: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    missing: Callable[[], str | None] = lambda: None
    proven: bool = True
    gives_way_to: str | None = None

    def refuses(self, op: str, device: str, dtype: torch.dtype) -> str | None:
        """Why this backend cannot run `op` on these inputs, or None."""
        if op not in self.ops:
            return f"has no kernel for {op}"
        if self.devices and device not in self.devices:
            return f"runs on {', '.join(self.devices)}, not {device}"
        if self.dtypes and dtype not in self.dtypes:
            return f"takes {', '.join(str(d).removeprefix('torch.') for d in self.dtypes)}, not {dtype}"
        return self.missing()


@dataclass(frozen=True)
class BackendInfo:
    """One row of `backends()`."""

    name: str
    available: bool
    reason: str
    devices: tuple[str, ...]
    ops: tuple[str, ...]
    proven: bool


_BACKENDS: dict[str, Backend] = {}
# Process-wide on purpose: on a GPU autograd runs backward in a thread of its own, which must see the same choice. Blocks of
# several threads may end in another order than they began in, so each takes out what it put in, by one operation of the list.
_forced: list[tuple[int, str]] = []
_blocks = itertools.count()
_chosen: dict[tuple[str, str, torch.dtype, str | None], str] = {}


def register(backend: Backend) -> None:
    """Adds a backend to the table; a name is registered once."""
    if backend.name in _BACKENDS:
        raise ValueError(f"backend {backend.name!r} is registered already")
    _BACKENDS[backend.name] = backend


def choose(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """Name of the backend that will run `op` on these inputs.

    Raises:
        RuntimeError: a backend forced by `use_backend` cannot run it; the message lists those that can.
    """
    last = _forced[-1:]
    key = (op, device.type, dtype, last[0][1] if last else None)
    if key not in _chosen:
        _chosen[key] = _choose(*key)
    return _chosen[key]


def _choose(op: str, device: str, dtype: torch.dtype, forced: str | None) -> str:
    if forced is not None:
        holder = _holder(op, forced)
        why = holder.refuses(op, device, dtype)
        if why is not None:
            if holder.name != forced:
                why = f"has no kernel for {op} and gives way to {holder.name}: {why}"
            able = [b.name for b in _BACKENDS.values() if b.refuses(op, device, dtype) is None]
            raise RuntimeError(f"use_backend({forced!r}): {why}; for {op} on {device} there is: {', '.join(able)}")
        return holder.name
    reasons: list[str] = []
    for name in _ORDER.get(device, _ANY):
        backend = _BACKENDS.get(name)
        if backend is None or not backend.proven:
            continue
        why = backend.refuses(op, device, dtype)
        if why is None:
            # float64 is the truth the tests compare with: reference is its only backend, not a fallback.
            if name == "reference" and reasons and dtype != torch.float64:
                warnings.warn(f"kdfast {op} on {device} runs on the slow reference backend: {'; '.join(reasons)}", stacklevel=4)
            return name
        reasons.append(f"{name} {why}")
    raise RuntimeError(f"no backend can run {op} on {device}: {'; '.join(reasons)}")


# What torch.compiler.assume_constant_result does, without importing the compiler: where the first call is a compiled one,
# looking for extensions (and warning) is done while the graph is traced and is no part of it.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def kernel(op: str, backend: str) -> ModuleType:
    """The module that holds the kernels of `op` in `backend`, or in the one it gives way to."""
    return importlib.import_module(f"{_holder(op, backend).package}.{op}")


def _holder(op: str, name: str) -> Backend:
    """The backend that has `op`: the named one, else the one it gives way to."""
    backend = _BACKENDS[name]
    return backend if op in backend.ops or backend.gives_way_to is None else _BACKENDS[backend.gives_way_to]


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block every op runs on the backend `name`, in the whole process; of blocks in several threads the last one
    counts.

    Raises:
        ValueError: no such backend.
        RuntimeError: the backend cannot run on this machine (why, and what can); later, at a call whose
            device or dtype it does not take.
    """
    if name not in _BACKENDS:
        raise ValueError(f"use_backend: name must be one of {', '.join(_BACKENDS)}, got {name!r}")
    why = _BACKENDS[name].missing()
    if why is not None:
        able = [b.name for b in _BACKENDS.values() if b.missing() is None]
        raise RuntimeError(f"use_backend({name!r}): {why}; available here: {', '.join(able)}")
    block = next(_blocks), name
    _forced.append(block)
    try:
        yield
    finally:
        _forced.remove(block)


def backends() -> list[BackendInfo]:
    """Every backend, whether it can run here, and why not."""
    rows = []
    for b in _BACKENDS.values():
        why = b.missing()
        rows.append(BackendInfo(b.name, why is None, why or "", b.devices or ("any",), b.ops, b.proven))
    return rows
