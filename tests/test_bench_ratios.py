"""Ratios of times: from pairs of one round, with an interval that holds what it says, and no more rounds than it takes."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bench import contest as bench_contest
from bench import logits, measure, performance, suite
from bench.contest import AGAIN, Settings, compared, contest
from bench.measure import Timing, Work, compare, ratio
from bench.peers import Peer, logits_peers, trained
from bench.ratios import Ratio, Settled, paired
from bench.report import Limits, Row, interval, read_csv, table, write_csv


class Clock:
    """Time that passes only where a work says so: a simulated machine under the timer's own loop."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(measure.time, "monotonic", lambda: self.now)

    def work(self, seconds: Callable[[], float]) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds()

        return run


def test_a_drift_that_falls_on_all_alike_leaves_the_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def drift() -> float:
        return 1 + 4 * math.sin(clock.now / 3) ** 2

    works = {
        "kdfast": clock.work(lambda: 0.001 * drift()),
        "peer": clock.work(lambda: 0.0015 * drift()),
        "same": clock.work(lambda: 0.001 * drift()),
    }
    timings = compare(works, repeats=2000, cold=False)
    assert timings["kdfast"].percentile(90) > 3 * timings["kdfast"].percentile(10)
    found = paired(timings["peer"].seconds, timings["kdfast"].seconds)
    assert found.low == pytest.approx(1.5, rel=0.01)
    assert found.high == pytest.approx(1.5, rel=0.01)
    assert ratio(timings["same"], timings["kdfast"]) == pytest.approx(1, rel=0.01)


def test_a_pair_is_of_one_round() -> None:
    base, double = (1.0, 10.0, 3.0), (2.0, 20.0, 6.0)
    assert paired(double, base).median == 2
    assert ratio(Timing((2.0, 10.0, 30.0)), Timing((1.0, 10.0, 10.0))) == 2
    assert math.isnan(ratio(Timing((), "broken"), Timing((1.0,))))
    with pytest.raises(ValueError, match="argument 2"):
        paired((1.0, 2.0), (1.0,))


def test_the_interval_by_hand() -> None:
    """Of 6 values the range holds the median 31 times in 32, of 5 only 15 in 16; of 9 the second and the eighth will do."""
    ones = (1.0,) * 9
    assert paired((5.0, 1.0, 2.0, 3.0, 4.0, 6.0), ones[:6]) == Ratio(3.5, 1.0, 6.0)
    assert math.isnan(paired((1.0, 2.0, 3.0, 4.0, 5.0), ones[:5]).low)
    assert paired((1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0), ones) == Ratio(5.0, 2.0, 8.0)
    assert Ratio(1.0, 0.98, 1.02).within(0.025)
    assert not Ratio(1.0, 0.98, 1.03).within(0.025)
    assert not Ratio(1.0).within(0.5)


def _noisy(source: random.Random, seconds: float) -> float:
    """Mostly near `seconds`, now and then far above, as where somebody else gets the processor."""
    return seconds * math.exp(source.gauss(0, 0.1)) * (3 if source.random() < 0.1 else 1)


@pytest.mark.parametrize("rounds", [8, 31, 200])
def test_the_interval_holds_the_true_ratio_as_often_as_it_says(rounds: int) -> None:
    source, held = random.Random(rounds), 0
    for _ in range(1000):
        base = [_noisy(source, 0.001) for _ in range(rounds)]
        found = paired([_noisy(source, 0.0013) for _ in range(rounds)], base)
        held += found.low <= 1.3 <= found.high
    # 95% or the next that so few rounds allow (99.2% of 8); three standard errors of a thousand trials are 2%.
    assert 930 <= held <= (1000 if rounds == 8 else 985)


def test_stopping_when_settled_costs_the_interval_little() -> None:
    """Looking again and again until the interval is narrow picks narrow ones, not ones that lie to a side."""
    source, held, trials = random.Random(1), 0, 300
    settled = Settled("base", share=0.04, seconds=0.0)
    for _ in range(trials):
        times = {"base": list[float](), "peer": list[float]()}
        while len(times["base"]) % 8 or not settled(times, 1.0):
            times["base"].append(_noisy(source, 0.001))
            times["peer"].append(_noisy(source, 0.0013))
        found = paired(times["peer"], times["base"])
        held += found.low <= 1.3 <= found.high
    assert held / trials >= 0.90


def test_a_settled_case_ends_early_and_a_noisy_one_with_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, source = Clock(monkeypatch), random.Random(0)

    def run(noise: float) -> int:
        works = {
            name: clock.work(lambda s=s: s * math.exp(source.gauss(0, noise)))  # type: ignore[misc]
            for name, s in (("kdfast", 0.010), ("peer", 0.012))
        }
        start = clock.now
        timings = compare(works, repeats=10**6, budget_s=20.0, enough=Settled("kdfast"), cold=False)
        assert clock.now - start < 20.5
        return len(timings["peer"].seconds)

    calm = run(0.01)
    assert calm <= 2.0 / 0.022 + 9  # the 2 s that are always measured, and up to the next eighth round
    wild = run(1.0)
    assert wild > 5 * calm
    assert wild > 15.0 / 0.05


def test_settled_asks_every_ratio_and_some_time() -> None:
    calm, wild = [1.0, 1.01] * 20, [1.0, 2.0] * 20
    settled = Settled("kdfast", seconds=2.0)
    assert settled({"kdfast": calm, "peer": calm}, 3.0)
    assert not settled({"kdfast": calm, "peer": calm}, 1.0)
    assert not settled({"kdfast": calm, "peer": calm, "other": wild}, 3.0)
    assert not settled({"kdfast": calm[:8], "peer": calm[:8]}, 3.0)
    assert not settled({"peer": calm}, 3.0)


def test_a_contestant_that_breaks_midway_keeps_nobody_from_settling() -> None:
    calls = itertools.count()

    def breaks() -> None:
        if next(calls) > 12:
            raise RuntimeError("out of memory")

    seen: list[set[str]] = []
    compare({"kdfast": lambda: None, "breaks": breaks}, repeats=40, enough=lambda times, _: seen.append(set(times)) or False)
    assert seen[0] == {"kdfast", "breaks"}
    assert seen[-1] == {"kdfast"}


def test_every_call_on_a_cpu_finds_the_caches_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the sweep wrote last is known to whoever runs: it went before each call, and not into the time."""
    clock = measure._CpuClock()
    assert clock._sweep is not None
    seen: list[float] = []
    took = [clock(Work(lambda _: seen.append(float(clock._sweep[0])), [lambda: None]), turn) for turn in range(3)]  # type: ignore[index]
    assert seen == [1.0, 2.0, 3.0]
    start = time.perf_counter()
    clock._sweep.add_(1)
    assert min(took) < time.perf_counter() - start
    assert measure._CpuClock(cold=False)._sweep is None


def test_the_pool_gives_later_cases_what_earlier_ones_left() -> None:
    pool = suite.Pool(30.0)
    assert pool.share(3) == 10
    pool.spend(2.0)
    assert pool.share(2) == 14
    pool.spend(40.0)
    assert pool.share(1) == 0


@pytest.mark.parametrize(
    ("settings", "calls"),
    [
        (Settings(repeats=6, budget_s=0.0), 3),
        (Settings(repeats=6, settle_s=1e-9), 6),
        (Settings(repeats=6, settle_s=math.inf), 12),
    ],
    ids=["budget", "repeats-first", "goes-on"],
)
def test_a_contest_goes_on_as_its_settings_say(settings: Settings, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    spent: list[float] = []
    monkeypatch.setattr(bench_contest, "_MANY", 12)  # fewer than any ratio is taken for known from
    job = logits.contestants(5, 33, torch.float32, peers=logits_peers("cpu", compiled=())[:2])
    rows = contest(job, Limits(copy=1e9), dataclasses.replace(settings, spend=spent.append))
    assert [r.calls for r in rows] == [calls] * 3
    assert sum(r.median_ms for r in rows) * 1e-3 < spent[0]
    assert math.isnan(rows[0].ratio_low)
    assert calls < 6 or all(r.ratio_low <= r.time_ratio <= r.ratio_high for r in rows[1:])


@pytest.mark.parametrize(
    ("rival", "behind"),
    [
        ((0.8,) * 7, "rival takes 0.80 of its time"),
        ((0.9, 0.9, 0.9, 0.9, 1.2, 1.2, 1.2), "rival takes 0.90 of its time, within noise: 0.90 to 1.20"),
        ((1.1, 0.9, 0.9, 1.2, 1.2, 1.2, 1.2), ""),
    ],
    ids=["behind", "within-noise", "ahead"],
)
def test_behind_and_within_noise(rival: tuple[float, ...], behind: str) -> None:
    peers = [Peer("kdfast", trained(len), ours=True), Peer("rival", trained(len))]
    rows = compared([Row("logits", p.name) for p in peers], peers, {"kdfast": Timing((1.0,) * 7), "rival": Timing(rival)})
    assert rows[0].behind == behind
    assert (rows[1].ratio_low, rows[1].ratio_high) == (min(rival), max(rival))
    assert interval(rows[1]) in table(rows)


def test_a_file_from_before_the_interval_reads_as_not_measured(tmp_path: Path) -> None:
    path, old = tmp_path / "rows.csv", tmp_path / "old.csv"
    write_csv([Row("logits", AGAIN, median_ms=2.0, time_ratio=1.02, ratio_low=0.99, ratio_high=1.04, calls=9)], path)
    (row,) = read_csv(path)
    assert (row.ratio_low, row.ratio_high) == (0.99, 1.04)
    header, line = (text.split(",") for text in path.read_text().splitlines())
    at = header.index("ratio_low")
    old.write_text("\n".join(",".join(cells[:at] + cells[at + 2 :]) for cells in (header, line)) + "\n")
    (before,) = read_csv(old)
    assert (before.time_ratio, before.calls, before.contestant) == (1.02, 9, AGAIN)
    assert math.isnan(before.ratio_low)
    old.write_text(path.read_text().replace("ratio_high,", "", 1))
    with pytest.raises(ValueError, match="expected columns op, contestant"):
        read_csv(old)


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    write_csv([Row("logits", "a")], path)

    def broken() -> Iterator[Row]:
        yield Row("logits", "b")
        raise RuntimeError("no more rows")

    with pytest.raises(RuntimeError, match="no more rows"):
        write_csv(broken(), path)
    assert [p.name for p in path.parent.iterdir()] == ["rows.csv"]
    assert [r.contestant for r in read_csv(path)] == ["a"]


def test_the_summary_and_the_page_show_the_interval(capsys: pytest.CaptureFixture[str]) -> None:
    case = [
        Row("logits", "kdfast", median_ms=2.0, p10_ms=1.9, p90_ms=2.2, time_ratio=1.0, error_f64=1e-7),
        Row("logits", "near", median_ms=2.1, p10_ms=2.0, p90_ms=2.3, time_ratio=1.07, error_f64=1e-7),
        Row("logits", "nearer", median_ms=2.2, time_ratio=1.05, ratio_low=1.03, ratio_high=1.08, error_f64=1e-7),
    ]
    assert suite.fastest_peer(case) is case[2]  # by the ratio that is shown
    suite.print_summary([case])
    assert "1.03-1.08" in capsys.readouterr().out
    page = performance.page(case)
    assert "| 1.05 | 1.03-1.08 |" in page
    assert "| 1.07 |  |" in page
