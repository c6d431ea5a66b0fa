"""Heads of real architectures: named, checked against the model's own logits, stepped around."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from kdfast.models.heads import call, find_head, logits_in
from kdfast.models.load import load_weights
from kdfast.models.positions import positions_of

IDS = torch.arange(8)[None] + 3
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 61}
LLAMA = {**SMALL, "num_key_value_heads": 1, "pad_token_id": 0}
ENCODER_DECODER = {"vocab_size": 61, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
                   "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "pad_token_id": 0,
                   "decoder_start_token_id": 0, "eos_token_id": 1, "forced_eos_token_id": 1}  # fmt: skip
CAUSAL = {
    "llama": LLAMA,
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 61},
    "gemma2": {**LLAMA, "final_logit_softcapping": 5.0, "head_dim": 16},
    "cohere": {**LLAMA, "logit_scale": 0.25},
    "granite": {**LLAMA, "logits_scaling": 4.0},
    "opt": {"hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 61,
            "word_embed_proj_dim": 32},
}  # fmt: skip


class PlainLSTM(nn.Module):
    """A language model that is no `transformers` model."""

    def __init__(self, cap: bool = False) -> None:
        super().__init__()
        self.embedding, self.lstm, self.out = nn.Embedding(61, 16), nn.LSTM(16, 24, batch_first=True), nn.Linear(24, 61)
        self.cap = cap

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits = self.out(self.lstm(self.embedding(input_ids))[0])
        return logits.tanh() if self.cap else logits


def check(model: nn.Module, example: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    head = find_head(model, example)
    assert head is not None
    model.eval()
    with torch.no_grad():
        want = logits_in(call(model, example))
        with head.entered() as entrance:
            call(model, example)
    assert torch.allclose(head.logits(entrance.hidden), want, atol=tolerance, rtol=tolerance)
    with torch.no_grad():
        assert torch.equal(logits_in(call(model, example)), want), "the model is not as it was"


@pytest.mark.parametrize("model_type", CAUSAL)
def test_heads_of_causal_models(model_type: str) -> None:
    torch.manual_seed(0)
    check(AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **CAUSAL[model_type])), {"input_ids": IDS})


def test_heads_of_masked_and_encoder_decoder_models() -> None:
    torch.manual_seed(0)
    check(AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **SMALL)), {"input_ids": IDS})
    example = {"input_ids": IDS, "decoder_input_ids": IDS}
    t5 = {"d_model": 32, "d_ff": 32, "d_kv": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 61, "decoder_start_token_id": 0}
    check(AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **t5)), example)
    marian = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("marian", **ENCODER_DECODER))
    marian.final_logits_bias.normal_()
    check(marian, example)


def test_the_head_of_a_plain_module_is_the_layer_whose_output_it_returns() -> None:
    check(PlainLSTM(), {"input_ids": IDS})


def test_what_is_more_than_a_linear_layer_has_no_named_head() -> None:
    assert find_head(PlainLSTM(cap=True), {"input_ids": IDS}) is None
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **LLAMA))
    model.lm_head.register_forward_hook(lambda module, args, out: out + 1)
    assert find_head(model, {"input_ids": IDS}) is None


def test_an_adapter_on_the_head_is_seen() -> None:
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **LLAMA))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    assert find_head(adapted, {"input_ids": IDS}) is None
    body = peft.get_peft_model(
        AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **LLAMA)), peft.LoraConfig(target_modules=["q_proj"])
    )
    check(body, {"input_ids": IDS})


def test_sharded_and_tied_weights_load(tmp_path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **LLAMA, tie_word_embeddings=True)
    first, second = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    first.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    load_weights(second, tmp_path)
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    other = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**LLAMA, "vocab_size": 60}))
    with pytest.raises(ValueError, match=r"init_from: .*is \[61, 32\], expected \[60, 32\]"):
        load_weights(other, tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert", "roberta", "distilbert", "bart", "marian", "llama", "t5"])
def test_positions_are_as_many_as_a_model_takes(name: str) -> None:
    """Tables that begin at an offset, behind the number of the padding or at 0; models without a table take any length."""
    sizes: dict[str, dict[str, object]] = {
        "gpt2": {**CAUSAL["gpt2"], "n_positions": 16}, "opt": {**CAUSAL["opt"], "max_position_embeddings": 16},
        "distilbert": {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 32, "vocab_size": 61,
                       "max_position_embeddings": 16},
        "bart": {**ENCODER_DECODER, "max_position_embeddings": 16},
        "marian": {**ENCODER_DECODER, "max_position_embeddings": 16},
        "llama": {**LLAMA, "max_position_embeddings": 16},
        "t5": {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 61,
               "decoder_start_token_id": 0},
    }  # fmt: skip
    config = AutoConfig.for_model(name, **sizes.get(name, {**SMALL, "max_position_embeddings": 16, "pad_token_id": 1}))
    model = AutoModel.from_config(config).eval()
    most = positions_of(model)
    assert most == {"roberta": 14, "llama": None, "t5": None}.get(name, 16)

    def run(length: int) -> None:
        ids = torch.full((1, length), 7)
        model(input_ids=ids, **({"decoder_input_ids": ids} if config.is_encoder_decoder else {}))

    run(most or 40)
    if most is not None:
        with pytest.raises((IndexError, RuntimeError)):
            run(most + 1)


def test_positions_of_a_plain_module_are_unknown() -> None:
    assert positions_of(nn.Sequential(nn.Embedding(9, 4))) is None
