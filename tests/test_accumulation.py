"""Micro-batches of rows that differ in length are together what one batch of them is, whatever a term is a mean over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

pytest.importorskip("transformers")

from task_rows import BERT, BAD, GOOD, named, pictures, run, tokenizer_file, values, write_idx  # noqa: F401, I001
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from kdfast.train import Batch
from kdfast.train.batch import IGNORE

DEEP = {**BERT, "num_hidden_layers": 2, "initializer_range": 0.4, "attn_implementation": "sdpa"}
DEEP_VIT: dict[str, Any] = {"num_hidden_layers": 2, "initializer_range": 0.4, "attn_implementation": "sdpa", "num_labels": 3}
TAGS = named("B-loc", "I-loc", "O")
MODELS = {
    "sequence_classification": lambda size: BertForSequenceClassification(BertConfig(vocab_size=size, **DEEP)),
    "token_classification": lambda size: BertForTokenClassification(BertConfig(vocab_size=size, **DEEP, **TAGS)),
    "masked_lm": lambda size: BertForMaskedLM(BertConfig(vocab_size=size, **DEEP)),
    "image_classification": lambda _: ViTForImageClassification(ViTConfig(**{**VIT, **DEEP_VIT})),
    "causal_lm": lambda size: GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=16, n_layer=2, n_head=2, n_positions=64)),
}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
VIT = {name: value for name, value in BERT.items() if name != "max_position_embeddings"}
VIT |= {"image_size": 6, "patch_size": 2, "num_channels": 1}
STUDENTS = {"causal_lm": {"model_type": "gpt2", "config": GPT2}, "image_classification": {"model_type": "vit", "config": VIT}}
LAYERS = {"name": "tinybert", "stage": "intermediate"}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"tinybert-{term}": ("sequence_classification", {**LAYERS, **{f"{other}_weight": 0.0 for other in ("embedding", "hidden",
       "attention") if other != term}}) for term in ("embedding", "hidden", "attention")},
    "tinybert-causal": ("causal_lm", {**LAYERS, "hidden_weight": 0.0, "embedding_weight": 0.0}),
    "tinybert-tags": ("token_classification", {"name": "tinybert", "hard_weight": 0.5}),
    "distilbert-classes": ("sequence_classification", {"name": "distilbert"}),
    "distilbert-tags": ("token_classification", {"name": "distilbert"}),
    "distilbert-words": ("masked_lm", {"name": "distilbert"}),
    "distilbert-masked": ("masked_lm", {"name": "distilbert", "restrict_to_labels": True}),
    "distilbert-images": ("image_classification", {"name": "distilbert"}),
    "tinybert-images": ("image_classification", LAYERS),
    "word_kd": ("token_classification", {"name": "word_kd", "soft_weight": 0.7, "hard_weight": 0.3}),
}  # fmt: skip


def rows(folder: Path, task: str) -> dict[str, Any]:
    """Eight rows of 1 to 15 words."""
    words = [[(GOOD + BAD)[(i * j) % 6] for j in range(1 + 2 * i)] for i in range(8)]
    if task == "image_classification":
        images, labels = pictures(8)
        write_idx(folder / "images-idx3-ubyte", images)
        write_idx(folder / "labels-idx1-ubyte", labels)
        return {"train": str(folder), "mean": [0.2], "std": [0.3]}
    if task == "token_classification":
        file = folder / "rows.conll"
        file.write_text("\n\n".join("\n".join(f"{w}\t{'O' if w in GOOD else 'B-loc'}" for w in row) for row in words) + "\n")
        return {"train": str(file)}
    if task == "sequence_classification":
        file = folder / "rows.tsv"
        file.write_text("text\tlabel\n" + "".join(f"{' '.join(row)}\t{('neg', 'pos')[len(row) % 4 // 2]}\n" for row in words))
        return {"train": str(file)}
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": " ".join(row)}) + "\n" for row in words))
    packed = {"mask_share": 0.15} if task == "masked_lm" else {}
    return {"train": str(file), "sequence_length": 16, **packed}


@pytest.mark.parametrize(("task", "method"), METHODS.values(), ids=METHODS)
def test_micro_batches_are_one_batch(task: str, method: dict[str, Any], tokenizer: Path, tmp_path: Path) -> None:
    torch.manual_seed(2)
    MODELS[task](Tokenizer.from_file(str(tokenizer)).get_vocab_size()).save_pretrained(tmp_path / "teacher")
    (tmp_path / "rows").mkdir()
    data, found = rows(tmp_path / "rows", task), []
    read = None if task == "image_classification" else tokenizer
    for batch_size, accumulation in ((8, 1), (2, 4), (1, 8)):
        given = values(
            read, tmp_path / f"run-{accumulation}", data, task, method=method, teacher={"path": str(tmp_path / "teacher")},
            student=STUDENTS.get(task, {"model_type": "bert", "config": {**BERT, "initializer_range": 0.2}}), steps=2,
            batch_size=batch_size, accumulation=accumulation, log_every=1, optimizer={"lr": 1e-3, "clip": 0.0},
        )  # fmt: skip
        out = run(given).out
        found.append([json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()])
    for part in found[1:]:
        for whole, several in zip(found[0], part, strict=True):
            told = [name for name in whole if name not in ("seconds", "tokens_per_s", "data_wait_s")]
            assert {name: several[name] for name in told} == pytest.approx({name: whole[name] for name in told}, rel=2e-4)


def test_processes_may_have_less_than_an_item_each() -> None:
    """One label among two processes is half an item for each, whose gradients are averaged; none at all is no division."""
    batch = Batch(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([1, IGNORE]))
    assert float(batch.share(torch.tensor(0.5))) == 2.0
    assert float(batch.share(0)) == 1.0
