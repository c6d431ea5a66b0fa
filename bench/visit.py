"""The two visits to a GPU that is there for minutes: what is done in which order, for how long, and what to bring along.

`contact` shows that everything runs and is right, and where time goes; `record` measures every op beside its peers. Stages are
processes of their own, killed when their seconds are over; what may hang is last. Rows are written after every stage, and those
of the stage in progress after every case (`running.csv`): a visit that is cut short loses the case it was at.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.machinery
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import sweep
from .report import Limits, Row, read_csv, stamp, write_csv

_ROOT = Path(__file__).parent.parent
_PACKAGE = _ROOT / "kdfast"
#: Seconds of a whole visit: a command's limit on a lent machine, less what its start takes.
SECONDS = {"contact": 230.0, "record": 440.0}
#: Building the C++ extension, and the CUDA kernels after it, on 16 cores.
_BUILD_S = {"_C": 30.0, "_cuda": 45.0}
_RESERVE_S = 5.0
#: The stage that shows that kdfast is right.
_TESTS = "tests"
_INTERRUPTED = "interrupted"
_LEFT_OUT = "left out: "


@dataclass(frozen=True)
class Stage:
    """A process and the seconds it may take.

    Args:
        rows: the ops of `sweep` whose cases it measures, "" for none.
        size: of those cases.
        left_out: why it does not run, "" when it does.
        env: set for it alone.
        kept: its seconds are kept back from the stages before it.
    """

    name: str
    seconds: float
    command: tuple[str, ...] = ()
    rows: str = ""
    size: str = ""
    left_out: str = ""
    env: tuple[tuple[str, str], ...] = ()
    kept: bool = False


def extension(name: str) -> Path | None:
    """The binary of `kdfast.NAME` for the Python that runs, if it is there."""
    found = (_PACKAGE / f"{name}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in found if path.exists()), None)


def plan(kind: str, device: str, size: str, scratch: Path) -> list[Stage]:
    """The stages of a visit; the measured ones are `sweep`'s groups."""
    python, here = (sys.executable, "-m"), f"{__package__}"
    proven = [op for group in sweep.GROUPS if group != sweep.UNPROVEN for op in group.split(",")]
    own = sweep.SIZES[size].alone or size
    workers = str(max(1, (os.cpu_count() or 2) - 2)) if device == "cuda" else "0"

    def facts(what: str, *more: str) -> tuple[str, ...]:
        return (*python, f"{here}.facts", what, device, own, *more)

    def tests(mark: str, *globs: str) -> tuple[str, ...]:
        # Files by name: every worker would import all the others.
        files = sorted(f"tests/{path.name}" for glob in globs for path in (_ROOT / "tests").glob(glob))
        spread = ("-n", workers, "--maxschedchunk", "1") if device == "cuda" else ("-p", "no:xdist", "--collect-only")
        return (*python, "pytest", "-m", mark, *spread, "--tb=short", "-p", "no:cacheprovider", *files)

    def build(name: str, mode: str) -> Stage:
        why = "it is there" if extension(name) else "" if name == "_C" or shutil.which("nvcc") else "no nvcc"
        why = why or ("a dry run builds nothing" if device == "cpu" else "")
        command = (sys.executable, "setup.py", "build_ext", "--inplace")
        return Stage(
            f"build {name}", _BUILD_S[name], command, left_out=why, env=(("KDFAST_BUILD", mode),), kept=name == "_cuda"
        )

    limits = Stage("limits", 10, facts("limits", str(scratch / "limits.csv")))
    cluster = [
        build("_cuda", "cuda"),
        Stage("cluster tests", 20, (*tests("unproven", "test_gpu_cluster.py"), "-x"), kept=True),
        Stage("cluster", 30, rows=sweep.UNPROVEN, size=size, kept=True),
    ]
    if kind == "contact":
        counters = (
            shutil.which("ncu") or "ncu", "--clock-control", "none", "-k", "regex:forward_kernel", "-c", "1", *facts("step"),
        )  # fmt: skip
        without = "" if shutil.which("ncu") and device == "cuda" else "there is no ncu here"
        return [
            Stage("versions", 10, facts("versions")), build("_C", "cpu"),
            Stage(_TESTS, 60, tests("gpu and smoke", "test_gpu_smoke.py")), limits,
            Stage("kdfast alone", 60, rows=",".join(op for op in proven if op != "train"), size=own),
            Stage("profile", 20, facts("profile")), Stage("counters", 20, counters, left_out=without), *cluster,
        ]  # fmt: skip
    groups = [Stage(group, sweep.SECONDS[group], rows=group, size=size) for group in sweep.GROUPS if group != sweep.UNPROVEN]
    return [
        Stage("versions", 10, facts("versions")), build("_C", "cpu"), limits,
        Stage(_TESTS, 110, tests("gpu", "test_gpu*.py", "test_triton_interpreted.py")), *groups, *cluster,
    ]  # fmt: skip


def to_carry() -> list[str]:
    """What the machine does not have or takes minutes to make, in words."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    lines = []
    for name, mode in (("_C", "cpu"), ("_cuda", "cuda")):
        path = _PACKAGE / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
        state = "there" if extension(name) else f"KDFAST_BUILD={mode} python setup.py build_ext --inplace makes it"
        lines.append(f"{path.relative_to(_ROOT)}: {state}, for Python {version}; without it it is built there")
    missing = sorted({
        peer.missing for op in sweep.OPS if op != "train" for job in sweep.plan(op, "tiny", "cpu") for peer in job.contest.peers
        if "not installed" in peer.missing
    })  # fmt: skip
    lines.append("wheels of the peers, in a folder given by --wheels")
    lines += [f"  not here: {why}" for why in missing]
    lines.append("the commit: --commit $(git rev-parse --short=12 HEAD), where the history does not travel")
    return lines


def describe(kind: str, stages: Sequence[Stage], limit: float) -> str:
    """The plan as text: each stage with its seconds, the sum, and what to carry."""
    lines = [f"{kind}: at most {limit:.0f} s", ""]
    for stage in stages:
        seconds = "     -" if stage.left_out else f"{stage.seconds:6.0f}"
        what = f"left out: {stage.left_out}" if stage.left_out else stage.rows or " ".join(stage.command[:6])
        lines.append(f"{seconds} s  {stage.name:<28} {what[:90]}")
    total = sum(stage.seconds for stage in stages if not stage.left_out)
    lines += ["", f"{total:6.0f} s  if every stage took all it may; one that ends early leaves its time to those after it",
              "", "to carry:", *(f"  {line}" for line in to_carry())]  # fmt: skip
    return "\n".join(lines)


def unpack(wheels: Path, folder: Path) -> None:
    """Makes what the wheels in a folder hold importable by the stages.

    Raises:
        ValueError: it is no folder, has no wheels, or one of them cannot be unpacked.
    """
    found = sorted(wheels.glob("*.whl"))
    if not found:
        state = "one without any" if wheels.is_dir() else "a file" if wheels.exists() else "nothing there"
        raise ValueError(f"expected a folder with wheels (*.whl), got {wheels}: {state}")
    for wheel in found:
        try:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            raise ValueError(f"expected wheels, which are zip archives, got {wheel}: {error}") from error
    os.environ["PYTHONPATH"] = os.pathsep.join(x for x in (str(folder), os.environ.get("PYTHONPATH", "")) if x)


#: What ends a visit from outside: Ctrl-C, a `kill`, and the terminal that goes away.
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: Between two looks whether one of them came.
_LOOK_S = 0.1


@contextlib.contextmanager
def _noted() -> Iterator[list[int]]:
    """A list that gets the signals of `_STOPS` while it lasts; they do nothing else. Those that are ignored stay ignored."""
    told = list[int]()
    if threading.current_thread() is not threading.main_thread():  # Python tells of signals in the main thread alone
        yield told
        return
    heard = [number for number in _STOPS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, lambda number, frame: told.append(number)) for number in heard}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def call(command: Sequence[str], seconds: float, log: Path, env: Sequence[tuple[str, str]] = ()) -> str:
    """Runs a command from the repository's root, its output added to `log`; returns why it failed, or "".

    No process of it outlives the call, which may end because the command does, its time is over, or a signal asks to stop.

    Raises:
        KeyboardInterrupt: SIGINT, SIGTERM or SIGHUP came.
    """
    end = time.monotonic() + seconds
    # Noted, not raised: an exception between the start of the process and the `try` would leave it on the card.
    with log.open("ab") as file, _noted() as told:
        process = subprocess.Popen(
            list(command), cwd=_ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=os.environ | dict(env)
        )
        code: int | None = None
        try:
            while code is None and not told and (left := end - time.monotonic()) > 0:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(timeout=min(left, _LOOK_S))
        finally:
            with contextlib.suppress(ProcessLookupError):  # its session is empty
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if told:
        raise KeyboardInterrupt
    if code is None:
        return f"stopped after {seconds:.0f} s"
    return f"exit code {code}" if code else ""


@dataclass
class Visit:
    """A visit on its way: the rows so far, in `path` after every stage. `patience` multiplies all seconds: a CPU is no GPU."""

    kind: str
    device: str
    path: Path
    scratch: Path
    seconds: float
    patience: float = 1.0
    rows: list[Row] = dataclasses.field(default_factory=list)
    limits: list[str] = dataclasses.field(default_factory=list)

    @property
    def log(self) -> Path:
        return self.path.with_suffix(".log")

    def run(self, stages: Sequence[Stage]) -> list[Row]:
        start = time.monotonic()
        for at, stage in enumerate(stages):
            left = self.patience * self.seconds - (time.monotonic() - start)
            kept = 0.0 if stage.kept else sum(s.seconds for s in stages[at + 1 :] if s.kept and not s.left_out)
            try:
                self._stage(stage, min(self.patience * stage.seconds, left - self.patience * kept))
            finally:
                write_csv(self.rows, self.path)
            row = next(r for r in reversed(self.rows) if r.op == "stage")
            print(f"{self.kind}: {stage.name}: {row.error or row.note}; {max(left, 0):.0f} s were left", flush=True)
        return self.rows

    def _stage(self, stage: Stage, seconds: float) -> None:
        began = time.monotonic()
        too_late = sweep.out_of_time(seconds, _RESERVE_S, "the") if seconds < _RESERVE_S else ""
        why = stage.left_out or too_late
        with self.log.open("a") as file:
            file.write(f"\n=== {stage.name}: {why or f'at most {seconds:.0f} s'}\n")
        try:
            if stage.rows and not stage.left_out:
                why = self._measure(stage, seconds, why)
            elif not why:
                why = call(stage.command, seconds, self.log, stage.env)
        except KeyboardInterrupt:
            self._note(stage, began, _INTERRUPTED)
            raise
        found = self.scratch / "limits.csv"
        if stage.name == "limits" and found.exists():
            self._keep_limits(read_csv(found))
        self._note(stage, began, why)

    def _note(self, stage: Stage, began: float, why: str) -> None:
        """The row of the stage itself."""
        last = self.log.read_text(errors="replace").strip().splitlines()[-1][:160]
        told = f"; {last}" if not (stage.rows or stage.left_out or last.startswith("===")) else ""
        note = f"took {time.monotonic() - began:.0f} s{told}"
        row = Row("stage", stage.name, note=f"{_LEFT_OUT}{stage.left_out}" if stage.left_out else note)
        self.rows.append(stamp(dataclasses.replace(row, error="" if stage.left_out else why), self.device))

    def _measure(self, stage: Stage, seconds: float, why: str) -> str:
        """The rows of some ops' cases, by a process that writes each as it comes; every planned case has its rows."""
        path = self.path.with_name("running.csv")
        path.unlink(missing_ok=True)  # a visit that was killed left it: those rows are not of this one
        command = [sys.executable, "-m", f"{__package__}.sweep", stage.rows, stage.size, self.device]
        try:
            why = why or call([*command, f"{seconds - _RESERVE_S:.0f}", str(path), *self.limits], seconds, self.log)
        except KeyboardInterrupt:
            why = _INTERRUPTED
            raise
        finally:
            rows = read_csv(path) if path.exists() else []
            path.unlink(missing_ok=True)
            self.rows += rows + sweep.unreached(stage.rows, stage.size, self.device, rows, why or "its process ended early")
        return why

    def _keep_limits(self, rows: list[Row]) -> None:
        self.rows += rows
        copy = next(row.gb_per_s for row in rows if row.contestant == "copy bandwidth") * 1e9
        measured = {row.dtype: Limits(copy, row.tflop_per_s * 1e12) for row in rows if row.contestant == "matrix product"}
        self.limits = [f"{dtype}={limit.copy:.6g},{limit.gemm:.6g}" for dtype, limit in measured.items()]


def failed(rows: Sequence[Row]) -> list[Row]:
    """kdfast's own rows without a number, and stages that did not end well.

    The unproven kernel's are told, not counted, with all that is in its process, which it may take down; nor is what the
    seconds did not reach, which is what is worth least (but see `unproven`).
    """
    ours = (r for r in rows if r.error and (r.op == "stage" or r.contestant.startswith("kdfast")))
    return [r for r in ours if "cluster" not in r.contestant and r.op != sweep.UNPROVEN and not _late(r)]


def unproven(rows: Sequence[Row]) -> str:
    """Why a visit shows nothing, though nothing failed in it: its seconds did not reach the tests, or any stage; else ""."""
    stages = [row for row in rows if row.op == "stage" and not row.note.startswith(_LEFT_OUT)]
    if stages and all(_late(row) for row in stages):
        return f"nothing ran: {stages[0].error}"
    return next((f"the tests did not run: {row.error}" for row in stages if row.contestant == _TESTS and _late(row)), "")


def _late(row: Row) -> bool:
    return row.error.startswith("out of time")
