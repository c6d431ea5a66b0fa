"""A tiny tokenizer, corpus and recipe for the trainer's tests, from the standard library's own text."""

from __future__ import annotations

import json as some_package
from pathlib import Path
from typing import Any

from kdfast.text.tokenizers import load_tokenizer, train_tokenizer
from kdfast.train.data import Sequences, tokenize

TEXT = Path(some_package.__file__).parent
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
