"""What became of a kernel: registers, spills, shared memory and loads, read from its machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path


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


def read_cubin(cubin: bytes, report: Report) -> None:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = cuobjdump("-res-usage", file.name)
        sass = cuobjdump("-sass", file.name)
    match = re.search(r"REG:(\d+)", usage)
    report.registers = int(match.group(1)) if match else None
    report.spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    loads = re.findall(r"\bLDG\.([\w.]+)", sass)
    report.loads_128 = sum(".128" in width for width in loads)
    report.loads_narrower = len(loads) - report.loads_128


def cuobjdump(flag: str, path: str) -> str:
    import triton

    assert triton.__file__ is not None
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, flag, path], check=True, capture_output=True, text=True).stdout
