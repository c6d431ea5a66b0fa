"""What stops or misleads a run: every refusal is one line before the first step, and odd data do no harm."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_translation
import torch
from safetensors.torch import load_file
from tiny_runs import LABELLED, STUDENT, TEXT, Rows, make_sequences, make_tokenizer, quiet, recipe_values, rows_of, untimed
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from kdfast import topk_targets
from kdfast.cache import AlignmentError, CacheError, CacheMismatch, CacheWriter, build, check_alignment
from kdfast.cli import eval as cli_eval
from kdfast.text import IGNORE, TextData
from kdfast.text.tokenizers import file_hash, train_tokenizer
from kdfast.train import Batch, Recipe, distill
from kdfast.train.ahead import Ahead, Read
from kdfast.train.documents import Documents
from kdfast.train.inputs import open_inputs
from kdfast.train.objective import Setting
from kdfast.train.recipes.supervised import Supervised, SupervisedOptions
from kdfast.train.step import DistillStep

THREADS = 1
BARE = torch.full((8, 16), IGNORE)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def make_cache(path: Path, tokenizer: Path, records: int = 12, gain: float = 6.0) -> Path:
    """Records of 8 to 20 tokens, all of the vocabulary kept at T = 1, 2 and 4."""
    generator = torch.Generator().manual_seed(0)
    temperatures = (1.0, 2.0, 4.0)
    with CacheWriter(
        path, vocab_size=300, k=300, teacher="x", tokenizer_hash=file_hash(tokenizer), temperatures=temperatures
    ) as writer:
        for i in range(records):
            ids = torch.randint(300, (8 + 5 * i % 13,), generator=generator)
            logits = gain / 6 * torch.randn(len(ids), 300, generator=generator)
            logits[torch.arange(len(ids)), ids.roll(-1)] += gain
            writer.add(ids, topk_targets(logits, 300, temperatures=temperatures))
    return path


@pytest.fixture(scope="module")
def cache(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("cache") / "one", tokenizer)


def cached(tokenizer: Path, out: Path, cache: Path, **changes: Any) -> Recipe:
    values = recipe_values(tokenizer, out, method="word_kd", teacher={"cache": str(cache)}, data={}, steps=2)
    return Recipe.build({**values, **changes})


def test_a_cache_takes_no_other_data(tokenizer: Path, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^train_data: the teacher is a cache"):
        distill(cached(tokenizer, tmp_path / "run", cache), train_data=Rows(LABELLED), say=quiet)
    with pytest.raises(ValueError, match=r"^data\.train: the teacher is a cache"):
        distill(cached(tokenizer, tmp_path / "run", cache, data={"train": [str(TEXT)]}), say=quiet)


@pytest.mark.parametrize("pack", [None, 24], ids=["padded", "packed"])
def test_a_share_of_a_cache_is_held_out(pack: int | None, tokenizer: Path, cache: Path, tmp_path: Path) -> None:
    recipe = cached(tokenizer, tmp_path / "run", cache, data={"validation_share": 0.25, "pack": pack})
    inputs = open_inputs(recipe, tmp_path)
    assert inputs.validation is not None
    assert (len(inputs.train), len(inputs.validation)) == (9, 3)
    result = distill(recipe, say=quiet)
    assert result.evaluation is not None
    assert result.evaluation.tokens == inputs.validation.batch(range(3)).count()


@pytest.mark.parametrize(
    ("changes", "train", "validation", "message"),
    [
        pytest.param(
            {}, Rows(LABELLED), Rows(BARE), r"^data\.validation: .* labelled position in 8 rows", id="bare-validation"
        ),
        pytest.param({}, Rows(LABELLED), Rows(LABELLED[:0]), r"^data\.validation: .* one row", id="empty-validation"),
        pytest.param({}, Rows(LABELLED[:0]), None, r"^data\.train: expected training rows", id="empty-train"),
        pytest.param(
            {}, Rows(LABELLED + 300), None, r"^data: label 30\d lies outside the vocabulary of 300", id="label-too-big"
        ),
        pytest.param({"precision": "fp16", "shard": "fsdp"}, None, None, r"^precision: fp16 expects a GPU", id="fp16"),
        pytest.param({"shard": "fsdp"}, None, None, r"^shard: fsdp expects several processes", id="fsdp-alone"),
        pytest.param({"data": {"train": ["nowhere"]}}, None, None, r"^data\.train: .*'nowhere'", id="no-such-file"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    changes: dict[str, Any], train: Any, validation: Any, message: str, tokenizer: Path, tmp_path: Path
) -> None:
    recipe = Recipe.build(recipe_values(tokenizer, tmp_path / "run", **changes))
    with pytest.raises(ValueError, match=message) as error:
        distill(recipe, train_data=train, validation_data=validation, say=quiet)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_teacher_of_another_vocabulary_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=304, n_embd=16, n_layer=1, n_head=2, n_positions=32)).save_pretrained(tmp_path / "t")
    values = recipe_values(tokenizer, tmp_path / "run", method="word_kd", teacher={"path": str(tmp_path / "t")})
    with pytest.raises(ValueError, match=r"^teacher: its vocabulary has 304 ids, the student's 300"):
        distill(Recipe.build(values), say=quiet)


@pytest.mark.parametrize("labels", [BARE, torch.where(torch.arange(8)[:, None] % 2 == 0, LABELLED, BARE)], ids=["none", "half"])
def test_steps_and_micro_batches_without_labels(labels: torch.Tensor, tokenizer: Path, tmp_path: Path) -> None:
    values = recipe_values(tokenizer, tmp_path / "run", steps=6, batch_size=1, accumulation=2, log_every=1)
    distill(Recipe.build(values), train_data=Rows(labels), say=quiet)
    for row in rows_of(tmp_path / "run"):
        assert row["loss"] is not None
        counted = "hard" in row
        assert (row["loss"] > 1) == counted
        assert counted or (row["loss"] == 0 and row["grad_norm"] == 0)


def test_another_precision_in_one_process(tokenizer: Path, tmp_path: Path) -> None:
    for precision in ("fp32", "bf16", "fp32"):
        values = recipe_values(tokenizer, tmp_path / precision, steps=1, precision=precision)
        assert distill(Recipe.build(values), say=quiet).evaluation is not None


def test_a_cache_of_one_record_and_a_batch_larger_than_the_data(tokenizer: Path, tmp_path: Path) -> None:
    path = make_cache(tmp_path / "single", tokenizer, 1)
    distill(cached(tokenizer, tmp_path / "run", path, batch_size=5, log_every=100), say=quiet)
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2]
    for file in ("run.json", "result.json", "checkpoints/step-00000002/state.json"):
        json.loads((tmp_path / "run" / file).read_text(), parse_constant=pytest.fail)


def test_the_alignment_guard_has_a_margin_and_a_key(tokenizer: Path, tmp_path: Path) -> None:
    ids = torch.randint(300, (4, 32))
    wrong = -1.0 * torch.nn.functional.one_hot(ids, 300)
    near = check_alignment(topk_targets(0.3 * wrong, 300), ids)
    assert 0 < near.at - torch.tensor(300.0).log() < 0.5
    with pytest.raises(AlignmentError, match="above log V"):
        check_alignment(topk_targets(3 * wrong, 300), ids)
    bad = make_cache(tmp_path / "bad", tokenizer, gain=-6.0)
    with pytest.raises(AlignmentError):
        distill(cached(tokenizer, tmp_path / "run", bad, batch_size=12), say=quiet)
    assert distill(cached(tokenizer, tmp_path / "run", bad, batch_size=12, alignment=False), say=quiet).steps == 2


def test_the_auxiliary_loss_of_experts_is_kept() -> None:
    config = MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=4, output_router_logits=True, router_aux_loss_coef=10.0,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    ids = torch.randint(50, (2, 8))
    step = DistillStep(model, Supervised(SupervisedOptions(), Setting(model, (), None)))
    loss, metrics = step(Batch(ids, ids), None, 16)
    out = model(ids)
    plain = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), ids.flatten()) + 10 * out.aux_loss
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(metrics["auxiliary"].total / metrics["auxiliary"].count, 10 * out.aux_loss)


def test_a_student_from_a_folder_keeps_its_tokenizer(tokenizer: Path, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    GPT2LMHeadModel(GPT2Config(vocab_size=300, **STUDENT, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    settings = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    values = recipe_values(tokenizer, tmp_path / "run", steps=1, student={"path": str(folder)})
    model = distill(Recipe.build({**values, "tokenizer": None}), say=quiet).model
    before, after = (AutoTokenizer.from_pretrained(path) for path in (folder, model))
    assert {p.name for p in folder.iterdir()} <= {p.name for p in model.iterdir()}
    assert before.eos_token == after.eos_token == "<|endoftext|>"
    chat = [{"role": "user", "content": "import json"}]
    assert before.apply_chat_template(chat, tokenize=False) == after.apply_chat_template(chat, tokenize=False) == "import json"
    assert before("def f(x):")["input_ids"] == after("def f(x):")["input_ids"]


def test_a_finished_run_goes_on_when_asked_for_more_steps(tokenizer: Path, tmp_path: Path) -> None:
    values = recipe_values(tokenizer, tmp_path / "run", steps=2)
    distill(Recipe.build(values), say=quiet)
    said: list[str] = []
    assert distill(Recipe.build({**values, "steps": 4}), say=said.append).steps == 4
    assert any("finished 2 steps before; going on to 4" in line for line in said)
    assert [row["step"] for row in rows_of(tmp_path / "run") if "loss" in row] == [1, 2, 3, 4]
    (tmp_path / "run" / "result.json").unlink()  # as if it had been stopped
    distill(Recipe.build({**values, "steps": 5}), say=said.append)
    assert "steps: 4 when this run began, 5 now, and so its schedules from here on" in said
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(ValueError, match=r"^steps: .* has done 5 of them"):
        distill(Recipe.build({**values, "steps": 3}), say=quiet)


@pytest.mark.parametrize("precision", [None, 40], ids=["padded", "packed"])
def test_reading_ahead_changes_no_bit(precision: int | None, tokenizer: Path, cache: Path, tmp_path: Path) -> None:
    runs = [tmp_path / str(ahead) for ahead in (0, 1, 3)]
    for ahead, out in zip((0, 1, 3), runs, strict=True):
        distill(cached(tokenizer, out, cache, ahead=ahead, steps=5, data={"pack": precision}), say=quiet)
    models = [(out / "model" / "model.safetensors").read_bytes() for out in runs]
    assert models[0] == models[1] == models[2]
    assert untimed(runs[0]) == untimed(runs[1]) == untimed(runs[2])
    assert not [t for t in threading.enumerate() if t.name.startswith("kdfast-ahead")]


def test_an_error_while_reading_ahead_is_itself() -> None:
    class Gone(Exception):
        pass

    def read(step: int) -> Read:
        if step == 3:
            raise Gone
        return Read.of([Rows(LABELLED).batch([0])])

    seen: list[int] = []
    steps = Ahead(read, torch.device("cpu"), 2).steps(1, 9)
    with pytest.raises(Gone):
        seen.extend(step for step, _ in steps)
    assert seen == [1, 2]
    assert not [t for t in threading.enumerate() if t.name.startswith("kdfast-ahead")]


def test_documents_are_kept_until_a_file_changes(tokenizer: Path, tmp_path: Path) -> None:
    source = tmp_path / "text.py"
    source.write_text("x = 1\n" * 200)
    recipe = Recipe.build(recipe_values(tokenizer, tmp_path / "run", data={"train": [str(source)], "validation_share": 0.0,
                                                                          "sequence_length": 16}))  # fmt: skip
    first = open_inputs(recipe, tmp_path / "kept")
    made = (tmp_path / "kept" / "train" / "documents.json").stat().st_mtime_ns
    assert isinstance(first.train, Documents)
    assert open_inputs(recipe, tmp_path / "kept").digest == first.digest
    assert (tmp_path / "kept" / "train" / "documents.json").stat().st_mtime_ns == made
    source.write_text("y = 2\n" * 200)
    os.utime(source, ns=(made, made + 1))
    again = open_inputs(recipe, tmp_path / "kept")
    assert again.digest != first.digest
    assert not torch.equal(again.train.batch([0]).input_ids, first.train.batch([0]).input_ids)


def test_held_out_data_is_where_the_recipe_says(tokenizer: Path, cache: Path, tmp_path: Path) -> None:
    """A cache with text beside it is evaluated on the share of its files; who brings validation data loses none of the rest."""
    values = recipe_values(tokenizer, tmp_path / "a", method="word_kd", teacher={"cache": str(cache)}, steps=1)
    assert distill(Recipe.build(values), say=lambda line: None).evaluation is not None
    unshared = {**values, "data": {"train": [str(TEXT)], "glob": "*.py", "sequence_length": 32}}
    with pytest.raises(ValueError, match=r"^data\.train: the teacher is a cache.*data\.validation_share"):
        distill(Recipe.build({**unshared, "out": str(tmp_path / "b")}), say=lambda line: None)
    plain = Recipe.build(recipe_values(tokenizer, tmp_path / "c", steps=1))
    mine = make_sequences(tokenizer)
    whole = open_inputs(plain, tmp_path / "c", validation=mine)
    held_out = open_inputs(plain, tmp_path / "d")
    assert held_out.validation is not None
    assert len(whole.train) > len(held_out.train)
    assert whole.validation is mine


TIED = """
from torch import nn
class Tied(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.inputs, self.middle, self.head = nn.Embedding(300, size), nn.Linear(size, size), nn.Linear(size, 300, bias=False)
        self.head.weight = self.inputs.weight
        self.again = self.middle.weight
    def forward(self, input_ids):
        return self.head(self.middle(self.inputs(input_ids)).tanh())
"""


def test_a_module_with_tied_weights_is_exported_by_every_name(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tied_student.py").write_text(TIED)
    monkeypatch.syspath_prepend(str(tmp_path))
    student = {"function": "tied_student:Tied", "arguments": {"size": 8}}
    model = distill(Recipe.build(recipe_values(tokenizer, tmp_path / "run", student=student, steps=2)), say=quiet).model
    module = importlib.import_module("tied_student").Tied(8)
    module.load_state_dict(load_file(model / "model.safetensors"))
    again = recipe_values(tokenizer, tmp_path / "again", student=student, steps=2, init_from=str(model))
    assert distill(Recipe.build(again), say=quiet).evaluation is not None


def saved(folder: Path, tokenizer: Path | None, **config: Any) -> Path:
    """A GPT-2 in a folder, with its tokenizer."""
    made = GPT2Config(**{"vocab_size": 300, **STUDENT, "bos_token_id": 0, "eos_token_id": 0, **config})
    GPT2LMHeadModel(made).save_pretrained(folder)
    if tokenizer is not None:
        (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    return folder


def test_rows_longer_than_the_positions_of_a_model_are_refused(tokenizer: Path, cache: Path, tmp_path: Path) -> None:
    """An index error in the midst of a step on a CPU; on a GPU the end of the process."""

    def fails(match: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=match) as caught:
            distill(Recipe.build({**recipe_values(tokenizer, tmp_path / "run"), **changes}), say=quiet)
        assert "\n" not in str(caught.value)

    long = {"train": [str(TEXT)], "glob": "*.py", "sequence_length": 48}
    fails(
        r"^data: a row has 48 tokens, expected at most the 32 positions of the student; lower data\.sequence_length", data=long
    )
    short = {"model_type": "gpt2", "config": {**STUDENT, "n_positions": 16}}
    fails(r"^data: a row has 20 tokens, .* 16 positions of the student; capture shorter documents", student=short,
          method="word_kd", teacher={"cache": str(cache)}, data={})  # fmt: skip
    teacher = saved(tmp_path / "teacher", None, n_positions=24)
    fails(r"^data: a row has 32 tokens, .* 24 positions of the teacher", method="word_kd", teacher={"path": str(teacher)})
    packed = cached(tokenizer, tmp_path / "packed", cache, student=short, data={"pack": 16})
    assert distill(packed, say=quiet).steps == 2  # documents are cut there
    with pytest.raises(CacheError, match=r"^documents: one has 32 tokens, expected at most the 24 positions of the teacher"):
        build_cache(saved(tmp_path / "teacher", tokenizer, n_positions=24), tmp_path, length=32)


def build_cache(teacher: Path, folder: Path, length: int = 16, **options: Any) -> Any:
    data = TextData(paths=(str(TEXT),), glob="*.py", sequence_length=length)
    return build(teacher, data, folder / "built", k=4, say=quiet, **options)


def test_a_model_with_fewer_ids_than_the_tokenizer_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    small = saved(tmp_path / "small", tokenizer, vocab_size=50)
    message = r"its vocabulary has 50 ids, expected at least the tokenizer's 300"
    with pytest.raises(ValueError, match=f"^teacher: {message}"):
        build_cache(small, tmp_path)
    with pytest.raises(ValueError, match=f"^model: {message}"):
        run_eval(str(small), "--data", str(TEXT), "--glob", "*.py", "--sequence-length", "16")


def run_eval(*words: str) -> None:
    parser = argparse.ArgumentParser()
    cli_eval.add_parser(parser.add_subparsers())
    cli_eval.run(parser.parse_args(["eval", *words]))


@pytest.mark.parametrize(("device", "message"), [("gpu7", "expected cpu, cuda, cuda:1 or the like, got 'gpu7'"),
                                                 ("cuda:99", "expected a device of this machine, which has")])  # fmt: skip
def test_a_device_that_is_not_there_is_one_line(device: str, message: str, tokenizer: Path, tmp_path: Path) -> None:
    model = saved(tmp_path / "model", tokenizer)
    with pytest.raises(ValueError, match=f"^--device: {message}"):
        run_eval(str(model), "--data", str(TEXT), "--glob", "*.py", "--sequence-length", "16", "--device", device)
    with pytest.raises(ValueError, match=f"^device: {message}"):
        build_cache(model, tmp_path, device=device)


@pytest.mark.parametrize("named", ["another-name", "cache-alone"])
def test_a_student_is_exported_with_its_tokenizer(named: str, tokenizer: Path, cache: Path, tmp_path: Path) -> None:
    """A tokenizer's file may have any name; a cache needs none to train, a student from a folder has one all the same."""
    student = saved(tmp_path / "student", tokenizer)
    (student / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    changes: dict[str, Any] = {"student": {"path": str(student)}}
    named_file = None
    if named == "another-name":
        other = tmp_path / "there" / "my_tokenizer.json"
        other.parent.mkdir()
        other.write_bytes(tokenizer.read_bytes())
        changes, named_file = {}, str(other)
    recipe = dataclasses.replace(cached(tokenizer, tmp_path / "run", cache, **changes), tokenizer=named_file)
    model = distill(recipe, say=quiet).model
    assert (model / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    own = (student / "tokenizer_config.json").read_text() if named == "cache-alone" else None
    said = (model / "tokenizer_config.json").read_text()
    assert said == own if own else json.loads(said)["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_student_with_another_tokenizer_than_the_cache_is_refused(tokenizer: Path, cache: Path, tmp_path: Path) -> None:
    """As many ids that mean other tokens: nothing else would tell."""
    other = tmp_path / "other"
    other.mkdir()
    train_tokenizer(sorted(TEXT.glob("d*.py")), 300).save(str(other / "tokenizer.json"))
    student = saved(tmp_path / "student", other / "tokenizer.json")
    recipe = cached(tokenizer, tmp_path / "run", cache, student={"path": str(student)})
    with pytest.raises(CacheMismatch, match=r"^student: tokenizer_hash: .*; or set tokenizer: PATH of the cache's$"):
        distill(dataclasses.replace(recipe, tokenizer=None), say=quiet)


class Unlabelled:
    """Rows of token ids, the later ones shorter, of which nobody knows what follows."""

    def __len__(self) -> int:
        return 4

    def batch(self, indices: Sequence[int]) -> Batch:
        rows = torch.as_tensor(list(indices))
        mask = torch.arange(12) < 12 - 2 * rows[:, None]
        return Batch((torch.arange(48).view(4, 12) % 31)[rows] * mask, attention_mask=mask.long())


def test_tokens_without_a_label_count_each(tokenizer: Path, tmp_path: Path) -> None:
    """The loss is a mean over tokens, as it is with labels, and padding is none of them."""
    models = {}
    for name, seed in (("teacher", 1), ("student", 2)):
        torch.manual_seed(seed)
        folder = saved(tmp_path / name, None, resid_pdrop=0.0, initializer_range=0.5)
        models[name] = GPT2LMHeadModel.from_pretrained(folder).double().eval()
    batch = Unlabelled().batch(range(4))
    with torch.no_grad():
        log_t, log_s = (models[name](**batch.by_name).logits.log_softmax(-1) for name in ("teacher", "student"))
    kl = (log_t.exp() * (log_t - log_s)).sum(-1)
    changes: dict[str, Any] = {"student": {"path": str(tmp_path / "student")}, "teacher": {"path": str(tmp_path / "teacher")},
                               "steps": 1, "batch_size": 2, "accumulation": 2}  # fmt: skip
    for method in ({"name": "word_kd"}, {"name": "word_kd", "z_loss": 1e-3}):
        out = tmp_path / ("z" if "z_loss" in method else "plain")
        config = {**models["student"].config.to_dict(), "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        (tmp_path / "student" / "config.json").write_text(json.dumps(config))
        values = recipe_values(tokenizer, out, method=method, **changes)
        distill(Recipe.build({**values, "data": {}}), train_data=Unlabelled(), say=quiet)
        z = method.get("z_loss", 0.0) * log_s_squared(models["student"], batch)
        truth = (kl + z)[batch.attention_mask.bool()].mean()  # type: ignore[union-attr]
        assert rows_of(out)[0]["loss"] == pytest.approx(float(truth), rel=1e-4)
    values = recipe_values(tokenizer, tmp_path / "hard", method={"name": "word_kd", "hard_weight": 0.5}, **changes)
    with pytest.raises(ValueError, match=r"^labels: expected a tensor because hard_weight is 0\.5, got None"):
        distill(Recipe.build({**values, "data": {}}), train_data=Unlabelled(), say=quiet)


def log_s_squared(model: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**batch.by_name).logits.logsumexp(-1) ** 2
    return found


def test_validation_data_without_labels_are_refused_before_training(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^data\.validation: expected at least one labelled position in 4 rows, got none"):
        distill(Recipe.build(recipe_values(tokenizer, tmp_path / "run")), validation_data=Unlabelled(), say=quiet)


@pytest.mark.parametrize("outside", [300, -3])
def test_validation_labels_outside_the_vocabulary_are_one_line(outside: int, tokenizer: Path, tmp_path: Path) -> None:
    labels = LABELLED.clone()
    labels[7, 3] = outside
    with pytest.raises(ValueError, match=rf"^labels: expected numbers from 0 to 299, or -100 for none, got {outside}$"):
        distill(Recipe.build(recipe_values(tokenizer, tmp_path / "run", steps=1)), validation_data=Rows(labels), say=quiet)


def test_a_run_is_not_gone_on_with_on_other_validation_data(tokenizer: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("import json\n" * 90)
    data = {"train": [str(TEXT)], "validation": [str(held_out)], "glob": "*.py", "sequence_length": 16}
    values = recipe_values(tokenizer, tmp_path / "run", data=data, steps=2)
    distill(Recipe.build(values), say=quiet)
    held_out.write_text("import this\n" * 90)
    with pytest.raises(ValueError, match=r"^out: .* holds a run that differs in the validation data; set another out"):
        distill(Recipe.build({**values, "steps": 4}), say=quiet)
    known = json.loads((tmp_path / "run" / "run.json").read_text())
    del known["validation_hash"]  # as runs before had it
    (tmp_path / "run" / "run.json").write_text(json.dumps(known))
    assert distill(Recipe.build({**values, "steps": 4}), say=quiet).steps == 4


def test_a_teacher_that_is_not_heard_in_a_step_is_not_compared_with_the_labels(tmp_path: Path) -> None:
    """They are its own draws, at a temperature at which they are none of what it holds likely."""
    tokenizer = tiny_translation.make_tokenizer(tmp_path / "tokenizer")
    teacher = tiny_translation.save(tiny_translation.llama(3), tmp_path / "teacher", tokenizer)
    pairs = [{"prompt": pair["source"], "completion": pair["target"]} for pair in tiny_translation.pairs()]
    data = tiny_translation.write_rows(tmp_path / "pairs.jsonl", pairs)
    drawn = {"name": "sequence_kd", "sample": True, "nbest": 2, "sample_temperature": 4.0, "max_tokens": 5}
    student = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
               "num_key_value_heads": 2}  # fmt: skip
    values = tiny_translation.recipe_values(
        tokenizer, data, tmp_path / "run", method=drawn, teacher={"path": str(teacher)}, task="causal_lm", steps=1,
        student={"model_type": "llama", "config": student}, batch_size=16,
    )  # fmt: skip
    said: list[str] = []
    distill(Recipe.build(values), say=said.append)
    assert not any("alignment" in line for line in said)
    heard = {**values, "out": str(tmp_path / "heard"), "method": {**drawn, "soft_weight": 1.0}}
    with pytest.raises(AlignmentError):
        distill(Recipe.build(heard), say=quiet)


def test_two_runs_do_not_train_in_one_folder(tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    recipe = Recipe.build(recipe_values(tokenizer, out, steps=2))
    other = (
        "import sys, time\nfrom kdfast import files\nwith files.locked(sys.argv[1]):\n print(1, flush=True)\n time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", other, str(out)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(ValueError, match=r"^out: another process trains in .*run; wait until it has ended, or set another"):
            distill(recipe, say=quiet)
        assert not (out / "metrics.jsonl").exists()
        process.kill()
    assert distill(recipe, say=quiet).steps == 2
