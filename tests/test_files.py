"""`kdfast.files`: a file is the old one or the whole new one, whatever happens; JSON has no NaN."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kdfast import files

ROOT = Path(__file__).parent.parent


def strict(text: str) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_json_has_no_nan() -> None:
    values = {"a": math.nan, "b": [math.inf, {"c": (-math.inf, 1.5, 2)}], "d": "NaN", "e": None, "f": True}
    assert strict(files.json_text(values)) == {"a": None, "b": [None, {"c": [None, 1.5, 2]}], "d": "NaN", "e": None, "f": True}


@pytest.mark.parametrize("value", [0.1, -0.0, 1e-320, 1.7976931348623157e308, 12345678901234567890])
def test_finite_numbers_come_back_bit_for_bit(value: float) -> None:
    assert repr(strict(files.json_text([value]))[0]) == repr(value)


def test_a_value_json_does_not_know_is_an_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    files.write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "x.json", {"a": object()})
    assert strict((tmp_path / "x.json").read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["x.json"]


#: text/chat.py renders templates, and writes what Transformers does; cache/format.py compares settings.
OTHERS = re.compile(r"kdfast/(text/chat|cache/format)\.py")


def test_every_json_of_the_project_goes_through_it() -> None:
    """`json.dumps` writes NaN unless it is told not to."""
    sources = [p for folder in ("kdfast", "bench") for p in (ROOT / folder).rglob("*.py")]
    sources = [p for p in sources if not OTHERS.fullmatch(str(p.relative_to(ROOT)))]
    assert sources
    bare = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sources
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"\bjson\.dumps?\(", line) and "allow_nan=False" not in line
    ]
    assert not bare, f"{', '.join(bare)}: use kdfast.files.json_text, write_json or append_lines"


def test_missing_folders_are_made(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a" / "b" / "c.txt", "é\n")
    assert (tmp_path / "a/b/c.txt").read_bytes() == "é\n".encode()


@pytest.mark.parametrize("old", [None, "old"], ids=["no file before", "a file before"])
def test_an_error_leaves_what_was_there(tmp_path: Path, old: str | None) -> None:
    path = tmp_path / "x.txt"
    if old is not None:
        path.write_text(old)
    with pytest.raises(KeyboardInterrupt), files.written(path) as part:  # noqa: PT012
        part.write_text("half")
        raise KeyboardInterrupt
    assert (path.read_text() if path.exists() else None) == old
    assert os.listdir(tmp_path) == ([] if old is None else ["x.txt"])


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), files.written(tmp_path / "x"):
        pass


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    with files.written(path) as first:
        first.write_text("first")
        with files.written(path) as second:
            second.write_text("second")
        assert first != second
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert os.listdir(tmp_path) == ["x.txt"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").write_text("old")
    (tmp_path / "x").symlink_to("there/x")
    files.write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").is_symlink()
    assert (tmp_path / "there" / "x").read_text() == "new"


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        files.write_text(tmp_path / "pipe", "text")
        assert os.read(reader, 100) == b"text"
    finally:
        os.close(reader)
    assert os.listdir(tmp_path) == ["pipe"]


def test_the_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    files.write_text(tmp_path / "ours", "")
    files.write_parts(tmp_path / "parts", [b""])
    assert len({(tmp_path / name).stat().st_mode for name in ("plain", "ours", "parts")}) == 1


def test_order_of_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data reach the disk before the name does, and the name before the call returns."""
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        steps.append("sync folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "sync file")
        fsync(descriptor)

    def note_replace(source: Any, target: Any) -> None:
        steps.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    for write in (lambda: files.write_text(tmp_path / "x", "1"), lambda: files.write_parts(tmp_path / "x", [b"1", b"2"])):
        steps.clear()
        write()
        assert steps == ["sync file", "rename", "sync folder"]


@pytest.mark.parametrize("before", [False, True], ids=["no folder before", "a folder before"])
def test_a_folder_is_replaced_as_a_whole(tmp_path: Path, before: bool) -> None:
    target = tmp_path / "model"
    if before:
        target.mkdir()
        (target / "old").write_text("old")
    with files.written_folder(target) as part:
        (part / "deep").mkdir()
        (part / "deep" / "new").write_text("new")
        assert (target / "old").exists() == before
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["model", "model/deep", "model/deep/new"]
    with pytest.raises(RuntimeError, match="no"), files.written_folder(target) as part:  # noqa: PT012
        (part / "half").write_text("half")
        raise RuntimeError("no")
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["model", "model/deep", "model/deep/new"]


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "log" / "metrics.jsonl"
    assert files.read_lines(path) == []
    files.append_lines(path, [{"step": 1, "kl": math.nan}])
    files.append_lines(path, [])
    files.append_lines(path, [{"step": 2}, {"step": 3}], sync=False)
    assert [strict(line) for line in path.read_text().splitlines()] == files.read_lines(path)
    assert files.read_lines(path) == [{"step": 1, "kl": None}, {"step": 2}, {"step": 3}]


@pytest.mark.parametrize("torn", ['{"step": 3', '{"x": "' + "y" * 10000], ids=["short", "longer than a block"])
@pytest.mark.parametrize("whole", ['{"step": 1}\n{"step": 2}\n', ""], ids=["after lines", "alone"])
def test_a_torn_line_is_cut_before_the_next_one(tmp_path: Path, whole: str, torn: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(whole + torn)
    assert "".join(files.json_text(x) + "\n" for x in files.read_lines(path)) == whole
    files.append_lines(path, [{"step": 3}])
    assert path.read_text() == whole + '{"step": 3}\n'


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"a"\n{"a": 2}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:2: expected a line of JSON"):
        files.read_lines(tmp_path / "x.jsonl")


def _append(path: Path, who: int) -> None:
    for i in range(50):
        files.append_lines(path, [{"who": who, "i": i, "text": "x" * 500}, {"who": who, "i": i, "second": True}], sync=False)


def test_processes_append_side_by_side(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=_append, args=(path, who)) for who in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    found = files.read_lines(path)
    for who in range(3):
        assert [x["i"] for x in found if x["who"] == who] == [i for i in range(50) for _ in range(2)]
    assert all(a["who"] == b["who"] and "second" in b for a, b in zip(found[::2], found[1::2], strict=True))


def _count(path: Path) -> None:
    for _ in range(40):
        with files.locked(path.parent):
            files.write_text(path, str(int(path.read_text()) + 1))


def test_a_folder_is_locked_by_one_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "count").write_text("0")
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=_count, args=(tmp_path / "count",)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert (tmp_path / "count").read_text() == "120"
    assert os.listdir(tmp_path) == ["count"]


def _die_inside(path: Path) -> None:
    with files.written(path) as part:
        part.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_leftovers_of_a_killed_writer_are_known_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")
    worker = multiprocessing.get_context("fork").Process(target=_die_inside, args=(path,))
    worker.start()
    worker.join()
    assert worker.exitcode == -signal.SIGKILL
    assert path.read_text() == "old"
    (found,) = files.leftovers(path)
    assert found.name.startswith(".x.txt.")
    assert not list(tmp_path.glob("*.txt"))[1:], "a leftover passes for a result"
    others = [tmp_path / name for name in (".x.txt.1-abc.part", "x.txt.part", ".y.txt.1-0123abcd.part")]
    for other in others:
        other.write_text("somebody's")
    files.remove_leftovers(path)
    assert files.leftovers(path) == []
    assert all(other.exists() for other in others)
    assert path.read_text() == "old"


def test_an_error_of_the_system_names_the_file(tmp_path: Path) -> None:
    """That of a full disk names nothing, that of a temporary name something that nobody knows."""
    read, write = multiprocessing.get_context("fork").Pipe(False)

    def fill() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        for number, (name, act) in enumerate(_writes(tmp_path).items()):
            try:
                act(tmp_path / f"{number}")
            except OSError as error:
                write.send((name, error.errno, str(error.filename)))
        write.send(None)

    process = multiprocessing.get_context("fork").Process(target=fill)
    process.start()
    found = list(iter(read.recv, None))
    process.join()
    assert found == [(name, errno.EFBIG, str(tmp_path / str(number))) for number, name in enumerate(_writes(tmp_path))]
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


def _writes(folder: Path) -> dict[str, Any]:
    import torch

    from kdfast import tensors

    def in_folder(path: Path) -> None:
        with files.written_folder(path) as part, open(part / "some", "wb") as file:
            file.write(bytes(9999))

    return {
        "text": lambda path: files.write_text(path, "x" * 9999),
        "lines": lambda path: files.append_lines(path, ["x" * 9999]),
        "parts": lambda path: files.write_parts(path, [bytes(9999)]),
        "folder": in_folder,
        "tensors": lambda path: tensors.save_tensors({"x": torch.zeros(9999)}, path),
    }


def test_an_error_of_something_else_is_itself(tmp_path: Path) -> None:
    """What is written may be read from elsewhere meanwhile."""
    for raised in (ConnectionResetError(errno.ECONNRESET, "reset"), FileNotFoundError(errno.ENOENT, "gone", "/data/x")):
        with pytest.raises(OSError, match=r"reset|gone") as caught, files.written_folder(tmp_path / "made"):
            raise raised
        assert caught.value is raised
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_folder_is_named_as_asked(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed").chmod(0o500)
    if os.access(tmp_path / "closed", os.W_OK):
        pytest.skip("this user may write anywhere")
    with pytest.raises(PermissionError) as caught:
        files.write_text(tmp_path / "closed" / "x", "y")
    assert caught.value.filename == str(tmp_path / "closed" / "x")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    import torch

    from kdfast import tensors

    file = tmp_path / "x.safetensors"
    tensors.save_tensors({"x": torch.arange(4.0)}, file, {"a": "b"})
    assert torch.equal(tensors.load_tensors(file)["x"], torch.arange(4.0))
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match=rf"^{re.escape(str(file))}: expected a whole safetensors file"):
        tensors.load_tensors(file)
    (tmp_path / "x.json").write_text('{"a": ')
    with pytest.raises(ValueError, match=r"x\.json: expected JSON, got something else or a part of it"):
        files.read_json(tmp_path / "x.json")


def test_what_the_dead_left_is_removed_and_what_the_living_write_is_not(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    dead, own = process.pid, os.getpid()
    apart = tmp_path / "apart"
    apart.mkdir()
    home = tmp_path / "run"
    gone = [
        home / f".a.json.{dead}-01234567.part",
        home / "deep" / "er" / f".rows.{dead}-89abcdef.part" / "ids.bin",
        home / f".a.json.{own}-00000000.part",  # of a process that had this number before
    ]
    kept = [
        home / f".a.json.{own}-01234567.part",
        home / "deep" / f".rows.{own}-01234567.part" / f".x.{dead}-01234567.part",
        home / f".a.json.{dead}-0123456.part",
        home / f"a.json.{dead}-01234567.part",
        home / "a.json",
        apart / f".a.json.{dead}-01234567.part",
    ]
    for file in (*gone, *kept):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x")
    os.utime(gone[2], (1e9, 1e9))
    (home / "link").symlink_to(apart)
    (home / f".b.{dead}-01234567.part").symlink_to(apart)
    files.remove_orphans(home)
    assert [str(path) for path in gone if path.exists()] == []
    assert [str(path) for path in kept if not path.exists()] == []
    assert not (home / "deep" / "er" / f".rows.{dead}-89abcdef.part").exists()
    assert not (home / f".b.{dead}-01234567.part").is_symlink()
    files.remove_orphans(tmp_path / "none")
