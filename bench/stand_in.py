"""A GPU that is not there: tensors that say they are on one, and hold their values in the memory of this process.

Code under test sees `device` cuda:1 while the current device is 0, takes its branches for GPUs, and computes on the CPU. What a
GPU would make the host wait for is told, with the line of kdfast that asked. Nothing is faster or slower for it, and streams,
events and graphs are not here.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map

import kdfast

DEVICE = torch.device("cuda", 1)  # the current device is 0
#: An H100, as far as launches are computed from it.
MULTIPROCESSORS = 132
_PACKAGE = str(Path(kdfast.__file__).parent)
_CLI = str(Path(kdfast.__file__).parent / "cli")
_aten = torch.ops.aten
#: torch's own words for what reads values back, or sizes that depend on them.
_READS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}

Told = Callable[[str], None]


@functools.cache
def reads(func: Any) -> bool:
    """Whether an operator makes the host wait for values, or for sizes that depend on them; of `INDEXED` the indices say."""
    return func not in INDEXED and any(tag in func.tags for tag in _READS)


@functools.cache
def _made_of_others(func: Any) -> Any:
    """The key under which an operator is Python of kdfast, or made of other operators; None where it is neither.

    Autograd takes the latter apart, but not within an op of kdfast: `item` comes there as `item`, `where` as `where`.
    """
    if func.namespace == "kdfast":
        return torch._C.DispatchKey.CompositeExplicitAutograd
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return key if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key) else None


def opened(mode: TorchDispatchMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operator gives, if it is made of others that `mode` then sees one by one; else NotImplemented."""
    key = _made_of_others(func)
    if key is None:
        return NotImplemented
    with mode:  # torch has put it aside for the call it is in
        return func._op_dk(key, *args, **kwargs)


class OnDevice(Tensor):
    """A tensor that says it is on `DEVICE`; torch's own code takes it for one of the CPU, where `held` is."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        self = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=held.device
        )
        self.held = held
        return self

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnDevice({self.held})"

    def __format__(self, spec: str) -> str:
        return format(self.held.item() if self.ndim == 0 else self.held, spec)

    def tolist(self) -> Any:
        _wait("tolist")
        return self.held.tolist()

    def numpy(self, **options: Any) -> Any:
        _wait("numpy")
        return self.held.numpy(**options)

    def cpu(self) -> Tensor:  # type: ignore[override]
        return self.to("cpu")

    def to(self, *args: Any, **options: Any) -> Tensor:
        """The same on the stand-in, whatever device is asked for: the two mix freely."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **{k: v for k, v in options.items() if k != "copy"})
        if device is not None and device.type == "cpu" and not non_blocking:
            _wait("copy to the host")
        return _host_to(self, dtype=dtype or self.dtype, copy=options.get("copy", False))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(func, args, kwargs or {})


_HostGenerator = torch.Generator


class _Generator(_HostGenerator):
    device = DEVICE

    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls) if torch.device(device).type == "cuda" else _HostGenerator(device)


class _Mode(TorchDispatchMode):
    #: The key for tensors of devices that are not there: without it torch would look for CUDA before it asks the mode.
    _mode_key = torch._C._TorchDispatchModeKey.FAKE

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


_told: list[Told] = []
_current = [0]


def current_device() -> int:
    return _current[-1]


@contextlib.contextmanager
def silently() -> Iterator[None]:
    """Within the block nobody is told of waiting."""
    _told.append(lambda line: None)
    try:
        yield
    finally:
        _told.pop()


def _wait(what: str) -> None:
    line = _asking()
    if line and _told and not kdfast.ops.rows._debug[-1][1]:  # checks of values are asked for
        _told[-1](f"{what} at {line}")


def _asking() -> str:
    """The innermost line of kdfast on the stack, or ""."""
    frame: FrameType | None = sys._getframe(2)
    line = ""
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_CLI):
            return ""  # the command that runs the benchmark
        if name.startswith(_PACKAGE):
            if frame.f_code.co_name == "to":
                return ""  # the caller asked for that copy
            line = line or f"{Path(name).relative_to(_PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return line


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if (out := opened(_Mode(), func, args, kwargs)) is not NotImplemented:
        return out
    here = False

    def held(x: Any) -> Any:
        nonlocal here
        if isinstance(x, OnDevice):
            here = True
            return x.held
        if isinstance(x, torch.device) and x.type == "cuda":
            here = True
            return torch.device("cpu")
        return x

    target = kwargs.get("device")
    inner, options = tree_map(held, args), tree_map(held, kwargs)
    options.pop("pin_memory", None)
    if here:
        _look(func, args, kwargs)
    out = func(*inner, **options)
    if not here or (target is not None and torch.device(target).type == "cpu" and func is not _aten._to_copy.default):
        return out
    out = tree_map(lambda x: OnDevice(x) if isinstance(x, Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out)


def _look(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tells of what would make the host wait."""
    if reads(func) and not kwargs.get("output_size"):
        _wait(func.overloadpacket.__name__)
    elif func in INDEXED and any(x is not None and (x.dtype == torch.bool or not isinstance(x, OnDevice)) for x in args[1]):
        _wait("index by a mask, or by numbers of the host")
    elif func is _aten._to_copy.default and not isinstance(args[0], OnDevice) and not _unwaited(args[0], kwargs):
        _wait("copy of a host's tensor")
    elif (
        func is _aten.copy_.default
        and isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice)
        and args[1].ndim  # none: x[0] = 1.0
        and not (kwargs.get("non_blocking") or args[2:3] == (True,))
    ):
        _wait("copy between host and device")


def _unwaited(tensor: Tensor, kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("non_blocking")) and tensor.is_pinned()


_host_to = Tensor.to


def _to(self: Tensor, *args: Any, **options: Any) -> Tensor:
    """`Tensor.to` of a host's tensor: which of the devices "cuda" is, torch would ask a driver."""
    args = tuple(DEVICE if isinstance(x, str) and x == "cuda" else x for x in args)
    if options.get("device") == "cuda":
        options["device"] = DEVICE
    return _host_to(self, *args, **options)


def _tensor(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.tensor` and `as_tensor`: on a device a copy of a host's numbers, which the host waits for."""

    def made(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        if device is None or torch.device(device).type != "cuda":
            return make(data, device=device, **options)
        if not isinstance(data, OnDevice):
            _wait("torch.tensor of numbers of the host")
        return make(data, **options).to(DEVICE)

    return made


def _pinned(self: Tensor, *_: Any) -> Tensor:
    return self


@contextlib.contextmanager
def _on(device: Any) -> Iterator[None]:
    at = device if isinstance(device, int) else torch.device(device).index
    _current.append(0 if at is None else at)
    try:
        yield
    finally:
        _current.pop()


@contextlib.contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """`owner`'s attributes are `values` within the block."""
    before = {name: vars(owner)[name] if name in vars(owner) else getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextlib.contextmanager
def device(told: Told) -> Iterator[None]:
    """Within the block torch finds a GPU, which is this; `told` gets every wait of the host inside kdfast."""
    properties = SimpleNamespace(
        multi_processor_count=MULTIPROCESSORS, total_memory=80 << 30, name="stand-in", major=9, minor=0
    )
    stream = SimpleNamespace(cuda_stream=0, synchronize=lambda: _wait("Stream.synchronize"))
    cuda: dict[str, Any] = {
        "is_available": lambda: True, "device": _on, "current_device": current_device,
        "get_device_properties": lambda device=None: properties, "current_stream": lambda device=None: stream,
        "get_device_capability": lambda device=None: (9, 0), "synchronize": lambda device=None: _wait("torch.cuda.synchronize"),
        "get_device_name": lambda device=None: "stand-in", "get_sync_debug_mode": lambda: 0,
        "is_current_stream_capturing": lambda: False,
        "set_sync_debug_mode": lambda mode: None,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(torch.cuda, **cuda))
        stack.enter_context(
            replaced(torch, Generator=_Generator, tensor=_tensor(torch.tensor), as_tensor=_tensor(torch.as_tensor))
        )
        # Memory the device can reach is any memory.
        stack.enter_context(replaced(torch.Tensor, to=_to, pin_memory=_pinned, is_pinned=lambda self, *_: True))
        stack.enter_context(_Mode())
        _told.append(told)
        try:
            yield
        finally:
            _told.pop()
