"""What would train on the wrong rows, or score against the wrong ones, without a word: refused, said, or right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from tiny_translation import SIZE, WORDS, llama, make_tokenizer, marian, marian_config, pairs, recipe_values, save, write_rows
from transformers import AutoModelForCausalLM, GenerationConfig

from kdfast.cache import build
from kdfast.cli import main
from kdfast.text import TextData
from kdfast.train import Batch, Recipe, distill
from kdfast.train.data import Subset, digest_of
from kdfast.train.decode import asked_in
from kdfast.train.inputs import open_inputs


class Rows:
    """A caller's own rows of prompts, without a digest."""

    def __init__(self, ids: list[list[int]]) -> None:
        self.ids = torch.tensor(ids)

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Any) -> Batch:
        ids = self.ids[torch.as_tensor(list(indices))]
        labels = torch.cat([ids[:, 1:], ids.new_full((len(ids), 1), -100)], 1)
        labels[:, 0] = -100
        return Batch(ids, labels)


class Drawn(Rows):
    """The same with something drawn anew at every look."""

    def batch(self, indices: Any) -> Batch:
        return Batch(torch.randint(1, SIZE, (len(list(indices)), 4)), None)


@pytest.fixture
def home(tmp_path: Path) -> tuple[Path, Path]:
    """tokenizer.json, and a causal teacher's folder."""
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    return tokenizer, save(llama(0), tmp_path / "teacher", tokenizer)


def run(values: dict[str, Any], said: list[str] | None = None, **rows: Any) -> Any:
    return distill(Recipe.build(values), say=(lambda line: None) if said is None else said.append, **rows)


SIZES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip


def causal(tokenizer: Path, data: Any, out: Path, **changes: Any) -> dict[str, Any]:
    student = {"model_type": "llama", "config": SIZES}
    return recipe_values(tokenizer, data, out, **{"task": "causal_lm", "student": student, "steps": 1, **changes})


def test_rows_of_the_caller_are_known_by_what_is_in_them() -> None:
    one, other = Rows([[1, 2, 3], [4, 5, 6]]), Rows([[1, 2, 3], [4, 5, 7]])
    assert digest_of(one) == digest_of(Rows([[1, 2, 3], [4, 5, 6]]))
    assert digest_of(one) != digest_of(other)
    assert digest_of(Subset(one, [0])) != digest_of(Subset(other, [0]))
    long = [Rows([[1, 2, 3]] * 1000 + [[4, 5, last]] + [[1, 2, 3]] * 999) for last in (6, 7)]
    assert digest_of(long[0], whole=True) != digest_of(long[1], whole=True)
    assert digest_of(Drawn([[1]] * 3)) == "Drawn of 3 rows"
    assert digest_of(Rows([])) == digest_of(Rows([]))


def test_hypotheses_of_other_rows_or_of_another_teacher_are_not_learned(home: tuple[Path, Path], tmp_path: Path) -> None:
    tokenizer, teacher = home
    method = {"name": "sequence_kd", "beam": 1, "max_tokens": 3, "decoded": str(tmp_path / "decoded")}
    values = causal(tokenizer, tmp_path, tmp_path / "one", method=method, teacher={"path": str(teacher)})
    values.pop("data")
    first, second = Rows([[1, 2, 3]] * 12), Rows([[4, 5, 6]] * 12)
    run(values, train_data=first)
    with pytest.raises(ValueError, match=r"method\.decoded: .* decoded with other data; name another folder"):
        run({**values, "out": str(tmp_path / "two")}, train_data=second)
    with pytest.raises(ValueError, match=r"out: .* differs in the training data"):
        run(values, train_data=second)
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(ValueError, match=r"method\.decoded: .* decoded with other configs; name another folder"):
        run({**values, "out": str(tmp_path / "three")}, train_data=first)


def test_caches_of_other_targets_are_no_ensemble(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    teacher = save(marian(0), tmp_path / "teacher", tokenizer)
    (teacher / "generation_config.json").write_text((tokenizer.parent / "generation_config.json").read_text())
    for name, word in (("a", "ein"), ("b", "hund")):
        write_rows(tmp_path / f"{name}.jsonl", [{"source": "a dog", "target": word}] * 4)
        build(teacher, TextData(paths=(str(tmp_path / f"{name}.jsonl"),), sequence_length=16), tmp_path / f"{name}.cache", k=4)
    caches = [{"cache": str(tmp_path / f"{name}.cache")} for name in ("a", "b")]
    values = recipe_values(tokenizer, tmp_path, tmp_path / "run", method="word_kd", teachers=caches, data={})
    with pytest.raises(ValueError, match=r"teachers\[1\]\.cache: holds other documents than teachers\[0\]\.cache"):
        run(values)


def test_a_student_keeps_its_own_tokenizer(tmp_path: Path) -> None:
    """One of as many other tokens would have its ids taken for words that they are not."""
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    other = json.loads(tokenizer.read_text())
    words = list(other["model"]["vocab"])
    other["model"]["vocab"] = {word: i for i, word in enumerate([words[0], *reversed(words[1:])])}
    (tmp_path / "other.json").write_text(json.dumps(other))
    begun = save(llama(2), tmp_path / "begun", tmp_path / "other.json")
    rows = [{"prompt": row["source"], "completion": row["target"]} for row in pairs()]
    values = causal(tokenizer, write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "run", student={"path": str(begun)})
    with pytest.raises(ValueError, match=r"student\.path: "):
        run(values)


def test_what_is_scored_in_other_lengths_than_was_captured_is_said(home: tuple[Path, Path], tmp_path: Path) -> None:
    tokenizer, teacher = home
    (tmp_path / "a.txt").write_text(" ".join(WORDS * 9))
    data = TextData(paths=(str(tmp_path / "a.txt"),), sequence_length=32)
    build(teacher, data, tmp_path / "cache", k=4)
    said: list[str] = []
    own = {"validation": [str(tmp_path / "a.txt")], "sequence_length": 16}
    values = causal(
        tokenizer, tmp_path, tmp_path / "run", teacher={"cache": str(tmp_path / "cache")}, method="word_kd", alignment=False
    )
    run({**values, "data": own}, said)
    told = "data.validation: read in sequences of 16 tokens, the cache's are of 32; data.sequence_length sets the former"
    assert told in said
    assert "data.validation: the last 13 of 109 tokens left out, which fill no sequence of data.sequence_length 16" in said
    values = {**values, "data": {**own, "sequence_length": 32}, "out": str(tmp_path / "same"), "steps": 4, "eval_every": 2}
    run(values, said := [])
    assert told not in said
    assert sum(line.startswith("step 2: validation perplexity") for line in said) == 1
    cut = {**values, "student": {"from_teacher": {"layers": [0]}}, "out": str(tmp_path / "cut")}
    with pytest.raises(ValueError, match=r"student\.from_teacher\.path: expected the folder of the model to cut it out of"):
        run(cut)


# What is asked


class One:
    """One row."""

    def __init__(self, ids: list[int], labels: list[int]) -> None:
        self.row = Batch(torch.tensor([ids]), torch.tensor([labels]))

    def batch(self, indices: Any) -> Batch:
        return self.row


@pytest.mark.parametrize(
    ("labels", "source", "gold", "more"),
    [
        ([-100, 3, 4, -100, -100, -100], [1, 2], [3, 4], False),
        ([-100, 3, 4, -100, 6, -100], [1, 2], [3, 4], True),
        ([-100, -100, -100, -100, 6, 7], [1, 2, 3, 4, 5], [6], False),
        ([2, 3, 4, 5, 6, -100], [1], [2, 3, 4, 5, 6], False),
        ([-100] * 6, [1, 2, 3, 4, 5, 6], [], False),
    ],
)
def test_an_answer_ends_where_the_next_question_begins(
    labels: list[int], source: list[int], gold: list[int], more: bool
) -> None:
    row = asked_in(One([1, 2, 3, 4, 5, 6], labels), 0)
    assert (row.source.tolist(), row.gold.tolist(), row.more) == (source, gold, more)


def test_prompts_and_running_text_are_told_apart(home: tuple[Path, Path], tmp_path: Path) -> None:
    tokenizer, teacher = home
    taught = {"teacher": {"path": str(teacher)}}
    method = {"name": "sequence_kd", "beam": 1, "max_tokens": 3}
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text(" ".join(WORDS * 8))
    running = causal(tokenizer, text, tmp_path / "r", method=method, **taught)
    running["data"] = {"train": [str(text)], "validation_share": 0.0, "sequence_length": 8}
    with pytest.raises(ValueError, match=r"method\.prompt_tokens: expected how many tokens of a row are a prompt"):
        run(running)
    rows = [{"prompt": "a dog runs", "completion": "ein hund"}, {"prompt": " ".join(WORDS), "completion": "ein"}]
    asked = causal(tokenizer, text, tmp_path / "a", method=method, **taught)
    asked["data"] = {**running["data"], "train": [str(write_rows(tmp_path / "rows.jsonl", rows))]}
    with pytest.raises(ValueError, match=r"method\.prompt_tokens: expected none for rows with prompts .* got 2; leave it out"):
        run({**asked, "method": {**method, "prompt_tokens": 2}})
    said: list[str] = []
    run(asked, said)
    assert "data.train: 1 of 2 documents cut to data.sequence_length 8, 1 dropped: nothing to learn within it" in said


def test_prompts_that_leave_no_room_are_counted(home: tuple[Path, Path], tmp_path: Path) -> None:
    tokenizer, _ = home
    teacher = save(llama(1, max_position_embeddings=4), tmp_path / "short", tokenizer)
    values = causal(tokenizer, tmp_path, tmp_path / "run", teacher={"path": str(teacher)},
                    method={"name": "sequence_kd", "beam": 1, "max_tokens": 2})  # fmt: skip
    values.pop("data")
    said: list[str] = []
    rows = Rows([[1, 2, 3, 4, 5, 6]] * 3)
    rows.batch = lambda indices, of=rows.batch: _asked_whole(of(indices))  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"holds no hypothesis"):
        run(values, said, train_data=rows)
    assert "3 of 3 sources are empty or leave no room for what follows, and are left out" in said


def _asked_whole(batch: Batch) -> Batch:
    assert batch.labels is not None
    return Batch(batch.input_ids, torch.full_like(batch.labels, -100).index_fill(1, torch.tensor([4]), 6))


def test_what_the_student_has_no_room_for_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    teacher = save(marian(0), tmp_path / "teacher", tokenizer)
    data = write_rows(tmp_path / "pairs.jsonl", pairs())
    short = {"model_type": "marian", "config": {**marian_config(), "max_position_embeddings": 8}}
    values = recipe_values(
        tokenizer, data, tmp_path / "run", teacher={"path": str(teacher)}, student=short,
        method={"name": "sequence_kd", "beam": 1, "max_tokens": 20},
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"method\.max_tokens: expected at most the 8 positions of the student, got 20"):
        run(values)
    assert not list((tmp_path / "run").rglob("hypotheses*"))


def test_bleu_of_rows_of_the_caller_wants_a_tokenizer_before_the_first_step(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    data = write_rows(tmp_path / "pairs.jsonl", pairs())
    values = recipe_values(tokenizer, data, tmp_path / "run", steps=1, task={"name": "seq2seq", "beams": [1], "max_tokens": 3})
    inputs = open_inputs(Recipe.build(values), tmp_path / "read")
    brought = {"train_data": inputs.train, "validation_data": inputs.validation}
    bare = {key: value for key, value in values.items() if key not in ("data", "tokenizer")}
    bare["student"] = {"model_type": "marian", "config": {**marian_config(), "vocab_size": SIZE}}
    with pytest.raises(ValueError, match=r"task\.beams: expected a tokenizer, to write text with; add tokenizer: PATH"):
        run({**bare, "out": str(tmp_path / "bare")}, **brought)
    assert not (tmp_path / "bare" / "metrics.jsonl").is_file()
    assert "bleu_greedy" in run({**bare, "tokenizer": str(tokenizer)}, **brought).evaluation


# Scores


def test_bleu_is_held_against_whole_targets(tmp_path: Path) -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    teacher = save(marian(3), tmp_path / "teacher", tokenizer)
    (teacher / "generation_config.json").write_text((tokenizer.parent / "generation_config.json").read_text())
    rows = [{"source": row["source"], "target": " ".join(WORDS[7:] * 4)} for row in pairs(6)]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    task = {"name": "seq2seq", "beams": [1], "max_tokens": 6}
    values = recipe_values(tokenizer, data, tmp_path / "run", task=task, steps=1, student={"path": str(teacher)})
    values["data"] |= {"sequence_length": 6}
    result = run({**values, "optimizer": {"lr": 1e-9}})
    said = [_written(result.model, row["source"], tokenizer) for row in rows]
    whole = sacrebleu.corpus_bleu(said, [[row["target"] for row in rows]]).score
    assert result.evaluation["bleu_greedy"] == pytest.approx(whole, abs=1e-6)


def _written(folder: Path, source: str, tokenizer: Path) -> str:
    from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

    its = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer))
    ids = its(source, return_tensors="pt").input_ids
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    plain = GenerationConfig(
        max_new_tokens=6, num_beams=1, do_sample=False, decoder_start_token_id=0, eos_token_id=0, pad_token_id=0
    )
    return str(its.decode(model.generate(ids, generation_config=plain)[0], skip_special_tokens=True))


@pytest.mark.parametrize("said", ["path", "config"])
def test_eval_of_a_run_reads_rows_as_the_run_did(said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tokenizer lies by itself; what ends a text is said by the student alone."""
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    (tokenizer.parent / "generation_config.json").unlink()
    rows = [{"prompt": row["source"], "completion": row["target"]} for row in pairs()]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    student: dict[str, Any] = {"model_type": "llama", "config": {**SIZES, "eos_token_id": 0}}
    if said == "path":
        llama(2).save_pretrained(tmp_path / "begun")
        student = {"path": str(tmp_path / "begun")}
    result = run(causal(tokenizer, data, tmp_path / "run", student=student))
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), "--data", str(data), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert (scores["tokens"], scores["ppl"]) == (result.evaluation.tokens, pytest.approx(result.evaluation.ppl, rel=1e-5))
    assert AutoModelForCausalLM.from_pretrained(result.model).generation_config.eos_token_id == 0


def test_a_student_ends_what_it_writes_as_its_rows_end(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    rows = [{"prompt": row["source"], "completion": row["target"]} for row in pairs()]
    begun = save(llama(2), tmp_path / "begun", tokenizer)
    data = {"train": [str(write_rows(tmp_path / "rows.jsonl", rows))], "validation_share": 0.0, "end": "gross"}
    values = causal(tokenizer, tmp_path, tmp_path / "run", student={"path": str(begun)})
    saved = AutoModelForCausalLM.from_pretrained(run({**values, "data": data}).model)
    assert saved.generation_config.eos_token_id == saved.config.eos_token_id == WORDS.index("gross") + 1
    wrong = {"model_type": "llama", "config": {**SIZES, "eos_token_id": 5}}
    said: list[str] = []
    run({**values, "data": data, "out": str(tmp_path / "wrong"), "student": wrong}, said)
    assert "student: what it writes ends with id 5 (student.config.eos_token_id), the rows end with 12" in said
    taught = {"method": "word_kd", "teacher": {"path": str(begun)}, "out": str(tmp_path / "taught")}
    run({**values, "data": data, **taught}, said)
    assert "teacher: what it writes ends with id 0 (eos_token_id), the rows end with 12" in said


def test_sources_without_a_target_are_not_held_out(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    teacher = save(marian(0), tmp_path / "teacher", tokenizer)
    some = [row if i % 4 == 0 else {"source": row["source"]} for i, row in enumerate(pairs(200))]
    values = recipe_values(
        tokenizer, write_rows(tmp_path / "some.jsonl", some), tmp_path / "run", teacher={"path": str(teacher)},
        method={"name": "sequence_kd", "beam": 1, "max_tokens": 3},
    )  # fmt: skip
    values["data"] = {"train": values["data"]["train"], "sequence_length": 16, "unlabelled": True, "validation_share": 0.2}
    inputs = open_inputs(Recipe.build(values), tmp_path / "read")
    assert inputs.validation is not None
    assert 0 < len(inputs.validation) < 50
    labels = [inputs.validation.batch([i]).labels for i in range(len(inputs.validation))]
    assert all(bool((row != -100).any()) for row in labels)
    values["data"]["train"] = [str(write_rows(tmp_path / "bare.jsonl", [{"source": row["source"]} for row in pairs()]))]
    assert open_inputs(Recipe.build(values), tmp_path / "again").validation is None


@pytest.mark.parametrize(("words", "expected"), [
    (["eval"], "name its fields in --set source_field/--set target_field"),
    (["cache", "build", "--k", "4", "--out", "x"], "name its fields in --source-field/--target-field"),
])  # fmt: skip
def test_a_remedy_is_a_flag_of_the_command(
    words: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    teacher = save(marian(0), tmp_path / "teacher", tokenizer)
    data = write_rows(tmp_path / "bare.jsonl", [{"source": "a dog"}])
    capsys.readouterr()
    command, *rest = words if words[0] == "eval" else [" ".join(words[:2]), *words[2:]]
    assert main([*command.split(), str(teacher), "--data", str(data), *rest]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert "unlabelled" not in error
