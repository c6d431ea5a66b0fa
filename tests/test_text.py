"""Documents from files, rows and conversations: tokens, special tokens, and memory that does not grow with the corpus."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_teacher import CHATML
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from kdfast.text import TextData, packing
from kdfast.text.documents import Corpus
from kdfast.text.files import list_files
from kdfast.text.packing import long_text, pack
from kdfast.text.tokenizers import load_tokenizer, without_post_processor

ROOT = Path(__file__).parents[1]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "[MASK]"]
BEGIN, END, TURN, TURN_END, TEXT_END, MASK = range(6)
TEXT = "def f(x):\n    return [x  for x in range(10)]\n\n\n# grüße, 世界 🎉\n" * 40


def make(folder: Path, post: str | None = None, metaspace: bool = False, **files: dict[str, Any] | str) -> Corpus | Any:
    """A folder with a tokenizer and the configuration files given by their stem; post: the post-processor's template."""
    folder.mkdir(parents=True, exist_ok=True)
    if metaspace:  # as the converted SentencePiece tokenizers: no words, blanks become a letter, one is put in front
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<s>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
        tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False, initial_alphabet=alphabet)
        tokenizer.train_from_iterator([TEXT], trainer)
    if post:
        tokenizer.post_processor = processors.TemplateProcessing(single=post, special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, values in files.items():
        if isinstance(values, str):
            (folder / f"{name}.jinja").write_text(values)
        else:
            (folder / f"{name}.json").write_text(json.dumps(values))
    return load_tokenizer(folder)[0]


def chosen(folder: Path, **options: Any) -> tuple[Any, ...]:
    (folder / "x.txt").write_text("x")
    data = TextData(paths=(str(folder / "x.txt"),), **options)
    return tuple(Corpus(data, load_tokenizer(folder)[0], folder).specials)[:3]


LLAMA = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}


@pytest.mark.parametrize(
    ("post", "files", "expected"),
    [
        (None, {}, ((), (TEXT_END,), (TEXT_END,))),
        ("<s> $A", {"tokenizer_config": LLAMA}, ((BEGIN,), (END,), (END,))),
        ("<s> $A </s>", {"tokenizer_config": LLAMA}, ((BEGIN,), (END,), (END,))),
        ("<s> $A", {"tokenizer_config": {**LLAMA, "add_bos_token": False}}, ((), (END,), (END,))),
        (None, {"tokenizer_config": {**LLAMA, "add_bos_token": True}}, ((BEGIN,), (END,), (END,))),
        ("<s> $A", {"special_tokens_map": LLAMA}, ((BEGIN,), (END,), (END,))),
        (None, {"tokenizer_config": {"eos_token": "<|endoftext|>"}, "generation_config": {"eos_token_id": TURN_END}},
         ((), (TEXT_END,), (TURN_END,))),
        (None, {"generation_config": {"eos_token_id": [TURN_END, TEXT_END]}}, ((), (TURN_END,), (TURN_END,))),
        (None, {"tokenizer_config": {"eos_token": "<|endoftext|>"}, "chat_template": CHATML,
                "generation_config": {"eos_token_id": [TEXT_END, TURN_END]}}, ((), (TEXT_END,), (TURN_END,))),
        (None, {"config": {"eos_token_id": END}, "generation_config": {"eos_token_id": 50256}}, ((), (END,), (END,))),
        (None, {"config": {"text_config": {"eos_token_id": [END]}}}, ((), (END,), (END,))),
    ],
    ids=["bare", "llama", "both", "no-bos", "bos", "map", "turn", "list", "template", "not-in-vocabulary", "nested"],
)  # fmt: skip
def test_special_tokens_are_what_the_folder_says(tmp_path: Path, post: str | None, files: Any, expected: Any) -> None:
    make(tmp_path, post, **files)
    assert chosen(tmp_path) == expected
    assert chosen(tmp_path, special_tokens="none") == ((), (), ())
    assert chosen(tmp_path, special_tokens="none", end="<|im_end|>") == ((), (), (TURN_END,))
    assert chosen(tmp_path, separator="<|im_start|>") == (expected[0], (TURN,), (TURN,))
    assert chosen(tmp_path, separator="none", end="</s>") == (expected[0], (), (END,))
    with pytest.raises(ValueError, match=r"data.separator: expected a token of the tokenizer, or none, got 'x y'"):
        chosen(tmp_path, separator="x y")


def rows(folder: Path, *values: dict[str, Any]) -> TextData:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, values)))
    return TextData(paths=(str(folder / "rows.jsonl"),))


def test_documents_begin_and_end_as_the_tokenizer_s_do(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, "<s> $A", tokenizer_config=LLAMA)
    data = rows(tmp_path, {"text": "for x"}, {"prompt": "for x", "completion": " in range"})
    text, pair = Corpus(data, tokenizer, tmp_path)
    first, second = (tokenizer.encode(t, add_special_tokens=False).ids for t in ("for x", " in range"))
    assert text.input_ids.tolist() == [BEGIN, *first, END]
    assert pair.input_ids.tolist() == [BEGIN, *first, *second, END]
    assert pair.loss_mask is not None
    assert pair.loss_mask.tolist() == [False] * len(first) + [True] * (len(second) + 1) + [False]
    (tmp_path / "a.txt").write_text("for x")
    (tmp_path / "b.txt").write_text(" in range")
    packed = pack(tokenizer, [tmp_path / "a.txt", tmp_path / "b.txt"], 2, Corpus(data, tokenizer, tmp_path).specials)
    whole = [BEGIN, *first, END, BEGIN, *second, END]
    assert packed.flatten().tolist() == whole[: len(whole) // 2 * 2]


WRITTEN = [("", ""), ("<s>", ""), ("", "</s>"), ("<s>", "</s>"), ("</s>", "<s>"), ("<s><s>", "</s></s>")]


@pytest.mark.parametrize(("before", "after"), WRITTEN)
def test_special_tokens_that_a_text_has_are_not_doubled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    """In a text, a prompt and its completion, whole files, files in pieces: added only where the text has not written them."""
    tokenizer = make(tmp_path, "<s> $A", tokenizer_config=LLAMA)
    first, second = (tokenizer.encode(t, add_special_tokens=False).ids for t in ("for x", " in range"))
    begin = [BEGIN] * (before.count("<s>") or 1) if "</s>" not in before else [BEGIN, END]
    end = [END] * (after.count("</s>") or 1) if after != "<s>" else [BEGIN, END]
    data = rows(
        tmp_path, {"text": f"{before}for x{after}"}, {"prompt": f"{before}for x", "completion": f" in range{after}"},
        {"text": f"{before}{after}" or "x"},
    )  # fmt: skip
    text, pair, *bare = Corpus(data, tokenizer, tmp_path)
    assert text.input_ids.tolist() == [*begin, *first, *end]
    assert pair.input_ids.tolist() == [*begin, *first, *second, *end]
    assert pair.loss_mask is not None
    learned = pair.input_ids[1:][pair.loss_mask[:-1]].tolist()
    assert learned == [*second, *end]
    if before == "<s>" and after == "</s>":
        assert bare[0].input_ids.tolist() == [BEGIN, END]
    for name, said in (("a", "for x"), ("b", TEXT), ("c", " in range")):
        (tmp_path / f"{name}.txt").write_text(f"{before}{said}{after}")
    files = [tmp_path / f"{name}.txt" for name in "abc"]
    middle = tokenizer.encode(TEXT, add_special_tokens=False).ids
    expected = [i for ids in (first, middle, second) for i in (*begin, *ids, *end)]
    specials = Corpus(data, tokenizer, tmp_path).specials
    for piece in (1 << 18, 500):
        monkeypatch.setattr(packing, "_PIECE", piece)
        monkeypatch.setattr(packing, "_OVERLAP", 200)
        found = pack(tokenizer, files, 2, specials).flatten().tolist()
        assert found == expected[: len(expected) // 2 * 2]


def test_special_tokens_of_the_end_alone(tmp_path: Path) -> None:
    """A tokenizer with one token for everything, between texts and after completions."""
    tokenizer = make(tmp_path)
    ids = tokenizer.encode("for x", add_special_tokens=False).ids
    end = "<|endoftext|>"
    data = rows(tmp_path, {"text": "for x" + end}, {"prompt": end + "for x", "completion": "for x" + end})
    text, pair = Corpus(data, tokenizer, tmp_path)
    assert text.input_ids.tolist() == [*ids, TEXT_END]
    assert pair.input_ids.tolist() == [TEXT_END, *ids, *ids, TEXT_END]
    (tmp_path / "a.txt").write_text("for x" + end)
    whole = pack(tokenizer, [tmp_path / "a.txt"] * 2, 1, Corpus(data, tokenizer, tmp_path).specials).flatten().tolist()
    assert whole == [*ids, TEXT_END, *ids, TEXT_END]


@pytest.mark.parametrize("source", ["for x", "<s>for x</s>", "<s>for x", "for x</s>"])
@pytest.mark.parametrize("target", [" in", " in</s>", "<|im_start|> in</s>", "<s> in</s>", "<|im_start|><s> in"])
@pytest.mark.parametrize("forced", [None, BEGIN, 5])
def test_pairs_with_special_tokens_of_their_own(tmp_path: Path, source: str, target: str, forced: int | None) -> None:
    """A target is what the tokenizer makes of it (`text_target`), or begins with the id that a model is made to begin with."""
    begin = [BEGIN] if forced is None else [forced]
    config = {"decoder_start_token_id": TURN, "eos_token_id": END, "forced_bos_token_id": forced}
    tokenizer = make(tmp_path, "<s> $A </s>", tokenizer_config=LLAMA, config=config)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"source": source, "target": target}))
    data = TextData(paths=(str(tmp_path / "rows.jsonl"),))
    (example,) = Corpus(data, tokenizer, tmp_path, task="seq2seq")
    asked, said = (tokenizer.encode(t, add_special_tokens=False).ids for t in ("for x", " in"))
    assert example.context_ids is not None
    assert example.labels is not None
    assert example.context_ids.tolist() == [BEGIN, *asked, END]
    if "<s>" in target and forced == 5:  # a language's id stands before what a text says itself
        begin = [5, BEGIN]
    assert example.labels.tolist() == [*begin, *said, END]
    assert example.input_ids.tolist() == [TURN, *begin, *said]
    if forced is None:
        assert example.labels.tolist() == tokenizer.encode(" in", add_special_tokens=True).ids
    (cut,) = Corpus(dataclasses.replace(data, sequence_length=2), tokenizer, tmp_path, task="seq2seq")
    assert cut.context_ids is not None
    assert cut.context_ids.tolist() == [BEGIN, END]


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("causal", {"mask_share": 0.3}, "data.mask_share: expected a masked teacher, got a causal one; leave it out"),
        ("causal", {"source_field": "x"}, "data.source_field: expected a seq2seq teacher, got a causal one"),
        ("masked", {"end": "</s>"}, "data.end: expected a causal or seq2seq teacher, got a masked one"),
        ("masked", {"prompt_loss": True}, "data.prompt_loss: expected a causal teacher, got a masked one"),
        ("seq2seq", {"field": "x"}, "data.field: expected a causal or masked teacher, got a seq2seq one"),
        ("seq2seq", {"mask_token": "</s>"}, "data.mask_token: expected a masked teacher, got a seq2seq one"),
    ],
)
def test_options_of_another_task_are_refused(tmp_path: Path, task: str, options: dict[str, Any], message: str) -> None:
    tokenizer = make(tmp_path)
    data = dataclasses.replace(rows(tmp_path, {"text": "for x"}), **options)
    with pytest.raises(ValueError, match=re.escape(message)):
        Corpus(data, tokenizer, tmp_path, task=task)


def test_a_turn_is_learned_up_to_its_end_token(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, chat_template=CHATML)
    said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "for\n"}, {"role": "user", "content": "y"},
            {"role": "assistant", "content": "in"}]  # fmt: skip
    (example,) = Corpus(rows(tmp_path, {"messages": said}), tokenizer, tmp_path)
    assert example.loss_mask is not None
    learned = example.input_ids[1:][example.loss_mask[:-1]].tolist()
    assert tokenizer.decode(learned, skip_special_tokens=False) == "for\n<|im_end|>in<|im_end|>"


def test_templates_find_what_transformers_gives_them(tmp_path: Path) -> None:
    template = (
        "{%- if tools is not none %}{{ raise_exception('tools') }}{% endif %}\n{% for m in messages %}\n"
        "    {%- generation %}{{ m.content | tojson }}{% endgeneration %}{% if loop.last %}{% break %}{% endif %}\n{% endfor %}"
    )
    tokenizer = make(tmp_path, chat_template=template)
    data = rows(tmp_path, {"messages": [{"role": "user", "content": "<é>"}, {"role": "assistant", "content": "b"}]})
    (example,) = Corpus(data, tokenizer, tmp_path)
    assert tokenizer.decode(example.input_ids.tolist()) == '"<é>""b"'


@pytest.mark.parametrize("metaspace", [False, True], ids=["byte-level", "metaspace"])
def test_a_long_file_in_pieces_has_the_tokens_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metaspace: bool
) -> None:
    tokenizer = make(tmp_path, metaspace=metaspace)
    plain = without_post_processor(tokenizer)
    text = "".join(TEXT[i:] + "\n" * (i % 4) + "x" * (i % 7) for i in range(0, 90, 3))
    whole = plain.encode(text, add_special_tokens=False).ids
    monkeypatch.setattr(packing, "_OVERLAP", 200)
    for size in (317, 1000, 4096):
        pieces = iter([text[at : at + size] for at in range(size, len(text), size)])
        found = list(long_text(plain, text[:size], functools.partial(next, pieces, "")))
        assert len(found) > 2
        assert [i for ids in found for i in ids] == whole
    monkeypatch.setattr(packing, "_PIECE", 500)
    (tmp_path / "long.txt").write_text(text)
    (tmp_path / "short.txt").write_text("for x")
    files = [tmp_path / "short.txt", tmp_path / "long.txt", tmp_path / "short.txt"]
    short = plain.encode("for x", add_special_tokens=False).ids
    ids = pack(tokenizer, files, 2).flatten().tolist()
    expected = [*short, *whole, *short]
    assert ids == expected[: len(expected) // 2 * 2]


def test_an_endless_word_has_no_joint_and_is_taken_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = without_post_processor(make(tmp_path))
    monkeypatch.setattr(packing, "_OVERLAP", 8)
    text = "return" * 100
    pieces = iter([text[at : at + 50] for at in range(50, len(text), 50)])
    found = [i for ids in long_text(plain, text[:50], lambda: next(pieces, "")) for i in ids]
    assert found == plain.encode(text, add_special_tokens=False).ids


def test_two_folders_with_a_file_of_the_same_name_keep_both(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(name)
    found = list_files([tmp_path / "a", tmp_path / "b", tmp_path / "a"], "*.txt")
    assert sorted(file.read_text() for _, file in found) == ["a", "b"]


def test_parquet_files_are_rows(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    tokenizer = make(tmp_path)
    values = [{"content": f"for x in range({i})", "picture": i} for i in range(150)]
    parquet.write_table(arrow.Table.from_pylist(values), tmp_path / "rows.parquet")
    data = TextData(paths=(str(tmp_path / "rows.parquet"),), field="content")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, values)))
    lines = TextData(paths=(str(tmp_path / "rows.jsonl"),), field="content")
    one, other = (list(Corpus(d, tokenizer, tmp_path)) for d in (data, lines))
    assert [e.input_ids.tolist() for e in one] == [e.input_ids.tolist() for e in other]
    assert len(one) == 150
    with pytest.raises(ValueError, match=r"data.paths: expected a column body in .*rows.parquet', got content, picture"):
        list(Corpus(TextData(paths=data.paths, field="body"), tokenizer, tmp_path))
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(ValueError, match="expected a Parquet file"):
        list(Corpus(TextData(paths=(str(tmp_path / "bad.parquet"),)), tokenizer, tmp_path))


@pytest.mark.parametrize("task", ["causal", "masked"])
@pytest.mark.parametrize("suffix", ["tsv", "csv"])
def test_a_table_is_no_running_text(tmp_path: Path, task: str, suffix: str) -> None:
    """Its header, separators and labels would be learned, in a folder too."""
    tokenizer = make(tmp_path)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / f"train.{suffix}").write_text("text\tlabel\ngood\t1\n" * 20)
    (tmp_path / "corpus" / "plain.txt").write_text(TEXT)
    for paths in (f"corpus/train.{suffix}", "corpus"):
        data = TextData(paths=(str(tmp_path / paths),), glob="*")
        with pytest.raises(
            ValueError, match=rf"^data\.paths: expected running text or rows, got the table .*train\.{suffix}; write"
        ):
            Corpus(data, tokenizer, tmp_path, task=task)
    assert list(Corpus(TextData(paths=(str(tmp_path / "corpus"),)), tokenizer, tmp_path, task=task))


def test_masks_depend_on_seed_and_place_and_leave_special_tokens(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, "<s> $A </s>")
    data = rows(tmp_path, *({"text": "for x in range"} for _ in range(20)))
    one, again, other = (list(Corpus(data, tokenizer, tmp_path, task="masked", seed=seed)) for seed in (1, 1, 2))
    assert all(a.input_ids.equal(b.input_ids) for a, b in zip(one, again, strict=True))
    assert not all(a.input_ids.equal(b.input_ids) for a, b in zip(one, other, strict=True))
    assert len({tuple(e.input_ids.tolist()) for e in one}) > 1
    for example in one:
        assert example.labels is not None
        assert (example.input_ids[0], example.input_ids[-1]) == (BEGIN, END)
        assert (example.input_ids == MASK).equal(example.labels != -100)
        assert (example.labels != -100).any()


def test_a_corpus_is_walked_again_and_counted(tmp_path: Path) -> None:
    tokenizer = make(tmp_path)
    corpus = Corpus(rows(tmp_path, *({"text": "for x"} for _ in range(5))), tokenizer, tmp_path)
    whole = list(corpus)
    assert corpus.share_read == 1
    assert corpus.count() == (5, sum(len(e.input_ids) for e in whole))
    next(iter(corpus))
    assert all(a.input_ids.equal(b.input_ids) for a, b in zip(corpus, whole, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--data: expected text files, .jsonl files or folders, or --dataset, got neither"),
        ({"paths": ("x",), "sequence_length": 1}, "--sequence-length: expected a number >= 2, got 1"),
        ({"paths": ("x",), "special_tokens": "some"}, "--special-tokens: expected auto or none, got 'some'"),
        ({"paths": ("x",), "mask_share": 0.0}, "--mask-share: expected a share"),
        ({"paths": ("x",), "streaming": True}, "--streaming: expected it with --dataset"),
    ],
)
def test_options_are_checked_by_the_name_they_were_given(options: dict[str, Any], message: str) -> None:
    from kdfast.cli.cache_build import flag

    with pytest.raises(ValueError, match=message):
        TextData(**options).check(flag)


def test_text_wants_neither_a_trainer_nor_transformers() -> None:
    code = (
        "import sys; import kdfast.text.documents, kdfast.cache\n"
        "print([m for m in ('transformers', 'accelerate', 'yaml', 'tensorboard', 'rich', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["one-file", "rows"])
def test_memory_is_flat_while_a_corpus_is_read(tmp_path: Path, form: str) -> None:
    from corpus_memory import grow

    make(tmp_path)
    found = grow(tmp_path, form, megabytes=12, after=4)
    assert found["tokens"] > 1e6
    assert found["grown_mb"] < 40
