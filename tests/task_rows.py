"""What tests of tasks share: rows and their files, a tokenizer, a recipe, a run, a teacher's cache."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

pytest.importorskip("transformers")

from transformers import BertConfig, BertForSequenceClassification

from kdfast.train import Recipe, capture_classes, distill
from kdfast.train.tasks import task_class

BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "initializer_range": 0.2,
        "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
WORD_KD = {"name": "word_kd", "temperature": 2.0, "soft_weight": 0.7, "hard_weight": 0.3}
GOOD, BAD = ("good", "fine", "great"), ("bad", "poor", "awful")


def sentence(i: int) -> tuple[str, str]:
    word = (GOOD if i % 2 else BAD)[i % 3]
    return " ".join(["the film was", *["really"] * (i % 4), word]), "pos" if i % 2 else "neg"


@pytest.fixture(scope="module", name="tokenizer")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary written out: one that is trained may differ from run to run."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = ["the", "film", "was", "really", "who", "plays", "in", "paris", "and", "new", "york", "so"]
    tokens = [*special, *words, *GOOD, *BAD, "##film", ",", '"']
    found = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    found.normalizer, found.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    found.add_special_tokens(special)
    found.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    found.save(str(file))
    return file


def values(tokenizer: Path | None, out: Path, data: dict[str, Any], task: Any, **changes: Any) -> dict[str, Any]:
    return {
        "task": task, "out": str(out), "tokenizer": None if tokenizer is None else str(tokenizer), "data": data,
        "student": {"model_type": "bert", "config": BERT}, "optimizer": {"lr": 1e-2}, "steps": 30, "batch_size": 8,
        "tracker": "none", "method": "supervised", **changes,
    }  # fmt: skip


def run(recipe: dict[str, Any]) -> Any:
    return distill(Recipe.build(recipe), say=lambda line: None)


def opened(tokenizer: Path, task: Any, data: dict[str, Any]) -> tuple[Any, Any]:
    recipe = Recipe.build(values(tokenizer, Path("unused"), data, task))
    made = task_class(recipe.task.name)(recipe.task.options, recipe.data)
    return made, made.open(Tokenizer.from_file(str(tokenizer)), tokenizer, Path("unused"), True)


def write_table(file: Path, header: bool, rows: int = 40, pair: bool = False, unlabelled: int = 0) -> Path:
    lines = ["text\tlabel" if not pair else "text\tother\tlabel"] if header else []
    for i in range(rows):
        text, label = sentence(i)
        middle = f"\t{sentence(i + 2)[0]}" if pair else ""
        lines.append(f"{text}{middle}\t{'' if i < unlabelled else label}")
    file.write_text("\n".join(lines) + "\n")
    return file


def classifier(folder: Path, tokenizer: Path, **config: Any) -> Path:
    torch.manual_seed(0)
    size = Tokenizer.from_file(str(tokenizer)).get_vocab_size()
    BertForSequenceClassification(BertConfig(vocab_size=size, **{**BERT, **config})).save_pretrained(folder)
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    return folder


def named(*names: str) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def table(file: Path, label: Any = lambda i, name: name, rows: int = 24, head: str = "text\tlabel") -> str:
    lines = [f"{sentence(i)[0]}\t{label(i, sentence(i)[1])}" for i in range(rows)]
    file.write_text("\n".join([head, *lines]) + "\n")
    return str(file)


WORDS = [("who", "O"), ("plays", "O"), ("in", "O"), ("new", "B-loc"), ("york", "I-loc"), ("and", "O"), ("paris", "B-loc")]


def write_conll(file: Path, sentences: int) -> Path:
    turned = [WORDS[i % 3 :] + WORDS[: i % 3] for i in range(sentences)]
    file.write_text("\n\n".join("\n".join("\t".join(pair) for pair in words) for words in turned) + "\n")
    return file


def write_idx(file: Path, values: np.ndarray) -> None:
    raw = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()
    file.write_bytes(gzip.compress(raw) if file.suffix == ".gz" else raw)


def pictures(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Class c is bright in column 2c."""
    labels = np.arange(rows) % 3
    images = np.random.default_rng(0).integers(0, 60, (rows, 6, 6))
    images[np.arange(rows), :, 2 * labels] += 180
    return images, labels


def cached(tmp_path: Path, recipe: dict[str, Any], teacher: dict[str, Any]) -> dict[str, Any]:
    """The recipe with the teacher's cache in the place of the teacher."""
    from kdfast.train.recipe import Teacher

    taught = {**recipe, "teacher": {"cache": str(tmp_path / "cache")}, "out": str(tmp_path / "from-cache")}
    info = capture_classes(Recipe.build(taught), Teacher(**teacher), tmp_path / "cache", temperatures=(1.0, 2.0), batch_size=8)
    assert info.kl_max < 1e-12
    assert (info.k, info.alignment) == (info.vocab_size, "same")
    return taught


def losses(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k in ("loss", "kl_at_T", "hard", "grad_norm")} for row in rows if "loss" in row]
