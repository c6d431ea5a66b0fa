"""The one timer. Every number this project reports comes from `compare`."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kdfast import memory

from .ratios import paired

Prepare = Callable[[], object]
#: Told the times so far, round by round, and the seconds since the first: whether that is enough.
Enough = Callable[[Mapping[str, Sequence[float]], float], bool]

# Long enough for the host to enqueue a forward and backward before the device reaches them.
_HEAD_START_CYCLES = 2_000_000
_FLUSH_BYTES = 256 << 20
# Twice the third-level cache that a few cores share; 5 ms of a memory of 25 GB/s.
_SWEEP_BYTES = 64 << 20
# From malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@dataclass(frozen=True)
class Work:
    """Something to time: `run(prepare())`, where `prepare` is not timed.

    Args:
        run: what is timed; what it returns is released after the clock has stopped.
        inputs: one `prepare` per set of inputs; calls take them in turn, so that a cache does not serve repeats.
    """

    run: Callable[[object], object]
    inputs: Sequence[Prepare]


def _nothing() -> None:
    return None


def as_work(contestant: Work | Callable[[], object]) -> Work:
    """A plain callable as `Work` without inputs."""
    if isinstance(contestant, Work):
        return contestant
    call = contestant
    return Work(lambda _: call(), (_nothing,))


@dataclass(frozen=True)
class Timing:
    """Seconds of each timed call, in order, or the reason there are none."""

    seconds: tuple[float, ...]
    error: str = ""

    def percentile(self, q: float) -> float:
        """Linear interpolation between the sorted calls, 0 <= q <= 100; NaN without calls."""
        if not self.seconds:
            return math.nan
        ordered = sorted(self.seconds)
        at = (len(ordered) - 1) * q / 100
        low = math.floor(at)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (at - low)

    @property
    def median(self) -> float:
        return self.percentile(50)


def ratio(of: Timing, to: Timing) -> float:
    """How many times as long `of` takes as `to`, round by round (`ratios.paired`); NaN when either has no calls."""
    return paired(of.seconds, to.seconds).median


def failures() -> tuple[type[BaseException], ...]:
    """What a contestant may raise for its own reasons: out of memory, a compiler, a changed signature, a refusal."""
    kinds: tuple[type[BaseException], ...] = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, OSError)
    try:
        from triton.errors import TritonError
    except ImportError:
        return (*kinds, ImportError)
    return (*kinds, ImportError, TritonError)


def reason(error: BaseException) -> str:
    """An exception as one line of at most 200 characters."""
    text = " ".join(str(error).split())
    line = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return line if len(line) <= 200 else line[:197] + "..."


def keep_freed_memory() -> None:
    """From now on glibc keeps what is freed, up to tensors of 32 MiB, its own largest choice; nothing elsewhere.

    Left alone it comes to that in some processes and in others returns memory to the system after every call, whose pages
    then fault again: the same eager loss took 90 ms in one run and 117 in the next. Larger tensors are always returned.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        for option, value in ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 1 << 30)):
            library.mallopt(option, value)


class _CpuClock:
    """Wall time of a call that comes cold, as a loss does in a training step: other memory went through the caches just
    before, and torch's threads are awake.

    Without that sweep a call took its time from whoever ran before it (docs/cost.md: 0.15 ms of Python after itself, 0.5 to
    0.7 after a contestant that fills the caches), and the median of a millisecond case fell now among the ones, now among
    the others. Outputs are dropped between calls, as in training: what an allocator makes of that is part of its time.
    The C library's is put in the state that its own rules lead to as a rule (`keep_freed_memory`).
    """

    def __init__(self, cold: bool = True) -> None:
        keep_freed_memory()
        self._sweep = torch.zeros(_SWEEP_BYTES // 4) if cold else None

    def __call__(self, work: Work, turn: int) -> float:
        argument = work.inputs[turn % len(work.inputs)]()
        if self._sweep is not None:
            self._sweep.add_(1)  # read and written: `fill_` may pass the caches by
        start = time.perf_counter()
        kept = work.run(argument)
        end = time.perf_counter()
        del kept
        return end - start


class _CudaClock:
    """Device time between events. L2 is overwritten first, and the device held back until the host has enqueued."""

    def __init__(self) -> None:
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def __call__(self, work: Work, turn: int) -> float:
        argument = work.inputs[turn % len(work.inputs)]()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.fill_(turn % 251)
        torch.cuda._sleep(_HEAD_START_CYCLES)
        start.record()
        kept = work.run(argument)
        end.record()
        torch.cuda.synchronize()
        del kept
        return start.elapsed_time(end) / 1e3


def compare(
    contestants: Mapping[str, Work | Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 1,
    device: str = "cpu",
    budget_s: float = math.inf,
    least: int = 3,
    enough: Enough | None = None,
    cold: bool = True,
) -> dict[str, Timing]:
    """Times all contestants in this process, interleaved: in each round everyone runs once, in random order.

    Drift of the machine (clocks, neighbours) then falls on all alike, and so does what a predecessor leaves behind:
    under a rotating order each contestant always follows the same one, and one that always found the huge pages its
    twin had just freed was seen 6 times faster than that twin. Every contestant has one time a round, for `ratio`. To
    see the spread, enter a contestant twice under two names.

    Args:
        contestants: name -> `Work` or a callable without arguments.
        repeats: timed rounds, at most.
        warmup: untimed calls of each contestant before the first round; compilers and autotuners run there.
        device: "cpu" (wall time) or "cuda" (events, L2 flushed before each call, launch overhead hidden).
        budget_s: seconds after which no further round starts, once `least` rounds are done.
        enough: ends the rounds before that, when `least` are done; asked after every eighth.
        cold: caches are swept before each call; on CUDA they always are.

    Returns:
        name -> `Timing`; a contestant that raised has its reason there and no times.
    """
    if repeats < 1 or least < 1:
        raise ValueError(f"repeats and least: expected at least 1, got {repeats} and {least}")
    works = {name: as_work(c) for name, c in contestants.items()}
    clock = _CudaClock() if device == "cuda" else _CpuClock(cold)
    errors: dict[str, str] = {}
    seconds: dict[str, list[float]] = {name: [] for name in works}

    def attempt(name: str, turn: int) -> float | None:
        try:
            return clock(works[name], turn)
        except failures() as error:
            errors[name] = reason(error)
        release(device)  # after the handler, when the traceback no longer holds the failed call's tensors
        return None

    def running() -> dict[str, list[float]]:
        return {name: times for name, times in seconds.items() if name not in errors}

    for name in works:
        for turn in range(warmup):
            if name not in errors:
                attempt(name, turn)
    started = time.monotonic()
    names, order = list(works), random.Random(0)
    for turn in range(repeats):
        passed = time.monotonic() - started
        if turn >= least and (passed > budget_s or (turn % 8 == 0 and enough is not None and enough(running(), passed))):
            break
        order.shuffle(names)
        for name in names:
            if name in errors:
                continue
            took = attempt(name, turn)
            if took is not None:
                seconds[name].append(took)
    return {name: Timing(() if name in errors else tuple(seconds[name]), errors.get(name, "")) for name in works}


def release(device: str) -> None:
    """Gives freed memory back, so that one contestant's leftovers are not another's peak."""
    gc.collect()
    memory.release()
    if device == "cuda":
        torch.cuda.empty_cache()
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_bytes(contestant: Work | Callable[[], object], device: str = "cpu") -> int | None:
    """Memory one call needs on top of what its inputs hold, at its highest, in bytes.

    On CUDA the allocator's peak. On a CPU the growth of the process's resident set by the kernel's own high-water
    mark, which is exact to a page and needs no sampling, but counts only pages that were touched and includes
    whatever else the process touches meanwhile (a compiler's first call: warm up before). None where the kernel
    keeps no resettable mark (anything but Linux).
    """
    work = as_work(contestant)
    argument = work.inputs[0]()
    release(device)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work.run(argument)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not _reset_high_water():
        return None
    before = _status_bytes("VmRSS")
    work.run(argument)
    return max(0, _status_bytes("VmHWM") - before)


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no field {field}")


def _sized(device: str, on_gpu: int, on_cpu: int) -> int:
    return on_gpu if device == "cuda" else on_cpu


def copy_bandwidth(device: str = "cpu", size: int | None = None) -> float:
    """Bytes per second, read plus written, of `target.copy_(source)` between buffers far larger than any cache.

    Args:
        size: bytes of each buffer; by default 2 GiB on CUDA, 256 MiB on a CPU.
    """
    count = (size or _sized(device, 2 << 30, 256 << 20)) // 4
    source, target = torch.rand(count, device=device), torch.empty(count, device=device)
    timing = compare({"copy": lambda: target.copy_(source)}, repeats=_sized(device, 20, 7), warmup=2, device=device)["copy"]
    if timing.error:
        raise RuntimeError(f"copy_bandwidth on {device}: {timing.error}")
    return 2 * 4 * count / timing.median


def gemm_rate(dtype: torch.dtype, shape: tuple[int, int, int] | None = None, device: str = "cpu") -> float:
    """FLOP per second (2*M*N*K per product) of `torch.mm` of `[M, K]` and `[N, K]` transposed, on random numbers.

    Args:
        shape: (M, N, K); by default 8192 cubed on CUDA and 1024 cubed on a CPU.
    """
    m, n, k = shape or (_sized(device, 8192, 1024),) * 3
    a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)
    out = torch.empty(m, n, device=device, dtype=dtype)
    works = {"mm": lambda: torch.mm(a, b.t(), out=out)}
    timing = compare(works, repeats=_sized(device, 20, 7), warmup=3, device=device, cold=False)["mm"]
    if timing.error:
        raise RuntimeError(f"gemm_rate({dtype}) on {device}: {timing.error}")
    return 2 * m * n * k / timing.median


def relative_error(got: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """|| got - truth || / || truth || over all tensors together, in float64."""
    above = below = 0.0
    for g, t in zip(got, truth, strict=True):
        above += float((g.to(t.dtype) - t).square().sum())
        below += float(t.square().sum())
    return math.sqrt(above / below) if below else (0.0 if above == 0 else math.inf)
