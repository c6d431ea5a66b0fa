"""A tiny translation task: words of one vocabulary, models with random weights that say something definite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, MarianConfig, MarianMTModel

END = "<|endoftext|>"
WORDS = ["a", "dog", "cat", "runs", "sleeps", "big", "small", "ein", "hund", "rennt", "schlaeft", "gross"]
SIZE = len(WORDS) + 1
IDS = {"pad_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0}


def make_tokenizer(folder: Path) -> Path:
    """`tokenizer.json` of whole words, the end as id 0, and beside it what a decoder starts from."""
    found = Tokenizer(models.WordLevel({word: i for i, word in enumerate([END, *WORDS])}, unk_token=END))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    found.add_special_tokens([END])
    folder.mkdir(parents=True, exist_ok=True)
    found.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text(json.dumps(IDS))
    return folder / "tokenizer.json"


def marian_config(width: int = 16, decoder_layers: int = 1) -> dict[str, Any]:
    return {
        "d_model": width, "encoder_layers": 1, "decoder_layers": decoder_layers, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 2 * width, "decoder_ffn_dim": 2 * width, "dropout": 0.0,
        "max_position_embeddings": 32, "init_std": 0.5, "forced_eos_token_id": None, **IDS,
    }  # fmt: skip


def marian(seed: int, **changes: Any) -> MarianMTModel:
    torch.manual_seed(seed)
    return MarianMTModel(MarianConfig(vocab_size=SIZE, **marian_config(**changes))).eval()


def llama(seed: int, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "vocab_size": SIZE, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "initializer_range": 0.5, "eos_token_id": 0, "bos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**config, **changes})).eval()


def save(model: Any, folder: Path, tokenizer: Path) -> Path:
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    return folder


def pairs(n: int = 24) -> list[dict[str, str]]:
    source, target = WORDS[:7], WORDS[7:]
    return [
        {
            "source": " ".join(source[(i + j * j) % 7] for j in range(2 + i % 4)),
            "target": " ".join(target[(i + j) % 5] for j in range(1 + i % 5)),
        }
        for i in range(n)
    ]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def recipe_values(tokenizer: Path, data: Path, out: Path, /, **changes: Any) -> dict[str, Any]:
    return {
        "task": "seq2seq", "out": str(out), "tokenizer": str(tokenizer),
        "student": {"model_type": "marian", "config": marian_config()},
        "data": {"train": [str(data)], "validation": [str(data)], "sequence_length": 16},
        "optimizer": {"lr": 3e-3}, "steps": 4, "batch_size": 6, "tracker": "none", **changes,
    }  # fmt: skip
