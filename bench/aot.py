"""`python -m bench aot`: compiles every Triton kernel for GPUs that are not here, and gates on spills.

Each kernel is compiled at every size its launch function can pick and in a handful of representative types, with the
hints the runtime would give (16-byte aligned pointers, sizes and strides that 16 divides). Registers, spills and load
widths are read from the machine code. sm_80 and sm_90 must not spill; sm_100 and gfx942 must compile.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

GATED = ("sm_80", "sm_90")
TARGETS = (*GATED, "sm_100", "gfx942")
_POINTER = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
_FLOATS = ("inv_t", "soft_scale", "hard_weight", "temperature", "scale_s", "scale_t")
#: What the row kernels' other pointers point to, by argument name.
_FIXED = {"stats_ptr": "*fp64", "labels_ptr": "*i64", "ids_ptr": "*i32", "bits_ptr": "*i32", "kept_ptr": "*i32",
          "query_mask_ptr": "*i1", "key_mask_ptr": "*i1", "mask_ptr": "*i1"}  # fmt: skip
#: One for each launch size, and one whose rows are not aligned.
_VOCABS = (1024, 16384, 57344, 151936, 50257)


@dataclass(frozen=True)
class Case:
    """One kernel in one set of types, flags and sizes."""

    kernel: Any
    label: str
    pointers: dict[str, torch.dtype]
    constants: dict[str, Any]
    options: dict[str, int | bool]
    aligned: bool = True

    def signature(self) -> dict[str, str]:
        return {name: self._type(name) for name in self.kernel.arg_names}

    def _type(self, name: str) -> str:
        if name in self.constants:
            return "constexpr"
        if name.endswith("_ptr"):
            return _FIXED.get(name) or _POINTER[self.pointers.get(name.removesuffix("_ptr"), torch.float32)]
        return "fp32" if name in _FLOATS else "i32"

    def hints(self) -> dict[tuple[int], list[list[Any]]]:
        """Divisibility by 16 of every pointer and, in aligned rows, of every size and stride but the number of rows."""
        types = self.signature()
        aligned = [n for n, t in types.items() if t.startswith("*") or (self.aligned and t == "i32" and n != "rows")]
        return {(self.kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}


@dataclass
class Report:
    """What one case became on one target; counts are instructions in the machine code."""

    kernel: str
    case: str
    target: str
    warps: int
    registers: int | None = None
    spills: int = 0
    shared_bytes: int = 0
    loads_128: int | None = None
    loads_narrower: int | None = None
    seconds: float = 0.0
    error: str = ""


def cases() -> Iterator[Case]:
    """Every kernel at every launch size, in representative types and flags."""
    yield from _logits_cases()
    yield from _topk_cases()
    yield from _attention_cases()
    from kdfast.backends.triton import scale, selection

    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        options = {"num_warps": scale.WARPS, "enable_fp_fusion": True}
        yield Case(scale.scale_kernel, name, {"grad": dtype}, {"BLOCK": scale.BLOCK}, options)
        options = {"num_warps": selection.SELECT_WARPS, "enable_fp_fusion": True}
        flags = {"DIGITS": selection.DIGITS[dtype], "BLOCK": selection.SELECT_BLOCK}
        yield Case(selection.select_kernel, name, {"logits": dtype}, flags, options)


_SOFT = {"UNIT_T": False, "LABELS": False, "HARD": False, "PARTS": False, "GRAD": True, "EXTRA": False}
_HARD = {**_SOFT, "LABELS": True, "HARD": True}
#: Flags of the forward kernels: the usual ones, and those that hold the most registers.
_FORWARD = {"soft": _SOFT, "hard": _HARD, "hard T=1 parts": {**_HARD, "UNIT_T": True, "PARTS": True},
            "hard parts extra": {**_HARD, "PARTS": True, "EXTRA": True}}  # fmt: skip
_BACKWARD = {"hard": {"HARD": True, "EXTRA": False}, "hard extra": {"HARD": True, "EXTRA": True}}


def _logits_cases() -> Iterator[Case]:
    from kdfast.backends.triton import logits, tiles

    bf16, fp32 = torch.bfloat16, torch.float32
    mixes = {"bf16": (bf16, bf16), "fp32": (fp32, fp32), "fp32+bf16": (fp32, bf16)}
    for vocab, (mix, (student, teacher)) in itertools.product(_VOCABS, mixes.items()):
        pointers = {"student": student, "grad": student, "teacher": teacher}
        for name, flags in _FORWARD.items():
            size = tiles.launch(vocab, student, teacher, heavy=flags["PARTS"], ragged=vocab % 16 != 0)
            yield _row_case(logits.forward_kernel, f"{mix} V={vocab} {name}", pointers, flags, size)
        for name, flags in _BACKWARD.items():
            size = tiles.launch(vocab, student, teacher, ragged=vocab % 16 != 0)
            yield _row_case(logits.backward_kernel, f"{mix} V={vocab} {name}", pointers, flags, size)


def _topk_cases() -> Iterator[Case]:
    from kdfast.backends.triton import selection, tiles, topk

    for vocab, (name, dtype) in itertools.product(_VOCABS, (("bf16", torch.bfloat16), ("fp32", torch.float32))):
        pointers = {"student": dtype, "grad": dtype, "logits": dtype}
        for flag, flags in _FORWARD.items():
            size = tiles.launch(vocab, dtype, heavy=flags["PARTS"], ragged=vocab % 16 != 0)
            yield _row_case(topk.forward_kernel, f"{name} V={vocab} k=64 {flag}", pointers, {**flags, "K": 64}, size)
        size = tiles.launch(vocab, dtype, ragged=vocab % 16 != 0)
        for flag, flags in _BACKWARD.items():
            yield _row_case(topk.backward_kernel, f"{name} V={vocab} k=64 {flag}", pointers, {**flags, "K": 64}, size)
        yield _row_case(selection.sums_kernel, f"{name} V={vocab}", pointers, {"DIGITS": selection.DIGITS[dtype]}, size)


def _attention_cases() -> Iterator[Case]:
    from kdfast.backends.triton import attention
    from kdfast.backends.triton import attention_tiles as tiles

    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    for (name, dtype), (ds, dt), kind in itertools.product(dtypes.items(), ((64, 64), (128, 128), (32, 256)), (2, 1, 0)):
        pointers = dict.fromkeys(("q_s", "k_s", "q_t", "k_t", "grad"), dtype)
        flags = tiles.flags(kind, ds, dt, dtype, True, True, True)
        size = tiles.launch(ds, dt, dtype)
        label = f"{name} D={ds},{dt} {('scores', 'probs', 'kl')[kind]}"
        constants = {**flags, **size.shape}
        yield Case(tiles.queries_kernel, label, pointers, {**constants, "GRAD": True}, size.options)
        yield Case(tiles.keys_kernel, label, pointers, constants, size.options)
    for name, dtype in dtypes.items():
        flags = {"MASK": True, "GRAD": True, "BLOCK": attention.MAP_BLOCK}
        options = {"num_warps": attention.MAP_WARPS, "enable_fp_fusion": True}
        pointers = {"student": dtype, "teacher": dtype, "grad": dtype}
        yield Case(tiles.map_kernel, name, pointers, flags, options)


def _row_case(kernel: Any, label: str, pointers: dict[str, torch.dtype], flags: dict[str, Any], size: Any) -> Case:
    return Case(kernel, label, pointers, {**flags, **size.shape}, size.options, not size.ragged)


def compile_case(case: Case, target: str) -> Report:
    """Compiles for `target` (no GPU needed) and reads the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    amd = target.startswith("gfx")
    options = dict(case.options)
    if amd:
        # A wave of gfx942 has 64 lanes and a program at most 1024; registers are limited on NVIDIA only.
        options["num_warps"] = min(options["num_warps"], 16)
        options.pop("maxnreg", None)
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    report = Report(f"{_module(case.kernel)}.{case.kernel.__name__}", case.label, target, int(options["num_warps"]))
    source = ASTSource(case.kernel, case.signature(), case.constants, case.hints())
    begun = time.perf_counter()
    try:
        built = triton.compile(source, target=gpu, options=options)
    except (triton.CompilationError, RuntimeError, subprocess.CalledProcessError) as failure:
        report.error = _root_cause(failure)
        return report
    report.seconds = round(time.perf_counter() - begun, 2)
    report.shared_bytes = built.metadata.shared
    if amd:
        _read_amdgcn(built.asm["amdgcn"], report)
    else:
        _read_cubin(built.asm["cubin"], report)
    return report


def _root_cause(failure: BaseException) -> str:
    """The last line of the innermost error: Triton wraps one for every function it was inlining."""
    while failure.__cause__ is not None:
        failure = failure.__cause__
    lines = str(failure).strip().splitlines()
    return lines[-1] if lines else type(failure).__name__


def _module(kernel: Any) -> str:
    return str(kernel.__module__).rsplit(".", 1)[-1]


def _read_amdgcn(text: str, report: Report) -> None:
    found = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s*(\d+)", text)}
    report.registers, report.spills = found.get("vgpr_count"), found.get("vgpr_spill_count", 0)


def _read_cubin(cubin: bytes, report: Report) -> None:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        sass = _cuobjdump("-sass", file.name)
    match = re.search(r"REG:(\d+)", usage)
    report.registers = int(match.group(1)) if match else None
    report.spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    loads = re.findall(r"\bLDG\.([\w.]+)", sass)
    report.loads_128 = sum(".128" in width for width in loads)
    report.loads_narrower = len(loads) - report.loads_128


def _cuobjdump(flag: str, path: str) -> str:
    import triton

    assert triton.__file__ is not None
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, flag, path], check=True, capture_output=True, text=True).stdout


def _pick(all_cases: Sequence[Case], quick: bool) -> list[Case]:
    """All of them, or the first of each kernel."""
    if not quick:
        return list(all_cases)
    first: dict[Any, Case] = {}
    for case in all_cases:
        first.setdefault(case.kernel, case)
    return list(first.values())


def _failed(report: Report) -> bool:
    return bool(report.error) or (report.target in GATED and report.spills > 0)


def _line(report: Report) -> str:
    name = f"{report.kernel:25} {report.case:34} {report.target:7} {report.warps:5}"
    if report.error:
        return f"{name}  does not compile: {report.error}"
    width = "" if report.loads_128 is None else f"{report.loads_128:9} {report.loads_narrower:9}"
    verdict = "  SPILLS" if _failed(report) else ""
    return f"{name} {report.registers!s:>9} {report.spills:6} {report.shared_bytes:6} {width}{verdict}"


def main(argv: Sequence[str] | None = None) -> int:
    """0: everything compiled and nothing gated spills. 1: something did not. 2: Triton is missing or wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m bench aot", description=__doc__, epilog="example: python -m bench aot --quick --target sm_90",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="one configuration a kernel")
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this one (may be given several times)")
    parser.add_argument("--kernel", default="", help="only kernels whose name holds this")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(argv)
    if importlib.util.find_spec("triton") is None:
        print("aot: triton is not installed; expected it to compile the kernels; pip install triton", file=sys.stderr)
        return 2
    targets = options.target or TARGETS
    chosen = [c for c in cases() if options.kernel in f"{_module(c.kernel)}.{c.kernel.__name__}"]
    if not chosen:
        print(f"aot: --kernel: expected part of a kernel's name, got {options.kernel!r}", file=sys.stderr)
        return 2
    failures = 0
    if not options.json:
        print(f"{'kernel':25} {'case':34} target  warps registers spills shared 128-bit / narrower loads")
    reports = (compile_case(case, target) for case in _pick(chosen, options.quick) for target in targets)
    for report in reports:
        failures += _failed(report)
        print(json.dumps(dataclasses.asdict(report)) if options.json else _line(report), flush=True)
    if not options.json:
        print(
            f"{failures} failed" if failures else f"no spills on {' and '.join(t for t in GATED if t in targets)}; all compile"
        )
    return 1 if failures else 0
