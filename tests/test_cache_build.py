"""`kdfast.cache.build`: a teacher and a corpus to a cache, through the head, over ranks, interrupted and resumed."""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_helpers import assert_same
from tiny_teacher import make_teacher
from transformers import GPT2LMHeadModel

from kdfast.cache import CacheMismatch, CacheReader, CacheWriter, build, capture, estimate, read_capture
from kdfast.models.heads import find_head
from kdfast.text import TextData

ROOT = Path(__file__).parents[1]
WORDS = ["the", "old", "dog", "cat", "ran", "far", "sat", "mat", "hill", "and"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("build")
    make_teacher(folder / "teacher", [" ".join(WORDS)] * 3, 300)
    chance = random.Random(3)
    rows = [{"text": " ".join(chance.choices(WORDS, k=chance.randint(1, 60)))} for _ in range(210)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def small(root: Path, out: Path, **options: Any) -> CacheReader:
    options = {"k": 8, "batch_size": 4, "window": 2, "device": "cpu", "temperatures": (1.0, 2.0), **options}
    data = TextData(paths=(str(root / "rows.jsonl"),), sequence_length=100)
    return CacheReader(build(root / "teacher", data, out, **options).path)


def assert_equal(one: CacheReader, other: CacheReader) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert a.input_ids.equal(b.input_ids)
        assert a.loss_mask.equal(b.loss_mask)
        assert_same(a.targets, b.targets)


def test_records_keep_the_order_of_the_rows_whatever_the_window(world: Path, tmp_path: Path) -> None:
    one, other = small(world, tmp_path / "a", window=1), small(world, tmp_path / "b", window=64)
    rows = [json.loads(line)["text"] for line in (world / "rows.jsonl").read_text().splitlines()]
    tokenizer = make_tokenizer(world)
    assert len(one) == len(other) == len(rows)
    for row, a, b in zip(rows, one, other, strict=True):
        assert a.input_ids.tolist() == b.input_ids.tolist() == [*tokenizer.encode(row).ids, 0]
        assert a.targets.ids.equal(b.targets.ids)  # padded differently, so a rounding apart
        torch.testing.assert_close(a.targets.log_tail, b.targets.log_tail, atol=2e-3, rtol=0)


def make_tokenizer(world: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(world / "teacher" / "tokenizer.json"))


@pytest.mark.parametrize("settings", [{}, {"k": 10, "kind": "mixed", "samples": 4}, {"kind": "topp"}])
def test_through_the_head_is_as_through_logits(world: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    model = GPT2LMHeadModel.from_pretrained(world / "teacher")
    head = find_head(model, {"input_ids": torch.arange(4)[None]})
    assert head is not None
    chance = torch.Generator().manual_seed(1)
    documents = [torch.randint(0, 270, (int(n),), generator=chance) for n in torch.randint(2, 90, (19,), generator=chance)]
    made = {"vocab_size": 280, "k": 8, "teacher": "t", "tokenizer_hash": "t", **settings}
    made["vocab_size"] = head.weight.shape[0]
    readers = []
    for name, through in (("head", head), ("logits", None)):
        with CacheWriter(tmp_path / name, **made) as writer:
            top_p = 0.5 if made.get("kind") == "topp" else None
            capture(model, documents, writer, batch_size=4, window=3, head=through, top_p=top_p)
        readers.append(CacheReader(tmp_path / name))
    for a, b in zip(*readers, strict=True):
        assert a.input_ids.equal(b.input_ids)
        assert a.targets.ids.equal(b.targets.ids)
        torch.testing.assert_close(a.targets.logprobs, b.targets.logprobs, atol=2e-3, rtol=0)
        torch.testing.assert_close(a.targets.log_tail, b.targets.log_tail, atol=2e-3, rtol=0)


def test_a_build_goes_through_the_head_and_says_how_it_was_made(world: Path, tmp_path: Path) -> None:
    whole: list[torch.Size] = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda m, _, out: whole.append(out.logits.shape) if isinstance(m, GPT2LMHeadModel) else None
    )
    try:
        reader = small(world, tmp_path / "cache", dtype="bfloat16")
    finally:
        hook.remove()
    vocab = reader.info.vocab_size
    assert sum(shape[-1] == vocab for shape in whole) <= 2  # while the head is looked for, on eight tokens
    assert len(whole) > len(reader) // 4
    described = read_capture(tmp_path / "cache")
    assert (described["dtype"], described["through_head"], described["stopped"]) == ("bfloat16", True, False)
    assert described["chosen_tokens"] == {"begin": None, "separator": "<|endoftext|>", "end": "<|endoftext|>"}


def test_ranks_take_turns_and_the_last_one_merges(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdfast.cache.windows.TURN", 2)
    one = small(world, tmp_path / "one")
    for order in ([0, 1, 2], [2, 0, 1]):
        out = tmp_path / f"three{order[0]}"
        for rank in order:
            small(world, out, rank=rank, world=3)
        assert_equal(one, CacheReader(out))
        assert not list(out.glob("part-*"))
        assert "turns" not in read_capture(out)


def test_a_rank_that_is_done_reads_its_part_before_the_last_one_removes_it(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_build = importlib.import_module("kdfast.cache.build")
    out, read = tmp_path / "two", cache_build.read_manifest
    options: dict[str, Any] = {"k": 8, "batch_size": 4, "window": 2, "device": "cpu", "temperatures": (1.0, 2.0), "world": 2}
    arguments = world / "teacher", TextData(paths=(str(world / "rows.jsonl"),), sequence_length=100), out
    last = threading.Thread(target=build, args=arguments, kwargs={**options, "rank": 1})

    def meanwhile(folder: Path) -> Any:
        if folder.name.startswith("part-00000") and last.ident is None:
            last.start()
            last.join(10)  # the other one needs less to be done, and then waits for this one
        return read(folder)

    monkeypatch.setattr(cache_build, "read_manifest", meanwhile)
    first = build(*arguments, **options, rank=0)
    last.join()
    assert first.path.name == "part-00000-of-00002"
    assert not first.path.exists()
    assert_equal(small(world, tmp_path / "one"), CacheReader(out))


def test_ranks_that_stop_at_a_limit_leave_no_gap(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdfast.cache.windows.TURN", 2)
    one = small(world, tmp_path / "one")
    for rank in range(2):
        small(world, tmp_path / "two", rank=rank, world=2, max_gb=1.2e-4)
    two = CacheReader(tmp_path / "two")
    assert 0 < len(two) < len(one)
    assert two.info.bytes <= 120_000
    for i in range(len(two)):
        assert one[i].input_ids.equal(two[i].input_ids)
        assert_same(one[i].targets, two[i].targets)


def test_torchrun_sets_the_ranks(world: Path, tmp_path: Path) -> None:
    words = ["cache", "build", str(world / "teacher"), "--data", str(world / "rows.jsonl"), "--k", "8", "--device", "cpu",
             "--sequence-length", "100", "--batch-size", "4", "--window", "2", "--temperatures", "1", "2"]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "kdfast.cli"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *words, "--out", str(tmp_path / "two")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_equal(small(world, tmp_path / "one"), CacheReader(tmp_path / "two"))


@pytest.mark.parametrize("signals", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_and_resumed_it_is_the_build_in_one_go(world: Path, tmp_path: Path, signals: signal.Signals) -> None:
    code = (
        "import sys, time\n"
        "from kdfast.cache import CacheWriter\n"
        "from kdfast.cli import main\n"
        "add, begin = CacheWriter.add, CacheWriter.__init__\n"
        "def slowly(self, *args):\n"
        "    add(self, *args); print(len(self), flush=True); time.sleep(0.01)\n"
        "CacheWriter.add = slowly\n"
        "CacheWriter.__init__ = lambda self, path, **given: begin(self, path, **{**given, 'shard_bytes': 4000})\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    words = ["cache", "build", str(world / "teacher"), "--data", str(world / "rows.jsonl"), "--k", "8", "--device", "cpu",
             "--sequence-length", "100", "--batch-size", "4", "--window", "3", "--temperatures", "1", "2"]  # fmt: skip
    words += ["--out", str(tmp_path / "cut")]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        # A shell that runs the tests in the background has them, and what they start, ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert child.stdout is not None
    while int(child.stdout.readline()) < 30:
        pass
    child.send_signal(signals)
    _, error = child.communicate()
    if signals == signal.SIGINT:
        assert child.returncode == 130
        assert "interrupted; what was finished is safe, run the same command again to go on" in error
    with pytest.raises(CacheMismatch, match=r"data.sequence_length: 90 != 100"):
        build(world / "teacher", TextData(paths=(str(world / "rows.jsonl"),), sequence_length=90), tmp_path / "cut", k=8,
              batch_size=4, window=3, device="cpu")  # fmt: skip
    resumed = small(world, tmp_path / "cut", window=3, resume=True, name=lambda option: f"data.{option}")
    assert_equal(small(world, tmp_path / "whole", window=3), resumed)


def test_estimate_counts_what_a_build_captures(world: Path, tmp_path: Path) -> None:
    data = TextData(paths=(str(world / "rows.jsonl"),), sequence_length=100)
    found = estimate(world / "teacher", data, k=8, device="cpu")
    info = small(world, tmp_path / "c").info
    assert (found["records"], found["tokens"]) == (info.records, info.tokens)
