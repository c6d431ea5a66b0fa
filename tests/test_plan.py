"""`kdfast plan`: its arithmetic by hand, and what it refuses."""

from __future__ import annotations

import json
import math

import pytest

from kdfast.cli import main
from kdfast.cli.plan_model import GPUS, token_bytes

WORDS = ["plan", "--tokens", "2B", "--vocab", "1000", "--k", "10", "--teacher-hidden", "256", "--student-hidden", "128",
         "--teacher-params", "3M", "--student-params", "1M", "--gpu", "h100", "--count", "4", "--micro-batch", "100",
         "--efficiency", "0.5"]  # fmt: skip


def facts(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_arithmetic_of_a_small_job(capsys: pytest.CaptureFixture[str]) -> None:
    made = facts([*WORDS, "--epochs", "3", "--bytes-per-token", "20"], capsys)["plan"]
    gpu = GPUS["h100"]
    teacher, student = 2 * (3e6 + 256e3), 6 * (1e6 + 128e3)
    assert made["cache_bytes"] == 40e9
    assert made["capture"]["flops_a_token"] == teacher
    assert made["capture"]["roofline_s"] == pytest.approx(2e9 / 4 * (teacher / gpu.flops + 8000 / gpu.bandwidth))
    assert made["capture"]["expected_s"] == pytest.approx(2 * made["capture"]["roofline_s"])
    assert made["train_cached"]["roofline_s"] == pytest.approx(6e9 / 4 * (student / gpu.flops + 12000 / gpu.bandwidth))
    live = 6e9 / 4 * ((student + teacher) / gpu.flops + 20000 / gpu.bandwidth)
    assert made["train_live"]["roofline_s"] == pytest.approx(live)
    assert made["loss_bytes_plain"] == 18 * 100 * 1000
    assert made["read_bytes_per_s"] == pytest.approx(6e9 * 20 / made["train_cached"]["expected_s"])
    saved = made["train_live"]["expected_s"] - made["train_cached"]["expected_s"]
    assert made["break_even_epochs"] == pytest.approx(made["capture"]["expected_s"] / saved)


def test_more_gpus_take_less_time_and_the_same_cache(capsys: pytest.CaptureFixture[str]) -> None:
    few, many = (facts([*WORDS, "--count", count], capsys)["plan"] for count in ("4", "8"))
    assert many["capture"]["expected_s"] == pytest.approx(few["capture"]["expected_s"] / 2)
    assert many["cache_bytes"] == few["cache_bytes"]


def test_bytes_of_a_token_are_above_the_entropy_of_its_ids() -> None:
    for vocab, k in ((151936, 64), (32000, 50), (10, 10), (1 << 24, 4096)):
        entropy = (math.lgamma(vocab + 1) - math.lgamma(k + 1) - math.lgamma(vocab - k + 1)) / math.log(2) / 8
        assert entropy < token_bytes(vocab, k) < 2 * entropy + k + 10


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tokens", "many"], "expected a number above 0"),
        (["--tokens", "0"], "expected a number above 0"),
        (["--tokens", "1B", "--k", "2.5"], "expected a whole number"),
        (["--tokens", "1B", "--efficiency", "1.5"], "up to 1"),
        (["--tokens", "1B", "--gpu", "abacus"], "invalid choice"),
        ([], "--tokens"),
    ],
)
def test_wrong_numbers_are_named(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    assert said in capsys.readouterr().err


def test_the_table_reads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(WORDS) == 0
    out = capsys.readouterr().out
    for part in ("capture", "train from cache", "loss layer", "bytes a token", "nothing was measured"):
        assert part in out
