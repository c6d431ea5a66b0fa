"""`python -m bench aot`: compiles every Triton and CUDA kernel for GPUs that are not here, and gates on spills.

Each kernel is compiled at every size its launch function can pick and in a handful of representative types, with the
hints the runtime would give (16-byte aligned pointers, sizes and strides that 16 divides). Registers, spills and load
widths are read from the machine code. sm_80 and sm_90 must not spill; sm_100 and gfx942 must compile. CUDA sources: see
`aot_cuda`; without nvcc they are left out, which is said.
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

from kdfast.options import DIVERGENCES

GATED = ("sm_80", "sm_90")
TARGETS = (*GATED, "sm_100", "gfx942")
_POINTER = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
_FLOATS = ("inv_t", "cap", "scale", "scale_s", "scale_t")
#: What the row kernels' other pointers point to, by argument name.
_FIXED = {"stats_ptr": "*fp64", "labels_ptr": "*i64", "ids_ptr": "*i32", "bits_ptr": "*i32", "kept_ptr": "*i32",
          "drawn_ptr": "*i32", "points_ptr": "*fp64", "total_ptr": "*fp64", "log_mass_ptr": "*fp64",
          "data_ptr": "*u8", "offsets_ptr": "*i64", "counts_ptr": "*i32",
          "query_mask_ptr": "*i1", "key_mask_ptr": "*i1", "mask_ptr": "*i1"}  # fmt: skip
#: One for each launch size, the widest and tightest first, and one whose rows are not aligned.
_VOCABS = (151936, 57344, 16384, 1024, 50257)


@dataclass(frozen=True)
class Case:
    """One kernel in one set of types, flags and sizes; `pointers` to tensors by argument, the teachers' as a tuple."""

    kernel: Any
    label: str
    pointers: dict[str, torch.dtype | tuple[torch.dtype, ...]]
    constants: dict[str, Any]
    options: dict[str, int | bool]
    aligned: bool = True

    def signature(self) -> dict[str, Any]:
        return {name: self._type(name) for name in self.kernel.arg_names}

    def _type(self, name: str) -> Any:
        if name in self.constants:
            return "constexpr"
        if name.endswith("_ptr"):
            return _FIXED.get(name) or _POINTER[self.pointers.get(name.removesuffix("_ptr"), torch.float32)]
        if name == "o":
            from kdfast.backends.triton.logits import Scalars

            return Scalars(*["fp32"] * len(Scalars._fields))
        teachers = self.pointers.get("teachers", ())
        if name in (of_each := {"teacher_ptrs": None, "teacher_strides": "i32", "weights": "fp32"}):
            return tuple(of_each[name] or _POINTER[dtype] for dtype in teachers)
        return "fp32" if name in _FLOATS else "i32"

    def hints(self) -> dict[tuple[int, ...], list[list[Any]]]:
        """Divisibility by 16 of every pointer and, in aligned rows, of every size and stride but the number of rows."""
        found = {}
        for at, (name, types) in enumerate(self.signature().items()):
            leaves = {(at, i): t for i, t in enumerate(types)} if isinstance(types, tuple) else {(at,): types}
            for path, leaf in leaves.items():
                if leaf.startswith("*") or (self.aligned and leaf == "i32" and name != "rows"):
                    found[path] = [["tt.divisibility", 16]]
        return found


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
    yield from _hidden_cases()
    yield from _codec_cases()
    from kdfast.backends.triton import drawing, scale, selection, selection_rows

    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        options = {"num_warps": scale.WARPS, "enable_fp_fusion": True}
        yield Case(scale.scale_kernel, name, {"grad": dtype}, {"BLOCK": scale.BLOCK}, options)
        options = {"num_warps": selection.SELECT_WARPS, "enable_fp_fusion": True}
        for head, digits in ((0, selection.DIGITS[dtype]), (2, 4)):
            flags = {"HEAD": head, "DIGITS": digits, "BLOCK": selection.SELECT_BLOCK}
            yield Case(selection_rows.select_kernel, f"{name} head={head}", {"logits": dtype}, flags, options)
            options = {"num_warps": drawing.WARPS, "enable_fp_fusion": True}
            yield Case(
                drawing.draw_kernel, f"{name} head={head}", {"logits": dtype}, {**flags, "BLOCK": drawing.BLOCK}, options
            )


def _logits_cases() -> Iterator[Case]:
    """Forward KL at every size and mix of types; the rest where registers are tightest."""
    from kdfast.backends.triton.logits_rows import backward_kernel, forward_kernel

    bf16, fp32 = torch.bfloat16, torch.float32
    mixes = {"bf16": (bf16, bf16), "fp32": (fp32, fp32), "fp32+bf16": (fp32, bf16)}
    variants = _logits_variants()
    for vocab, (mix, (student, teacher)) in itertools.product(_VOCABS, mixes.items()):
        for name, flags in variants.items():
            usual = flags.kind == 0 and flags.teachers == 1 and flags.student_head == 0
            if not (usual or (mix, vocab) in (("bf16", 151936), ("bf16", 16384), ("bf16", 50257), ("fp32", 151936))):
                continue
            dtypes = (student, *(teacher,) * flags.teachers)
            for kernel, own in ((forward_kernel, flags), (backward_kernel, dataclasses.replace(flags, parts=False))):
                yield _logits_case(kernel, f"{mix} V={vocab} {name}", dtypes, own, vocab)


def _logits_variants() -> dict[str, Any]:
    """The usual flags, each divergence, and those that hold the most registers."""
    from kdfast.backends.triton import divergence
    from kdfast.backends.triton.logits import Flags

    soft = Flags()
    hard = Flags(labels=True, hard=True)
    every = dataclasses.replace(hard, student_head=2, teacher_head=2, smooth=True, z=True)
    kinds = {kind: int(getattr(divergence, kind.upper()).value) for kind in (*DIVERGENCES, "alpha_0", "beta_0", "both_0")}
    return {
        "soft": soft, "hard": hard,
        "hard T=1 parts": dataclasses.replace(hard, unit_t=True, parts=True),
        "hard parts extra": dataclasses.replace(hard, parts=True, extra=True),
        **{kind: dataclasses.replace(hard, kind=number) for kind, number in kinds.items() if number != 0},
        "jsd parts, all options": dataclasses.replace(every, kind=kinds["jsd"], parts=True),
        "all options": every,
        "2 teachers' probs": dataclasses.replace(hard, teachers=2, mixed=True),
        "3 teachers' logits": dataclasses.replace(hard, teachers=3),
        "4 teachers' probs, jsd parts": dataclasses.replace(hard, teachers=4, mixed=True, kind=kinds["jsd"], parts=True),
    }  # fmt: skip


def _logits_case(kernel: Any, label: str, dtypes: tuple[torch.dtype, ...], flags: Any, vocab: int) -> Case:
    from kdfast.backends.triton import tiles

    size = tiles.launch(vocab, *dtypes, heavy=flags.heavy, ragged=vocab % 16 != 0)
    pointers = {"student": dtypes[0], "grad": dtypes[0], "teachers": dtypes[1:]}
    return _row_case(kernel, label, pointers, {"F": flags}, size)


def _topk_cases() -> Iterator[Case]:
    """The usual losses at every size, the rest where registers are tightest; capture, and draws."""
    from kdfast.backends.triton import drawing, selection, selection_rows, tiles, topk_rows
    from kdfast.backends.triton.logits import Flags

    variants = _topk_variants()
    for vocab, (name, dtype) in itertools.product(_VOCABS, (("bf16", torch.bfloat16), ("fp32", torch.float32))):
        ragged = vocab % 16 != 0
        for flag, flags in variants.items():
            if not (flag in ("soft", "hard") or vocab in (151936, 50257)):
                continue
            size = tiles.launch(vocab, dtype, heavy=flags.heavy, ragged=ragged)
            pointers = {"student": dtype, "grad": dtype, "teachers": (torch.float32,) * flags.teachers}
            for kernel, own in ((topk_rows.forward_kernel, flags), (topk_rows.backward_kernel, _in_backward(flags))):
                yield _row_case(kernel, f"{name} V={vocab} k=64 {flag}", pointers, {"F": own, "K": 64}, size)
        size = tiles.launch(vocab, dtype, ragged=ragged)
        for head, digits in ((0, selection.DIGITS[dtype]), (2, 4)):
            flags = {"HEAD": head, "DIGITS": digits}
            yield _row_case(selection_rows.sums_kernel, f"{name} V={vocab} head={head}", {"logits": dtype}, flags, size)
        yield _row_case(drawing.unlisted_kernel, f"{name} V={vocab} k=64", {"logits": dtype}, {"F": Flags(), "K": 64}, size)


def _in_backward(flags: Any) -> Any:
    return dataclasses.replace(flags, parts=False, grad=True)


def _topk_variants() -> dict[str, Any]:
    """The usual flags, each tail's divergences, and those that hold the most registers."""
    from kdfast.backends.triton import divergence
    from kdfast.backends.triton.topk import Flags

    hard, reverse, jsd = Flags(labels=True, hard=True), divergence.REVERSE_KL.value, divergence.JSD.value
    every = dataclasses.replace(hard, student_head=2, smooth=True, z=True, parts=True, extra=True)
    return {
        "soft": Flags(), "hard": hard, "hard T=1 parts": dataclasses.replace(hard, unit_t=True, parts=True),
        "reverse": dataclasses.replace(hard, kind=reverse), "jsd": dataclasses.replace(hard, kind=jsd),
        "uniform": dataclasses.replace(hard, spread=True), "uniform jsd": dataclasses.replace(hard, spread=True, kind=jsd),
        "all options": every,
        "3 targets, uniform jsd parts": dataclasses.replace(hard, spread=True, kind=jsd, teachers=3, parts=True),
    }  # fmt: skip


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


def _hidden_cases() -> Iterator[Case]:
    from kdfast.backends.triton import hidden

    bm, bn, bk = hidden.PROJECT_TILE
    tile = {"BIAS": True, "WIDEN": False, "BM": bm, "BN": bn, "BK": bk}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        options = {"num_warps": hidden.WARPS, "enable_fp_fusion": True}
        for kernel, block in itertools.product((hidden.mse_kernel, hidden.cosine_kernel), (1024, hidden.BLOCK)):
            pointers = {"student": dtype, "teacher": dtype, "grad": dtype}
            yield Case(kernel, f"{name} block={block}", pointers, {"BLOCK": block, "GRAD": True}, options)
        options = {"num_warps": hidden.PROJECT_WARPS, "enable_fp_fusion": True}
        for precision in ("ieee", "tf32"):
            pointers = {"student": dtype, "projection": dtype, "bias": dtype, "teacher": dtype, "grad": dtype}
            yield Case(hidden.project_kernel, f"{name} {precision}", pointers, {**tile, "PRECISION": precision}, options)


def _codec_cases() -> Iterator[Case]:
    """The usual rows, and those with the most to hold."""
    from kdfast.backends.triton import codec
    from kdfast.backends.triton.codec_rows import decode_kernel
    from kdfast.options import CodecLayout

    layouts = {
        "topk": CodecLayout(64, 151936, (1.0,)), "topk 3 T": CodecLayout(64, 151936, (0.5, 1.0, 2.0)),
        "sampled": CodecLayout(64, 151936, (1.0,), samples=64),
        "mixed 3 T": CodecLayout(64, 151936, (1.0, 2.0, 4.0), 32, True, 2.0),
    }  # fmt: skip
    for name, layout in layouts.items():
        constants = {"F": codec.Flags.of(layout), "BITS": codec.BITS}
        yield Case(decode_kernel, name, {}, constants, codec.OPTIONS, aligned=False)
        if layout.samples:  # arguments that are 1 are compiled in
            yield Case(decode_kernel, f"{name}, ones", {}, {**constants, "k": 1, "vocab": 1, "samples": 1}, codec.OPTIONS)


def _row_case(kernel: Any, label: str, pointers: dict[str, Any], flags: dict[str, Any], size: Any) -> Case:
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


def _pick(all_cases: Sequence[Case], targets: Sequence[str], quick: bool) -> list[tuple[Case, str]]:
    """All of them on every target; or the first of each kernel, and on sm_90 the first of each variant too."""
    if not quick:
        return list(itertools.product(all_cases, targets))
    first: dict[Any, Case] = {}
    for case in all_cases:
        first.setdefault((case.kernel, case.constants.get("F")), case)
    known = set()
    chosen = []
    for case in first.values():
        chosen += [(case, target) for target in targets if case.kernel not in known or target == "sm_90"]
        known.add(case.kernel)
    return chosen


def _failed(report: Report) -> bool:
    return bool(report.error) or (report.target in GATED and report.spills > 0)


def _cuda_targets(targets: Sequence[str], quick: bool, kernel: str) -> list[str]:
    """For which of the targets the CUDA sources are to be compiled."""
    from . import aot_cuda

    wanted = aot_cuda.TARGETS[:1] if quick else aot_cuda.TARGETS
    return [target for target in wanted if target in targets and kernel in "cuda.logits"]


def _line(report: Report) -> str:
    name = f"{report.kernel:25} {report.case:42} {report.target:7} {report.warps:5}"
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
    parser.add_argument("--quick", action="store_true", help="one configuration a kernel, and on sm_90 one a variant")
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this one (may be given several times)")
    parser.add_argument("--kernel", default="", help="only kernels whose name holds this")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(argv)
    if importlib.util.find_spec("triton") is None:
        print("aot: triton is not installed; expected it to compile the kernels; pip install triton", file=sys.stderr)
        return 2
    from . import aot_cuda

    targets = options.target or TARGETS
    chosen = [c for c in cases() if options.kernel in f"{_module(c.kernel)}.{c.kernel.__name__}"]
    in_cuda = [] if aot_cuda.missing() else _cuda_targets(targets, options.quick, options.kernel)
    if not chosen and not in_cuda:
        print(f"aot: --kernel: expected part of a kernel's name, got {options.kernel!r}", file=sys.stderr)
        return 2
    failures = 0
    triton_reports = (compile_case(case, target) for case, target in _pick(chosen, targets, options.quick))
    reports = itertools.chain(triton_reports, aot_cuda.reports(in_cuda))
    if not options.json:
        print(f"{'kernel':25} {'case':42} target  warps registers spills shared 128-bit / narrower loads")
    for report in reports:
        failures += _failed(report)
        print(json.dumps(dataclasses.asdict(report)) if options.json else _line(report), flush=True)
    if aot_cuda.missing() and not options.json:
        print(f"CUDA sources left out: {aot_cuda.missing()}")
    if not options.json:
        print(
            f"{failures} failed" if failures else f"no spills on {' and '.join(t for t in GATED if t in targets)}; all compile"
        )
    return 1 if failures else 0
