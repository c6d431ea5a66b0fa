"""Files that are found whole or not at all, and JSON that every parser reads.

    write_json(path, values)                  # the file at `path` is the old one or the whole new one, whatever is killed
    with written(path) as part:               # the same for whoever wants a path to write to
        figure.savefig(part, format="png")
    with written_folder(path) as part:        # and for a folder
        model.save_pretrained(part)

Everything goes to a temporary name in the same folder first, is flushed to the disk and renamed; then the folder is flushed.
The temporary name is `.NAME.PID-RANDOM.part`: two processes that write one file do not meet, the last one to rename wins, and
what a killed one left is known by its name (`leftovers`). A name that is a link keeps being one: the file that it leads to is
replaced. What is no regular file (`/dev/stdout`, a pipe) is written to directly.

An error of the system names the file that was to be written: that of a full disk names none, others the temporary name.

JSON has no NaN and no infinity; Python writes them all the same unless it is told not to. Here they become null (`json_value`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)-[0-9a-f]{8}\.part", re.DOTALL)
#: How far the clock of a file system may be from that of the machine.
_CLOCKS_S = 5.0


def json_value(value: Any) -> Any:
    """The value with None for every float that is NaN or infinite, at any depth; tuples become lists, as JSON has them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: json_value(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(x) for x in value]
    return value


def json_text(values: Any, indent: int | None = None) -> str:
    """`json.dumps(json_value(values), indent=indent, allow_nan=False)`: what every command prints and every file holds."""
    return json.dumps(json_value(values), indent=indent, allow_nan=False)


def json_line(values: Any) -> str:
    """`json_text(values)` with letters of every script as they are, and a line end: a line of what people read too."""
    return json.dumps(json_value(values), ensure_ascii=False, allow_nan=False) + "\n"


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """`Path(path).write_text(text, encoding="utf-8")`, found whole or not at all; missing folders are made."""
    with written(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], values: Any, indent: int | None = 2) -> None:
    """Writes `json_text(values, indent)` and a line end as `write_text` does."""
    write_text(path, json_text(values, indent) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value in a file of JSON.

    Raises:
        ValueError: it is not JSON; names it. OSError: it cannot be read.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got something else or a part of it ({error}); is the file damaged?") from None


def write_parts(path: Path, parts: Iterable[Any], temporary: Path | None = None) -> None:
    """Writes bytes-like parts one after another as `write_text` does.

    Args:
        temporary: the name to write under, for a format that prescribes it; its writers must exclude each other.
    """
    part = temporary or temporary_name(path)
    part.unlink(missing_ok=True)  # what a killed writer left; a link planted here is not followed
    with _becoming(part, path):
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        with open(descriptor, "wb") as file:
            for data in parts:
                file.write(data)


@contextlib.contextmanager
def written(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name beside `path` to write a file to; at the end of the block it is flushed and becomes `path`.

    An error in the block removes it and leaves what was at `path`.
    """
    target = Path(path)
    if target.is_relative_to("/dev") or (target.exists() and not target.is_file()):
        yield target  # a pipe or a terminal takes what it is given; a folder raises where it is opened
        return
    target = Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    part = temporary_name(target)
    with _becoming(part, target):
        yield part


@contextlib.contextmanager
def _becoming(part: Path, target: Path) -> Iterator[None]:
    """At the end of the block the file `part` is flushed and takes the name `target`; an error in it removes `part`."""
    try:
        with naming(target, part):
            yield
            _sync(part)
            os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


@contextlib.contextmanager
def naming(target: str | os.PathLike[str], part: Path | None = None) -> Iterator[None]:
    """An error of the system in the block names `target` where it is of a disk and names nothing, or where it names the
    temporary `part` or what lies in it."""
    try:
        yield
    except OSError as error:
        named = error.filename
        if named is None:  # what is read in the block may fail too: a connection is no file
            ours = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
        else:
            ours = part is not None and Path(os.fsdecode(named)).is_relative_to(part)
        if not ours or error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), os.fspath(target)) from error


@contextlib.contextmanager
def written_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder beside `path` to fill; at the end of the block it is flushed and becomes `path` (see `replace_folder`).

    An error in the block removes it and leaves what was at `path`.
    """
    target = Path(os.path.realpath(path))
    part = temporary_name(target)
    part.mkdir(parents=True)
    try:
        with naming(target, part):
            yield part
            replace_folder(part, target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def replace_folder(part: Path, target: Path) -> None:
    """Flushes the folder `part` and all it holds and renames it to `target`, for several processes that fill one folder.

    No file system replaces a folder that holds files in one step: the old one is renamed to a name of `leftovers`, then the
    new one takes its place, then the old one is removed. A kill between the renames leaves both, whole.
    """
    for folder, _, files in os.walk(part):
        for name in files:
            _sync(Path(folder, name))
        sync_folder(Path(folder))
    before = temporary_name(target)
    if target.exists():
        os.rename(target, before)
    os.rename(part, target)
    sync_folder(target.parent)
    shutil.rmtree(before, ignore_errors=True)


def append_lines(path: str | os.PathLike[str], values: Iterable[Any], sync: bool = True) -> None:
    """Appends each value as one line of JSON; what other processes append meanwhile does not mix with it.

    A line that a kill cut short is removed first, so that everything before the end of the file is whole lines.

    Args:
        sync: flush to the disk before returning.
    """
    data = "".join(json_text(value) + "\n" for value in values).encode()
    if not data:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with naming(path), open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # dies with the process
        _cut_torn_line(file)
        file.write(data)
        file.flush()
        if sync:
            os.fsync(file.fileno())


def read_lines(path: str | os.PathLike[str]) -> list[Any]:
    """The values that `append_lines` wrote, without a last line that a kill cut short; nothing where there is no file.

    Raises:
        ValueError: a whole line is not JSON; names it.
    """
    file = Path(path)
    if not file.exists():
        return []
    found = []
    *lines, _ = file.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: expected a line of JSON, got {line[:60]!r} ({error})") from None
    return found


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str], wait: bool = True) -> Iterator[None]:
    """Processes do what is in the block one at a time, one for each folder, which is made when missing.

    The lock is on the folder itself: it leaves no file behind and dies with the process.

    Raises:
        BlockingIOError: another process is in such a block, and `wait` is False.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """A name beside `path` that nobody else writes to: `.NAME.PID-RANDOM.part`."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")


def leftovers(path: str | os.PathLike[str]) -> list[Path]:
    """What writers of `path` that were killed left beside it, and what those that are at work are writing."""
    target = Path(path)
    if not target.parent.is_dir():
        return []
    names = ((found, _LEFTOVER.fullmatch(found.name)) for found in target.parent.iterdir())
    return sorted(found for found, match in names if match is not None and match["name"] == target.name)


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Removes the `leftovers` of `path`; for a caller that knows itself to be its only writer."""
    for found in leftovers(path):
        _remove(found)


def _remove(found: Path) -> None:
    if found.is_dir() and not found.is_symlink():
        shutil.rmtree(found)
    else:
        found.unlink(missing_ok=True)


def remove_orphans(folder: str | os.PathLike[str]) -> None:
    """Removes the leftovers in `folder`, at any depth, whose writers are gone from this machine; what cannot be removed stays.

    For a caller that knows that no other machine is writing there.
    """
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            match, found = _LEFTOVER.fullmatch(name), Path(parent, name)
            if match is None or _is_written_by(int(match["pid"]), found):
                continue
            if found.is_dir() and not found.is_symlink():
                shutil.rmtree(found, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    found.unlink()
        folders[:] = [name for name in folders if not _LEFTOVER.fullmatch(name)]


def _is_written_by(pid: int, found: Path) -> bool:
    """Whether the process that named `found` still runs. One that has its number, but began after `found` was last changed, is
    another: in a container every run may have the same."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        began = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + int(fields[18]) / os.sysconf("SC_CLK_TCK")
        changed = found.lstat().st_mtime
    except (OSError, AttributeError):  # no Linux, or it ended just now
        return True
    return state not in "ZX" and not changed + _CLOCKS_S < began <= time.time()


def sync_folder(folder: Path) -> None:
    """Makes renames, links and removals in a folder last."""
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cut_torn_line(file: Any) -> None:
    """Cuts what follows the last line end; the file is read from its end, in blocks."""
    end = file.seek(0, os.SEEK_END)
    at = end
    while at:
        start = max(0, at - 4096)
        file.seek(start)
        line_end = file.read(at - start).rfind(b"\n")
        if line_end >= 0:
            at = start + line_end + 1
            break
        at = start
    if at < end:
        file.truncate(at)
