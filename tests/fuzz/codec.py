"""Builds tests/fuzz/codec.cpp with the sanitizers and runs it: `python -m tests.fuzz.codec --seconds 600`.

Where there is clang, libFuzzer follows the coverage, from records and rows of the encoder; elsewhere the program mutates them
blindly.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLAGS = "-O1 -g -std=c++17 -fno-sanitize-recover=all -pthread"
SANITIZERS = "address,undefined"
AVX2 = "-mavx2 -mfma -mf16c -mbmi2"
ISAS = {"baseline": ""}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS |= {"avx2": AVX2, "avx512": f"{AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq"}
SEEDS = 400


def build(folder: Path, compiler: str, guided: bool) -> Path:
    """Compiles the driver with every instruction set into a folder; guided, the libFuzzer target `target` beside it."""
    driver = ROOT / "tests" / "fuzz" / "codec.cpp"
    jobs = [*((ROOT / "csrc" / f"codec_{name}.cpp", name, "") for name in ("record", "index")), (driver, "driver", "")]
    for source in ("codec_decode", "codec_encode"):
        jobs += [(ROOT / "csrc" / "cpu" / f"{source}.cpp", f"{source}.{i}", f"-DKDFAST_ISA={i} {f}") for i, f in ISAS.items()]
    if guided:
        jobs.append((driver, "target", "-DKDFAST_LIBFUZZER"))
    instrument = [*FLAGS.split(), f"-fsanitize={SANITIZERS}{',fuzzer-no-link' if guided else ''}"]
    for source, name, flags in jobs:
        command = [compiler, *instrument, f"-I{ROOT / 'csrc'}", *flags.split(), "-c", str(source), "-o", f"{folder / name}.o"]
        subprocess.run(command, check=True)
    common = [f"{folder / name}.o" for _, name, _ in jobs if name not in ("driver", "target")]
    subprocess.run([compiler, *instrument, *common, f"{folder / 'driver'}.o", "-o", str(folder / "driver")], check=True)
    if guided:
        flags = [*FLAGS.split(), f"-fsanitize={SANITIZERS},fuzzer"]
        subprocess.run([compiler, *flags, *common, f"{folder / 'target'}.o", "-o", str(folder / "target")], check=True)
    return folder / "driver"


def guided_compiler() -> str | None:
    """The first clang that can link a libFuzzer target; its runtime is a package of its own in places."""
    probe = 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }'
    for name in filter(None, (os.environ.get("CXX"), "clang++")):
        found = shutil.which(name)
        command = [str(found), "-x", "c++", "-", f"-fsanitize={SANITIZERS},fuzzer", "-o", os.devnull]
        if found and not subprocess.run(command, input=probe, text=True, capture_output=True).returncode:
            return name
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", type=Path, help="folder that keeps what libFuzzer found worth keeping")
    parser.add_argument("--blind", action="store_true", help="mutate blindly even where there is clang")
    args = parser.parse_args()
    compiler = None if args.blind else guided_compiler()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        driver = build(folder, compiler or os.environ.get("CXX", "g++"), compiler is not None)
        if compiler is None:
            print("mutating blindly" + ("" if args.blind else ": no clang that links -fsanitize=fuzzer"), flush=True)
            subprocess.run([driver, str(args.seconds), str(args.seed)], check=True)
            return
        print(f"coverage-guided with {compiler}; an input that fails is left as ./crash-*", flush=True)
        corpus, seeds = args.corpus or folder / "corpus", folder / "seeds"
        for made in (corpus, seeds):
            made.mkdir(parents=True, exist_ok=True)
        subprocess.run([driver, "seeds", seeds, str(SEEDS)], check=True)
        options = [f"-max_total_time={args.seconds:.0f}", f"-seed={args.seed + 1}", "-max_len=8192", "-timeout=20"]
        subprocess.run([folder / "target", *options, "-print_final_stats=1", corpus, seeds], check=True)


if __name__ == "__main__":
    main()
