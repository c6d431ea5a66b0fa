"""What breaks a classifier's or tagger's training without a word, and the line that says so instead."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file
from task_rows import BERT, classifier, named, opened, run, sentence, table, tokenizer_file, values  # noqa: F401
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
)

from kdfast.cli import main
from kdfast.models.shrink import cut_out
from kdfast.train import Recipe, distill
from kdfast.train.domains import check_examples
from kdfast.train.objective import Setting
from kdfast.train.recipes.tinybert import TinyBERT, TinyBERTOptions
from kdfast.train.summary import draw
from kdfast.train.tasks.token_classification import entities
from kdfast.train.teachers import LiveTeacher

TASK = "sequence_classification"


def test_what_stands_for_no_label_is_no_class(tokenizer: Path, tmp_path: Path) -> None:
    """MNLI's rows without agreement have `-`."""
    file = table(tmp_path / "train.tsv", lambda i, name: "-" if i % 4 == 0 else name)
    data = {"train": file, "validation_share": 0.0}
    assert opened(tokenizer, TASK, data)[0].names == ["-", "neg", "pos"]
    task, splits = opened(tokenizer, {"name": TASK, "no_label": ["-"]}, data)
    assert task.names == ["neg", "pos"]
    assert splits.train.labelled.tolist() == [i % 4 != 0 for i in range(24)]
    with pytest.raises(ValueError, match=r"got -; list all, task\.labels: \[neg, pos, '-'\], or .*task\.no_label: \['-'\]"):
        opened(tokenizer, {"name": TASK, "labels": ["neg", "pos"]}, data)


def test_a_column_that_is_not_there(tokenizer: Path, tmp_path: Path) -> None:
    data = {"train": table(tmp_path / "train.tsv"), "validation": table(tmp_path / "dev.tsv")}
    task = {"name": TASK, "labels": ["neg", "pos"]}
    for changes in ({}, {"validation": [], "validation_share": 0.2}):
        line = r"^data\.train: expected a column 'lable' with the class, got text, label; name it in data\.label"
        with pytest.raises(ValueError, match=line):
            opened(tokenizer, task, {**data, **changes, "label": "lable"})
    bare = tmp_path / "bare.tsv"
    bare.write_text("text\n" + "the film was good\n" * 9)
    with pytest.raises(ValueError, match=r"^data\.validation: expected a column 'label' with the class, got text;"):
        opened(tokenizer, task, {**data, "validation": str(bare)})
    held = {"train": str(bare), "validation_share": 0.5}
    assert opened(tokenizer, task, held)[0].notes == [
        "data.validation_share: no row with a label is held out, so nothing is evaluated"
    ]
    # Without a teacher nothing would be learned, with one its term would be left out.
    with pytest.raises(ValueError, match=r"^data\.train: expected labels, which the method learns from, got 9 rows without"):
        run(values(tokenizer, tmp_path / "run", held, task))
    teacher = classifier(tmp_path / "teacher", tokenizer, **named("neg", "pos"))
    taught = {"teacher": {"path": str(teacher)}, "steps": 1}
    with pytest.raises(ValueError, match=r"or set method\.hard_weight: 0$"):
        run(values(tokenizer, tmp_path / "run", held, task, method={"name": "tinybert", "hard_weight": 1.0}, **taught))
    assert run(values(tokenizer, tmp_path / "run", held, task, method="tinybert", **taught)).steps == 1
    headed = {"train": table(tmp_path / "headed.tsv"), "columns": ["text", "label"], "validation_share": 0.0}
    with pytest.raises(ValueError, match=r"headed\.tsv: its first line is a header \(text, label\); leave data\.columns out"):
        opened(tokenizer, TASK, headed)


def test_rows_without_a_token_are_left_out(tmp_path: Path) -> None:
    """Of a tokenizer that puts nothing around a text."""
    bare = Tokenizer(models.WordLevel({"[UNK]": 0, "good": 1, "bad": 2}, unk_token="[UNK]"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    bare.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "t.tsv").write_text("text\tlabel\ngood\tpos\n\tpos\nbad\tneg\n")
    task, splits = opened(tmp_path / "tokenizer.json", TASK, {"train": str(tmp_path / "t.tsv"), "validation_share": 0.0})
    assert len(splits.train) == 2
    assert task.notes == ["data.train: 1 rows have no token and are left out"]


def test_predictions_and_scores_of_domains(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = classifier(tmp_path / "model", tokenizer, **named("neg", "pos"))
    (tmp_path / "rows.jsonl").write_text("".join(
        json.dumps({"text": sentence(i)[0], "label": sentence(i)[1], "domain": "ab"[i % 3 == 0]}) + "\n" for i in range(20)
    ))  # fmt: skip
    words = ["eval", str(model), "--data", str(tmp_path / "rows.jsonl"), "--json", "--set", "domain=domain"]
    assert main([*words, "--predictions", str(tmp_path / "said.jsonl")]) == 0
    found = json.loads(capsys.readouterr().out)
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    right = [row["said"] == row["label"] == sentence(row["row"])[1] for row in said]
    assert found["accuracy"] == sum(right) / 20
    for name, of in (("a", [i for i in range(20) if i % 3]), ("b", range(0, 20, 3))):
        assert found[f"accuracy_{name}"] == pytest.approx(sum(right[i] for i in of) / len(of))
    assert main([word for word in words if word != "--json"]) == 0
    each = ", ".join(f"{name} {found[f'accuracy_{name}']:.1%}" for name in "ab")
    assert capsys.readouterr().out.startswith(f"accuracy {found['accuracy']:.1%} ({each}), macro-F1 ")
    assert all(row["said"] == max(row["probabilities"], key=row["probabilities"].get) for row in said)
    (tmp_path / "bare.jsonl").write_text('{"text": "the film was good"}\n')
    words[3] = str(tmp_path / "bare.jsonl")
    assert main([*words, "--predictions", str(tmp_path / "said.jsonl")]) == 0
    (line,) = (tmp_path / "said.jsonl").read_text().splitlines()
    assert json.loads(line)["label"] is None
    assert main(words) == 2


# Domains and layers


def test_rows_without_a_label_are_not_corrupted(tokenizer: Path, tmp_path: Path) -> None:
    """The wrong domain is a term of the rows that count, those with a label."""
    losses = []
    for rows, batch in ((24, 24), (4, 4)):
        lines = [f"{sentence(i)[0]}\t{sentence(i)[1] if i < 4 else ''}\t{'ab'[i // 2 % 2]}" for i in range(rows)]
        (tmp_path / f"{rows}.tsv").write_text("\n".join(["text\tlabel\tdomain", *lines]) + "\n")
        data = {"train": str(tmp_path / f"{rows}.tsv"), "domain": "domain", "validation_share": 0.0}
        method = {"name": "meta_teacher", "instance_weights": False}
        run(values(tokenizer, tmp_path / f"run{rows}", data, TASK, method=method, batch_size=batch, steps=1))
        losses.append(json.loads((tmp_path / f"run{rows}/metrics.jsonl").read_text().splitlines()[0])["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_examples_are_asked_for_of_classes_that_occur() -> None:
    labels, domains = torch.tensor([1, 2, 1, 2, 1]), torch.tensor([0, 0, 1, 1, 1])
    assert check_examples(labels, domains, ["a", "b"], "paper").tolist() == [[0, 1, 1], [0, 2, 1]]
    with pytest.raises(ValueError, match=r"expected an example of class pos in every domain .* got none in domain 'b'"):
        check_examples(labels, torch.tensor([0, 0, 1, 0, 1]), ["a", "b"], "paper", ["x", "neg", "pos"])


def test_domains_that_are_numbers(tokenizer: Path, tmp_path: Path) -> None:
    lines = [f"{sentence(i)[0]}\t{sentence(i)[1]}\t{2020 + i // 2 % 2}" for i in range(40)]
    (tmp_path / "t.tsv").write_text("\n".join(["text\tlabel\tyear", *lines]) + "\n")
    data = {"train": str(tmp_path / "t.tsv"), "domain": "year", "domain_shares": {2020: 0}, "validation_share": 0.0}
    task, splits = opened(tokenizer, TASK, data)
    assert (task.domains, len(splits.train)) == (["2021"], 20)
    made = values(tokenizer, tmp_path / "run", data, TASK, method={"name": "meta_kd", "domain": 2021}, teacher={"path": "x"})
    with pytest.raises(ValueError, match=r"method\.domain: expected text, got int 2021; quote it: '2021'"):
        Recipe.build(made)


def test_phases_share_projections_whatever_else_differs() -> None:
    student, teacher = (BertForSequenceClassification(BertConfig(vocab_size=30, **{**BERT, "hidden_size": d})) for d in (8, 16))
    first = TinyBERT(TinyBERTOptions(), Setting(student, [LiveTeacher(teacher)], None))
    for options in ({"stage": "intermediate", "attention_weight": 0.0}, {"layer_weights": (2.0,)}, {"hidden_weight": 0.0}):
        made = TinyBERT(TinyBERTOptions(**options), Setting(student, [LiveTeacher(teacher)], None, earlier=[first]))
        for name, module in made.match.projections.items():
            assert module is first.match.projections[name]
    with pytest.raises(ValueError, match=r"layer_weights: expected numbers >= 0, some of them above, got 0"):
        TinyBERT(TinyBERTOptions(layer_weights=(0.0,)), Setting(student, [LiveTeacher(teacher)], None))


def test_layers_that_cannot_take_each_others_place() -> None:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    size = {"vocab_size": 60, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 4}
    modern = ModernBertForSequenceClassification(ModernBertConfig(**size, **special))
    assert cut_out(modern, [0, 2], None, None, "student.from_teacher").config.num_hidden_layers == 2
    with pytest.raises(ValueError, match=r"^student\.from_teacher\.layers: model\.layers\.1\.attn_norm\.weight would be lost"):
        cut_out(modern, [1, 3], None, None, "student.from_teacher")
    with pytest.raises(ValueError, match=r"layers: the larger model has no model\.layers\.0\.attn_norm\.weight.*keep layer 0"):
        cut_out(modern, [1, 0], None, None, "student.from_teacher")
    shared = AlbertForSequenceClassification(AlbertConfig(**size, embedding_size=8))
    with pytest.raises(
        ValueError, match=r"the 4 layers of AlbertForSequenceClassification share 1 set of weights, none can be"
    ):
        cut_out(shared, [0, 2], None, None, "student.from_teacher")


# Tags


def test_words_are_read_as_in_plain_text(tmp_path: Path) -> None:
    """A byte-level vocabulary marks the space before a word: words by themselves would be parts of one."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<pad>"], initial_alphabet=alphabet, show_progress=False)
    words.train_from_iterator(["I live in Paris and New York"] * 5, trainer)
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "t.conll").write_text("# text = I live in Paris\nI\tO\nlive\tO\nin\tO\nParis\tB-loc\n\n")
    data = {"train": str(tmp_path / "t.conll"), "validation_share": 0.0}
    task, splits = opened(tmp_path / "tokenizer.json", "token_classification", data)
    batch = splits.train.batch([0])
    assert batch.input_ids[0].tolist() == words.encode("I live in Paris").ids
    assert [task.names[i] for i in batch.labels[0].tolist() if i >= 0] == ["O", "O", "O", "B-loc"]
    assert not task.notes
    (tmp_path / "t.conll").write_text("Constantinople\tB-loc\nin\tO\n\n")
    task, splits = opened(tmp_path / "tokenizer.json", "token_classification", {**data, "max_length": 6})
    assert [int((splits.train.batch([i]).labels >= 0).sum()) for i in range(len(splits.train))] == [1, 1]
    assert task.notes == ["data.train: 1 words have more than data.max_length 6 tokens and are cut"]


@pytest.mark.parametrize("length", [5, 6, 7, 128])
def test_entities_are_the_same_at_every_length(length: int, tokenizer: Path, tmp_path: Path) -> None:
    """No row ends within one, and a word that is nothing to the tokenizer keeps its tag."""
    tags = [
        ("in", "O"),
        ("the", "O"),
        ("new", "B-loc"),
        ("york", "I-loc"),
        ("paris", "I-loc"),
        ("\u200b", "B-loc"),
        ("so", "O"),
    ]
    (tmp_path / "t.conll").write_text("".join(f"{word}\t{tag}\n" for word, tag in tags) + "\n")
    data = {"train": str(tmp_path / "t.conll"), "validation_share": 0.0, "max_length": length}
    task, splits = opened(tokenizer, "token_classification", data)
    rows = [splits.train.batch([i]) for i in range(len(splits.train))]
    assert all(row.input_ids.shape[1] <= length for row in rows)
    found = [[task.names[i] for i in row.labels[0].tolist() if i >= 0] for row in rows]
    assert [tag for row in found for tag in row] == [tag for _, tag in tags]
    assert sum(len(entities(row)) for row in found) == 2


def test_tags_are_written_beside_those_of_the_file(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    (tmp_path / "t.conll").write_text("in O\nparis B-loc\n\nthe O\nfilm O\n\n" * 8)
    data = {"train": str(tmp_path / "t.conll"), "validation": str(tmp_path / "t.conll")}
    made = run(values(tokenizer, tmp_path / "run", data, "token_classification"))
    words = ["eval", str(made.out), "--data", data["train"], "--predictions", str(tmp_path / "said.jsonl")]
    assert main(words) == 0
    rows = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert len(rows) == 16
    assert rows[0] == {"row": 0, "sentence": 0, "words": ["in", "paris"], "tags": ["O", "B-loc"], "said": ["O", "B-loc"]}
    # A file of another kind, and one of CoNLL-U with words written as one and words not written.
    made_of_rows = tmp_path / "t.jsonl"
    made_of_rows.write_text(json.dumps({"w": ["in", "paris"], "tags": ["O", "B-loc"]}) + "\n")
    listed = {"train": str(made_of_rows), "validation": str(made_of_rows), "words": "w"}
    by_rows = run(values(tokenizer, tmp_path / "by_rows", listed, "token_classification", steps=1))
    words_in = tmp_path / "u.conll"
    words_in.write_text("# text = in paris\n1-2\tinparis\t_\n1\tin\tO\n1.1\tthe\t_\n2\tparis\tB-loc\n")
    for told in ([], ["--set", "words=w"]):
        asked = ["eval", str(by_rows.out), "--data", str(words_in), "--set", "word_column=1", *told, *words[-2:]]
        assert main(asked) == (2 if told else 0)
    (row,) = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert (row["words"], row["tags"]) == (["in", "paris"], ["O", "B-loc"])
    # A long sentence has several rows.
    long = tmp_path / "long.conll"
    long.write_text("the O\nfilm O\nin O\nparis B-loc\n\nin O\nparis B-loc\n")
    assert main(["eval", str(made.out), "--data", str(long), "--set", "max_length=4", *words[-2:]]) == 0
    rows = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [row["sentence"] for row in rows] == [0, 0, 1]
    assert [word for row in rows for word in row["words"]] == ["the", "film", "in", "paris", "in", "paris"]
    # The run's own validation files where none are named.
    capsys.readouterr()
    assert main(["eval", str(made.out), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == made.evaluation
    assert f"--data: {data['validation']}, as the run's recipe says\n" in captured.err
    assert main(["eval", str(made.model)]) == 2
    assert "--data: expected files or folders, got none; only a run whose recipe" in capsys.readouterr().err
    # A model of NaN says no tag, and is right nowhere.
    weights = load_file(made.model / "model.safetensors")
    save_file(weights | {"classifier.bias": weights["classifier.bias"] * math.nan}, made.model / "model.safetensors")
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["accuracy"], found["entity_f1"], found["nll"]) == (0, 0, None)
    assert json.loads((tmp_path / "said.jsonl").read_text().splitlines()[0])["said"] == [None, None]


# What a person sees


def test_a_check_tries_every_phase(tokenizer: Path, tmp_path: Path) -> None:
    teacher = classifier(tmp_path / "teacher", tokenizer, **named("neg", "pos"))
    data = {"train": table(tmp_path / "train.tsv", rows=200), "validation_share": 0.0}
    phases = [
        {"steps": 3, "method": {"name": "tinybert", "stage": "intermediate"}},
        {"steps": 5, "method": {"name": "tinybert", "stage": "prediction", "augment": {"copies": 2}}},
    ]
    made = values(tokenizer, tmp_path / "run", data, TASK, teacher={"path": str(teacher)}, phases=phases)
    del made["steps"], made["method"]
    lines: list[str] = []
    distill(Recipe.build({**made, "check": True}), say=lines.append)
    text = "\n".join(lines)
    assert "phase 1, tinybert intermediate: loss " in text
    assert "for 3 steps, which read the 200 rows 0.12 times" in text
    assert "phase 2, tinybert prediction: loss " in text
    assert "for 5 steps, which read the 600 rows 0.0667 times" in text
    assert not (tmp_path / "run").exists()
    finished = run(made)
    summary = json.loads((finished.out / "summary.json").read_text())
    assert (summary["method"], summary["phase_steps"]) == (["tinybert intermediate", "tinybert prediction"], [3, 5])
    kept = load_file(next((finished.out / "prepared/1/augmented").glob("*.safetensors")))
    assert 200 < len(kept["origin"]) <= 400


def test_curves_show_what_changes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[str] = []
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda self, part, **kw: (drawn.extend(a.get_title() for a in self.axes), Path(part).write_bytes(b"")),
    )
    steps = [
        {"step": i, "loss": 1 / i, "kl_at_T": 2 / i, "kl_at_1": 2 / i * (1 + 1e-7), "teacher_entropy": 0.69} for i in (1, 2, 3)
    ]
    draw(steps, [{"step": i, "accuracy": i / 9, "rows": 7} for i in (1, 3)], tmp_path / "c.png", "run")
    assert drawn == ["validation: accuracy", "training: loss", "training: kl_at_T"]
