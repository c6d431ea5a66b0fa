"""Builds tests/fuzz/codec.cpp with the sanitizers and runs it: `python -m tests.fuzz.codec --seconds 600`."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLAGS = "-O1 -g -std=c++17 -fsanitize=address,undefined -fno-sanitize-recover=all -pthread"
AVX2 = "-mavx2 -mfma -mf16c -mbmi2"
ISAS = {"baseline": ""}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS |= {"avx2": AVX2, "avx512": f"{AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq"}


def build(folder: Path) -> Path:
    """Compiles the driver with every instruction set into a folder."""
    compiler = os.environ.get("CXX", "g++")
    jobs = [(ROOT / "csrc" / f"codec_{name}.cpp", name, "") for name in ("record", "index")]
    jobs += [(ROOT / "tests" / "fuzz" / "codec.cpp", "driver", "")]
    for source in ("codec_decode", "codec_encode"):
        jobs += [(ROOT / "csrc" / "cpu" / f"{source}.cpp", f"{source}.{i}", f"-DKDFAST_ISA={i} {f}") for i, f in ISAS.items()]
    objects = []
    for source, name, flags in jobs:
        objects.append(str(folder / f"{name}.o"))
        command = [compiler, *FLAGS.split(), f"-I{ROOT / 'csrc'}", *flags.split(), "-c", str(source), "-o", objects[-1]]
        subprocess.run(command, check=True)
    target = folder / "fuzz"
    subprocess.run([compiler, *FLAGS.split(), *objects, "-o", str(target)], check=True)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([build(Path(folder)), str(args.seconds), str(args.seed)], check=True)


if __name__ == "__main__":
    main()
