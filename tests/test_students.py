"""Students cut out of teachers, adapters, and what changes how a student runs but not what it computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import make_tokenizer, recipe_values
from torch import Tensor, nn

pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from kdfast.models.heads import call, find_head, logits_in
from kdfast.models.shrink import cast_weights, cut_out
from kdfast.models.view import look
from kdfast.train import Batch, Recipe, distill
from kdfast.train.objective import Setting
from kdfast.train.recipes import objective_class
from kdfast.train.step import DistillStep
from kdfast.train.students import build_student
from kdfast.train.tasks import task_class

IDS = torch.arange(8)[None] % 7 + 3
SMALL = {"hidden_size": 32, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 61}
LLAMA = {**SMALL, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PAIR = {"vocab_size": 61, "d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40, "pad_token_id": 0, "bos_token_id": 1,
        "decoder_start_token_id": 0, "eos_token_id": 2, "forced_eos_token_id": 2, "max_position_embeddings": 16}  # fmt: skip
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 4, "vocab_size": 61,
      "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 61, "n_positions": 16, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "llama": (AutoModelForCausalLM, LLAMA), "gpt2": (AutoModelForCausalLM, GPT2),
    "bert": (AutoModelForMaskedLM, {**SMALL, "pad_token_id": 0}), "marian": (AutoModelForSeq2SeqLM, PAIR),
    "bart": (AutoModelForSeq2SeqLM, PAIR), "t5": (AutoModelForSeq2SeqLM, T5),
}  # fmt: skip


STACKS = {"llama": "model.layers", "gpt2": "transformer.h", "bert": "bert.encoder.layer", "marian": "model.decoder.layers",
          "bart": "model.decoder.layers", "t5": "decoder.block"}  # fmt: skip


def make(model_type: str, **changes: Any) -> nn.Module:
    """A model none of whose weights are zeros or ones, which would hide a wrong slice."""
    torch.manual_seed(0)
    kind, fields = MODELS[model_type]
    model = kind.from_config(AutoConfig.for_model(model_type, **{**fields, **changes})).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + 0.05 * torch.randn_like(parameter)
    model.tie_weights()
    return model


def inputs_of(model: nn.Module) -> dict[str, Tensor]:
    return {"input_ids": IDS, **({"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {})}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return logits_in(call(model.eval(), inputs_of(model)))


@pytest.mark.parametrize("model_type", MODELS)
def test_all_layers_at_full_width_are_the_teacher(model_type: str) -> None:
    model = make(model_type)
    decoder = [0, 1, 2] if model.config.is_encoder_decoder else None
    assert torch.equal(logits(cut_out(model, [0, 1, 2], decoder, model.config.hidden_size, "student")), logits(model))


@pytest.mark.parametrize("model_type", MODELS)
def test_fewer_layers_are_a_folder_that_anyone_loads(model_type: str, tmp_path: Path) -> None:
    model = make(model_type)
    pair = model.config.is_encoder_decoder
    student = cut_out(model, None if pair else [2, 0], [2, 0] if pair else None, None, "student")
    student.save_pretrained(tmp_path)
    loaded = MODELS[model_type][0].from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(student))
    small, large = (m.get_submodule(STACKS[model_type]) for m in (student, model))
    assert len(small) == 2
    for layer, source in zip(small, (large[2], large[0]), strict=True):
        for name, weight in layer.named_parameters():
            if "relative_attention_bias" not in name:  # in T5's first layer, whichever that is
                assert torch.equal(weight, source.get_parameter(name)), name


@pytest.mark.parametrize("model_type", MODELS)
def test_a_narrower_student_is_a_folder_that_anyone_loads(model_type: str, tmp_path: Path) -> None:
    student = cut_out(make(model_type), None, None, 16, "student")
    student.save_pretrained(tmp_path)
    loaded = MODELS[model_type][0].from_pretrained(tmp_path)
    assert loaded.config.hidden_size == 16
    assert loaded.config.num_attention_heads == 2
    assert logits(student).isfinite().all()
    assert torch.equal(logits(loaded), logits(student))


def test_a_cut_out_student_ends_its_texts_as_its_teacher(tmp_path: Path) -> None:
    """What stands in the teacher's generation config alone is the student's, and its own."""
    model = make("marian")
    model.generation_config.update(eos_token_id=[2, 9], bad_words_ids=[[11]], forced_bos_token_id=8, max_length=20)
    student = cut_out(model, [0], [0, 2], None, "student")
    assert student.generation_config.to_dict() == model.generation_config.to_dict()
    student.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).generation_config
    assert (loaded.eos_token_id, loaded.bad_words_ids, loaded.forced_bos_token_id) == ([2, 9], [[11]], 8)
    student.generation_config.eos_token_id.append(3)
    assert model.generation_config.eos_token_id == [2, 9]


def test_fused_queries_keys_and_values_are_cut_block_by_block() -> None:
    model = make("gpt2")
    student = cut_out(model, None, None, 16, "student")
    whole, cut = (m.transformer.h[1].attn.c_attn for m in (model, student))
    for block in range(3):
        here, there = slice(16 * block, 16 * block + 16), slice(32 * block, 32 * block + 16)
        assert torch.equal(cut.weight[:, here], whole.weight[:16, there])
        assert torch.equal(cut.bias[here], whole.bias[there])


@pytest.mark.parametrize(("width", "kept", "groups"), [(16, [0, 1, 2, 3], 1), (24, [0, 1, 2, 4, 5, 6], 2)])
def test_query_heads_stay_with_the_keys_of_their_group(width: int, kept: list[int], groups: int) -> None:
    """8 query heads of size 4 in 2 groups of 4."""
    model = make("llama", num_attention_heads=8)
    student = cut_out(model, None, None, width, "student")
    assert student.config.num_key_value_heads == groups
    whole, cut = (m.model.layers[0].self_attn for m in (model, student))
    channels = torch.tensor([4 * head + i for head in kept for i in range(4)])
    assert torch.equal(cut.q_proj.weight, whole.q_proj.weight[channels][:, :width])
    assert torch.equal(cut.o_proj.weight, whole.o_proj.weight[:width][:, channels])
    assert torch.equal(cut.k_proj.weight, whole.k_proj.weight[: 4 * groups, :width])


def test_t5_keeps_its_positions_without_its_first_layer() -> None:
    model = make("t5")
    student = cut_out(model, [1, 2], [2], None, "student")
    for stack in ("encoder", "decoder"):
        first, whole = (getattr(m, stack).block[0].layer[0].SelfAttention for m in (student, model))
        assert torch.equal(first.relative_attention_bias.weight, whole.relative_attention_bias.weight)
    queries = [m.encoder.block[i].layer[0].SelfAttention.q.weight for m, i in ((student, 0), (model, 1))]
    assert torch.equal(*queries)


def test_what_cannot_be_cut_is_said_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"student\.width: expected a multiple of 8 .* up to 32, got 12"):
        cut_out(make("llama"), None, None, 12, "student")
    with pytest.raises(ValueError, match=r"student\.layers: expected layers from 0 to 2, got 3"):
        cut_out(make("llama"), [0, 3], None, None, "student")
    neox = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neox", **SMALL))
    with pytest.raises(ValueError, match=r"student\.width: .* got gpt_neox"):
        cut_out(neox, None, None, 16, "student")


@pytest.mark.parametrize("source", ["path", "from_teacher"])
def test_dropout_of_a_student_from_weights_is_the_recipes(source: str, tokenizer: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gpt2"
    make("gpt2", vocab_size=300).save_pretrained(folder)
    values = recipe_values(tokenizer, tmp_path / "run")
    spec = {"path": str(folder)} if source == "path" else {"from_teacher": {"path": str(folder), "layers": [0, 2]}}

    def built(config: dict[str, Any]) -> Any:
        recipe = Recipe.build({**values, "student": {**spec, "config": config}})
        return build_student(recipe, task_class("causal_lm")(recipe.task.options, recipe.data), 300)

    student, plain = built({"resid_pdrop": 0.25, "attn_pdrop": 0.0}), built({})
    rates = {name: module.p for name, module in student.named_modules() if isinstance(module, nn.Dropout)}
    assert {rate for name, rate in rates.items() if "resid" in name} == {0.25}
    assert {rate for name, rate in rates.items() if "attn_dropout" in name} == {0.0}
    torch.testing.assert_close(student.state_dict(), plain.state_dict(), rtol=0, atol=0)
    refused = (
        ({"n_layer": 2}, r"student\.config\.n_layer: expected dropout or token ids"),
        ({"n_head": 2}, r"student\.config\.n_head: expected dropout or token ids"),  # the same shapes, another function
        ({"tie_word_embeddings": False}, r"student\.config\.tie_word_embeddings: expected dropout or token ids"),
        ({"resid_drop": 0.1}, r"student\.config\.resid_drop: unknown key; did you mean 'resid_pdrop'\?"),
        ({"dtype": "bfloat16"}, r"student\.config\.dtype: expected dropout"),
    )
    for config, line in refused:
        with pytest.raises(ValueError, match=line) as error:
            built(config)
        assert "\n" not in str(error.value)


def test_a_config_beside_a_function_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    values = recipe_values(tokenizer, tmp_path / "run")
    with pytest.raises(ValueError, match=r"student.*config: it is a transformers model's, but function is given"):
        Recipe.build({**values, "student": {"function": "my_student:make", "config": {"dropout": 0.1}}})


def test_bfloat16_weights_leave_rotary_frequencies_as_they_are() -> None:
    model = make("llama")
    before = model.model.rotary_emb.inv_freq.clone()
    cast_weights(model, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
    assert cut_out(model, [0], None, None, "student").model.rotary_emb.inv_freq.dtype == torch.float32


# Runs of a whole recipe


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def student_values(**changes: Any) -> dict[str, Any]:
    config = {**LLAMA, "num_hidden_layers": 2, "vocab_size": 300, "max_position_embeddings": 64}
    return {"model_type": "llama", "config": config, **changes}


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in row]


def run(tokenizer: Path, out: Path, **changes: Any) -> Path:
    values = recipe_values(tokenizer, out, **{"steps": 4, "student": student_values(), **changes})
    return distill(Recipe.build(values), say=lambda line: None).model


def test_adapters_train_alone_and_are_exported_merged(tokenizer: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = run(tokenizer, tmp_path / "base", steps=1)
    student = {"path": str(base), "lora": {"rank": 2, "modules": ["q_proj", "v_proj"]}}
    changes = {"student": student, "save_every": 2, "optimizer": {"lr": 0.05}}
    whole = run(tokenizer, tmp_path / "whole", steps=4, **changes)
    original = AutoModelForCausalLM.from_pretrained(base)
    merged = AutoModelForCausalLM.from_pretrained(whole)
    changed = {n for (n, a), b in zip(original.named_parameters(), merged.parameters(), strict=True) if not torch.equal(a, b)}
    assert changed == {f"model.layers.{i}.self_attn.{m}.weight" for i in (0, 1) for m in ("q_proj", "v_proj")}
    adapted = peft.PeftModel.from_pretrained(original, whole / "adapter")
    assert torch.allclose(logits_in(adapted(IDS)), logits_in(merged(IDS)), atol=1e-5)

    constant = {**changes, "optimizer": {"lr": 0.05, "schedule": "constant"}}
    straight = run(tokenizer, tmp_path / "straight", steps=4, eval_every=1, keep_best=True, **constant)
    run(tokenizer, tmp_path / "resumed", steps=2, **constant)
    resumed = run(tokenizer, tmp_path / "resumed", steps=4, **constant)
    assert (resumed / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()


def step_of(values: dict[str, Any]) -> DistillStep:
    recipe = Recipe.build(values)
    task = task_class(recipe.task.name)(recipe.task.options, recipe.data)
    torch.manual_seed(0)
    student = build_student(recipe, task, 300)
    objective = objective_class(recipe.method.name)(recipe.method.options, Setting(student, (), task))
    return DistillStep(student, objective, task).name_head()


BATCH = Batch(torch.arange(24).reshape(2, 12) % 50 + 3, torch.arange(24).reshape(2, 12) % 37 + 4)


def test_a_frozen_head_gets_no_gradient_and_an_adapted_one_is_not_passed_by(tokenizer: Path) -> None:
    pytest.importorskip("peft")
    values = recipe_values(tokenizer, Path("unused"), student=student_values(lora={"modules": ["q_proj"]}))
    step = step_of(values)
    assert step.head is not None
    assert not step.head.weight.requires_grad
    step(BATCH, num_items=24)[0].backward()
    assert step.head.weight.grad is None
    assert {n for n, p in step.named_parameters() if p.grad is not None} == {
        n for n, _ in step.named_parameters() if "lora_" in n
    }
    values["student"] = student_values(lora={"modules": ["q_proj", "lm_head"]})
    step = step_of(values)
    assert step.head is None
    adapter = step.student.base_model.model.lm_head.lora_B["default"].weight
    with torch.no_grad():
        adapter.normal_()
    loss = step(BATCH, num_items=24)[0]
    plain = nn.functional.cross_entropy(logits_in(call(step.student, BATCH.by_name)).flatten(0, 1), BATCH.labels.flatten())
    assert torch.allclose(loss, plain)
    loss.backward()
    assert adapter.grad.abs().sum() > 0


def test_gradient_checkpointing_gives_the_same_gradients(tokenizer: Path) -> None:
    found = []
    for kept in (False, True):
        student = student_values(gradient_checkpointing=kept)
        step = step_of(recipe_values(tokenizer, Path("unused"), student=student)).train()
        assert step.student.is_gradient_checkpointing == kept
        step(BATCH, num_items=24)[0].backward()
        found.append([p.grad for p in step.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_mixture_of_experts_adds_its_own_loss(tokenizer: Path) -> None:
    config = {**LLAMA, "num_hidden_layers": 1, "vocab_size": 300, "num_local_experts": 4, "num_experts_per_tok": 2,
              "output_router_logits": True, "router_aux_loss_coef": 0.5}  # fmt: skip
    step = step_of(recipe_values(tokenizer, Path("unused"), student={"model_type": "mixtral", "config": config})).eval()
    loss, metrics = step(BATCH, num_items=24)
    output = step.student(**BATCH.by_name)
    plain = nn.functional.cross_entropy(output.logits.flatten(0, 1), BATCH.labels.flatten())
    assert output.aux_loss.item() > 0
    assert torch.allclose(loss, plain + 0.5 * output.aux_loss)
    assert torch.allclose(metrics["auxiliary"].total / metrics["auxiliary"].count, 0.5 * output.aux_loss)
    # A batch that is a third of its step has a third of the weight.
    assert torch.allclose(step(BATCH, num_items=72)[0], loss / 3)


def test_bfloat16_students_train_and_are_stored_so(tokenizer: Path, tmp_path: Path) -> None:
    model = run(tokenizer, tmp_path / "run", steps=12, student=student_values(dtype="bfloat16"))
    assert json.loads((model / "config.json").read_text())["dtype"] == "bfloat16"
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


@pytest.mark.slow
def test_a_compiled_student_is_compiled_once_and_has_the_same_losses(tokenizer: Path) -> None:
    found: list[list[float]] = []
    for compiled in (False, True):
        step = step_of(recipe_values(tokenizer, Path("unused"), student=student_values()))
        assert step.head is not None
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        if compiled:
            step.student.compile()
        optimizer = torch.optim.SGD(step.parameters(), 0.02)
        found.append([])
        for _ in range(4):
            loss = step(BATCH, num_items=24)[0]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found[-1].append(loss.item())
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[1][-1] < found[1][0]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_heads_are_found_through_an_adapter() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    head = find_head(model, {"input_ids": IDS})
    assert head is not None
    view = look(model.eval(), {"input_ids": IDS}, head=head)
    assert torch.allclose(view.logits, logits_in(model(IDS)), atol=1e-6)


@pytest.mark.parametrize("model_type", ["bart", "marian"])
def test_an_adapted_model_with_a_bias_after_its_head_has_the_same_logits_through_it(model_type: str) -> None:
    peft = pytest.importorskip("peft")
    model = make(model_type, tie_word_embeddings=True)
    model.final_logits_bias.copy_(torch.randn_like(model.final_logits_bias))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
    inputs = inputs_of(model)
    head = find_head(adapted, inputs)
    assert head is not None
    assert head.biased_by is model
    want = logits_in(call(adapted, inputs))
    with head.entered() as entrance:
        call(adapted, inputs)
    torch.testing.assert_close(head.logits(entrance.hidden), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits_in(call(adapted, inputs)), want, rtol=0, atol=0)
