"""`kdfast cache build` from instruction data: which tokens count, from the command line to the records."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_teacher import CHATML, make_teacher
from tokenizers import Tokenizer
from transformers import BertConfig, BertForMaskedLM

from kdfast.cache import CacheReader, CacheWriter, Record
from kdfast.cli import main

# Every character is a token; the last blank of the prompt is one by itself.
LETTERS = "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a: {% endif %}"
TURNS = [
    {"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "the cat sat"},
    {"role": "user", "content": "and the dog?"}, {"role": "assistant", "content": "the old dog ran far"},
]  # fmt: skip
PAIR = {"prompt": "the cat and ", "completion": "the old dog ran"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    make_teacher(folder / "teacher", [m["content"] for m in TURNS] * 3, 300)
    make_teacher(folder / "letters", [], 0, LETTERS)
    return folder


def build(world: Path, tmp_path: Path, rows: list[Any], *more: str, teacher: str = "teacher", name: str = "cache") -> int:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    words = ["cache", "build", str(world / teacher), "--data", str(file), "--out", str(tmp_path / name), "--k", "8"]
    return main([*words, "--sequence-length", "100", "--device", "cpu", "--batch-size", "3", "--json", *more])


def tokenizer_of(world: Path, teacher: str = "teacher") -> Tokenizer:
    return Tokenizer.from_file(str(world / teacher / "tokenizer.json"))


def learned(tokenizer: Tokenizer, record: Record) -> str:
    """What the rows that count predict."""
    return str(tokenizer.decode(record.input_ids[1:][record.loss_mask[:-1]].tolist(), skip_special_tokens=False))


def test_a_row_counts_when_the_token_after_it_is_the_assistant_s(world: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "yz"}]
    assert build(world, tmp_path, [{"messages": messages}], teacher="letters") == 0
    reader = CacheReader(tmp_path / "cache")
    #  row        0  1  2  3  4  5  6  7  8  9  10
    #  token      u  :  _  x  \n a  :  _  y  z  \n
    #  predicts   :  _  x  \n a  :  _  y  z  \n -
    assert len(reader[0].input_ids) == 11
    assert reader[0].loss_mask.nonzero().flatten().tolist() == [7, 8, 9]
    labels = reader.batch([0]).labels[0]
    assert labels[7:10].tolist() == reader[0].input_ids[8:11].tolist()
    assert (labels != -100).sum() == 3


def test_every_assistant_turn_counts_and_special_tokens_of_the_config_are_written(world: Path, tmp_path: Path) -> None:
    assert build(world, tmp_path, [{"messages": TURNS}]) == 0
    record, tokenizer = CacheReader(tmp_path / "cache")[0], tokenizer_of(world)
    assert record.input_ids[:2].tolist() == [0, 1]
    assert learned(tokenizer, record) == "the cat sat<|im_end|>the old dog ran far<|im_end|>"
    text = tokenizer.decode(record.input_ids.tolist(), skip_special_tokens=False)
    assert text.startswith("<|endoftext|><|im_start|>user\nthe cat?<|im_end|>\n<|im_start|>assistant\nthe cat sat")


def test_a_token_that_begins_in_the_prompt_does_not_count(world: Path, tmp_path: Path) -> None:
    """The blank at the end of the prompt and the first word are one token, which begins at the blank."""
    (tmp_path / "t.jinja").write_text(LETTERS)
    assert build(world, tmp_path, [{"messages": TURNS[:2]}], "--chat-template", str(tmp_path / "t.jinja")) == 0
    record, tokenizer = CacheReader(tmp_path / "cache")[0], tokenizer_of(world)
    assert " the" in [tokenizer.decode([i]) for i in record.input_ids.tolist()]
    assert learned(tokenizer, record) == " cat sat\n"


def test_prompt_and_completion_end_with_the_separator(world: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(world)
    prompt, completion = (tokenizer.encode(text).ids for text in PAIR.values())
    assert build(world, tmp_path, [PAIR]) == 0
    assert build(world, tmp_path, [{"q": PAIR["prompt"], "a": PAIR["completion"], "text": "no"}],
                 "--prompt-field", "q", "--completion-field", "a", "--separator", "none", name="other") == 0  # fmt: skip
    for name, end in (("cache", [0]), ("other", [])):
        record = CacheReader(tmp_path / name)[0]
        assert record.input_ids.tolist() == prompt + completion + end
        rows = torch.arange(len(record.input_ids))
        first, last = len(prompt) - 1, len(record.input_ids) - 1
        assert record.loss_mask.equal((rows >= first) & (rows < last))


def test_prompts_count_with_prompt_loss_and_text_does_anyway(world: Path, tmp_path: Path) -> None:
    rows = [{"messages": TURNS}, PAIR, {"text": "the old cat ran"}]
    for name, more in (("some", ()), ("all", ("--prompt-loss",))):
        assert build(world, tmp_path, rows, *more, name=name) == 0
    some, whole = CacheReader(tmp_path / "some"), CacheReader(tmp_path / "all")
    for i in range(3):
        assert some[i].input_ids.equal(whole[i].input_ids)
        assert whole[i].loss_mask.sum() == len(whole[i].input_ids) - 1
    assert [bool(a.loss_mask.equal(b.loss_mask)) for a, b in zip(some, whole, strict=True)] == [False, False, True]


@pytest.mark.parametrize("more", [(), ("--samples", "4")])
def test_dropped_rows_are_empty_and_the_others_the_same(world: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    rows = [{"messages": TURNS}, PAIR, {"text": "the old cat ran"}, {"messages": TURNS[:2]}]
    assert build(world, tmp_path, rows, *more, name="kept") == 0
    assert build(world, tmp_path, rows, *more, "--drop-masked", name="dropped") == 0
    kept, dropped = CacheReader(tmp_path / "kept"), CacheReader(tmp_path / "dropped")
    assert dropped.info.bytes_per_token < kept.info.bytes_per_token
    for i, (a, b) in enumerate(zip(kept, dropped, strict=True)):
        assert a.loss_mask.equal(b.loss_mask)
        stored = torch.ones_like(a.loss_mask) if i == 2 else a.loss_mask
        assert (b.targets.ids >= 0).any(-1).equal(stored)
        assert (a.targets.ids >= 0).any(-1).all()
        assert a.targets.ids[stored].equal(b.targets.ids[stored])
        torch.testing.assert_close(a.targets.logprobs[stored], b.targets.logprobs[stored], atol=0.02, rtol=0)
    assert main(["cache", "verify", str(tmp_path / "dropped"), "--teacher", str(world / "teacher")]) == 0


def test_long_documents_are_cut_and_those_without_a_completion_dropped(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tokenizer_of(world)
    long, lost = {**PAIR, "completion": "dog " * 50}, {"prompt": "cat " * 50, "completion": "dog"}
    fits = len(tokenizer.encode(PAIR["prompt"]).ids) + len(tokenizer.encode(PAIR["completion"]).ids) + 1
    assert build(world, tmp_path, [PAIR, long, lost], "--sequence-length", str(fits)) == 0
    assert "2 of 3 documents cut to --sequence-length" in capsys.readouterr().err
    records = list(CacheReader(tmp_path / "cache"))
    assert [len(r.input_ids) for r in records] == [fits, fits]
    assert learned(tokenizer, records[0]) == PAIR["completion"] + "<|endoftext|>"
    assert "<|endoftext|>" not in learned(tokenizer, records[1])
    assert build(world, tmp_path, [lost, {"messages": TURNS[:1]}], "--sequence-length", "9", name="x") == 2
    assert "expected a completion within --sequence-length 9, found none in 2 documents" in capsys.readouterr().err


def test_the_template_comes_from_the_file_the_folder_or_its_config(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_teacher(tmp_path / "bare", [m["content"] for m in TURNS], 300, None)
    capsys.readouterr()  # what saving the teacher printed
    rows = [{"messages": TURNS[:2]}]
    assert build(tmp_path, tmp_path, rows, teacher="bare") == 2
    error = capsys.readouterr().err
    assert "expected chat_template.jinja in" in error
    assert "--chat-template FILE" in error
    assert error.count("\n") == 1
    named = [{"name": "tool_use", "template": "{{ no }}"}, {"name": "default", "template": CHATML}]
    for name, template in (("one", CHATML), ("several", named)):
        config = {"bos_token": "<|endoftext|>", "chat_template": template}
        (tmp_path / "bare" / "tokenizer_config.json").write_text(json.dumps(config))
        assert build(tmp_path, tmp_path, rows, teacher="bare", name=name) == 0
        record = CacheReader(tmp_path / name)[0]
        assert learned(tokenizer_of(tmp_path, "bare"), record) == "the cat sat<|im_end|>"


REFUSING = (
    "{% for m in messages %}{{ m.content }}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}"
)
LAST_ONLY = "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else '...' }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (LAST_ONLY, {"messages": TURNS}, "line 1: expected a chat template that keeps what it wrote when message 1"),
        (REFUSING, {"messages": [*TURNS, {"role": "tool", "content": "3"}]}, "refuses the conversation: no tools"),
        ("{% for %}", {"messages": TURNS}, "line 1: the chat template refuses the conversation"),
        (CHATML, {"messages": TURNS[1:]}, "line 1: expected a message before the assistant's first"),
        (CHATML, {"messages": "hello"}, "line 1: expected a list of messages"),
        (CHATML, {"messages": [{"role": "user"}]}, "line 1: expected a list of messages"),
        (CHATML, {"prompt": "a", "completion": 3}, "line 1: expected text in prompt, completion"),
        (CHATML, {"prompt": "a", "other": 3}, "with messages, or prompt and completion, or text, got prompt, other"),
        (CHATML, [3], "line 1: expected an object of JSON, got list"),
        (None, {"messages": TURNS}, "--chat-template: expected a file"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], template: str | None, row: Any, message: str
) -> None:
    if template is not None:
        (tmp_path / "t.jinja").write_text(template)
    assert build(world, tmp_path, [row], "--chat-template", str(tmp_path / "t.jinja")) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("option", ["--drop-masked", "--prompt-loss", "--messages-field=m", "--chat-template=t"])
def test_instruction_options_need_a_causal_teacher(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    tokenizer, size = tokenizer_of(world), {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(vocab_size=300, intermediate_size=16, **size)).save_pretrained(tmp_path / "bert")
    tokenizer.save(str(tmp_path / "bert" / "tokenizer.json"))
    capsys.readouterr()  # what saving the teacher printed
    assert build(tmp_path, tmp_path, [PAIR], option, teacher="bert") == 2
    error = capsys.readouterr().err
    assert f"{option.partition('=')[0]}: expected a causal teacher, got a masked one" in error
    assert error.count("\n") == 1


def test_a_tokenizer_that_cuts_and_fills_does_not_here(world: Path, tmp_path: Path) -> None:
    make_teacher(tmp_path / "cutting", [m["content"] for m in TURNS], 300)
    tokenizer = tokenizer_of(tmp_path, "cutting")
    whole = [tokenizer.encode(text).ids for text in PAIR.values()]
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=90)
    tokenizer.save(str(tmp_path / "cutting" / "tokenizer.json"))
    assert build(tmp_path, tmp_path, [PAIR], teacher="cutting") == 0
    assert CacheReader(tmp_path / "cache")[0].input_ids.tolist() == [*whole[0], *whole[1], 0]


def test_resume_goes_on_with_an_unfinished_cache_only(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [PAIR, {"messages": TURNS}, {"text": "the old cat ran"}, PAIR]
    assert build(world, tmp_path, rows, "--resume") == 2
    error = capsys.readouterr().err
    assert "--resume: expected an unfinished cache" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "cache").exists()
    assert build(world, tmp_path, rows, name="whole") == 0
    assert build(world, tmp_path, rows, "--resume", name="whole") == 2
    whole = CacheReader(tmp_path / "whole")
    with contextlib.suppress(KeyboardInterrupt), CacheWriter(tmp_path / "cut", **dataclasses.asdict(whole.settings)) as writer:
        writer.begin_groups(3)
        for record in [whole[i] for i in range(3)]:
            writer.add(record.input_ids, record.targets, record.loss_mask)
        writer.flush()
        raise KeyboardInterrupt
    before = (tmp_path / "cut" / "shard-00000.safetensors").read_bytes()
    assert build(world, tmp_path, rows, "--resume", name="cut") == 0
    resumed = CacheReader(tmp_path / "cut")
    assert (tmp_path / "cut" / "shard-00000.safetensors").read_bytes() == before
    assert [r.input_ids.tolist() for r in resumed] == [r.input_ids.tolist() for r in whole]
    assert [r.loss_mask.tolist() for r in resumed] == [r.loss_mask.tolist() for r in whole]
