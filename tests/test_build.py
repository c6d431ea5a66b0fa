"""What setup.py does when there is less than a compiler, a clear wish, or both."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import aot_cuda

ROOT = Path(__file__).parent.parent


def build(folder: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[Path]]:
    """Runs build_ext on a copy of the sources; what it built."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / "kdfast").mkdir()
    (folder / "kdfast" / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", "out"],
        cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done, list((folder / "out").rglob("*.so"))


@pytest.fixture
def no_tools(tmp_path: Path) -> str:
    """A PATH on which there is nothing."""
    empty = tmp_path / "empty"
    empty.mkdir()
    return str(empty)


def test_without_a_compiler_the_install_succeeds_and_says_so(tmp_path: Path, no_tools: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    done, built = build(source, PATH=no_tools, KDFAST_BUILD="auto", CXX="")
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler found, installing pure Python" in done.stderr
    assert not built


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("cpu", "KDFAST_BUILD=cpu: no C++ compiler found; install g++ or clang++, or set CXX"),
        ("fast", "KDFAST_BUILD: expected auto, cpu, cuda or none, got 'fast'"),
    ],
)
def test_a_wish_that_cannot_be_met_is_one_line(mode: str, message: str, tmp_path: Path, no_tools: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    done, built = build(source, PATH=no_tools, KDFAST_BUILD=mode, CXX="")
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1] == message
    assert not built


def test_none_builds_nothing(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    done, built = build(source, KDFAST_BUILD="none")
    assert done.returncode == 0, done.stderr
    assert not built


@pytest.mark.parametrize(
    ("mode", "names"),
    [
        ("", ["kdfast._C"]),
        ("auto", ["kdfast._C"]),
        ("cpu", ["kdfast._C"]),
        ("cuda", ["kdfast._C", "kdfast._cuda"]),
        ("none", []),
    ],
)
def test_unproven_kernels_are_built_on_request_alone(mode: str, names: list[str]) -> None:
    code = (
        "import runpy, setuptools; setuptools.setup = lambda **k: print([e.name for e in k['ext_modules']]);"
        "runpy.run_path('setup.py')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "KDFAST_BUILD"} | ({"KDFAST_BUILD": mode} if mode else {})
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(names)


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("g++"), reason="asks g++ for what an x86 has")
def test_the_assembler_is_asked_for_an_instruction(tmp_path: Path) -> None:
    code = (
        "import runpy, setuptools, sys, pathlib; setuptools.setup = lambda **k: None; made = runpy.run_path('setup.py');"
        "print([made['assembles']('g++', name, pathlib.Path(sys.argv[1])) for name in ('nop', 'unheardof')])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[True, False]\n"


def test_cuda_without_nvcc_is_one_line(tmp_path: Path, no_tools: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    done, built = build(source, PATH=no_tools, KDFAST_BUILD="cuda", CXX=shutil.which("g++") or shutil.which("clang++") or "c++")
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1] == "KDFAST_BUILD=cuda: nvcc is not on PATH; expected that of CUDA 12 or later"
    assert not built


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_cuda_kernels_fit_their_registers() -> None:
    """Every kernel compiles for sm_90, spills nothing and leaves room for two blocks on a multiprocessor."""
    reports = list(aot_cuda.reports(["sm_90"]))
    assert len(reports) >= 30
    assert [r for r in reports if r.error or r.spills] == []
    assert max(r.registers or 0 for r in reports) * 256 * 2 <= 65536
    assert max(r.shared_bytes for r in reports) <= 3 << 10


@pytest.mark.skipif(importlib.util.find_spec("kdfast._cuda") is None, reason="kdfast._cuda is not built (KDFAST_BUILD=cuda)")
def test_the_cuda_extension_imports_without_a_gpu() -> None:
    code = (
        "import kdfast, sys; assert 'kdfast._cuda' not in sys.modules; from kdfast import _cuda; print(_cuda.build_version())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 12000
