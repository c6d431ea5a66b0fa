"""What nvcc makes of the CUDA sources for GPUs that are not here: registers, spills and shared memory of every kernel.

A stack frame is an error: the kernels are written to live in registers.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from .machine_code import Report

TARGETS = ("sm_90", "sm_100")
_CSRC = Path(__file__).parent.parent / "csrc"
#: In a mangled name: the student's and teacher's types, how the softmax at T = 1 comes about, whether parts are wanted.
_FLAGS = re.compile(r"kernelI(?P<types>.*?)LNS\d_5AtOneE(?P<at_one>\d)ELb(?P<parts>\d)E")
_AT_ONE = ("soft", "hard T=1", "hard T=2", "hard any T")
_THREADS = 256


def missing() -> str:
    """Why the sources cannot be compiled here, or ""."""
    return "" if shutil.which("nvcc") else "nvcc is not on PATH"


def reports(targets: Sequence[str]) -> Iterator[Report]:
    """One for every kernel and target, in the order of the compiler."""
    for target in targets:
        for source in sorted((_CSRC / "cuda").glob("*.cu")):
            yield from _compiled(source, target)


def _compiled(source: Path, target: str) -> list[Report]:
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            ["nvcc", "-O3", "-std=c++17", f"-arch={target}", f"-I{_CSRC}", "-cubin", "-Xptxas", "-v", str(source),
             "-o", f"{folder}/kernels.cubin"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nvcc said nothing"])[-1]
        return [Report(f"cuda.{source.stem}", "", target, _THREADS // 32, error=last)]
    kernels = done.stderr.split("Compiling entry function ")[1:]
    found = [_read(source.stem, target, text) for text in kernels]
    for report in found:
        report.seconds = round((time.perf_counter() - begun) / len(found), 2)
    return found


def _read(stem: str, target: str, text: str) -> Report:
    """One kernel of ptxas's report."""
    name = text.split("'")[1]
    report = Report(f"cuda.{stem}", _case(name), target, _THREADS // 32)

    def number(pattern: str) -> int:
        match = re.search(pattern, text)
        return int(match.group(1)) if match else 0

    report.registers = number(r"Used (\d+) registers")
    report.spills = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    report.shared_bytes = number(r"(\d+) bytes smem")
    stack = number(r"(\d+) bytes stack frame")
    if stack or report.spills:
        report.error = f"{stack} bytes of stack, {report.spills} bytes spilled"
    return report


def _case(name: str) -> str:
    match = _FLAGS.search(name)
    if match is None:
        return name
    types = re.findall(r"Bf16|Fp16|S\d*_(?!\d)|f", match["types"])
    student, teacher = ({"f": "fp32", "Bf16": "bf16", "Fp16": "fp16"}.get(t, "") for t in types)
    parts = " parts" if match["parts"] == "1" else ""
    return f"{student}+{teacher or student} {_AT_ONE[int(match['at_one'])]}{parts}"
