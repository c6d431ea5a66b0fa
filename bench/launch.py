"""Every launch of the public API with no GPU: Triton's own binder and compiler for sm_90, on a stand-in for the device.

    kdfast bench smoke --launch           the smoke calls: what CI runs
    kdfast bench aot --launch             every GPU test of the checkout, as it stands in tests/test_gpu*.py
    PYTHONPATH=DIR kdfast bench aot --launch      with the Triton in DIR: pip install --no-deps --target DIR triton==3.6.0

Interpreter and ahead-of-time compilation go around how arguments are bound and specialised. Here everything happens but the
execution; results come from the reference, so that the tests go on and hold. What is found is a failure: a call that raises,
an argument no kernel can take, a grid no GPU has, a launch on another device than its tensors', a wait of the host inside a
public call, a spill, more shared memory than there is, a product of halves or TF32 without tensor cores.
`test_gpu_cluster.py` launches no Triton.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from . import launch_lint, stand_in
from .machine_code import SHARED, Report, read_cubin

#: Of an SM of sm_90: registers, threads, blocks, bytes of shared memory, and what each block takes of those for itself.
_REGISTERS, _THREADS, _BLOCKS, _SHARED, _OWN = 65536, 2048, 32, 233472, 1024
_TESTS = Path(__file__).parent.parent / "tests"
#: Tests of what only the hardware has: memory, streams, graphs, profiles, other compilers.
ONLY_THERE = "hardware"


@dataclass
class Variant:
    """A kernel as it was bound: what was compiled, and where it was launched first."""

    kernel: str
    bound: str
    warps: int
    seconds: float
    built: Any
    caller: str
    grids: list[tuple[int, ...]] = field(default_factory=list)
    registers: int = 0
    spills: int = 0
    shared: int = 0
    dots: str = ""

    def read(self) -> None:
        """Registers, spills and what does each product."""
        report = Report(self.kernel, self.bound, "sm_90", self.warps)
        read_cubin(self.built.asm["cubin"], report, loads=False)
        self.registers, self.spills, self.shared = report.registers or 0, report.spills, self.built.metadata.shared
        self.dots = dots(self.built.asm["ttgir"])

    @property
    def resident(self) -> int:
        """Blocks an SM holds at once."""
        threads = 32 * self.warps
        registers = -(-self.registers // 8) * 8 * threads
        return min(_BLOCKS, _THREADS // threads, _REGISTERS // max(registers, 1), _SHARED // (self.shared + _OWN))

    @property
    def waves(self) -> str:
        """The smallest and largest grid over the blocks that the GPU holds at once."""
        held = max(self.resident, 1) * stand_in.MULTIPROCESSORS
        found = sorted({_blocks(grid) / held for grid in self.grids})
        return "-".join(dict.fromkeys(f"{x:.2g}" for x in (found[0], found[-1])))

    @property
    def wrong(self) -> str:
        if self.spills:
            return f"{self.spills} instructions of spills"
        if self.shared > SHARED["sm_90"]:
            return f"{self.shared} bytes of shared memory, expected at most {SHARED['sm_90']}"
        return "a product of halves or TF32 by FFMA" if re.search(r"FFMA \((?!ieee)", self.dots) else ""

    def line(self) -> str:
        mark = f"  WRONG: {self.wrong}" if self.wrong else ""
        return (
            f"{self.kernel:18} {self.seconds:6.1f} {self.warps:5} {self.registers:9} {self.spills:6} {self.shared:6} "
            f"{self.resident:6} {self.waves:>9}  {self.dots or '-':24} {self.bound}{mark}"
        )


HEADER = f"{'kernel':18} {'s':>6} warps registers spills shared blocks {'waves':>9}  {'products':24} bound as"


def dots(ttgir: str) -> str:
    """What does each product of a kernel: "2 HGMMA, 1 FFMA (ieee)", from the layouts the compiler chose."""
    found: collections.Counter[str] = collections.Counter()
    for line in ttgir.splitlines():
        if "warp_group_dot " in line or "tc_gen5_mma" in line:
            found["HGMMA"] += 1
        elif re.search(r"= tt\.dot ", line):
            halves = "ieee" if re.search(r": tensor<[\dx]*f32", line) and "inputPrecision" not in line else "tf32 or half"
            found["HMMA" if line.rsplit("->", 1)[-1].count("#mma") else f"FFMA ({halves})"] += 1
    return ", ".join(f"{n} {name}" for name, n in sorted(found.items()))


def _blocks(grid: tuple[int, ...]) -> int:
    n = 1
    for x in grid:
        n *= x
    return n


@dataclass
class Launches:
    """What was launched, and what was wrong with it; `at` says which call is being made."""

    variants: dict[int, Variant] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)  # the finding -> the first call that showed it
    count: int = 0
    at: str = ""

    def tell(self, finding: str) -> None:
        self.wrong.setdefault(finding, self.at)


def _driver() -> Any:
    """A driver of Triton's that knows its target and launches nothing."""
    from triton.backends.compiler import GPUTarget

    class Properties:
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": SHARED["sm_90"], "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}

    class Sm90:
        binary_ext, utils = "cubin", Properties

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return stand_in.current_device()

        def get_current_stream(self, *device: int) -> int:
            return 0

        def get_active_torch_device(self) -> Any:
            return stand_in.DEVICE

    return Sm90()


def _bound(names: Sequence[str], args: Sequence[Any], options: dict[str, Any]) -> str:
    """The dtypes and constants of a launch in a few words."""
    dtypes = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "float64": "f64"}

    def short(x: Any) -> str:
        return dtypes.get(str(x.dtype)[6:], "")

    tensors = [short(x) for a in args for x in (a if type(a) is tuple else (a,)) if isinstance(x, Tensor) and short(x)]
    words = ["+".join(tensors[:4])]
    for name, value in options.items():
        if dataclasses.is_dataclass(value):
            set_ = [
                f"{f.name}={getattr(value, f.name)}" for f in dataclasses.fields(value) if getattr(value, f.name) != f.default
            ]
            words.append(" ".join(set_))
        elif name in names:
            words.append(f"{name}={value}")
    return " ".join(words).replace("=True", "")


@contextlib.contextmanager
def launches_only() -> Iterator[Launches]:
    """Within the block there is a GPU for which Triton binds, specialises and compiles, and launches nothing.

    Kernels of the backend `triton` are asked first and those of `reference` give the results.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from kdfast import dispatch

    found = Launches()
    run, kernel = JITFunction.run, dispatch.kernel
    referring = [False]

    def compile_only(self: Any, *args: Any, grid: Any, warmup: Any, **options: Any) -> Any:
        name, began = self.fn.__name__, time.perf_counter()
        found.count += 1
        for why in (launch_lint.arguments(self.arg_names, args, options), launch_lint.grid(grid)):
            if why:
                found.tell(f"{name}: {why}")
        at = next((x.device.index for x in args if isinstance(x, Tensor)), 0)
        if at != stand_in.current_device():
            found.tell(f"{name}: launched on device {stand_in.current_device()}, its tensors are on {at}")
        built = run(self, *args, grid=grid, warmup=True, **options)
        if id(built) not in found.variants:
            bound = _bound(self.arg_names, args, options)
            seconds = time.perf_counter() - began
            found.variants[id(built)] = Variant(name, bound, built.metadata.num_warps, seconds, built, found.at)
        if grid not in found.variants[id(built)].grids:
            found.variants[id(built)].grids.append(grid)
        return built

    def both(op: str, backend: str) -> Any:
        return _Both(kernel(op, "triton"), kernel(op, "reference"), referring) if backend == "triton" else kernel(op, backend)

    missing = dataclasses.replace(dispatch._BACKENDS["triton"], missing=lambda: None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(stand_in.replaced(JITFunction, run=compile_only))
        stack.enter_context(stand_in.replaced(dispatch, kernel=both, _BACKENDS=dispatch._BACKENDS | {"triton": missing}))
        stack.enter_context(stand_in.device(lambda line: found.tell(f"the host waits: {line}")))
        dispatch._chosen.clear()
        driver.set_active(_driver())
        try:
            yield found
        finally:
            dispatch._chosen.clear()
            driver._active = None  # `reset_active` would look for a GPU


class _Both:
    """A kernel module: the functions of one run, those of the other give the results."""

    def __init__(self, tried: Any, trusted: Any, referring: list[bool]):
        self.tried, self.trusted, self.referring = tried, trusted, referring

    def __getattr__(self, name: str) -> Callable[..., Any]:
        tried, trusted, referring = getattr(self.tried, name), getattr(self.trusted, name), self.referring

        def call(*args: Any, **options: Any) -> Any:
            if not referring[0]:
                tried(*args, **options)
            before, referring[0] = referring[0], True
            try:
                with stand_in.silently():
                    return trusted(*args, **options)
            finally:
                referring[0] = before

        return call


def report(found: Launches, failed: int, seconds: float, table: bool) -> int:
    """Prints what was launched and found; returns how much failed."""
    import triton

    variants = sorted(found.variants.values(), key=lambda v: (v.kernel, v.bound))
    if table:
        print(HEADER)
    for variant in variants:
        variant.read()
        if table:
            print(variant.line(), flush=True)
    for finding, at in found.wrong.items():
        print(f"FAIL  {finding} (first in {at})")
    wrong = [v for v in variants if v.wrong]
    for v in wrong:
        print(f"FAIL  {v.kernel}: {v.wrong} ({v.bound}; first in {v.caller})")
    kernels = collections.Counter(v.kernel for v in variants)
    listed = ", ".join(f"{name} {n}" for name, n in kernels.most_common())
    print(
        f"{failed} calls failed, {len(found.wrong) + len(wrong)} findings; {found.count} launches of {len(variants)} variants"
        f" in {seconds:.0f} s, triton {triton.__version__}: {listed}"
    )
    return failed + len(found.wrong) + len(wrong)


def checked_calls(calls: Sequence[Any], check: Callable[..., str], trace: bool = False) -> int:
    """The kernels of named calls; returns how much failed.

    Args:
        calls: each with a `name`. check: says what is wrong with one, given a device and a backend. trace: print how it came.
    """
    failed, began = 0, time.perf_counter()
    with launches_only() as found:
        for call in calls:
            before, found.at = found.count, call.name
            try:
                wrong = check(call, "cuda", backend="triton")
                print(
                    f"{'FAIL' if wrong else 'ok  '}  {call.name}: {found.count - before} launches {wrong}".rstrip(), flush=True
                )
                failed += bool(wrong)
            except Exception as error:  # whatever a binder or compiler raises is the finding
                failed += 1
                print(f"FAIL  {call.name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}", flush=True)
                if trace:
                    traceback.print_exc()
    return report(found, failed, time.perf_counter() - began, table=False)


class _Plugin:
    """Runs each test of a GPU within the block that `launches_only` makes."""

    def __init__(self, found: Launches, name: str):
        self.found, self.name, self.named = found, name, 0
        self.failed, self.passed, self.left = 0, 0, collections.Counter[str]()

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        named = [item for item in items if self.name in item.nodeid]
        self.named, kept = len(named), []
        for item in named:
            why = _left_out(item)
            if why:
                self.left[why] += 1
            else:
                kept.append(item)
        items[:] = kept

    def pytest_runtest_setup(self, item: Any) -> None:
        self.found.at = item.nodeid.removeprefix("tests/")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed += 1
            lines = str(report.longrepr).strip().splitlines() or [""]
            why = next((line[1:].strip() for line in lines if line.startswith("E ")), "")
            print(f"FAIL  {report.nodeid}: {lines[-1][:200]} {why[:200]}".rstrip(), flush=True)
        elif report.when == "call" and report.passed:
            self.passed += 1
        elif report.skipped:
            self.left[str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)[:80]] += 1


def _left_out(item: Any) -> str:
    """Why a test of a GPU has nothing to show here, or ""."""
    if item.get_closest_marker(ONLY_THERE):
        return "they show on hardware only"
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return "they launch nothing, being of the reference" if parameters.get("backend") == "reference" else ""


def gpu_tests(name: str = "") -> int:
    """The kernels of the GPU tests whose name holds `name`: 0 all well, 1 something failed, 2 there are no such tests."""
    import pytest

    files = [str(path) for path in sorted(_TESTS.glob("test_gpu*.py")) if path.name != "test_gpu_cluster.py"]
    if not files:
        print("aot: --launch needs the checkout's tests, which an installation does not have", file=sys.stderr)
        return 2
    began = time.perf_counter()
    with launches_only() as found:
        plugin = _Plugin(found, name)
        base = ["-p", "no:cacheprovider", "-p", "no:xdist", "-m", "gpu", "-q", "--no-header", "--no-summary", "-r", "N"]
        code = pytest.main([*base, *files], plugins=[plugin])
        if not plugin.named:
            print(f"aot: --kernel: expected part of a GPU test's name, got {name!r}", file=sys.stderr)
            return 2
        for why, n in plugin.left.items():
            print(f"{n} tests left out: {why}")
        print(f"{plugin.passed} tests passed, {plugin.failed} failed")
        failed = plugin.failed or int(plugin.passed == 0 or code not in (0, 1))
        return 1 if report(found, failed, time.perf_counter() - began, table=True) else 0


if __name__ == "__main__":
    sys.exit(gpu_tests(*sys.argv[1:2]))
