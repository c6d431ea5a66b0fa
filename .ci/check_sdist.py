"""Builds the source distribution, a wheel from it, and runs both: `python .ci/check_sdist.py`.

It must hold every tracked file but `LEFT_OUT`. Nothing is downloaded: the build and the trial use the packages that this Python
has, with the wheel's kdfast before them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
#: Tracked files that a source distribution does without.
LEFT_OUT: set[str] = set()
#: What setuptools adds.
ADDED = {"PKG-INFO", "setup.cfg"}
#: Cheap ones, that read files beside the package.
TESTS = ("tests/test_floors.py", "tests/test_files.py", "tests/test_environment.py")


def run(*words: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run([str(w) for w in words], cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def tracked() -> set[str]:
    return {name for name in run("git", "ls-files", "-z", cwd=ROOT).split("\0") if name and (ROOT / name).is_file()}


def sdist(folder: Path, files: set[str]) -> Path:
    """Built from a copy of the tracked files: setuptools also packs what an earlier build listed in kdfast.egg-info."""
    copy = folder / "copy"
    for name in files:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", build, cwd=copy)
    (found,) = folder.glob("*.tar.gz")
    return found


def unpack(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    (found,) = folder.iterdir()
    return found


def compare(there: Path, files: set[str]) -> None:
    packed = {str(p.relative_to(there)) for p in there.rglob("*") if p.is_file()}
    packed = {name for name in packed if not name.startswith("kdfast.egg-info/")} - ADDED
    for what, names in (("lacks", files - LEFT_OUT - packed), ("should not hold", packed - (files - LEFT_OUT))):
        if names:
            raise SystemExit(f"the source distribution {what} {', '.join(sorted(names))}; see MANIFEST.in")
    print(f"source distribution: {len(packed)} files, as tracked")


def try_wheel(there: Path, folder: Path, build: str) -> None:
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, there,
        cwd=folder, KDFAST_BUILD=build)  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel, cwd=folder)
    at = {"cwd": folder, "PYTHONPATH": str(site)}
    where = run(sys.executable, "-c", "import kdfast.bench; print(kdfast.__file__)", **at).strip()
    if not Path(where).is_relative_to(site):
        raise SystemExit(f"imported {where}, expected the wheel's under {site}")
    for words in (["--version"], ["env"], ["bench", "--help"], ["bench", "check", "--help"]):
        run(sys.executable, "-m", "kdfast", *words, **at)
    print(f"wheel: {wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB, built with KDFAST_BUILD={build}, imported, commands run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", default="none", choices=("none", "cpu"), help="KDFAST_BUILD of the wheel (default none)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, files = Path(name).resolve(), tracked()
        (folder / "unpacked").mkdir()
        there = unpack(sdist(folder, files), folder / "unpacked")
        compare(there, files)
        try_wheel(there, folder, args.build)
        run(sys.executable, "-m", "pytest", *TESTS, cwd=there, PYTHONPATH=str(there))
        print(f"tests from the unpacked source distribution: {', '.join(TESTS)}")


if __name__ == "__main__":
    main()
