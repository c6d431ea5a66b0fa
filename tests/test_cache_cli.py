"""`kdfast cache`: a real small teacher over real text, from the command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cache_helpers import assert_same
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from kdfast.cache import CacheReader
from kdfast.cli import main

TEXT = (
    "\n".join(f"the {a} {b} and the {c}" for a in ("cat", "old dog") for b in ("sat", "ran far") for c in ("mat", "hill")) * 6
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    (folder / "text").mkdir()
    for name in "ab":
        (folder / "text" / f"{name}.txt").write_text(TEXT)
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=300, show_progress=False))
    torch.manual_seed(0)
    size = {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=tokenizer.get_vocab_size() + 3, **size))
    model.save_pretrained(folder / "teacher")
    tokenizer.save(str(folder / "teacher" / "tokenizer.json"))
    return folder


def build(world: Path, out: Path, *more: str) -> int:
    words = ["cache", "build", str(world / "teacher"), "--data", str(world / "text"), "--out", str(out), "--k", "8"]
    return main([*words, "--sequence-length", "32", "--temperatures", "1", "2", "--device", "cpu", *more])


@pytest.mark.parametrize(("k", "kind", "slots"), [("4", "mixed", 10), ("0", "sampled", 6)])
def test_build_with_draws(
    k: str, kind: str, slots: int, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(world, tmp_path / "cache", "--k", k, "--samples", "6", "--json") == 0
    built = json.loads(capsys.readouterr().out)
    assert (built["kind"], built["k"], built["samples"]) == (kind, slots, 6)
    assert CacheReader(tmp_path / "cache")[0].targets.weights is not None
    assert build(world, tmp_path / "other", "--samples", "6", "--top-p", "0.9") == 2
    assert "--samples: expected it without --top-p" in capsys.readouterr().err


def test_build_info_and_verify(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cache"
    assert build(world, out, "--dry-run", "--json") == 0
    dry = json.loads(capsys.readouterr().out)
    assert not out.exists()
    assert build(world, out, "--json") == 0
    built = json.loads(capsys.readouterr().out)
    assert (built["tokens"], built["records"], built["k"]) == (dry["tokens"], dry["records"], 8)
    reader = CacheReader(out)
    assert reader[0].input_ids.shape == (32,)
    assert main(["cache", "info", str(out), "--json", "--plot", str(tmp_path / "c.png")]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == reader.info.bytes
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert main(["cache", "info", str(out)]) == 0
    assert re.search(rf"^records +{len(reader)}$", capsys.readouterr().out, re.MULTILINE)
    assert main(["cache", "verify", str(out)]) == 0
    assert "verified  yes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [(("--k", "100000"), "k: expected"), (("--temperatures", "2"), "temperatures: expected 1.0"),
     (("--sequence-length", "1"), "--sequence-length"), (("--glob", "*.none"), "--data")],
)  # fmt: skip
def test_wrong_use_is_one_line(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    assert build(world, tmp_path / "c", *more) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_no_cache_and_a_corrupt_one(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "info", str(tmp_path / "none")]) == 2
    assert "kdfast cache build" in capsys.readouterr().err
    assert build(world, tmp_path / "c") == 0
    shard = tmp_path / "c" / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert main(["cache", "verify", str(tmp_path / "c")]) == 2
    assert "checksum" in capsys.readouterr().err
    records = len(CacheReader(tmp_path / "c"))
    for words in (["--dry-run"], []):
        assert main(["cache", "repair", str(tmp_path / "c"), "--json", *words]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["records"], found["records_lost"], found["tokens_lost"]) == (records - 1, 1, 32)
    assert main(["cache", "verify", str(tmp_path / "c")]) == 0
    assert len(CacheReader(tmp_path / "c")) == records - 1


def test_verify_with_a_teacher_tells_the_right_one(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build(world, tmp_path / "c") == 0
    words = ["cache", "verify", str(tmp_path / "c"), "--json", "--records", "3", "--teacher"]
    capsys.readouterr()
    assert main([*words, str(world / "teacher")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["verified"], found["same_weights"], found["compared_rows"]) == (True, True, 96)
    assert found["kl_to_teacher_max"] < 6e-5
    other = tmp_path / "other"
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2LMHeadModel.from_pretrained(world / "teacher").config)
    model.lm_head.weight.data.mul_(20)
    model.save_pretrained(other)
    assert main([*words, str(other)]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["verified"], found["same_weights"]) == (False, False)
    model.resize_token_embeddings(20)
    model.save_pretrained(tmp_path / "small")
    assert main([*words, str(tmp_path / "small")]) == 2
    assert "--teacher: its vocabulary has 20 ids, expected the cache's" in capsys.readouterr().err
    assert main(["cache", "cat", str(tmp_path / "c"), "--records", "99999"]) == 2
    assert capsys.readouterr().err.startswith("kdfast cache: --records: expected numbers from 0 to ")


def test_ranks_build_side_by_side_and_merge(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build(world, tmp_path / "one", "--batch-size", "4") == 0
    for rank in range(2):
        assert build(world, tmp_path / "two", "--batch-size", "4", "--world", "2", "--rank", str(rank)) == 0
    assert main(["cache", "merge", str(tmp_path / "two")]) == 0
    one, two = CacheReader(tmp_path / "one"), CacheReader(tmp_path / "two")
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.input_ids.equal(b.input_ids)
        assert_same(a.targets, b.targets)
    capsys.readouterr()
    assert main(["cache", "cat", str(tmp_path / "two"), "--records", "1", "--tokenizer", str(world / "teacher")]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("record 1: 32 tokens")
    assert len(shown.splitlines()) == 17
    assert main(["cache", "cat", str(tmp_path / "two"), "--rows", "40", "--top", "2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["records"][0]["rows"]
    assert [r["input"] for r in rows] == one[0].input_ids.tolist()
    assert [r["label"] for r in rows] == [*one[0].input_ids[1:].tolist(), None]
    assert main(["cache", "bench", str(tmp_path / "two"), "--seconds", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens_per_second_best"] > 0
    assert build(world, tmp_path / "small", "--max-gb", "1e-5", "--json", "--batch-size", "2") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["stopped_at_max_gb"]
    assert 0 < found["records"] < len(one)
    assert found["bytes"] <= 10_000


def test_masked_and_encoder_decoder_teachers(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer.from_file(str(world / "teacher" / "tokenizer.json"))
    tokenizer.add_special_tokens(["[MASK]"])
    vocab = tokenizer.get_vocab_size()
    small = {"vocab_size": vocab, "pad_token_id": 0}
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertForMaskedLM(BertConfig(**small, **size, max_position_embeddings=64))
    t5 = T5ForConditionalGeneration(
        T5Config(**small, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0, eos_token_id=1)
    )
    for name, model in (("bert", bert), ("t5", t5)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
    lines = [{"source": f"the cat {i}", "target": "the old dog ran " * (1 + i % 3), "text": f"the hill {i} and the mat"}
             for i in range(9)]  # fmt: skip
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    common = ["--data", str(tmp_path / "lines.jsonl"), "--k", "8", "--device", "cpu", "--batch-size", "4", "--json"]
    for name in ("bert", "t5"):
        out = tmp_path / f"{name}-cache"
        assert main(["cache", "build", str(tmp_path / name), "--out", str(out), *common]) == 0
        assert main(["cache", "verify", str(out), "--teacher", str(tmp_path / name)]) == 0
    masked, pairs = CacheReader(tmp_path / "bert-cache"), CacheReader(tmp_path / "t5-cache")
    assert (masked.info.alignment, pairs.info.alignment) == ("same", "next")
    for record in masked:
        assert record.loss_mask.equal(record.input_ids == tokenizer.token_to_id("[MASK]"))
        assert record.loss_mask.any()
        assert ((record.targets.ids >= 0).any(-1) == record.loss_mask).all()
    assert len(pairs) == 9
    for line, record in zip(lines, pairs, strict=True):
        said = tokenizer.encode(line["target"], add_special_tokens=False).ids
        assert record.labels is not None
        assert record.context_ids is not None
        assert record.labels.tolist() == [*said, 1]
        assert record.input_ids.tolist() == [0, *said]
        assert record.context_ids.tolist() == tokenizer.encode(line["source"]).ids
    (tmp_path / "lines.jsonl").write_text('{"text": 3}\n')
    capsys.readouterr()
    assert main(["cache", "build", str(tmp_path / "bert"), "--out", str(tmp_path / "x"), *common]) == 2
    assert "line 1: expected text in text" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["accelerate", "tensorboard", "rich", "datasets", "matplotlib"])
def test_commands_want_only_what_they_use(world: Path, tmp_path: Path, package: str) -> None:
    code = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *a: None if name == {package!r} else find(name, *a)\n"
        f"sys.modules[{package!r}] = None\n"
        "from kdfast.cli import main\n"
        "teacher, text, out = sys.argv[1:]\n"
        "words = ['cache', 'build', teacher, '--data', text, '--out', out, '--k', '4', '--sequence-length', '32']\n"
        "codes = [main([*words, '--device', 'cpu']), main(['cache', 'verify', out, '--teacher', teacher])]\n"
        "codes += [main(['cache', 'cat', out, '--tokenizer', teacher]), main(['cache', 'info', out])]\n"
        "codes += [main(['eval', teacher, '--data', text, '--sequence-length', '32', '--json'])]\n"
        "sys.exit(max(codes))\n"
    )
    words = [str(world / "teacher"), str(world / "text"), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["tokens"] > 0


def test_help_is_grouped_and_info_says_how_a_cache_was_made(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", "build", "--help"]) == 0
    shown = capsys.readouterr().out
    for group in ("data:", "rows:", "tokens:", "what is kept:", "the run:", "examples:"):
        assert f"\n{group}\n" in shown
    assert build(world, tmp_path / "c", "--dtype", "bfloat16") == 0
    capsys.readouterr()
    assert main(["cache", "info", str(tmp_path / "c"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["dtype"], found["special_tokens"]) == ("bfloat16", "none")
    assert main(["cache", "verify", str(tmp_path / "c"), "--teacher", str(world / "teacher")]) == 0
