"""Half of a teacher, trained from the teacher's cache: nothing is named twice, and plain transformers loads what comes out."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers
from tiny_runs import TEXT, make_tokenizer

from kdfast.cache import build
from kdfast.text import TextData
from kdfast.train import Recipe, distill


def quiet(line: str) -> None:
    """Drops a line of a report."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    shutil.copy(make_tokenizer(folder.parent), folder / "tokenizer.json")
    return folder


def test_the_half_of_a_teacher_from_its_cache(teacher: Path, tmp_path: Path) -> None:
    text = TextData(paths=(str(TEXT),), glob="*.py", sequence_length=32)
    build(teacher, text, tmp_path / "cache", k=8, max_gb=2e-5, say=quiet)
    recipe = Recipe.build({
        "method": {"name": "word_kd", "hard_weight": 0.5}, "out": str(tmp_path / "run"),
        "teacher": {"cache": str(tmp_path / "cache")}, "tracker": "none", "steps": 2, "batch_size": 2, "alignment": False,
        "student": {"from_teacher": {"path": str(teacher), "layers": [0, 3]}},
        "data": {"validation": [str(TEXT)], "glob": "*.py", "sequence_length": 32}, "eval_sequences": 4,
    })  # fmt: skip
    result = distill(recipe, say=quiet)
    assert result.evaluation is not None
    student = transformers.AutoModelForCausalLM.from_pretrained(result.model)
    assert student.config.num_hidden_layers == 2
    assert (result.model / "tokenizer.json").read_bytes() == (teacher / "tokenizer.json").read_bytes()
    whole = transformers.AutoModelForCausalLM.from_pretrained(teacher)
    ids = torch.arange(32)[None]
    with torch.no_grad():
        apart = (student(ids).logits - whole(ids).logits).abs().max()
    assert 0 < apart < 1  # it began as the teacher's own layers, and has moved by two steps
