"""The GPU run as far as it shows without one: its order, what is left out, and every op's cases at tiny sizes on a CPU."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.nn.functional as F

import kdfast
from bench import gpu, linear_hard, peers, report, smoke, sweep, train, visit
from bench.report import Limits, Row, read_csv, write_csv

pytestmark = pytest.mark.usefixtures("imports_are_no_garbage")
THREADS = 1  # on a busy machine two would wait for each other at every operation


def test_ops_run_in_order_of_worth_and_none_twice() -> None:
    assert sweep.OPS[:4] == ("logits", "linear", "attention", "topk")
    assert sweep.OPS[-2:] == ("train", "cluster")
    assert sweep.UNPROVEN == "cluster"
    assert len(set(sweep.OPS)) == len(sweep.OPS)
    assert set(sweep.SECONDS) == set(sweep.GROUPS)


def test_every_op_has_cases_for_a_gpu() -> None:
    found = {job.contest.op for op in sweep.OPS for job in sweep.plan(op, "full", "cuda")}
    assert found == {
        "logits", "linear", "attention_scores", "attention_probs", "attention_kl", "topk_capture", "topk", "linear_topk",
        "linear_topk_capture", "hidden_projected", "hidden_mse", "hidden_cosine", "linear_logit_mse", "linear_hard", "codec",
        "scale", "cluster",
    }  # fmt: skip
    assert len({job.contest.shape for job in sweep.plan("divergences", "full", "cuda")}) == 6
    names = {op: {p.name for job in sweep.plan(op, "full", "cuda") for p in job.contest.peers} for op in sweep.OPS[:-2]}
    assert not any("cluster kernel" in found for found in names.values())  # what may hang is in a process of its own
    assert "kdfast bfloat16 logits" in names["linear"]  # like for like with Liger
    assert {p.name for p in sweep.plan("cluster", "full", "cuda")[0].contest.peers} == {"kdfast", "cluster kernel"}
    group = "hidden,linear_logit_mse"
    assert [j.contest.shape for j in sweep.plan(group, "full", "cuda")] == [
        j.contest.shape for op in group.split(",") for j in sweep.plan(op, "full", "cuda")
    ]


@pytest.mark.parametrize("op", [op for op in sweep.OPS if op not in ("train", "cluster")])
def test_the_cases_of_an_op_run_on_a_cpu(op: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    rows = sweep.run(op, "tiny", "cpu", 600.0, str(path), {"float32": Limits(1e9, 1e9)})
    ours = [r for r in rows if r.contestant == "kdfast"]
    assert len(ours) == len(sweep.plan(op, "tiny", "cpu"))
    assert all(r.error == "" and r.median_ms > 0 and r.error_f64 < 1e-5 for r in ours)
    assert any(r.median_ms > 0 for r in rows if not r.contestant.startswith("kdfast"))
    assert len(read_csv(path)) == len(rows)


def test_the_training_step_runs_on_a_cpu(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    rows = sweep.run("train", "tiny", "cpu", 600.0, str(tmp_path / "rows.csv"), {})
    assert {r.contestant for r in rows} >= set(train.CONTESTANTS)
    assert all(r.error == "" and r.median_ms > 0 for r in rows)


def test_what_is_not_reached_is_out_of_time(tmp_path: Path) -> None:
    group = "hidden,train"
    rows = sweep.run(group, "tiny", "cpu", 0.0, str(tmp_path / "rows.csv"), {})
    assert {r.op for r in rows} == {"hidden_projected", "hidden_mse", "hidden_cosine", "train"}
    assert all(r.error.startswith("out of time: 0 s of its op's budget left") for r in rows)
    refusal = sweep.out_of_time(2, 30, "the")
    assert refusal == "out of time: 2 s of the budget left, needs about 30 s"
    assert {r.error for r in sweep.unreached(group, "tiny", "cpu", [], refusal)} == {refusal}


def test_rows_that_are_there_are_not_planned_again(tmp_path: Path) -> None:
    rows = sweep.run("hidden", "tiny", "cpu", 0.0, str(tmp_path / "rows.csv"), {})
    left = sweep.unreached("hidden,scale,train", "tiny", "cpu", rows, "its process died")
    assert {r.op for r in left} == {"scale", "train"}
    assert {r.error for r in left} == {"its process died"}


def test_a_training_step_without_transformers_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "missing", lambda: "transformers not installed: pip install 'kdfast[train]'")
    rows = sweep.run("train", "tiny", "cpu", 600.0, str(tmp_path / "rows.csv"), {})
    assert [r.contestant for r in rows] == list(train.CONTESTANTS)
    assert all(r.error.startswith("transformers not installed") for r in rows)


def test_an_older_torch_costs_its_own_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    for them in (peers.linear_peers("cuda", compiled=False), linear_hard.hard_peers("cuda", compiled=False)):
        by_name = {p.name: p for p in them}
        assert by_name["F.linear_cross_entropy"].missing == "needs torch >= 2.13"
        assert not by_name["kdfast"].missing


def the_visit(tmp_path: Path, device: str = "cpu", seconds: float = 60.0) -> visit.Visit:
    return visit.Visit("record", device, tmp_path / "rows.csv", tmp_path, seconds)


@pytest.mark.parametrize("kind", visit.SECONDS)
def test_a_visit_ends_in_its_time_and_has_what_may_hang_last(kind: str, tmp_path: Path) -> None:
    stages = visit.plan(kind, "cuda", "full", tmp_path)
    names = [stage.name for stage in stages]
    assert names[-3:] == ["build _cuda", "cluster tests", "cluster"]
    wanted = [s for s in stages if not s.left_out and not s.name.startswith("build") and s.name != "train"]
    assert sum(s.seconds for s in wanted) <= visit.SECONDS[kind]  # train has what the others leave
    assert all(s.kept for s in stages[-3:])
    measured = ",".join(stage.rows for stage in stages if stage.rows).split(",")
    assert set(measured) | {"train"} == set(sweep.OPS)
    text = visit.describe(kind, stages, visit.SECONDS[kind])
    assert all(name in text for name in names)
    assert "to carry:" in text
    assert "--commit" in text


def test_every_op_is_measured_on_a_gpu() -> None:
    """What a backend offers, and what a visit measures, cannot drift apart."""
    offered = {op for backend in kdfast.backends() for op in backend.ops} - {"parallel"}
    measured = {word for op in sweep.OPS for word in (op, *op.split("_"))}
    assert offered <= measured


def test_alone_means_kdfast() -> None:
    jobs = [job for op in sweep.OPS if op != "train" for job in sweep.plan(op, "alone", "cuda")]
    assert all(peer.ours for job in jobs for peer in job.contest.peers)
    assert sum(job.seconds for job in jobs) < 90


def test_a_stage_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    log, child = (
        tmp_path / "log",
        "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])",
    )
    began = time.monotonic()
    assert visit.call([sys.executable, "-c", child], 1.0, log) == "stopped after 1 s"
    assert time.monotonic() - began < 20
    assert visit.call([sys.executable, "-c", "print('no nvcc'); exit(3)"], 60, log) == "exit code 3"
    assert visit.call([sys.executable, "-c", "print('fine')"], 60, log) == ""
    assert log.read_text() == "no nvcc\nfine\n"


@contextlib.contextmanager
def a_signal(number: signal.Signals, when: Callable[[], bool]) -> Iterator[None]:
    """Sends it to this process as soon as `when()`, unless it would end the tests: then nobody has asked to hear of it."""
    own: signal.Handlers | Callable[..., object] = signal.SIG_DFL
    if number == signal.SIGINT:
        own = signal.default_int_handler
    over, before = threading.Event(), signal.signal(number, own)

    def send() -> None:
        while not over.is_set() and not when():
            time.sleep(0.005)
        if not over.is_set() and signal.getsignal(number) is not signal.SIG_DFL:
            os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield
    finally:
        over.set()
        sender.join()
        assert signal.signal(number, before) == own  # as the call found it


def gone(pid: str) -> bool:
    """Whether a process ends soon (one that nobody has fetched yet has ended): a killed child's child takes a moment."""
    end = time.monotonic() + 10
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
    return True


_PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(os.getpid(), child.pid, "here", flush=True)
if len(sys.argv) > 1: time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_call_that_is_interrupted_leaves_no_process(number: signal.Signals, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with a_signal(number, lambda: log.exists() and "here" in log.read_text()), pytest.raises(KeyboardInterrupt):
        visit.call([sys.executable, "-c", _PARENT, "stay"], 10, log)
    assert all(gone(pid) for pid in log.read_text().split()[:2])


def test_a_stage_that_ends_leaves_no_process(tmp_path: Path) -> None:
    assert visit.call([sys.executable, "-c", _PARENT], 30, tmp_path / "log") == ""
    assert gone((tmp_path / "log").read_text().split()[1])


def test_an_interrupted_visit_keeps_its_rows(tmp_path: Path) -> None:
    stage = visit.Stage("many", 60, rows="scale,attention,topk,codec,linear_topk,hidden,divergences", size="tiny")
    with a_signal(signal.SIGTERM, (tmp_path / "running.csv").exists), pytest.raises(KeyboardInterrupt):
        the_visit(tmp_path).run([stage, visit.Stage("after", 10, (sys.executable, "-c", "1"))])
    rows = read_csv(tmp_path / "rows.csv")
    assert not (tmp_path / "running.csv").exists()
    assert [(r.contestant, r.error) for r in rows if r.op == "stage"] == [("many", "interrupted")]
    ours = [r for r in rows if r.contestant == "kdfast"]
    assert ours[0].median_ms > 0
    assert ours[-1].error == "interrupted"
    assert len(ours) == len(sweep.plan(stage.rows, "tiny", "cpu"))


def test_rows_of_a_visit_that_was_killed_are_not_those_of_the_next(tmp_path: Path) -> None:
    job = sweep.plan("scale", "tiny", "cpu")[0].contest
    write_csv([Row("scale", "kdfast", dtype="float32", shape=job.shape, median_ms=1.0)], tmp_path / "running.csv")
    rows = the_visit(tmp_path, seconds=1.0).run([visit.Stage("scale", 60, rows="scale", size="tiny")])
    assert all(r.error.startswith("out of time") for r in rows)
    assert not (tmp_path / "running.csv").exists()


def test_what_is_worth_least_may_be_late_but_not_the_tests() -> None:
    late = sweep.out_of_time(1, 5, "the")
    ran, out, group = Row("stage", "versions"), Row("stage", "build _C", note="left out: it is there"), Row("logits", "kdfast")
    tests, tests_late = Row("stage", "tests"), Row("stage", "tests", error=late)
    measured, measured_late = Row("stage", "logits", error=late), Row("logits", "kdfast", error=late)
    assert visit.unproven([ran, out, tests, group, measured, measured_late]) == ""
    assert visit.failed([ran, out, tests, measured, measured_late]) == []
    assert visit.unproven([ran, out, tests_late, measured, measured_late]) == f"the tests did not run: {late}"
    assert visit.unproven([out, tests_late, measured, measured_late]) == f"nothing ran: {late}"
    assert visit.unproven([out, measured, measured_late]) == f"nothing ran: {late}"
    stopped = Row("stage", "tests", error="stopped after 60 s")
    assert visit.failed([ran, stopped, measured]) == [stopped]


def test_a_kernel_that_takes_its_process_down_is_told_not_counted() -> None:
    why = "stopped after 30 s"
    rows = [
        Row("stage", "cluster", error=why),
        Row("cluster", "kdfast", error=why),
        Row("cluster", "cluster kernel", error=why),
    ]
    assert visit.failed(rows) == []
    assert visit.failed([*rows, Row("logits", "kdfast", error=why)]) == [Row("logits", "kdfast", error=why)]


@pytest.mark.parametrize("kind", visit.SECONDS)
def test_a_visit_that_reaches_nothing_says_so(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([f"--{kind}", "--dry-run", "--seconds", "0.1", "--out", str(tmp_path / "new" / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bench gpu: nothing ran: out of time: ")
    assert line.endswith("; give it more --seconds")


def test_a_picture_is_that_of_its_visit(tmp_path: Path) -> None:
    gpu.run("contact", tmp_path, "cpu", "tiny", 0.01)
    (path,) = tmp_path.glob("*.csv")
    path.with_suffix(".png").write_bytes(b"of the visit before")
    gpu.run("contact", tmp_path, "cpu", "tiny", 0.01)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".csv", ".log"]


def refusal(main: Callable[[list[str]], int], words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that is said of wrong usage."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    text = capsys.readouterr()
    (line,) = text.err.splitlines()
    assert (stop.value.code, text.out) == (2, "")
    return line


@pytest.mark.parametrize("got", ["-5", "nan", "0", "inf", "a"])
def test_seconds_are_above_zero(got: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(gpu.main, ["--dry-run", "--out", str(tmp_path), f"--seconds={got}"], capsys)
    assert f"argument --seconds: expected a number of seconds above 0, got {got!r}" in line


def test_a_commit_is_not_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(gpu.main, ["--dry-run", "--out", str(tmp_path), "--commit", ""], capsys)
    assert "argument --commit: expected a commit, got ''" in line


def test_a_folder_that_cannot_be_written_is_told_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    for out, why in ((file, "File exists"), (file / "in", "Not a directory"), (Path("/proc/none"), "No such file")):
        line = refusal(gpu.main, ["--dry-run", "--out", str(out)], capsys)
        assert f"argument --out: expected a folder that can be written, got {out}: {why}" in line


def test_wheels_that_are_none_are_told_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "as it was")

    def said(wheels: Path) -> str:
        return refusal(gpu.main, ["--dry-run", "--out", str(tmp_path / "out"), "--wheels", str(wheels)], capsys)

    folder = tmp_path / "wheels"
    assert f"argument --wheels: expected a folder with wheels (*.whl), got {folder}: nothing there" in said(folder)
    folder.mkdir()
    assert "one without any" in said(folder)
    wheel = folder / "x.whl"
    wheel.write_bytes(b"none")
    assert "a file" in said(wheel)
    assert f"argument --wheels: expected wheels, which are zip archives, got {wheel}: File is not a zip file" in said(folder)
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.py", "a = 1\n" * 100)
    broken = bytearray(wheel.read_bytes())
    broken[36:44] = bytes(8)
    wheel.write_bytes(broken)
    assert f"got {wheel}: " in said(folder)
    assert os.environ["PYTHONPATH"] == "as it was"


@pytest.mark.parametrize("got", ["x", "7/3", "3/3", "0/0", "-1/2", "1", "1/2/3", ""])
def test_a_part_of_the_smoke_calls_is_one_of_them(got: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(smoke.main, [f"--part={got}"], capsys)
    assert f"argument --part: expected I/N with whole numbers 0 <= I < N, such as 0/2, got {got!r}" in line


def test_words_that_name_no_smoke_call_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(smoke.main, ["--launch", "kd_loss", "kdloss"], capsys)
    assert "argument calls: expected words in the names of the calls, such as kd_loss or attention_kl, got 'kdloss'" in line


def test_parts_are_all_smoke_calls_once(capsys: pytest.CaptureFixture[str]) -> None:
    names = [call.name for call in smoke.calls()]
    parts = [[call.name for call in smoke.chosen([], (i, 3))] for i in range(3)]
    assert sorted(name for part in parts for name in part) == sorted(names)
    assert [call.name for call in smoke.chosen(["float16"], (0, 1))] == [name for name in names if "float16" in name]
    assert smoke.main(["--launch", "softcap", "--part", "1/2"]) == 0  # heeded there too
    assert capsys.readouterr().out == "bench smoke: part 1/2 has no calls\n"


def test_a_group_whose_process_dies_keeps_its_rows(tmp_path: Path) -> None:
    rows = the_visit(tmp_path).run(
        [visit.Stage("scale", 5.5, rows="scale", size="tiny"), visit.Stage("away", 5, left_out="no ncu")]
    )
    assert {r.contestant for r in rows} == {"kdfast", "kdfast, incoming gradient 1", "mul_", "scale", "away"}
    assert all(r.error for r in rows if r.op == "scale")
    assert rows[-1].note == "left out: no ncu"
    assert len(read_csv(tmp_path / "rows.csv")) == len(rows)


def test_a_stage_after_the_end_does_not_start(tmp_path: Path) -> None:
    (row,) = the_visit(tmp_path, seconds=1.0).run([visit.Stage("x", 60, (sys.executable, "-c", "1"))])
    assert row.error == "out of time: 1 s of the budget left, needs about 5 s"


def test_the_commit_that_is_told_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDFAST_COMMIT", "abc")
    report.commit.cache_clear()
    assert report.commit() == "abc"
    report.commit.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("kind", visit.SECONDS)
def test_a_dry_run_on_a_cpu(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan, then every stage but the device: a process each, one file, in the seconds of a processor that a visit has."""
    monkeypatch.setenv("KDFAST_COMMIT", "of another tree")  # put back when the test ends
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = gpu.main([f"--{kind}", "--dry-run", "--out", str(tmp_path), "--commit", "abc"])
    report.commit.cache_clear()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime < visit.SECONDS[kind]
    text = capsys.readouterr().out
    (path,) = tmp_path.glob("*.csv")
    rows = read_csv(path)
    assert code == 0, [r for r in rows if r.error]
    assert {r.contestant for r in rows if r.op == "stage"} == {s.name for s in visit.plan(kind, "cpu", "tiny", tmp_path)}
    assert {r.commit for r in rows} == {"abc"}
    assert not [r for r in rows if r.contestant == "kdfast" and r.error]
    assert {r.op for r in rows} >= {"limits", "logits", "linear", "attention_kl", "topk", "codec", "scale", "cluster"}
    assert ("train" in {r.op for r in rows}) == (kind == "record")
    assert "to carry:" in text
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".csv", ".log", ".png"]
