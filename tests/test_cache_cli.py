"""`kdfast cache`: a real small teacher over real text, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel

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
    assert f"records          {len(reader)}" in capsys.readouterr().out
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
