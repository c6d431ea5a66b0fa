"""Rows of measurements: where they were taken, CSV that survives a kill, a table for people, JSON for machines."""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib.metadata
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdfast.files import json_text, write_text, written

from .measure import Timing


@dataclass(frozen=True)
class Model:
    """What the arithmetic costs at least: bytes that must move and floating-point operations that must happen.

    Args:
        text: the same in symbols, printed beside the times.
    """

    bytes: float = 0.0
    flops: float = 0.0
    text: str = ""


@dataclass(frozen=True)
class Limits:
    """Measured on this machine, in this run: copy bandwidth in bytes/s, matrix product rate in FLOP/s; NaN if not measured."""

    copy: float = math.nan
    gemm: float = math.nan


@dataclass(frozen=True)
class Row:
    """One line of a results file. Units are in the names; NaN and "" mean: not measured.

    time_ratio: this contestant's time over kdfast's in the same round, the median over rounds (in files without the
    next two columns: a ratio of medians). ratio_low, ratio_high: between what it lies, 95 times in 100. limit_share:
    attained rate over the measured limit of this machine (copy bandwidth where the model is in bytes, matrix product
    rate where it is in FLOP). error_f64: || x - x64 || / || x64 || of gradients (outputs, for a capture) against
    float64. behind: the fastest comparable contestant ahead of kdfast. error: why there is no number.
    """

    op: str
    contestant: str
    dtype: str = ""
    shape: str = ""
    median_ms: float = math.nan
    p10_ms: float = math.nan
    p90_ms: float = math.nan
    calls: int = 0
    time_ratio: float = math.nan
    ratio_low: float = math.nan
    ratio_high: float = math.nan
    gb_per_s: float = math.nan
    tflop_per_s: float = math.nan
    limit_share: float = math.nan
    peak_mib: float = math.nan
    error_f64: float = math.nan
    behind: str = ""
    model: str = ""
    note: str = ""
    error: str = ""
    device: str = ""
    threads: int = 0
    torch: str = ""
    triton: str = ""
    kdfast: str = ""
    python: str = ""
    commit: str = ""

    @property
    def case(self) -> tuple[str, str, str]:
        return self.op, self.dtype, self.shape


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def version(package: str) -> str:
    """The installed version of a package, "" when it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.cache
def commit() -> str:
    """The commit of the working tree, with `+dirty` when tracked files differ from it; "unknown" outside a checkout.

    Where the code travels without its history, or with that of another commit, the environment variable KDFAST_COMMIT says it.
    """
    if told := os.environ.get("KDFAST_COMMIT"):
        return told
    root = Path(__file__).parent.parent
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        return head + ("+dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True).stdout.strip()


def device_name(device: str) -> str:
    """The GPU's name; or the processor's as the system tells it, with family and model: "AMD EPYC" alone is any of them."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n\n")[0].splitlines() if info.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    if "cpu family" not in facts or "model" not in facts:
        return facts["model name"]
    return f"{facts['model name']} (family {facts['cpu family']}, model {facts['model']})"


def stamp(row: Row, device: str) -> Row:
    """The row with the device, versions, commit and thread count it was taken with."""
    import kdfast

    return dataclasses.replace(
        row, device=device_name(device), threads=torch.get_num_threads(), torch=torch.__version__, triton=version("triton"),
        kdfast=kdfast.__version__, python=platform.python_version(), commit=commit(),
    )  # fmt: skip


def timed(row: Row, timing: Timing, model: Model, limits: Limits) -> Row:
    """The row with times, and the rates and limit share that follow from the model."""
    if timing.error or not timing.seconds:
        return dataclasses.replace(row, error=timing.error or "no timed call")
    moved, worked = model.bytes / timing.median, model.flops / timing.median
    share = worked / limits.gemm if worked else moved / limits.copy if moved else math.nan
    return dataclasses.replace(
        row, median_ms=timing.median * 1e3, p10_ms=timing.percentile(10) * 1e3, p90_ms=timing.percentile(90) * 1e3,
        calls=len(timing.seconds), model=model.text, gb_per_s=moved / 1e9 if moved else math.nan,
        tflop_per_s=worked / 1e12 if worked else math.nan, limit_share=share,
    )  # fmt: skip


def write_csv(rows: Iterable[Row], path: str | Path) -> None:
    """All rows, header first."""
    with written(path) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in dataclasses.fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: _cell(v) for k, v in dataclasses.asdict(row).items()})


def _cell(value: object) -> object:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value


#: Columns that files written before them do without.
_LATER = ("ratio_low", "ratio_high")


def read_csv(path: str | Path) -> list[Row]:
    """What `write_csv` wrote; a file from before the interval of a ratio reads as one that did not measure it.

    Raises:
        ValueError: the columns are not those of `Row`.
    """
    with Path(path).open(newline="") as file:
        reader = csv.DictReader(file)
        names = [f.name for f in dataclasses.fields(Row)]
        if reader.fieldnames not in (names, [name for name in names if name not in _LATER]):
            raise ValueError(f"{path}: expected columns {', '.join(names)}, got {', '.join(reader.fieldnames or ())}")
        return [Row(**{k: _value(k, v) for k, v in line.items()}) for line in reader]


_TYPES = {f.name: str(f.type) for f in dataclasses.fields(Row)}


def _value(name: str, text: str) -> Any:
    if _TYPES[name] == "float":
        return float(text) if text else math.nan
    return int(text) if _TYPES[name] == "int" else text


def to_json(rows: Iterable[Row]) -> str:
    """A JSON list; what was not measured is null."""
    return json_text([dataclasses.asdict(r) for r in rows], indent=1)


def between_marks(path: Path, marks: tuple[str, str], text: str) -> None:
    """Puts `text` between two marks of a file.

    Raises:
        ValueError: the file is not there or does not have both marks.
    """
    whole = path.read_text() if path.exists() else ""
    if not all(mark in whole for mark in marks):
        raise ValueError(f"expected a file with the marks {marks[0]} and {marks[1]}, got {path}")
    begin, end = whole.index(marks[0]) + len(marks[0]), whole.index(marks[1])
    write_text(path, f"{whole[:begin]}\n{text}\n{whole[end:]}")


def interval(row: Row) -> str:
    """Between what the ratio lies: "1.05-1.13", "" when that was not measured."""
    return "" if math.isnan(row.ratio_low) else f"{row.ratio_low:.3g}-{row.ratio_high:.3g}"


_HEADER = ("contestant", "median", "p10", "p90 ms", "x kdfast", "between", "GB/s", "TFLOP/s", "of limit", "peak MiB", "err f64")
_COLUMN = 11


def _number(value: float) -> str:
    return "-" if math.isnan(value) else format(value, ".3g" if abs(value) < 1e3 else ".0f")


def table(rows: Sequence[Row]) -> str:
    """One case's rows as aligned text: model first, a mark where kdfast is not first, and every reason and note."""
    first = rows[0]
    lines = [" ".join(part for part in first.case if part)]
    models = dict.fromkeys(r.model for r in rows if r.model)
    lines += [f"  at least {text}" for text in models]
    width = max(len(_HEADER[0]), *(len(r.contestant) for r in rows))
    lines.append(f"  {_HEADER[0]:<{width}}" + "".join(f"{h:>{_COLUMN}}" for h in _HEADER[1:]))
    for r in rows:
        times = (r.median_ms, r.p10_ms, r.p90_ms, r.time_ratio)
        rates = (r.gb_per_s, r.tflop_per_s, r.limit_share, r.peak_mib, r.error_f64)
        cells = "".join(f"{x:>{_COLUMN}}" for x in (*map(_number, times), interval(r) or "-", *map(_number, rates)))
        remarks = [f"NOT FIRST: {r.behind}" if r.behind else "", f"no number: {r.error}" if r.error else "", r.note]
        lines.append(f"  {r.contestant:<{width}}{cells}  {'; '.join(x for x in remarks if x)}".rstrip())
    return "\n".join(lines)


def heading(rows: Sequence[Row], limits: Limits) -> str:
    """Where and with what the rows were taken, and the limits measured beside them."""
    r = rows[0]
    versions = f"torch {r.torch}, triton {r.triton or 'none'}, kdfast {r.kdfast} at {r.commit}, Python {r.python}"
    measured = [f"copy {limits.copy / 1e9:.1f} GB/s"] if not math.isnan(limits.copy) else []
    measured += [f"matrix product {limits.gemm / 1e12:.3f} TFLOP/s"] if not math.isnan(limits.gemm) else []
    return f"{r.device}, {r.threads} threads; {versions}; limits of this machine: {', '.join(measured) or 'not measured'}"
