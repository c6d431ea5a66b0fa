"""`kdfast bench aot`: compiles every Triton and CUDA kernel for GPUs that are not here, and gates on spills.

Each kernel is compiled at every size its launch function can pick and in a handful of representative types, with the
hints the runtime would give (16-byte aligned pointers, sizes and strides that 16 divides). Registers, spills and load
widths are read from the machine code. sm_80 and sm_90 must not spill; everything must compile, with
no more shared memory than its GPU has. CUDA sources: see
`aot_cuda`; without nvcc they are left out, which is said. `--launch` is the launch check (`launch`): every GPU test's own calls
for sm_90, bound as a launch binds them, which is what variants of flags are held against.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from kdfast.files import json_text

from . import aot_cuda
from .aot_cases import Case, cases
from .machine_code import SHARED, Report, read_cubin
from .measure import failures

GATED = ("sm_80", "sm_90")
TARGETS = (*GATED, "sm_100", "gfx942")


def compile_case(case: Case, target: str) -> Report:
    """Compiles for `target` (no GPU needed) and reads the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    amd = target.startswith("gfx")
    options, constants = dict(case.options), dict(case.constants)
    if target == "sm_80":
        constants, options = constants | case.older[0], options | case.older[1]
    if amd:
        if constants.get("PRECISION") == "tf32x3":  # NVIDIA's; kernels take float32 there as it is
            constants["PRECISION"] = "ieee"
        # A wave of gfx942 has 64 lanes and a program at most 1024; registers are limited on NVIDIA only.
        options["num_warps"] = min(options["num_warps"], 16)
        options.pop("maxnreg", None)
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    report = Report(f"{_module(case.kernel)}.{case.kernel.__name__}", case.label, target, int(options["num_warps"]))
    source = ASTSource(case.kernel, case.signature(), constants, case.hints())
    refusals: tuple[type[BaseException], ...] = (*failures(), subprocess.CalledProcessError)
    begun = time.perf_counter()
    try:
        built = triton.compile(source, target=gpu, options=options)
    except refusals as failure:
        report.error = _root_cause(failure)
        return report
    report.seconds = round(time.perf_counter() - begun, 2)
    report.shared_bytes = built.metadata.shared
    if amd:
        _read_amdgcn(built.asm["amdgcn"], report)
    else:
        read_cubin(built.asm["cubin"], report)
    return report


def _root_cause(failure: BaseException) -> str:
    """The last line of the innermost error, which Triton wraps once for every function it was inlining; of an assembler's
    report its first error, as a command to try it again ends that."""
    while failure.__cause__ is not None:
        failure = failure.__cause__
    lines = str(failure).strip().splitlines()
    of_ptxas = next((line for line in lines if re.search(r"; error\s*:", line)), None)
    return of_ptxas or (lines[-1] if lines else type(failure).__name__)


def _module(kernel: Any) -> str:
    return str(kernel.__module__).rsplit(".", 1)[-1]


def _read_amdgcn(text: str, report: Report) -> None:
    found = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s*(\d+)", text)}
    report.registers, report.spills = found.get("vgpr_count"), found.get("vgpr_spill_count", 0)


def _pick(all_cases: Sequence[Case], targets: Sequence[str], quick: bool) -> list[tuple[Case, str]]:
    """All of them on every target, or the first of each kernel; variants on sm_90 are the launch check's."""
    if not quick:
        return list(itertools.product(all_cases, targets))
    first: dict[Any, Case] = {}
    for case in all_cases:
        first.setdefault(case.kernel, case)
    return list(itertools.product(first.values(), targets))


def _failed(report: Report) -> bool:
    return bool(report.error or _too_much_shared(report)) or (report.target in GATED and report.spills > 0)


def _too_much_shared(report: Report) -> str:
    most = SHARED[report.target]
    return f"  SHARED MEMORY: expected at most {most} bytes" if report.shared_bytes > most else ""


def _cuda_targets(targets: Sequence[str], quick: bool, kernel: str) -> list[str]:
    """For which of the targets the CUDA sources are to be compiled."""
    wanted = aot_cuda.TARGETS[:1] if quick else aot_cuda.TARGETS
    return [target for target in wanted if target in targets and kernel in "cuda.logits"]


def _line(report: Report) -> str:
    name = f"{report.kernel:25} {report.case:42} {report.target:7} {report.warps:5}"
    if report.error:
        return f"{name}  does not compile: {report.error}"
    width = "" if report.loads_128 is None else f"{report.loads_128:9} {report.loads_narrower:9}"
    verdict = _too_much_shared(report) or ("  SPILLS" if _failed(report) else "")
    return f"{name} {report.registers!s:>9} {report.spills:6} {report.shared_bytes:6} {width}{verdict}"


def main(argv: Sequence[str] | None = None) -> int:
    """0: everything compiled and nothing gated spills. 1: something did not. 2: Triton is missing or wrong usage."""
    parser = argparse.ArgumentParser(
        prog="kdfast bench aot", description=__doc__, epilog="example: kdfast bench aot --quick --target sm_90",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="one configuration a kernel")
    parser.add_argument("--launch", action="store_true", help="the GPU tests' own launches instead, for sm_90 (minutes)")
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this one (may be given several times)")
    parser.add_argument("--kernel", default="", help="only kernels (with --launch: tests) whose name holds this")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(argv)
    if importlib.util.find_spec("triton") is None:
        print("aot: triton is not installed; expected it to compile the kernels; pip install triton", file=sys.stderr)
        return 2
    if options.launch:
        from .launch import gpu_tests

        return gpu_tests(options.kernel)
    targets = options.target or TARGETS
    chosen = [c for c in cases() if options.kernel in f"{_module(c.kernel)}.{c.kernel.__name__}"]
    in_cuda = [] if aot_cuda.missing() else _cuda_targets(targets, options.quick, options.kernel)
    if not chosen and not in_cuda:
        print(f"aot: --kernel: expected part of a kernel's name, got {options.kernel!r}", file=sys.stderr)
        return 2
    failed = 0
    triton_reports = (compile_case(case, target) for case, target in _pick(chosen, targets, options.quick))
    reports = itertools.chain(triton_reports, aot_cuda.reports(in_cuda))
    if not options.json:
        print(f"{'kernel':25} {'case':42} target  warps registers spills shared 128-bit / narrower loads")
    for report in reports:
        failed += _failed(report)
        print(json_text(dataclasses.asdict(report)) if options.json else _line(report), flush=True)
    if aot_cuda.missing() and not options.json:
        print(f"CUDA sources left out: {aot_cuda.missing()}")
    if not options.json:
        print(f"{failed} failed" if failed else _all_well(targets))
    return 1 if failed else 0


def _all_well(targets: Sequence[str]) -> str:
    gated = [target for target in GATED if target in targets]
    return f"no spills on {' and '.join(gated)}; all compile" if gated else "all compile"
