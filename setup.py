"""Builds `kdfast._C`: C++17 with OpenMP, no torch, each kernel compiled once per instruction set, through one ninja file.

KDFAST_BUILD=auto  C++ when a compiler is found (else pure Python), CUDA when nvcc and CUDA sources are found (default)
             cpu   C++ only; no compiler is an error
             cuda  C++ and CUDA; no nvcc is an error
             none  pure Python
CXX names the C++ compiler.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
COMMON = (
    "-O3 -std=c++17 -fPIC -fopenmp -fvisibility=hidden -ffp-contract=fast -fno-math-errno -fno-trapping-math"
    " -Wall -Wextra -Wno-maybe-uninitialized -Wno-uninitialized"
)
AVX2 = "-mavx2 -mfma -mf16c -mbmi2"
ISAS = {"baseline": ""}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS |= {"avx2": AVX2, "avx512": f"{AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512"}
NVCC_FLAGS = (
    "-O3 -std=c++17 -Xcompiler -fPIC -gencode arch=compute_90,code=sm_90 -gencode arch=compute_100,code=[sm_100,compute_100]"
)


def find_compiler() -> str | None:
    candidates = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    return next((shutil.which(c.split()[0]) for c in candidates if c and shutil.which(c.split()[0])), None)


def find_ninja() -> str:
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise SystemExit("kdfast: building the extension needs ninja: pip install ninja") from None
        return found


def wanted_build() -> str:
    mode = os.environ.get("KDFAST_BUILD", "auto")
    if mode not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"KDFAST_BUILD: expected auto, cpu, cuda or none, got {mode!r}")
    return mode


class NinjaBuild(build_ext):
    """One ninja file for the whole extension: parallel, and incremental by content of the headers too."""

    def build_extension(self, ext: Extension) -> None:
        mode, compiler = wanted_build(), find_compiler()
        if compiler is None:
            if mode != "auto":
                raise SystemExit(f"KDFAST_BUILD={mode}: no C++ compiler found; install g++ or clang++, or set CXX")
            print(
                "kdfast: no C++ compiler found, installing pure Python; `kdfast env` says how to get the C++ backend",
                file=sys.stderr,
            )
            return
        cuda = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
        nvcc = shutil.which("nvcc")
        if mode == "cuda" and not (cuda and nvcc):
            missing = "nvcc is not on PATH" if cuda else "this version has no CUDA sources; the GPU backend is Triton"
            raise SystemExit(f"KDFAST_BUILD=cuda: {missing}")
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        use_cuda = bool(cuda and nvcc and mode in ("auto", "cuda"))
        text = ninja_file(compiler, target, nvcc if use_cuda else None, cuda if use_cuda else [])
        (folder / "build.ninja").write_text(text)
        subprocess.run([find_ninja(), "-C", str(folder)], check=True)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        if all(Path(self.get_ext_fullpath(ext.name)).exists() or self.inplace for ext in self.extensions):
            super().copy_extensions_to_source()


def ninja_file(compiler: str, target: Path, nvcc: str | None, cuda: list[Path]) -> str:
    import pybind11

    def escape(path: Path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    includes = f"-I{ROOT / 'csrc'} -isystem {pybind11.get_include()} -isystem {sysconfig.get_paths()['include']}"
    shared = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
    lines = [
        f"cxx = {compiler}",
        f"flags = {COMMON} {includes}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags $isa -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx {shared} -fopenmp $in -o $out.tmp $libs && mv $out.tmp $out",
    ]
    objects = []
    for source in sorted((ROOT / "csrc").glob("*.cpp")):
        objects.append(f"{source.stem}.o")
        lines.append(f"build {objects[-1]}: compile {escape(source)}")
    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        for isa, flags in ISAS.items():
            objects.append(f"{source.stem}.{isa}.o")
            lines += [f"build {objects[-1]}: compile {escape(source)}", f"  isa = -DKDFAST_ISA={isa} {flags}"]
    if nvcc is not None:
        lines += ["rule nvcc", f"  command = {nvcc} {NVCC_FLAGS} -I{ROOT / 'csrc'} -c $in -o $out"]
        for source in cuda:
            objects.append(f"{source.stem}.cu.o")
            lines.append(f"build {objects[-1]}: nvcc {escape(source)}")
    lines += [f"build {escape(target)}: link {' '.join(objects)}"]
    if nvcc is not None:
        lines.append("  libs = -lcudart_static -lrt -ldl -lpthread")
    return "\n".join(lines) + "\n"


extensions = [] if wanted_build() == "none" else [Extension("kdfast._C", sources=[])]
setup(ext_modules=extensions, cmdclass={"build_ext": NinjaBuild})
