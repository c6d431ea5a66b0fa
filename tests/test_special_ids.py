"""Ids that rows start from and end with are those of the models that learn them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from tiny_translation import make_tokenizer, marian_config, pairs, recipe_values, write_rows
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from kdfast.train import Recipe, distill


def quiet(line: str) -> None:
    """Says nothing."""


@pytest.mark.parametrize("model_type", ["t5", "bart", "marian"])
def test_a_student_with_random_weights_starts_and_ends_as_its_rows_do(model_type: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tok")
    (tokenizer.parent / "generation_config.json").write_text('{"decoder_start_token_id": 5, "eos_token_id": 0}')
    data = write_rows(tmp_path / "pairs.jsonl", pairs())
    sizes = {name: value for name, value in marian_config().items() if not name.endswith("_token_id")}
    sizes = {**sizes, "init_std": 0.1} if model_type != "t5" else {
        "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0,
    }  # fmt: skip
    values = recipe_values(
        tokenizer, data, tmp_path / "run", task={"name": "seq2seq", "beams": [1], "max_tokens": 4}, steps=1,
        student={"model_type": model_type, "config": sizes},
    )  # fmt: skip
    folder = distill(Recipe.build(values), say=quiet).model
    saved, its = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    written = saved.generate(**its("a dog", return_tensors="pt"), max_new_tokens=3)
    assert isinstance(its.decode(written[0], skip_special_tokens=True), str)
    assert its.eos_token_id == 0
    assert (saved.generation_config.decoder_start_token_id, saved.generation_config.eos_token_id) == (5, 0)
    assert saved.generate(torch.tensor([[1, 2]]), max_new_tokens=3)[0, 0] == 5
    other = {
        **values,
        "out": str(tmp_path / "other"),
        "student": {"model_type": model_type, "config": {**sizes, "decoder_start_token_id": 3}},
    }
    with pytest.raises(ValueError, match=r"student: its decoder starts from id 3 \(decoder_start_token_id\), expected 5"):
        distill(Recipe.build(other), say=quiet)


def test_what_a_decoder_starts_from_may_stand_in_the_recipe_alone(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tok")
    (tokenizer.parent / "generation_config.json").unlink()
    data = write_rows(tmp_path / "pairs.jsonl", pairs())
    values = recipe_values(tokenizer, data, tmp_path / "run", steps=1)
    distill(Recipe.build(values), say=quiet)
    plain = {name: value for name, value in marian_config().items() if name != "decoder_start_token_id"}
    values |= {"out": str(tmp_path / "none"), "student": {"model_type": "marian", "config": plain}}
    with pytest.raises(ValueError, match=r"decoder_start_token_id: expected .* or in student\.config, found none"):
        distill(Recipe.build(values), say=quiet)


def test_a_causal_student_with_random_weights_knows_its_end(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tok")
    rows = [{"prompt": row["source"], "completion": row["target"]} for row in pairs()]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    values = recipe_values(
        tokenizer, data, tmp_path / "run", task="causal_lm", steps=1, student={"model_type": "llama", "config": sizes}
    )
    saved = AutoModelForCausalLM.from_pretrained(distill(Recipe.build(values), say=quiet).model)
    assert saved.generation_config.eos_token_id == 0
