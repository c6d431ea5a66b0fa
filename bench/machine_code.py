"""What became of a kernel: registers, spills, shared memory and loads, read from its machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

#: Bytes of shared memory that a block can have.
SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}


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


def read_cubin(cubin: bytes, report: Report, loads: bool = True) -> None:
    """Registers and spills, and the widths of loads if `loads`: those need the disassembly, which takes most of the time."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = cuobjdump("-res-usage", file.name)
        found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        report.registers = found["REG"]
        if not loads and not found["STACK"] and not found["LOCAL"]:
            return  # nowhere to spill to
        sass = cuobjdump("-sass", file.name)
    report.spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    widths = re.findall(r"\bLDG\.([\w.]+)", sass)
    report.loads_128 = sum(".128" in width for width in widths)
    report.loads_narrower = len(widths) - report.loads_128


def cuobjdump(flag: str, path: str) -> str:
    import triton

    assert triton.__file__ is not None
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, flag, path], check=True, capture_output=True, text=True).stdout
