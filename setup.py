"""Builds `kdfast._C` and, on request, `kdfast._cuda`: C++17 with OpenMP, no torch, each through a ninja file of its own.

KDFAST_BUILD=auto  C++ when a compiler is found, else pure Python (default)
             cpu   C++; no compiler is an error
             cuda  C++ and the CUDA kernels, which are unproven (`kdfast.backends.cuda`); no nvcc for sm_90 is an error
             none  pure Python
CXX names the C++ compiler. CPU kernels are compiled once per instruction set. The CUDA runtime is linked into `_cuda`, which
is imported when a CUDA kernel is first asked for: neither the build machine nor the one that runs it needs a GPU.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
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
#: What has to be assembled for `csrc/cpu/amx.h`.
AMX = "tilerelease"
NVCC_FLAGS = "-O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden --threads 2"
#: Machine code for these, and PTX of the last for what comes after.
GPU_ARCHITECTURES = ("90", "100")


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


def gpu_flags() -> str:
    """The architectures to compile for, as flags of nvcc; "" when it knows none of them."""
    listed = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout.split()
    known = [a for a in GPU_ARCHITECTURES if f"compute_{a}" in listed]
    flags = [f"-gencode arch=compute_{a},code=sm_{a}" for a in known]
    return " ".join([*flags, f"-gencode arch=compute_{known[-1]},code=compute_{known[-1]}"]) if known else ""


def cuda_missing() -> str:
    """Why `_cuda` cannot be built, or ""."""
    if shutil.which("nvcc") is None:
        return "nvcc is not on PATH; expected that of CUDA 12 or later"
    return "" if gpu_flags() else "this nvcc knows no sm_90; expected that of CUDA 12 or later"


class NinjaBuild(build_ext):
    """A ninja file an extension: parallel, and incremental by content of the headers too."""

    def build_extension(self, ext: Extension) -> None:
        mode, compiler = wanted_build(), find_compiler()
        if compiler is None:
            if mode != "auto":
                raise SystemExit(f"KDFAST_BUILD={mode}: no C++ compiler found; install g++ or clang++, or set CXX")
            print(
                "kdfast: no C++ compiler found, installing pure Python; `kdfast env` says how to get the C++ backend",
                file=sys.stderr,
            )
        elif ext.name == "kdfast._C":
            folder = Path(self.build_temp)
            self.ninja(ext, cpu_rules(compiler, amx=sys.platform == "linux" and assembles(compiler, AMX, folder)), folder)
        else:
            self.ninja(ext, cuda_rules(compiler), Path(self.build_temp) / "cuda")

    def build_extensions(self) -> None:
        if wanted_build() == "cuda" and (why := cuda_missing()):
            raise SystemExit(f"KDFAST_BUILD=cuda: {why}")
        super().build_extensions()

    def ninja(self, ext: Extension, rules: list[str], folder: Path) -> None:
        """Builds what `rules` make of $target, in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text("\n".join(rules).replace("$target", escape(target)) + "\n")
        # Quiet, ninja still prints all that a compiler says.
        quiet = [] if self.distribution.verbose else ["--quiet"]
        if subprocess.run([find_ninja(), *quiet, "-C", str(folder)], check=False).returncode:
            raise SystemExit(f"kdfast: building {ext.name} failed, see above; KDFAST_BUILD=none installs pure Python")

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


def assembles(compiler: str, instruction: str, folder: Path) -> bool:
    """Whether the compiler's assembler knows an instruction: that of binutils before 2.36 knows none of AMX."""
    if "avx512" not in ISAS:
        return False
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / f"{instruction}.cpp"
    source.write_text(f'void f() {{ asm volatile("{instruction}"); }}\n')
    command = [compiler, "-c", str(source), "-o", str(source.with_suffix(".o"))]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def compile_rules(compiler: str, defined: str = "") -> list[str]:
    import pybind11

    includes = f"-I{ROOT / 'csrc'} -isystem {pybind11.get_include()} -isystem {sysconfig.get_paths()['include']}"
    return [
        f"cxx = {compiler}",
        f"flags = {COMMON} {defined} {includes}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags $isa -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]


def cpu_rules(compiler: str, amx: bool) -> list[str]:
    shared = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
    lines = compile_rules(compiler, f"-DKDFAST_AMX={int(amx)}")
    lines += ["rule link", f"  command = $cxx {shared} -fopenmp $in -o $out.tmp && mv $out.tmp $out"]
    objects = []
    for source in sorted((ROOT / "csrc").glob("*.cpp")):
        objects.append(f"{source.stem}.o")
        lines.append(f"build {objects[-1]}: compile {escape(source)}")
    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        for isa, flags in ISAS.items():
            objects.append(f"{source.stem}.{isa}.o")
            lines += [f"build {objects[-1]}: compile {escape(source)}", f"  isa = -DKDFAST_ISA={isa} {flags}"]
    return [*lines, f"build $target: link {' '.join(objects)}"]


def cuda_rules(compiler: str) -> list[str]:
    lines = compile_rules(compiler)
    lines += [
        "rule nvcc",
        f"  command = nvcc {NVCC_FLAGS} {gpu_flags()} -I{ROOT / 'csrc'} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        # nvcc knows where its static runtime is, whose symbols stay inside: torch brings a runtime of its own.
        "rule link",
        "  command = nvcc -shared --cudart static -Xlinker --exclude-libs=ALL $in -o $out.tmp && mv $out.tmp $out",
    ]
    objects = []
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.c*")):
        objects.append(f"{source.name}.o")
        lines.append(f"build {objects[-1]}: {'nvcc' if source.suffix == '.cu' else 'compile'} {escape(source)}")
    return [*lines, f"build $target: link {' '.join(objects)}"]


def wanted_extensions() -> list[Extension]:
    """Optional ones: what could not be built is left out."""
    names = {"none": [], "cuda": ["kdfast._C", "kdfast._cuda"]}.get(wanted_build(), ["kdfast._C"])
    return [Extension(name, sources=[], optional=True) for name in names]


setup(
    # The benchmarks are a folder of their own in a checkout and `kdfast.bench` in an installation: `kdfast bench` runs both.
    packages=[*find_packages(include=["kdfast*"]), "kdfast.bench"],
    package_dir={"kdfast.bench": "bench"},
    ext_modules=wanted_extensions(),
    cmdclass={"build_ext": NinjaBuild},
)
