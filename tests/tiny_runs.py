"""A tiny tokenizer, corpus, rows and recipe for the trainer's tests, from the standard library's own text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from kdfast.text.tokenizers import load_tokenizer, train_tokenizer
from kdfast.train import Batch
from kdfast.train.data import Sequences, tokenize

TEXT = Path(json.__file__).parent
LABELLED = (torch.arange(16) % 7 + 1).expand(8, 16)
STUDENT = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 32, "resid_pdrop": 0.1}


def make_tokenizer(folder: Path, vocab_size: int = 300) -> Path:
    file = folder / "tokenizer.json"
    train_tokenizer(sorted(TEXT.glob("*.py")), vocab_size).save(str(file))
    return file


def make_sequences(tokenizer: Path, length: int = 32) -> Sequences:
    return tokenize(load_tokenizer(tokenizer)[0], sorted(TEXT.glob("*.py")), length, "<|endoftext|>")


def recipe_values(tokenizer: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "out": str(out), "tokenizer": str(tokenizer), "student": {"model_type": "gpt2", "config": STUDENT},
        "data": {"train": [str(TEXT)], "glob": "*.py", "sequence_length": 32, "validation_share": 0.3},
        "optimizer": {"lr": 3e-3, "warmup_steps": 2}, "steps": 8, "batch_size": 4, "tracker": "none", **changes,
    }  # fmt: skip


class Rows:
    """Eight rows of token ids with the labels given."""

    def __init__(self, labels: torch.Tensor) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Sequence[int]) -> Batch:
        chosen = torch.as_tensor(list(indices))
        return Batch(LABELLED[chosen % 8], self.labels[chosen])


def quiet(line: str) -> None:
    pass


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(folder: Path) -> list[dict[str, Any]]:
    timed = ("seconds", "tokens_per_s", "data_wait_s")
    return [{k: v for k, v in row.items() if k not in timed} for row in rows_of(folder)]
