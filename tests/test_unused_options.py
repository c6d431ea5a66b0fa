"""An option that was given something else than its default and that nothing would read is refused before the run begins."""

from __future__ import annotations

import dataclasses
import gzip
import struct
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_runs import TEXT, make_tokenizer, recipe_values

from kdfast.cache.build import BuildOptions, _python_name
from kdfast.strict import build, refuse_unused
from kdfast.train import Recipe
from kdfast.train.inputs import open_inputs
from kdfast.train.objective import Setting
from kdfast.train.recipes.word_kd import WordKD, WordKDOptions
from kdfast.train.schedule import Schedule
from kdfast.train.teachers import LiveTeacher

GOOD: dict[str, Any] = {"student": {"model_type": "gpt2"}}
UNREAD = "which nothing would read; leave it out$"


def kd(**options: Any) -> dict[str, Any]:
    return {**GOOD, "teacher": {"path": "x"}, "method": {"name": "word_kd", **options}}


def with_task(name: str, **data: Any) -> dict[str, Any]:
    return {**GOOD, "task": name, "data": data}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "student-arguments": ({"student": {"path": "x", "arguments": {"n": 1}}},
                          r"^student\.arguments: beside path expected none, they are a function's, got \{'n': 1\}"),
    "student-auto": ({"student": {"model_type": "gpt2", "dtype": "auto"}}, r"^student\.dtype: beside model_type expected"),
    "student-function-auto": ({"student": {"function": "m:f", "dtype": "auto"}}, r"^student\.dtype: beside function expected"),
    "teacher-arguments": ({**kd(), "teacher": {"path": "x", "arguments": {"n": 1}}}, r"^teacher\.arguments: beside path"),
    "teacher-dtype-cache": ({**kd(), "teacher": {"cache": "x", "dtype": "bfloat16"}},
                            r"^teacher\.dtype: beside cache expected none, it is that of a folder's weights, got 'bfloat16'"),
    "teacher-dtype-function": ({**kd(), "teacher": {"function": "m:f", "dtype": "float32"}}, r"^teacher\.dtype: beside func"),
    "teacher-weight": ({**kd(), "teacher": {"path": "x", "weight": 2}}, r"^teacher\.weight: of a single teacher expected none"),
    "teachers-weight": ({**GOOD, "method": "word_kd", "teachers": [{"path": "x", "weight": 2}]}, r"^teachers\[0\]\.weight: "),
    "final-lr": ({**GOOD, "optimizer": {"schedule": "constant", "final_lr_share": 0.5}},
                 r"^optimizer\.final_lr_share: with schedule constant expected none, got 0\.5"),
    "optimizer": ({**GOOD, "optimizer": {"lr": 0.5},
                   "phases": [{"steps": 2, "method": "supervised", "optimizer": {"lr": 0.1}}]},
                  r"^optimizer: where every phase has its own expected none"),
    "beta": (kd(beta=0.9), r"^method\.beta: with divergence forward_kl expected none \(it is for jsd\), got 0\.9"),
    "skew": (kd(divergence="jsd", skew=0.3), r"^method\.skew: with divergence jsd expected none \(it is for skew_forward"),
    "alpha": (kd(ab_alpha=0.3), r"^method\.ab_alpha: with divergence forward_kl"),
    "smoothing": (kd(label_smoothing=0.1), r"^method\.label_smoothing: without hard_weight expected none, got 0\.1"),
    "constant-steps": (kd(temperature={"start": 2, "end": 2, "shape": "constant", "steps": 9}),
                       r"^method\.temperature\.steps: with shape constant expected none, got 9"),
    "draws": ({**GOOD, "teacher": {"path": "x"}, "method": {"name": "sequence_kd", "sample_top_k": 9}},
              r"^method\.sample_top_k: without sample expected none, it is of draws, got 9"),
    "beam-of-draws": ({**GOOD, "teacher": {"path": "x"}, "method": {"name": "sequence_kd", "sample": True, "beam": 9}},
                      r"^method\.beam: with sample expected none"),
    "penalty-of-draws": ({**GOOD, "teacher": {"path": "x"},
                          "method": {"name": "sequence_kd", "sample": True, "length_penalty": 0.5}},
                         r"^method\.length_penalty: with sample expected none"),
    "beams": ({**GOOD, "task": {"name": "seq2seq", "max_tokens": 5}}, r"^task\.max_tokens: without beams expected none"),
    "member-steps": ({**GOOD, "teachers": [{"path": "x"}, {"path": "y"}], "method": {"name": "ensemble", "member_steps": 5}},
                     r"^method\.member_steps: without generations expected none, got 5"),
    "mask": ({**kd(), "method": {"name": "tinybert", "augment": {"mask_token": "<mask>"}}},
             r"^method\.augment\.mask_token: with by: embeddings expected none"),
    "share": (with_task("causal_lm", train="a", validation="b", validation_share=0.2),
              r"^data\.validation_share: beside validation expected none, got 0\.2"),
    "glob": (with_task("causal_lm", dataset="a", glob="*.md"), r"^data\.glob: beside dataset, which has no folders,"),
    "class-share": (with_task("sequence_classification", train="a", validation="b", validation_share=0.2),
                    r"^data\.validation_share: beside validation expected none"),
    "split-share": (with_task("sequence_classification", dataset="a", validation_split="b", validation_share=0.2),
                    r"^data\.validation_share: beside validation_split expected none"),
    "split": (with_task("sequence_classification", train="a", split="test"), r"^data\.split: without dataset expected none"),
    "two-validations": (with_task("sequence_classification", dataset="a", validation="b", validation_split="test"),
                        r"^data\.validation_split: beside validation expected none"),
    "columns": (with_task("sequence_classification", dataset="a", columns=["text"]), r"^data\.columns: without files in train"),
    "excluded": (with_task("image_classification", train="a", excluded="hide"), r"^data\.excluded: without exclude_labels"),
}  # fmt: skip


@pytest.mark.parametrize(("values", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_with_the_recipe(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Recipe.build(values)
    assert "\n" not in str(caught.value)


TAKEN: dict[str, dict[str, Any]] = {
    "options-of-a-term-without-weight": kd(soft_weight=0, hard_weight=1, temperature=2, divergence="jsd", beta=0.3),
    "smoothing-beside-a-schedule": kd(hard_weight={"start": 0, "end": 1}, label_smoothing=0.1),
    "weights-of-two": {**GOOD, "method": "word_kd", "teachers": [{"path": "x", "weight": 2}, {"path": "y"}]},
    "nothing-held-out": with_task("sequence_classification", train="a", validation="b", validation_share=0),
    "dtype-of-a-folder": {"student": {"path": "x", "dtype": "auto"}},
    "dtype-of-a-module": {"student": {"function": "m:f", "dtype": "bfloat16", "arguments": {"n": 1}}},
    "one-phase-without-an-optimizer": {
        **GOOD, "optimizer": {"lr": 0.5},
        "phases": [{"steps": 2, "method": "supervised", "optimizer": {"lr": 0.1}}, {"steps": 2, "method": "supervised"}],
    },
}  # fmt: skip


@pytest.mark.parametrize("values", [*TAKEN.values(), GOOD, kd()], ids=[*TAKEN, "defaults", "word-kd"])
def test_what_has_an_effect_is_taken_and_so_are_defaults_written_out(values: dict[str, Any]) -> None:
    recipe = Recipe.build(values)
    assert Recipe.build(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def cache(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from test_train_faults import make_cache

    return make_cache(tmp_path_factory.mktemp("cache") / "one", tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data": {"sequence_length": 64}},
            r"^data\.sequence_length: the cache, which is the training data, was made without it",
        ),
        ({"data": {"glob": "*.py", "validation_share": 0.3}}, r"^data\.glob: the cache, which is the training data"),
        ({"data": {"prompt_loss": True}}, r"^data\.prompt_loss: the cache"),
        ({"eval_every": 5}, r"^eval_every: without validation data \(data\.validation or .*\) expected none, got 5"),
        ({"eval_sequences": 5}, r"^eval_sequences: without validation data"),
        ({"keep_best": True}, r"^keep_best: without validation data"),
        ({"method": {"name": "word_kd", "teacher_mix": "logits"}}, r"^method\.teacher_mix: of a cache expected probs"),
        (
            {"data": {"pack": 32, "group_by_length": True}},
            r"^data\.group_by_length: beside data\.pack, which leaves little padding, expected none, got True",
        ),
    ],
    ids=["length", "glob", "prompt-loss", "eval-every", "eval-sequences", "keep-best", "mix", "group-and-pack"],
)
def test_refused_beside_a_cache(changes: dict[str, Any], message: str, tokenizer: Path, cache: Path, tmp_path: Path) -> None:
    values = recipe_values(tokenizer, tmp_path, method="word_kd", teacher={"cache": str(cache)}, data={})
    recipe = Recipe.build({**values, **changes})
    with pytest.raises(ValueError, match=f"{message}.*{UNREAD}"):
        _made(recipe, tmp_path)


def test_text_beside_a_cache_is_read_as_the_options_say(tokenizer: Path, cache: Path, tmp_path: Path) -> None:
    data = {"validation": [str(TEXT / "decoder.py")], "glob": "*.py", "sequence_length": 16}
    values = recipe_values(tokenizer, tmp_path, method="word_kd", teacher={"cache": str(cache)}, data=data, eval_every=2)
    inputs = open_inputs(Recipe.build(values), tmp_path)
    assert inputs.validation is not None
    assert inputs.validation.batch([0]).inputs["input_ids"].shape == (1, 16)


def _made(recipe: Recipe, folder: Path) -> WordKD:
    inputs = open_inputs(recipe, folder)
    return WordKD(recipe.method.options, Setting(_module(), inputs.teachers, inputs.task))


def _module() -> Any:
    from torch import nn

    return nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("options", "teachers", "message"),
    [
        ({"tail": "uniform"}, 1, r"^method\.tail: of a live teacher, which says all, expected none, got 'uniform'"),
        ({"teacher_mix": "logits"}, 1, r"^method\.teacher_mix: of a single teacher expected probs"),
        ({"tail": "ghost", "teacher_mix": "logits"}, 2, r"^method\.tail: of a live teacher"),
    ],
    ids=["tail", "mix", "tail-of-two"],
)
def test_refused_with_live_teachers(options: dict[str, Any], teachers: int, message: str) -> None:
    setting = Setting(_module(), [LiveTeacher(_module()) for _ in range(teachers)], None)
    with pytest.raises(ValueError, match=f"{message}.*{UNREAD}"):
        WordKD(WordKDOptions(**options), setting)
    WordKD(WordKDOptions(teacher_mix="logits"), Setting(_module(), [LiveTeacher(_module()) for _ in range(2)], None))


def test_a_tokenizer_where_no_text_is_read(tokenizer: Path, tmp_path: Path) -> None:
    recipe = Recipe.build({**with_task("image_classification", train=str(tmp_path)), "tokenizer": str(tokenizer)})
    with pytest.raises(ValueError, match=r"^tokenizer: task image_classification reads no text, expected none"):
        open_inputs(recipe, tmp_path)


def test_how_files_are_read_that_are_of_another_kind(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "train.conll").write_text("a X\nb Y\n\n" * 9)
    (tmp_path / "train.jsonl").write_text('{"tokens": ["a", "b"], "tags": ["X", "Y"]}\n' * 9)
    small = {"model_type": "bert"}

    def opened(name: str, **data: Any) -> Any:
        values = {"task": "token_classification", "student": small, "tokenizer": str(tokenizer),
                  "data": {"train": [str(tmp_path / name)], "validation_share": 0.2, **data}}  # fmt: skip
        return open_inputs(Recipe.build(values), tmp_path)

    with pytest.raises(ValueError, match=r"^data\.words: without \.jsonl or \.parquet files expected none, got 'w'"):
        opened("train.conll", words="w")
    with pytest.raises(ValueError, match=r"^data\.tag_column: without files in CoNLL columns expected none, got 2"):
        opened("train.jsonl", tag_column=2)
    both = {"validation": [str(tmp_path / "train.jsonl")], "validation_share": 0.0}
    assert len(opened("train.conll", words="tokens", tag_column=1, **both).train) == 9

    images, labels = tmp_path / "images-idx3-ubyte.gz", tmp_path / "labels-idx1-ubyte.gz"
    images.write_bytes(gzip.compress(struct.pack(">IIII", 0x803, 9, 2, 2) + bytes(36)))
    labels.write_bytes(gzip.compress(struct.pack(">II", 0x801, 9) + bytes([0, 1, 2] * 3)))
    recipe = Recipe.build(with_task("image_classification", train=str(images), size=[4], validation_share=0))
    with pytest.raises(ValueError, match=r"^data\.size: of IDX files, whose images are as they are, expected none, got \[4\]"):
        open_inputs(recipe, tmp_path)


def test_the_temperature_of_draws_without_draws() -> None:
    with pytest.raises(ValueError, match=r"^sample_temperature: expected it with samples, got it without"):
        BuildOptions(sample_temperature=2.0).check(_python_name)
    BuildOptions(samples=4, sample_temperature=2.0).check(_python_name)


def test_the_message_names_the_key_and_the_remedy() -> None:
    @dataclasses.dataclass(frozen=True)
    class Some:
        number: int = 3
        names: tuple[str, ...] = ()
        rest: dict[str, int] = dataclasses.field(default_factory=dict)

    refuse_unused(Some(), ("number", "names", "rest"), "expected none")
    with pytest.raises(ValueError, match=r"^a\.names: expected none, got \['x'\], which nothing would read; leave it out$"):
        refuse_unused(build(Some, {"names": ["x"]}), ("number", "names", "rest"), "expected none", "a")
    with pytest.raises(ValueError, match=r"^rest: "):
        refuse_unused(Some(rest={"a": 1}), ("number", "names", "rest"), "expected none")
    with pytest.raises(ValueError, match=r"^steps: with shape constant"):
        Schedule(1.0, 1.0, "constant", 3)
