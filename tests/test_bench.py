"""The measuring tools: a number that is wrong here is wrong everywhere it is quoted."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import __main__ as bench_main
from bench import linear, logits, scale, sweep, topk
from bench.cases import CaptureCase, LinearCase, LogitsCase, Outcome
from bench.contest import AGAIN, Contest, Settings, compared, contest
from bench.measure import Timing, Work, compare, copy_bandwidth, gemm_rate, peak_bytes, ratio, relative_error
from bench.peers import Peer, agree, capture_peers, eager_log_target, linear_peers, logits_peers, topk_peers, trained
from bench.plot import draw
from bench.report import Limits, Model, Row, read_csv, stamp, table, timed, to_json, write_csv


def spin(seconds: float) -> Callable[[], None]:
    """Busy, not asleep: a sleeper's time depends on the scheduler."""

    def run() -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    return run


def boom() -> None:
    raise RuntimeError("no kernel image is available")


def test_compare_orders_slow_and_fast() -> None:
    timings = compare({"slow": spin(0.050), "fast": spin(0.010)}, repeats=5)
    assert 2 < ratio(timings["slow"], timings["fast"]) < 20
    assert 0.0099 < timings["fast"].median < 0.05


def test_compare_runs_everyone_in_every_round_and_takes_inputs_in_turn() -> None:
    seen: list[tuple[str, int]] = []

    def work(name: str) -> Work:
        return Work(lambda x: seen.append((name, int(str(x)))), [lambda: 0, lambda: 1])

    timings = compare({"a": work("a"), "b": work("b")}, repeats=4, warmup=0)
    assert [len(t.seconds) for t in timings.values()] == [4, 4]
    for name in "ab":
        assert [x for n, x in seen if n == name] == [0, 1, 0, 1]
    rounds = [{n for n, _ in seen[i : i + 2]} for i in range(0, 8, 2)]
    assert rounds == [{"a", "b"}] * 4


def test_compare_does_not_time_the_preparation() -> None:
    timing = compare({"x": Work(lambda _: None, [spin(0.02)])}, repeats=3)["x"]
    assert timing.median < 0.01


def test_compare_keeps_the_reason_of_a_contestant_that_cannot_run() -> None:
    timings = compare({"broken": boom, "fine": spin(0.0001)}, repeats=3)
    assert timings["broken"] == Timing((), "RuntimeError: no kernel image is available")
    assert len(timings["fine"].seconds) == 3


def test_compare_ends_when_its_budget_is_spent() -> None:
    timing = compare({"x": spin(0.01)}, repeats=1000, budget_s=0.05, least=3)["x"]
    assert 3 <= len(timing.seconds) < 50


def test_compare_rejects_no_repeats() -> None:
    with pytest.raises(ValueError, match="repeats and least: expected at least 1, got 0"):
        compare({"x": boom}, repeats=0)


def test_percentiles_by_hand() -> None:
    timing = Timing((3.0, 1.0, 2.0, 5.0, 4.0))
    assert (timing.percentile(0), timing.median, timing.percentile(100)) == (1.0, 3.0, 5.0)
    assert timing.percentile(10) == pytest.approx(1.4)
    assert math.isnan(Timing(()).median)


def test_peak_memory_sees_a_buffer_and_not_the_inputs() -> None:
    size = 64 << 20
    peak = peak_bytes(Work(lambda _: torch.ones(size // 4).sum(), [lambda: torch.ones(size // 4)]))
    if peak is None:
        pytest.skip("this kernel keeps no high-water mark that can be reset")
    assert 0.9 * size < peak < 1.6 * size


def test_limits_are_plausible() -> None:
    assert 1e8 < copy_bandwidth(size=8 << 20) < 1e13
    assert 1e7 < gemm_rate(torch.float32, (128, 128, 128)) < 1e15


def test_relative_error_by_hand() -> None:
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error([truth + torch.tensor([0.0, 0.5])], [truth]) == pytest.approx(0.1)
    assert relative_error([torch.zeros(2)], [torch.zeros(2)]) == 0
    assert relative_error([torch.ones(2)], [torch.zeros(2)]) == math.inf


SMALL = {
    "logits": (logits_peers("cpu", compiled=()), LogitsCase.make(7, 129, torch.float64, ignored=2)),
    "linear": (linear_peers("cpu", compiled=False), LinearCase.make(7, 129, 8, 12, torch.float64, ignored=2)),
    "capture": (capture_peers(), CaptureCase.make(7, 129, 5, torch.float64)),
    "topk": (topk_peers(compiled=False), topk._loss_case(7, 129, 5, torch.float64, "cpu", 2, 0)),
}


@pytest.mark.parametrize("op", SMALL)
def test_peers_agree_with_kdfast_and_both_with_the_truth(op: str) -> None:
    peers, case = SMALL[op]
    ready = [p for p in peers if p.comparable and not p.missing]
    assert len(ready) >= 2
    for peer in ready:
        assert agree(peer, peers[0], case) == "", peer.name
    truth = Peer("truth", lambda c: c.truth())
    assert agree(peers[0], truth, case) == ""


@pytest.mark.parametrize(
    ("change", "what"),
    [({"temperature": 1.0}, "loss"), ({"hard_weight": 0.4}, "loss"), ({"soft_weight": 0.6}, "loss")],
    ids=["no-temperature", "other-hard-weight", "other-soft-weight"],
)
def test_a_peer_with_another_objective_is_rejected(change: dict[str, float], what: str) -> None:
    peers, case = SMALL["logits"]

    def other(c: LogitsCase) -> Tensor:
        return eager_log_target(c.student, c.teacher, c.labels, dataclasses.replace(c.objective, **change))

    assert agree(Peer("other", trained(other)), peers[0], case).startswith(f"disagrees: {what} off by")


def test_a_peer_with_a_wrong_gradient_only_is_rejected() -> None:
    peers, case = SMALL["logits"]

    def doubled(c: LogitsCase) -> Outcome:
        loss, grads = peers[0].run(c)
        return loss, tuple(2 * g for g in grads)

    assert agree(Peer("doubled", doubled), peers[0], case).startswith("disagrees: gradient off by 1")


def _contest(peers: list[Peer]) -> list[Row]:
    job = dataclasses.replace(logits.contestants(5, 33, torch.float32), peers=peers)
    return contest(job, Limits(copy=1e9), Settings(repeats=3))


def test_contest_gives_every_peer_a_row_and_no_number_to_a_red_one() -> None:
    ours = logits_peers("cpu", compiled=())[0]

    def raising(c: LogitsCase) -> Outcome:
        raise RuntimeError("out of memory")

    def nan(c: LogitsCase) -> Outcome:
        loss, grads = ours.run(c)
        return loss, tuple(g * (math.nan if c.student.dtype == torch.float32 else 1) for g in grads)

    rows = _contest(
        [ours, Peer("away", ours.run, missing="not installed: pip install it"), Peer("oom", raising), Peer("nan", nan)]
    )
    by_name = {r.contestant: r for r in rows}
    assert list(by_name) == ["kdfast", "away", "oom", "nan", AGAIN]
    assert by_name["kdfast"].error == ""
    assert by_name["kdfast"].median_ms > 0
    assert by_name["kdfast"].error_f64 < 1e-5
    assert by_name["kdfast"].limit_share == pytest.approx(3 * 5 * 33 * 4 / 1e9 / (by_name["kdfast"].median_ms / 1e3))
    assert by_name["away"].error == "not installed: pip install it"
    assert by_name["oom"].error == "RuntimeError: out of memory"
    assert by_name["nan"].error.startswith("disagrees: gradient off by nan")
    assert all(math.isnan(by_name[name].median_ms) for name in ("away", "oom", "nan"))
    assert "no number: not installed" in table(rows)


def test_kdfast_is_marked_where_it_is_not_first() -> None:
    peers = [
        Peer("kdfast", trained(len), ours=True),
        Peer("rival", trained(len)),
        Peer("floor", trained(len), comparable=False),
    ]
    rows = [Row("logits", p.name) for p in peers]

    def times(rival: float) -> dict[str, Timing]:
        return {"kdfast": Timing((1.0,)), "rival": Timing((rival,)), "floor": Timing((0.1,))}

    behind = compared(rows, peers, times(0.5))
    assert behind[0].behind == "rival takes 0.50 of its time"
    assert [r.time_ratio for r in behind] == [1.0, 0.5, 0.1]
    assert "NOT FIRST: rival" in table(behind)
    assert compared(rows, peers, times(2.0))[0].behind == ""


@pytest.mark.parametrize(
    ("seconds", "note"),
    [(1.1, "again"), (1.5, "again; SPREAD TOO WIDE TO QUOTE: 1.50x"), (0.5, "again; SPREAD TOO WIDE TO QUOTE: 2.00x")],
    ids=["calm", "slower", "faster"],
)
def test_a_disturbed_run_says_so(seconds: float, note: str) -> None:
    rows = compared(
        [Row("logits", "kdfast"), Row("logits", AGAIN, note="again")],
        [Peer("kdfast", trained(len), ours=True)],
        {"kdfast": Timing((1.0,)), AGAIN: Timing((seconds,))},
    )
    assert rows[1].note == note


def test_rates_follow_from_the_model() -> None:
    timing = Timing((0.5,))
    bytes_row = timed(Row("x", "y"), timing, Model(bytes=1e9, text="b"), Limits(copy=4e9))
    assert (bytes_row.gb_per_s, bytes_row.limit_share) == (2.0, 0.5)
    flop_row = timed(Row("x", "y"), timing, Model(flops=1e12, text="f"), Limits(gemm=4e12))
    assert (flop_row.tflop_per_s, flop_row.limit_share) == (2.0, 0.5)
    assert math.isnan(timed(Row("x", "y"), timing, Model(), Limits(1.0, 1.0)).limit_share)


def test_csv_round_trip_leaves_no_partial_file(tmp_path: Path) -> None:
    rows = [
        stamp(Row("logits", "a, with comma", "float32", "N=1", median_ms=1.25, calls=3, error_f64=2e-8), "cpu"),
        stamp(Row("logits", "b", error='said "no"\nand stopped'), "cpu"),
    ]
    path = tmp_path / "sub" / "rows.csv"
    write_csv(rows, path)
    assert [p.name for p in path.parent.iterdir()] == ["rows.csv"]
    back = read_csv(path)
    assert [repr(r) for r in back] == [repr(r) for r in rows]
    assert back[0].torch == torch.__version__
    assert back[0].commit


def test_csv_with_other_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("op,other\nlogits,1\n")
    with pytest.raises(ValueError, match="expected columns op, contestant"):
        read_csv(path)


def test_json_has_null_for_what_was_not_measured() -> None:
    assert '"median_ms": null' in to_json([Row("logits", "a", error="no")])


def test_models_count_bytes_and_flops() -> None:
    assert logits.model(256, 128256, torch.bfloat16).bytes == 3 * 256 * 128256 * 2
    assert linear.model(1024, 32000, 512, 1024).flops == 2 * 1024 * 32000 * (3 * 512 + 1024)


@pytest.mark.parametrize("argv", [[], ["nothing"]], ids=["no-command", "unknown-command"])
def test_wrong_usage_is_one_line_and_exit_code_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_main.main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("bench: COMMAND: expected one of logits, linear")
    assert "\n" not in error


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_main.main(["--help"]) == 0
    assert "kdfast bench full logits --quick" in capsys.readouterr().out


def test_command_line_measures_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.csv"
    assert (
        bench_main.main(
            ["topk", "--quick", "--rows", "3", "--vocab", "200", "--k", "4", "--dim", "8", "--csv", str(path), "--json"]
        )
        == 0
    )
    assert capsys.readouterr().out.startswith("[")
    assert {r.op for r in read_csv(path)} == {"topk_capture", "topk", "linear_topk_capture", "linear_topk"}


@pytest.mark.parametrize("argv", [["logits", "--rows", "0"], ["linear", "--dtype", "int8"]], ids=["no-rows", "dtype"])
def test_wrong_option_ends_with_code_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench_main.main(argv)
    assert ended.value.code == 2


def test_gpu_run_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert bench_main.main(["gpu", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.strip().startswith("bench gpu: torch sees no CUDA device")
    assert not list(tmp_path.iterdir())


def test_plan_covers_the_shapes_of_the_table() -> None:
    jobs: dict[str, list[Contest]] = {op: [j.contest for j in sweep.plan(op, "full", "cuda")] for op in sweep.OPS}
    vocabularies = {int(j.shape.split("V=")[1]) for j in jobs["logits"] if j.dtype == torch.bfloat16}
    assert min(vocabularies) == 32000
    assert max(vocabularies) > 256_000
    assert {j.dtype for j in jobs["logits"]} == {torch.bfloat16, torch.float32}
    assert {j.shape.split("Ds=")[1].split()[0] for j in jobs["linear"]} == {"2048", "4096"}
    assert [j.op for j in jobs["topk"]] == ["topk_capture", "topk"]
    assert len({(j.op, j.shape, j.dtype) for js in jobs.values() for j in js}) == sum(map(len, jobs.values()))


@pytest.mark.parametrize(
    ("seconds", "why"), [(60.0, ""), (0.0, "out of time: 0 s of its op's budget left")], ids=["fits", "skipped"]
)
def test_sweep_gives_every_planned_case_its_rows(seconds: float, why: str, tmp_path: Path) -> None:
    rows = sweep.run("scale", "tiny", "cpu", seconds, str(tmp_path / "rows.csv"), {"float32": Limits(1e9, 1e9)})
    assert {"kdfast", "kdfast, incoming gradient 1", "mul_"} <= {r.contestant for r in rows}
    assert all(r.error.startswith(why) and bool(r.error) == bool(why) for r in rows)
    assert [r.contestant for r in read_csv(tmp_path / "rows.csv")] == [r.contestant for r in rows]


def test_plot_of_nothing_is_no_file(tmp_path: Path) -> None:
    assert draw([Row("logits", "a", error="no")], tmp_path / "x.png") is False
    assert not list(tmp_path.iterdir())


def test_scale_case_matches_its_truth() -> None:
    job = scale.contestants(5, 33, torch.float32)
    rows = contest(job, Limits(copy=1e9), Settings(repeats=3))
    assert [r.error for r in rows] == [""] * 4
