"""Several teachers, schedules, phases and packed rows: what they equal, and exact resume across them."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from test_train_faults import cached, make_cache, quiet, rows_of
from tiny_runs import STUDENT, make_sequences, make_tokenizer, recipe_values
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from kdfast import kd_loss
from kdfast.models.load import load_folder
from kdfast.train import Recipe, distill, evaluate
from kdfast.train.data import LengthOrder, Order, PackedOrder, Source, Subset, lengths_of
from kdfast.train.inputs import open_inputs
from kdfast.train.metrics import MetricLog
from kdfast.train.objective import Metric, Setting
from kdfast.train.recipes.word_kd import WordKD, WordKDOptions
from kdfast.train.step import DistillStep
from kdfast.train.tasks import task_class
from kdfast.train.teachers import CachedTeacher, LiveTeacher

THREADS = 1


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def cache(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("cache") / "one", tokenizer)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two teachers of one vocabulary."""
    made = []
    for i in (1, 2):
        torch.manual_seed(i)
        made.append(tmp_path_factory.mktemp("teacher"))
        config = GPT2Config(vocab_size=300, n_embd=8 * i, n_layer=1, n_head=2, n_positions=32, initializer_range=0.5)
        GPT2LMHeadModel(config).save_pretrained(made[-1])
    return made


def test_teachers_are_scored_beside_the_student(tokenizer: Path, folders: list[Path], tmp_path: Path) -> None:
    teachers = [{"path": str(folder)} for folder in folders]
    values = recipe_values(tokenizer, tmp_path / "run", method="word_kd", teachers=teachers, steps=2, alignment=False)
    plain = distill(Recipe.build({**values, "out": str(tmp_path / "plain")}), say=quiet)
    said: list[str] = []
    scored = distill(Recipe.build({**values, "eval_teacher": True}), say=said.append)
    found = json.loads((tmp_path / "run" / "summary.json").read_text())["teachers_evaluation"]
    validation = open_inputs(Recipe.build(values), tmp_path / "data").validation
    assert validation is not None
    for i, folder in enumerate(folders):
        want = evaluate(load_folder(folder, "teacher"), validation)
        assert found[f"teachers[{i}]"] == pytest.approx(want)
        assert f"teachers[{i}]: validation perplexity {want.ppl:.2f}, top-1 {want.top1:.1%}" in said
    assert (scored.model / "model.safetensors").read_bytes() == (plain.model / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"^eval_teacher: without a live teacher expected none, got True"):
        distill(Recipe.build({**values, "method": "supervised", "teachers": [], "eval_teacher": True}), say=quiet)


def test_live_teachers_equal_kd_loss_with_teacher_weights(tokenizer: Path, folders: list[Path]) -> None:
    teachers = [LiveTeacher(load_folder(f, "teacher"), w) for f, w in zip(folders, (2.0, 1.0), strict=True)]
    torch.manual_seed(0)
    student = GPT2LMHeadModel(GPT2Config(vocab_size=300, **STUDENT)).eval()
    task = task_class("causal_lm")(None, None)
    objective = WordKD(WordKDOptions(temperature=2.0, hard_weight=0.5), Setting(student, teachers, task))
    step = DistillStep(student, objective, task).name_head()
    for teacher in teachers:
        teacher.name_head(task.example(teacher.model))
    batch = make_sequences(tokenizer).batch(range(3))
    loss, _ = step(batch, [teacher(batch) for teacher in teachers], batch.count())
    loss.backward()
    got = student.transformer.h[0].mlp.c_fc.weight.grad.clone()
    student.zero_grad()
    logits = [model(batch.input_ids).logits for model in (student, *(t.model for t in teachers))]
    want = kd_loss(
        logits[0], logits[1:], batch.labels, temperature=2.0, soft_weight=1.0, hard_weight=0.5, teacher_weights=[2.0, 1.0]
    )
    want.backward()
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got, student.transformer.h[0].mlp.c_fc.weight.grad, rtol=1e-4, atol=1e-6)


def test_precision_is_that_of_the_whole_step(
    tokenizer: Path, folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Student and teacher; the weights stay as they are, and so do the losses but for the rounding."""
    called: set[tuple[int, torch.dtype]] = set()
    plain = GPT2LMHeadModel.forward

    def forward(self: GPT2LMHeadModel, *args: Any, **kwargs: Any) -> Any:
        width = self.config.n_embd
        called.add((width, self.transformer.h[0].mlp.c_fc(torch.ones(1, width)).dtype))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(GPT2LMHeadModel, "forward", forward)
    losses = {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        called.clear()
        values = recipe_values(tokenizer, tmp_path / precision, steps=4, log_every=1, precision=precision, alignment=False)
        teacher = {"path": str(folders[0])}
        run = distill(Recipe.build({**values, "teacher": teacher, "method": "word_kd"}), say=quiet)
        assert {(8, dtype), (16, dtype)} <= called
        losses[precision] = [row["loss"] for row in rows_of(tmp_path / precision) if "loss" in row]
        assert load_file(run.model / "model.safetensors")["transformer.wte.weight"].dtype == torch.float32
    torch.testing.assert_close(torch.tensor(losses["bf16"]), torch.tensor(losses["fp32"]), rtol=2e-2, atol=1e-3)
    assert losses["bf16"] != losses["fp32"]


def test_an_ensemble_trains_from_folders_and_from_caches(
    tokenizer: Path, folders: list[Path], cache: Path, tmp_path: Path
) -> None:
    live = [{"path": str(folders[0]), "weight": 2}, {"path": str(folders[1])}]
    values = recipe_values(tokenizer, tmp_path / "live", method="word_kd", teachers=live, steps=2, alignment=False)
    assert distill(Recipe.build(values), say=quiet).steps == 2
    # Twice the same teacher, whatever the weights, is that teacher.
    alone = cached(tokenizer, tmp_path / "alone", cache, log_every=1)
    twice = [{"cache": str(cache), "weight": 2}, {"cache": str(cache)}]
    distill(alone, say=quiet)
    distill(cached(tokenizer, tmp_path / "twice", cache, teacher=None, teachers=twice, log_every=1), say=quiet)
    losses = [[row["loss"] for row in rows_of(tmp_path / name)] for name in ("alone", "twice")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_caches_of_other_documents_are_refused(tokenizer: Path, cache: Path, tmp_path: Path) -> None:
    other = make_cache(tmp_path / "other", tokenizer, 11)
    twice = [{"cache": str(cache)}, {"cache": str(other)}]
    with pytest.raises(ValueError, match=r"^teachers\[1\]\.cache: expected records 12 as in teachers\[0\]"):
        distill(cached(tokenizer, tmp_path / "run", cache, teacher=None, teachers=twice), say=quiet)


def test_schedules_step_through_what_a_cache_holds(tokenizer: Path, cache: Path, tmp_path: Path) -> None:
    method = {
        "name": "word_kd", "temperature": {"start": 4.0, "end": 1.0},
        "soft_weight": {"start": 1.0, "end": 0.0, "shape": "cosine"}, "hard_weight": 0.25,
    }  # fmt: skip
    beyond = {**method, "temperature": {"start": 8.0, "end": 1.0}}
    with pytest.raises(ValueError, match=r"^method\.temperature: 8 is not in the cache, which holds 1, 2, 4; capture it too"):
        distill(cached(tokenizer, tmp_path / "beyond", cache, method=beyond), say=quiet)
    distill(cached(tokenizer, tmp_path / "run", cache, method=method, steps=7, log_every=1), say=quiet)
    rows = rows_of(tmp_path / "run")
    assert [row["temperature"] for row in rows] == [4.0, 4.0, 2.0, 2.0, 2.0, 1.0, 1.0]
    assert [row["soft_weight"] for row in rows] == pytest.approx([1, 0.9330127, 0.75, 0.5, 0.25, 0.0669873, 0])
    for row in rows:
        soft = row["soft_weight"] * row["temperature"] ** 2 * row.get("kl_at_T", 0)
        assert row["loss"] == pytest.approx(soft + 0.25 * row["hard"], rel=1e-4)


def test_phases_resume_exactly_across_their_border(tokenizer: Path, folders: list[Path], tmp_path: Path) -> None:
    """The second phase has parameters and options of its own; the checkpoint lies one step before the border, on it, behind."""
    soft = {"steps": 3, "method": {"name": "word_kd", "temperature": 2.0}}
    mixed = {"steps": 3, "method": {"name": "my_objective:MyObjective"}, "optimizer": {"lr": 1e-2, "weight_decay": 0.5}}
    values: dict[str, Any] = recipe_values(
        tokenizer, tmp_path / "whole", teacher={"path": str(folders[0])}, phases=[soft, mixed], save_every=1, keep=9,
        log_every=1, alignment=False,
    )  # fmt: skip
    del values["steps"]
    whole = distill(Recipe.build(values), say=quiet)
    assert whole.steps == 6
    rows = rows_of(whole.out)
    assert ["my_gap" in row for row in rows if "loss" in row] == [False] * 3 + [True] * 3
    final = "checkpoints/step-00000006/training.safetensors"
    for last in (2, 3, 4):
        out = tmp_path / str(last)
        shutil.copytree(whole.out, out)
        (out / "result.json").unlink()
        for step in range(last + 1, 7):
            shutil.rmtree(out / "checkpoints" / f"step-{step:08d}")
        distill(Recipe.build({**values, "out": str(out)}), say=quiet)
        kept, want = load_file(out / final), load_file(whole.out / final)
        assert kept.keys() == want.keys()
        different = [name for name, value in want.items() if not torch.equal(kept[name], value)]
        assert not different, (last, different)
        assert [row.get("loss") for row in rows_of(out)] == [row.get("loss") for row in rows]


def make_llama() -> LlamaForCausalLM:
    torch.manual_seed(5)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=None, eos_token_id=None, attn_implementation="sdpa",
    )).eval()  # fmt: skip


def test_packed_rows_are_their_documents(cache: Path) -> None:
    """Loss and gradients; the padding at the end of a row counts nowhere."""
    model = make_llama()
    packed = CachedTeacher(cache, pack=40)
    task = task_class("causal_lm")(None, None)
    options = WordKDOptions(temperature=2.0, hard_weight=0.5)
    step = DistillStep(model, WordKD(options, Setting(model, [packed], task)), task).name_head()
    groups = [[0, 1, 3], [2], [4, 5]]
    numbers = [i for group in groups for i in group]
    lengths = packed.reader.lengths()
    assert all(sum(int(lengths[i]) for i in group) <= 40 for group in groups)
    losses, gradients = [], []
    for batch in (packed.batch(groups), packed.batch(numbers)):
        model.zero_grad()
        loss, _ = step(batch, packed_views(packed, batch), batch.count())
        loss.backward()
        losses.append((loss.item(), batch.count()))
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert losses[0][1] == losses[1][1]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
    for name, value in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], value, rtol=1e-4, atol=1e-6)


def packed_views(teacher: CachedTeacher, batch: Any) -> list[Any]:
    return [teacher(batch)]


def test_the_padding_of_a_packed_row_is_seen_by_nobody(cache: Path) -> None:
    model = make_llama()
    batch = CachedTeacher(cache, pack=40).batch([[0, 1], [5]])
    assert batch.labels is not None
    used = int((batch.labels[1] != -100).nonzero().max()) + 1
    assert used < 40, "there is padding"
    changed = batch.input_ids.clone()
    changed[1, used + 1 :] = 7
    position_ids = batch.by_name["position_ids"]
    outputs = [model(input_ids=ids, position_ids=position_ids).logits for ids in (batch.input_ids, changed)]
    torch.testing.assert_close(outputs[0][0], outputs[1][0], rtol=0, atol=0)
    torch.testing.assert_close(outputs[0][1, :used], outputs[1][1, :used], rtol=0, atol=0)


def test_a_packed_run_visits_every_document_once_an_epoch_and_resumes(tokenizer: Path, cache: Path, tmp_path: Path) -> None:
    recipe = cached(tokenizer, tmp_path / "unused", cache, data={"pack": 40, "validation_share": 0.25})
    inputs = open_inputs(recipe, tmp_path)
    lengths = inputs.caches[0].reader.lengths()[inputs.train.rows]  # type: ignore[attr-defined]
    order = PackedOrder(lengths, 40, 1)
    rows = order.take(0, len(order._epoch(0)))
    assert sorted(i for row in rows for i in row) == list(range(9))
    values = {"steps": 6, "save_every": 3, "batch_size": 2, "data": {"pack": 40, "validation_share": 0.25}}
    whole = distill(cached(tokenizer, tmp_path / "whole", cache, **values), say=quiet)
    shutil.copytree(whole.out, tmp_path / "cut")
    (tmp_path / "cut" / "result.json").unlink()
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000006")
    distill(cached(tokenizer, tmp_path / "cut", cache, **values), say=quiet)
    assert (whole.model / "model.safetensors").read_bytes() == (tmp_path / "cut/model/model.safetensors").read_bytes()
    states = [json.loads((f / "checkpoints/step-00000006/state.json").read_text()) for f in (whole.out, tmp_path / "cut")]
    assert states[0]["rows"] == states[1]["rows"] == 12


def make_lstm(vocab_size: int = 300, width: int = 16, layers: int = 1, dropout: float = 0.0) -> nn.Module:
    """The model of `examples/lstm`."""
    path = Path(__file__).parent.parent / "examples" / "lstm" / "lstm.py"
    found = importlib.util.module_from_spec(importlib.util.spec_from_file_location("lstm", path))
    found.__spec__.loader.exec_module(found)
    return found.make(vocab_size, width, layers, dropout)


def test_an_lstm_learns_from_a_wider_one_through_its_head(tokenizer: Path, tmp_path: Path) -> None:
    """Teacher and student are made by a function, the teacher's weights are those of its run."""
    wide = {"function": f"{__name__}:make_lstm", "arguments": {"width": 24, "layers": 2}}
    teacher = distill(Recipe.build(recipe_values(tokenizer, tmp_path / "teacher", student=wide)), say=lambda line: None)
    said: list[str] = []
    method = {"name": "word_kd", "temperature": 2.0, "soft_weight": 0.7, "hard_weight": 0.3}
    narrow = {"function": f"{__name__}:make_lstm", "arguments": {"dropout": 0.1}}
    taught = {"method": method, "student": narrow, "teacher": {**wide, "weights": str(teacher.model)}}
    values = recipe_values(tokenizer, tmp_path / "student", **taught)
    distill(Recipe.build(values), say=said.append)
    assert not any("logits are formed whole" in line for line in said)
    first = json.loads((tmp_path / "student" / "metrics.jsonl").read_text().splitlines()[0])
    # What the teacher says of the first batch is what its own run ended in, not what fresh weights would say.
    assert first["teacher_ppl"] == pytest.approx(teacher.evaluation.ppl, rel=0.3)
    bare: list[str] = []
    distill(Recipe.build({**values, "out": str(tmp_path / "bare"), "teacher": wide, "steps": 1}), say=bare.append)
    assert f"teacher: no weights named, it is as {__name__}:make_lstm makes it" in bare
    assert not any("no weights named" in line for line in said)
    other = {**values, "out": str(tmp_path / "other"), "student": {**wide, "arguments": {"vocab_size": 310}}}
    with pytest.raises(ValueError, match=r"teacher: its vocabulary has 300 ids, the student's 310"):
        distill(Recipe.build(other), say=said.append)


def test_batches_of_like_length_are_drawn_at_random_and_anywhere_alike() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 1003)
    order = LengthOrder(lengths, 8, seed=3)
    epoch = order.take(0, 1000)
    assert len(set(epoch)) == 1000
    assert order.n == 1000
    assert LengthOrder(lengths, 8, seed=3).take(1504, 24) == order.take(1504, 24) == [*order.take(1000, 1000), *epoch][504:528]
    assert sorted(order.take(1000, 1000)) != sorted(epoch)  # other rows are left out

    def padded(order: Order) -> int:
        batches = [lengths[order.take(start, 8)] for start in range(0, 1000, 8)]
        return sum(8 * int(batch.max()) for batch in batches)

    whole = int(lengths.sum())
    assert padded(order) < 1.1 * whole
    assert padded(Order(1003, 3)) > 1.6 * whole
    means = [lengths[order.take(start, 8)].mean() for start in range(0, 1000, 8)]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3  # neighbours are not of like length
    assert sorted(LengthOrder(lengths[:3], 8, seed=0).take(0, 3)) == [0, 1, 2]


def test_rows_without_lengths_are_not_grouped(tokenizer: Path, tmp_path: Path) -> None:
    class Bare:
        def __len__(self) -> int:
            return 4

    with pytest.raises(ValueError, match=r"data\.group_by_length: expected rows with lengths, got Bare"):
        lengths_of(cast(Source, Bare()))
    values = recipe_values(tokenizer, tmp_path / "run")
    found = open_inputs(Recipe.build(values), tmp_path / "read")
    some = Subset(found.train, [3, 1])
    assert lengths_of(some).tolist() == [len(some.batch([i]).input_ids[0]) for i in range(2)]


def test_a_run_folder_knows_keys_that_are_newer(tokenizer: Path, tmp_path: Path) -> None:
    values = recipe_values(tokenizer, tmp_path / "run", steps=2)
    distill(Recipe.build(values), say=lambda line: None)
    file = tmp_path / "run" / "recipe.yaml"
    kept = [line for line in file.read_text().splitlines() if "group_by_length" not in line and "unlabelled" not in line]
    file.write_text("\n".join(kept) + "\n")
    said: list[str] = []
    distill(Recipe.build(values), say=said.append)
    assert said == [f"{tmp_path / 'run'}: finished before; nothing to do"]
    with pytest.raises(ValueError, match=r"out: .* holds a run that differs in data\.group_by_length"):
        distill(Recipe.build({**values, "data": {**values["data"], "group_by_length": True}}), say=said.append)


def test_a_metric_takes_no_column_of_every_row(tmp_path: Path) -> None:
    log = MetricLog(Recipe.build({"student": {"model_type": "gpt2"}}), tmp_path, Accelerator(cpu=True))
    one = torch.ones(())
    for name in ("loss", "step", "lr", "temperature"):
        with pytest.raises(ValueError, match=f"^method: a metric is called '{name}', a column that every step has"):
            log.add(1, 0.1, one, one, [{name: Metric(one, one)}], one, {"temperature": 2.0})
    log.add(1, 0.1, one, one, [{"own": Metric(one, one)}], one, {"temperature": 2.0})
    row = log.flush()
    assert (row["own"], row["loss"], row["temperature"]) == (1.0, 1.0, 2.0)
