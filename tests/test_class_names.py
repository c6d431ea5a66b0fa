"""Classes of models beside the labels of the data: other ones, other names, another order, another task's, no names at all."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

pytest.importorskip("transformers")

from task_rows import classifier, named, run, sentence, table, tokenizer_file, values, write_conll  # noqa: F401
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, BertForTokenClassification

from kdfast.cli import main
from kdfast.train import Recipe, capture_classes, distill
from kdfast.train.recipe import Teacher

TASK = "sequence_classification"


@pytest.mark.parametrize("method", ["tinybert", "distilbert", {"name": "word_kd"}], ids=["tinybert", "distilbert", "word_kd"])
@pytest.mark.parametrize("classes", [1, 3])
def test_a_teacher_of_another_number_of_classes_is_refused(
    method: Any, classes: int, tokenizer: Path, tmp_path: Path
) -> None:  # fmt: skip
    """Its classes have no names, so only their number tells."""
    teacher = classifier(tmp_path / "teacher", tokenizer, num_labels=classes)
    data = {"train": table(tmp_path / "train.tsv"), "validation": table(tmp_path / "dev.tsv")}
    made = values(tokenizer, tmp_path / "run", data, TASK, teacher={"path": str(teacher)}, method=method)
    line = rf"^teacher\.path: expected 2 logits, one for each of the classes neg, pos, got {classes}; list all in task\.labels"
    with pytest.raises(ValueError, match=line):
        run(made)


@pytest.mark.parametrize("names", [(), ("B-loc", "I-loc", "O"), ("neg", "pos")], ids=["unnamed", "like the tags", "others"])
def test_a_teacher_with_another_tasks_head_is_refused(names: tuple[str, ...], tokenizer: Path, tmp_path: Path) -> None:
    """Both heads are called `classifier`: with as many classes it loads, and its words of a sentence would be those of tags."""
    tags = {"train": str(write_conll(tmp_path / "t.conll", 8)), "validation_share": 0.0}
    model = classifier(tmp_path / "model", tokenizer, **(named(*names) if names else {"num_labels": 3}))
    its = f"{len(names)} classes ({', '.join(names)})" if names else "3 classes"
    for changes in ({}, {"student": {"from_teacher": {"layers": [0]}}}):
        taught = {"teacher": {"path": str(model)}, "method": "tinybert", **changes}
        line = (
            "teacher.path: expected a model for token_classification of the 3 classes B-loc, I-loc, O, got a"
            f" BertForSequenceClassification of {its}; train one for this task first (method: supervised, student:"
            " {path: ENCODER})"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
            run(values(tokenizer, tmp_path / "run", tags, "token_classification", **taught))
    # A student may begin as one, where its head has the size.
    begun = {"student": {"path": str(classifier(tmp_path / "four", tokenizer, num_labels=4))}}
    line = (
        r"^student\.path: .*four does not load as a model for token_classification: it is a BertForSequenceClassification of 4"
    )
    with pytest.raises(ValueError, match=line + " classes, expected 3 or no head; take the encoder it was trained from$"):
        run(values(tokenizer, tmp_path / "run", tags, "token_classification", **begun))
    tagger = tmp_path / "tagger"
    BertForTokenClassification(BertForSequenceClassification.from_pretrained(model).config).save_pretrained(tagger)
    texts = {"train": table(tmp_path / "train.tsv"), "validation_share": 0.0}
    recipe = Recipe.build(values(tokenizer, tmp_path / "run", texts, TASK))
    with pytest.raises(
        ValueError, match=r"^teacher: expected .* of the 2 classes neg, pos, got a BertForTokenClassification of"
    ):
        capture_classes(recipe, Teacher(path=str(tagger)), tmp_path / "cache")


def test_classes_of_the_model_that_a_student_begins_as(tokenizer: Path, tmp_path: Path) -> None:
    """Under other names, or in another order, its trained head would say something else than it does."""
    swapped = classifier(tmp_path / "swapped", tokenizer, **named("pos", "neg"))
    data = {"train": table(tmp_path / "train.tsv"), "validation": table(tmp_path / "dev.tsv")}
    task = {"name": TASK, "labels": ["neg", "pos"]}
    begun = {"student.path": {"student": {"path": str(swapped)}}, "init_from": {"init_from": str(swapped)},
             "student.from_teacher.path": {"student": {"from_teacher": {"layers": [0], "path": str(swapped)}}}}  # fmt: skip
    for key, changes in begun.items():
        line = rf"^{key}: expected a model of the classes neg, pos in this order, got pos, neg; .*in its order in task\.labels"
        with pytest.raises(ValueError, match=line):
            run(values(tokenizer, tmp_path / "run", data, task, **changes))
    three = classifier(tmp_path / "three", tokenizer, num_labels=3)
    with pytest.raises(ValueError, match=r"^student\.path: expected 2 logits, .* got 3"):
        run(values(tokenizer, tmp_path / "run", data, task, student={"path": str(three)}))


def test_labels_that_the_model_calls_otherwise(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each refusal says what to write, and that is taken: the student is named as its teacher."""
    teacher = classifier(tmp_path / "teacher", tokenizer, **named("NEGATIVE", "POSITIVE"))
    numbers = table(tmp_path / "train.tsv", lambda i, name: int(name == "pos"))
    data = {"train": numbers, "validation": numbers}
    changes = {"teacher": {"path": str(teacher)}, "method": "tinybert", "steps": 2}
    line = r"got 0, 1; if they are the same, .* task\.labels: \[0, 1\], task\.names: \[NEGATIVE, POSITIVE\]$"
    with pytest.raises(ValueError, match=line):
        run(values(tokenizer, tmp_path / "run", data, TASK, **changes))
    with pytest.raises(ValueError, match=r"got NEGATIVE, POSITIVE; .*task\.names: \[NEGATIVE, POSITIVE\] says so"):
        run(values(tokenizer, tmp_path / "run", data, {"name": TASK, "labels": [0, 1]}, **changes))
    task = {"name": TASK, "labels": [0, 1], "names": ["NEGATIVE", "POSITIVE"]}
    made = run(values(tokenizer, tmp_path / "run", data, task, **changes))
    model = AutoModelForSequenceClassification.from_pretrained(made.model)
    assert model.config.id2label == {0: "NEGATIVE", 1: "POSITIVE"}
    assert main(["eval", str(made.out), "--data", numbers, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == made.evaluation["accuracy"]
    with pytest.raises(ValueError, match=r"task\.names: expected one for each of the 2 labels, got 1"):
        Recipe.build(values(tokenizer, tmp_path / "run", data, {**task, "names": ["NEGATIVE"]}))


def test_a_teacher_without_names_of_classes_is_told_how_it_is_taken(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """By its letters a label may be the other class: then each of its words is wrong, and nothing else would say so."""
    teacher = classifier(tmp_path / "teacher", tokenizer)
    file = table(tmp_path / "train.tsv")
    numbers = table(tmp_path / "numbers.tsv", lambda i, name: int(name == "pos"))

    def said(file: str, task: Any) -> list[str]:
        made = values(tokenizer, tmp_path / "run", {"train": file, "validation": file}, task)
        changes = {"teacher": {"path": str(teacher)}, "method": "tinybert", "check": True}
        lines: list[str] = []
        distill(Recipe.build({**made, **changes}), say=lines.append)
        return [line for line in lines if "names no classes" in line]

    line = (
        "{}: names no classes, so the labels are taken as sorted: class 0 is neg, class 1 is pos; if it was trained otherwise,"
        " {} says so"
    )
    assert said(file, TASK) == [line.format("teacher.path", "task.labels: [pos, neg]")]
    assert said(file, {"name": TASK, "labels": ["pos", "neg"]}) == said(numbers, TASK) == []
    found = []
    for more in ([], ["--set", "task.labels=[pos, neg]"]):
        assert main(["eval", str(teacher), "--data", file, "--json", *more]) == 0
        captured = capsys.readouterr()
        found.append(json.loads(captured.out)["accuracy"])
        assert (line.format("model", '--set task.labels="[pos, neg]"') in captured.err) is not bool(more)
    assert found[0] == pytest.approx(1 - found[1])
    lines: list[str] = []
    recipe = Recipe.build(values(tokenizer, tmp_path / "run", {"train": file}, TASK))
    capture_classes(recipe, Teacher(path=str(teacher)), tmp_path / "cache", say=lines.append)
    assert lines == [line.format("teacher", "task.labels: [pos, neg]")]


def test_labels_that_a_trained_model_has_no_class_for(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """To list them beside its own would be refused next: it has no logit for them. What is said instead is taken."""
    numbers = table(tmp_path / "train.tsv", lambda i, name: int(name == "pos"))
    words = table(tmp_path / "words.tsv")
    three = table(tmp_path / "three.tsv", lambda i, name: "-" if i % 5 == 0 else int(name == "pos"))
    task = {"name": TASK, "labels": [0, 1]}
    made = values(tokenizer, tmp_path / "run", {"train": numbers, "validation": numbers}, task, steps=2)
    accuracy = run(made).evaluation["accuracy"]
    capsys.readouterr()
    renamed = ["--set", "task.labels=[neg, pos]", "--set", "task.names=[0, 1]"]
    mapped = '--set task.labels="[neg, pos]", --set task.names="[0, 1]"\n'
    others = 'in --set task.labels what the data call each of --set task.names="[0, 1]"\n'
    for file, said, more, rows in ((words, mapped, renamed, 24), (three, others, ["--set", "task.no_label=[-]"], 19)):
        assert main(["eval", str(tmp_path / "run"), "--data", file]) == 2
        assert capsys.readouterr().err.endswith(said)
        assert main(["eval", str(tmp_path / "run"), "--data", file, "--json", *more]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["rows"] == rows
        assert file == three or found["accuracy"] == accuracy
    begun = {"student": {"path": str(tmp_path / "run/model")}}
    with pytest.raises(ValueError, match=r"^data\.train: .* got -; the model has learned no others: name files with these, or"):
        run(values(tokenizer, tmp_path / "next", {"train": three, "validation_share": 0.0}, TASK, **begun))


def test_eval_of_classes_without_names(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The kind of a classifier's folder is known, and a file that lacks a class is not read as if it had all of them."""
    model = classifier(tmp_path / "three", tokenizer, num_labels=3)
    file = table(tmp_path / "some.tsv", lambda i, name: 1 + i % 2)
    assert main(["eval", str(model), "--data", file]) == 2
    assert "model: expected 2 logits, one for each of the classes 1, 2, got 3; list all" in capsys.readouterr().err
    assert main(["eval", str(model), "--data", file, "--json", "--set", "task.labels=[0, 1, 2]"]) == 0
    found = json.loads(capsys.readouterr().out)
    net = AutoModelForSequenceClassification.from_pretrained(model)
    words = Tokenizer.from_file(str(tokenizer))
    said = [int(net(torch.tensor([words.encode(sentence(i)[0]).ids])).logits.argmax()) for i in range(24)]
    assert found["accuracy"] == sum(said[i] == 1 + i % 2 for i in range(24)) / 24


def test_eleven_classes_that_transformers_named(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`LABEL_10` comes after `LABEL_9`."""
    model = classifier(tmp_path / "eleven", tokenizer, num_labels=11)
    net = AutoModelForSequenceClassification.from_pretrained(model)
    words = Tokenizer.from_file(str(tokenizer))
    rows = []
    for i in range(24):
        text = sentence(i)[0]
        said = int(net(torch.tensor([words.encode(text).ids])).logits.argmax())
        rows += [(text, said if i % 3 else (said + 1) % 11), (text, i % 11)]  # every class occurs
    right = [int(net(torch.tensor([words.encode(text).ids])).logits.argmax()) == label for text, label in rows]
    for prefix in ("LABEL_", ""):
        file = tmp_path / "rows.tsv"
        file.write_text("text\tlabel\n" + "".join(f"{text}\t{prefix}{label}\n" for text, label in rows))
        assert main(["eval", str(model), "--data", str(file), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["accuracy"] == sum(right) / len(right)


def test_a_classifier_that_says_no_architecture(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It loads as what is asked for; its classes are compared like another's."""
    model = classifier(tmp_path / "model", tokenizer, **named("pos", "neg"))
    config = json.loads((model / "config.json").read_text())
    del config["architectures"]
    (model / "config.json").write_text(json.dumps(config))
    data = {"train": table(tmp_path / "train.tsv"), "validation": table(tmp_path / "dev.tsv")}
    task = {"name": TASK, "labels": ["neg", "pos"]}
    with pytest.raises(
        ValueError, match=r"^teacher\.path: expected a model of the classes neg, pos in this order, got pos, neg"
    ):
        run(values(tokenizer, tmp_path / "run", data, task, teacher={"path": str(model)}, method="tinybert"))
    assert main(["eval", str(model), "--data", data["train"], "--task", TASK, "--set", "task.labels=[neg, pos]"]) == 2
    assert "expected a model of the classes neg, pos in this order" in capsys.readouterr().err


def test_labels_that_yaml_reads_as_something_else(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """A remedy that is followed word for word helps."""
    model = classifier(tmp_path / "model", tokenizer, **named("NEG", "POS"))
    file = table(tmp_path / "data.tsv", lambda i, name: ("no", "yes")[i % 2])
    assert main(["eval", str(model), "--data", file]) == 2
    told = capsys.readouterr().err
    found = re.search(r"""--set task\.labels="(\['no', 'yes'\])", --set task\.names="(\[NEG, POS\])\"""", told)
    assert found is not None, told
    sets = ["--set", f"task.labels={found[1]}", "--set", f"task.names={found[2]}"]
    assert main(["eval", str(model), "--data", file, "--json", *sets]) == 0
    capsys.readouterr()
    assert main(["eval", str(model), "--data", file, "--set", "task.labels=[no, yes]"]) == 2
    assert (
        "task.labels: expected text or whole numbers, got False, as YAML reads it; put it in quotes" in capsys.readouterr().err
    )


@pytest.mark.parametrize("name", ["data.tsv", "task.csv"])
def test_the_name_of_a_file_is_said_as_it_is(
    name: str, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = classifier(tmp_path / "model", tokenizer, **named("neg", "pos"))
    Path(name).write_text("text,label\nfine,pos\na,b,c,neg\n".replace(",", "\t" if name.endswith("tsv") else ","))
    assert main(["eval", str(model), "--data", name]) == 2
    assert f" {name}, line 3: expected 2 columns" in capsys.readouterr().err


def test_a_run_is_a_teacher_by_its_folder(tokenizer: Path, tmp_path: Path) -> None:
    data = {"train": table(tmp_path / "train.tsv"), "validation": table(tmp_path / "dev.tsv")}
    taught = run(values(tokenizer, tmp_path / "teacher", data, TASK, steps=2))
    assert (taught.out / "model" / "config.json").is_file()
    student = run(
        values(tokenizer, tmp_path / "run", data, TASK, steps=2, teacher={"path": str(taught.out)}, method="tinybert")
    )
    assert student.steps == 2
