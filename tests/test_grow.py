"""A larger student that begins as a smaller, distilled one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import make_tokenizer, recipe_values
from torch import Tensor, nn

pytest.importorskip("transformers")

from test_students import GPT2, IDS, LLAMA, PAIR, SMALL, T5, inputs_of, make
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from kdfast.models.grow import difference, grow, start_from
from kdfast.models.heads import call, logits_in
from kdfast.train import Recipe, distill

KINDS = {"llama": AutoModelForCausalLM, "mistral": AutoModelForCausalLM, "qwen2": AutoModelForCausalLM,
         "qwen3": AutoModelForCausalLM, "gpt2": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM,
         "bert": AutoModelForMaskedLM, "bart": AutoModelForSeq2SeqLM, "marian": AutoModelForSeq2SeqLM}  # fmt: skip
ROPE = {**LLAMA, "head_dim": 8, "attention_bias": True, "mlp_bias": True}
NO_BIAS = {**LLAMA, "head_dim": 8}
T5_GATED = {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
WIDE = {"hidden_size": 45, "intermediate_size": 71, "num_hidden_layers": 5, "num_attention_heads": 9, "num_key_value_heads": 3}
#: (type, the smaller one's configuration, what is other in the larger), all of which say what they said.
SAME = {
    "llama-tied": ("llama", {**ROPE, "tie_word_embeddings": True}, WIDE),
    "llama-untied": ("llama", {**ROPE, "tie_word_embeddings": False}, WIDE),
    "llama-untied-now": ("llama", {**NO_BIAS, "tie_word_embeddings": True}, {"tie_word_embeddings": False, "hidden_size": 36}),
    "llama-deeper": ("llama", NO_BIAS, {"num_hidden_layers": 4}),
    "mistral": ("mistral", NO_BIAS, {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64}),
    "qwen2": ("qwen2", {**SMALL, "num_key_value_heads": 2}, {**WIDE, "hidden_size": 72}),
    "qwen3": ("qwen3", NO_BIAS, WIDE),
    "t5": ("t5", T5, {"d_model": 44, "d_ff": 50, "num_layers": 4, "num_decoder_layers": 7, "num_heads": 6}),
    "t5-gated-untied": (
        "t5",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        {"d_model": 40, "d_ff": 60},
    ),
    "gpt2": ("gpt2", GPT2, {"n_layer": 5, "n_inner": 150, "n_positions": 20}),
    "bert-inner": ("bert", {**SMALL, "pad_token_id": 0}, {"intermediate_size": 60}),
    "bart-inner": ("bart", PAIR, {"encoder_ffn_dim": 60, "decoder_ffn_dim": 50}),
    "marian-inner": ("marian", PAIR, {"encoder_ffn_dim": 60, "decoder_ffn_dim": 50}),
}


def built(model_type: str, fields: dict[str, Any], seed: int = 0) -> nn.Module:
    """None of its weights are zeros or ones, which would hide a wrong place."""
    torch.manual_seed(seed)
    model = KINDS[model_type].from_config(AutoConfig.for_model(model_type, **fields)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.tie_weights()
    return model


@pytest.mark.parametrize("name", SAME)
def test_a_grown_model_says_what_the_smaller_one_said(name: str, tmp_path: Path) -> None:
    kind, fields, changes = SAME[name]
    small = built(kind, fields)
    torch.manual_seed(1)
    student = KINDS[kind].from_config(AutoConfig.for_model(kind, **{**fields, **changes})).eval()
    assert difference(student, small, inputs_of(small)) > 0.1
    grow(student, small)
    assert difference(student, small, inputs_of(small)) < 1e-5
    assert sum(p.numel() for p in student.parameters()) > sum(p.numel() for p in small.parameters())
    student.save_pretrained(tmp_path)
    again = KINDS[kind].from_pretrained(tmp_path).eval()
    assert difference(again, small, inputs_of(small)) < 1e-5


@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "t5-gated-untied", "gpt2"])
def test_what_is_new_learns(name: str) -> None:
    """Nothing new stays dead: within three steps every new entry has had a gradient."""
    kind, fields, changes = SAME[name]
    small = built(kind, fields)
    torch.manual_seed(1)
    student = KINDS[kind].from_config(AutoConfig.for_model(kind, **{**fields, **changes})).train()
    grow(student, small)
    moved = {n: torch.zeros_like(p) for n, p in student.named_parameters()}
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for _ in range(3):
        torch.manual_seed(2)
        logits = logits_in(call(student, inputs_of(small)))
        nn.functional.cross_entropy(logits.flatten(0, 1), torch.arange(logits[..., 0].numel()) % 61).backward()
        for n, p in student.named_parameters():
            moved[n] += p.grad.abs()
        optimizer.step()
        optimizer.zero_grad()
    for n, total in moved.items():
        if total.ndim == 2 and not any(word in n for word in ("embed", "shared", "wte", "wpe", "lm_head", "relative")):
            assert (total == 0).float().mean() < 0.01, n


@pytest.mark.parametrize("kind", ["bert", "marian"])
def test_layers_behind_a_norm_are_copied_and_said_to_change_the_model(kind: str, tmp_path: Path) -> None:
    fields = {"bert": {**SMALL, "pad_token_id": 0}, "marian": PAIR}[kind]
    deeper = {"bert": {"num_hidden_layers": 5}, "marian": {"encoder_layers": 4, "decoder_layers": 5}}[kind]
    small = built(kind, fields)
    small.save_pretrained(tmp_path)
    student = KINDS[kind].from_config(AutoConfig.for_model(kind, **{**fields, **deeper}))
    task = "masked_lm" if kind == "bert" else "seq2seq"
    line = start_from(student, tmp_path, "init_from", kind=task, example=inputs_of(small))
    assert line is not None
    assert line.endswith(": another function")
    stack = "bert.encoder.layer" if kind == "bert" else "model.decoder.layers"
    ours, theirs = student.state_dict(), small.state_dict()
    for j, i in enumerate((0, 0, 1, 1, 2)):
        for name, value in theirs.items():
            if name.startswith(f"{stack}.{i}."):
                assert torch.equal(ours[name.replace(f"{stack}.{i}.", f"{stack}.{j}.")], value)


@pytest.mark.parametrize(
    ("kind", "fields", "changes", "said"),
    [
        ("llama", NO_BIAS, {"num_hidden_layers": 2}, r"expected at most 2 layers in model\.layers, as the student has, got 3"),
        ("llama", NO_BIAS, {"hidden_size": 24}, r"expected a student whose width is at least 32, got 24"),
        ("llama", NO_BIAS, {"head_dim": 16}, r"expected heads of size 8 as in the smaller model, got 16"),
        ("llama", NO_BIAS, {"num_key_value_heads": 4, "hidden_size": 64}, r"at least 2 key heads, each for at least 2 query"),
        ("llama", NO_BIAS, {"vocab_size": 64}, r"expected vocab_size 61 as in the smaller model, got 64"),
        ("llama", {**NO_BIAS, "tie_word_embeddings": False}, {"tie_word_embeddings": True, "num_hidden_layers": 4},
         r"expected tie_word_embeddings false"),
        ("gpt2", GPT2, {"n_embd": 64}, r"width is 32, as its layer norms are over all of it, got 64"),
        ("gpt2", GPT2, {"n_head": 2, "n_layer": 4}, r"expected 4 heads as in the smaller model, got 2"),
        ("bert", {**SMALL, "pad_token_id": 0}, {"intermediate_size": 40}, r"is \[52, 32\] there, expected .*\[40, 32\]"),
    ],
)  # fmt: skip
def test_what_cannot_grow_is_said_in_one_line(
    kind: str, fields: dict[str, Any], changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    built(kind, fields).save_pretrained(tmp_path)
    student = KINDS[kind].from_config(AutoConfig.for_model(kind, **{**fields, **changes}))
    with pytest.raises(ValueError, match=rf"^init_from: .*{said}") as error:
        start_from(student, tmp_path, "init_from", kind="masked_lm" if kind == "bert" else "causal_lm")
    assert "\n" not in str(error.value)


def test_another_type_is_said_in_one_line(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^init_from: expected a model of type gpt2 as the student, got llama"):
        start_from(make("gpt2"), tmp_path, "init_from", kind="causal_lm")


class Recurrent(nn.Module):
    """A language model by LSTM, its head tied to the embedding where both have one width."""

    def __init__(self, embedding: int, hidden: int, kind: Any = nn.LSTM, tie: bool = False, norm: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, embedding)
        self.rnn = kind(embedding, hidden, num_layers=2, batch_first=True)
        self.norm = nn.LayerNorm(hidden) if norm else nn.Identity()
        self.head = nn.Linear(hidden, 30)
        if tie:
            self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.rnn(self.embedding(input_ids))[0]))
        return out


def saved(module: nn.Module, folder: Path) -> Path:
    tied = {"head.weight"} if getattr(module, "head", None) is not None and hasattr(module, "embedding") else set()
    tied = tied if tied and module.head.weight is module.embedding.weight else set()
    save_file({k: v.contiguous() for k, v in module.state_dict().items() if k not in tied}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("kind", "tie"), [(nn.LSTM, False), (nn.LSTM, True), (nn.GRU, False), (nn.RNN, False)], ids=["lstm", "tied", "gru", "rnn"]
)
def test_a_recurrent_model_grows_and_says_what_it_said(kind: Any, tie: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    small, student = Recurrent(12, 12 if tie else 16, kind, tie), Recurrent(20, 20 if tie else 25, kind, tie)
    line = start_from(student, saved(small, tmp_path), "init_from", kind="causal_lm")
    assert line is not None
    assert "another function" not in line
    torch.testing.assert_close(student(IDS), small(IDS), rtol=1e-5, atol=1e-6)


def test_a_convolution_grows_a_norm_is_told_and_attention_refused(tmp_path: Path) -> None:
    def make_net(channels: int) -> nn.Module:
        flat = channels * 36
        return nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(), nn.Flatten(),
                             nn.Linear(flat, 3)).eval()  # fmt: skip

    small, student = make_net(4), make_net(7)
    assert start_from(student, saved(small, tmp_path), "init_from", kind="image_classification") is not None
    images = torch.randn(2, 1, 6, 6)
    torch.testing.assert_close(student(images), small(images), rtol=1e-5, atol=1e-6)

    line = start_from(
        Recurrent(12, 25, norm=True), saved(Recurrent(12, 16, norm=True), tmp_path), "init_from", kind="causal_lm"
    )
    assert line is not None
    assert line.endswith("a norm over more channels makes another function of it")
    with pytest.raises(ValueError, match=r"^init_from: in_proj_weight .* how a MultiheadAttention grows is not known"):
        start_from(nn.MultiheadAttention(8, 2), saved(nn.MultiheadAttention(4, 2), tmp_path), "init_from", kind="causal_lm")
    with pytest.raises(ValueError, match=r"^init_from: .*head\.weight is \[30, 25\], expected \[30, 16\]"):
        start_from(Recurrent(12, 16), saved(Recurrent(12, 25), tmp_path), "init_from", kind="causal_lm")


def test_a_student_larger_than_its_teacher_begins_where_that_one_ended(tmp_path: Path) -> None:
    """Distilled small, grown, gone on: the first evaluation before any step is the smaller student's last."""
    tokenizer = make_tokenizer(tmp_path)
    config = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "num_key_value_heads": 2}  # fmt: skip
    first = recipe_values(tokenizer, tmp_path / "first", student={"model_type": "llama", "config": config}, steps=20)
    small = distill(Recipe.build(first), say=lambda line: None)
    large = {**config, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 4}  # fmt: skip
    second = recipe_values(
        tokenizer, tmp_path / "second", student={"model_type": "llama", "config": large}, init_from=str(small.model), steps=1,
        method={"name": "word_kd"}, teacher={"path": str(small.model)}, optimizer={"lr": 1e-9},
    )  # fmt: skip
    said: list[str] = []
    grown = distill(Recipe.build(second), say=said.append)
    assert any(
        line.startswith("init_from: grown from a smaller model (layers 1 to 3, width 16 to 32, heads 2 to 4") for line in said
    )
    assert grown.evaluation.ppl == pytest.approx(small.evaluation.ppl, rel=1e-4)
    row = json.loads((tmp_path / "second" / "metrics.jsonl").read_text().splitlines()[0])
    assert row["kl_at_T"] < 1e-6
    assert load_file(grown.model / "model.safetensors")["model.embed_tokens.weight"].shape[1] == 32
