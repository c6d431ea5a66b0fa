"""Text and word tasks from their files to their scores, each from a live teacher; language tasks from a cache too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch.nn import functional as F

pytest.importorskip("transformers")

from task_rows import BAD, GOOD, WORD_KD, WORDS, opened, run, sentence, tokenizer_file, values, write_conll, write_table  # noqa: F401
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, MarianConfig, MarianMTModel

from kdfast.cache import build
from kdfast.cli import main
from kdfast.models.view import View
from kdfast.text import TextData
from kdfast.train import Batch, Recipe
from kdfast.train.data import hold_out
from kdfast.train.inputs import open_inputs
from kdfast.train.kd import distillation
from kdfast.train.tasks import task_class
from kdfast.train.tasks.classes import class_scores, class_summary
from kdfast.train.tasks.token_classification import entities

# Texts and pairs


def test_a_text_classifier_learns_and_its_student_too(tokenizer: Path, tmp_path: Path) -> None:
    train = str(write_table(tmp_path / "train.tsv", True))
    dev = str(write_table(tmp_path / "dev.tsv", True, rows=12))
    data = {"train": train, "validation": dev}
    teacher = run(values(tokenizer, tmp_path / "teacher", data, "sequence_classification"))
    assert teacher.evaluation["accuracy"] == 1.0
    assert teacher.evaluation["mcc"] == teacher.evaluation["macro_f1"] == 1.0
    assert teacher.evaluation["nll"] < 0.1
    assert teacher.headline == "accuracy 100.0%, macro-F1 1.000, MCC 1.000"
    model = AutoModelForSequenceClassification.from_pretrained(teacher.model)
    assert model.config.id2label == {0: "neg", 1: "pos"}

    # From the teacher's word alone, on rows most of which have no label.
    data = {**data, "train": str(write_table(tmp_path / "some.tsv", True, unlabelled=30))}
    changes = {"method": WORD_KD, "teacher": {"path": str(teacher.model)}, "steps": 60}
    student = run(values(tokenizer, tmp_path / "student", data, "sequence_classification", **changes))
    assert student.evaluation["accuracy"] == 1.0
    first = json.loads((tmp_path / "student" / "metrics.jsonl").read_text().splitlines()[0])
    assert {"kl_at_T", "hard", "top1_agreement"} <= first.keys()


def test_rows_without_a_label_are_not_held_out(tokenizer: Path, tmp_path: Path) -> None:
    """Nothing could be measured on them; the rows that have one are drawn as they are without the others."""
    table = {"train": str(write_table(tmp_path / "some.tsv", True, unlabelled=30)), "validation_share": 0.3}
    text = opened(tokenizer, "sequence_classification", table)[1]
    (tmp_path / "tags.conll").write_text("\n".join(f"good B-A\n{'bad O' if i % 2 else 'bad'}\n\nword\n" for i in range(60)))
    columns = {"train": str(tmp_path / "tags.conll"), "validation_share": 0.3}
    words = opened(tokenizer, "token_classification", columns)[1]
    for splits in (text, words):
        rows = splits.train.source
        held = hold_out(rows, 0.3)[1].rows
        assert splits.validation.rows == [row for row in held if rows.labelled[row]] != held
        assert sorted([*splits.train.rows, *splits.validation.rows]) == list(range(len(rows)))
    labels = words.validation.batch(range(len(words.validation))).labels
    assert bool((labels >= 0).any(1).all())


def test_a_saved_model_knows_the_classes_that_a_file_lacks(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """Ids are those of the model's config: by the file alone, its first class would be the model's first."""
    rows = [(text, label) for text, label in map(sentence, range(40))] + [("new york in paris", "other")] * 20
    names = ["neg", "other", "pos"]
    for name, kept in (("train", names), ("test", names[1:])):
        lines = [f"{text}\t{label}" for text, label in rows if label in kept]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["text\tlabel", *lines]) + "\n")
    data = {"train": str(tmp_path / "train.tsv"), "validation": str(tmp_path / "train.tsv")}
    model = run(values(tokenizer, tmp_path / "run", data, "sequence_classification")).model
    words = ["--data", str(tmp_path / "test.tsv"), "--json"]
    for of in ([str(model), "--task", "sequence_classification"], [str(tmp_path / "run")]):
        assert main(["eval", *of, *words]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["accuracy"], found["rows"]) == (1.0, 40)
    # The same of training that begins with a model, or learns from one: here without a step, so as it was saved.
    data = {"train": str(tmp_path / "test.tsv"), "validation": str(tmp_path / "test.tsv")}
    started = {"steps": 1, "optimizer": {"lr": 1e-9}}
    taught = {"method": WORD_KD, "teacher": {"path": str(model)}, "init_from": str(model)}
    begun = {
        "path": {"student": {"path": str(model)}},
        "cut": {"student": {"from_teacher": {"layers": [0], "path": str(model)}}},
    }
    for name, changes in {**begun, "taught": taught}.items():
        result = run(values(tokenizer, tmp_path / name, data, "sequence_classification", **started, **changes))
        assert result.evaluation["accuracy"] == 1.0
        assert AutoModelForSequenceClassification.from_pretrained(result.model).config.id2label == dict(enumerate(names))
    assert main(["eval", str(tmp_path / "run"), *words, "--sequence-length", "8"]) == 2
    assert "kdfast eval: --sequence-length: unknown key; did you mean 'max_length'?" in capsys.readouterr().err
    (tmp_path / "test.tsv").write_text("text\tlabel\nthe film was good\tgood\n")
    assert main(["eval", str(tmp_path / "run"), *words]) == 2
    line = (
        "expected one of the labels neg, other, pos, got good; the model has learned no others: name files with these, or what"
    )
    assert line in capsys.readouterr().err


def test_a_pair_is_marked_cut_and_padded(tokenizer: Path, tmp_path: Path) -> None:
    file = write_table(tmp_path / "pairs.tsv", True, pair=True)
    data = {"train": str(file), "text_pair": "other", "max_length": 14, "validation_share": 0.0}
    task, splits = opened(tokenizer, "sequence_classification", data)
    whole = Tokenizer.from_file(str(tokenizer))
    longer = sum(len(whole.encode(sentence(i)[0], sentence(i + 2)[0]).ids) > 14 for i in range(40))
    assert 0 < longer < 40
    assert task.notes == [f"data.train: {longer} of 40 rows are longer than data.max_length 14 and are cut"]
    batch = splits.train.batch([0, 3, 8])
    ids, types, mask = (batch.by_name[name] for name in ("input_ids", "token_type_ids", "attention_mask"))
    assert ids.shape[1] == 14
    assert ids[0, 0] == 2
    for row, kinds, seen in zip(ids, types, mask, strict=True):
        length = int(seen.sum())
        separators = (row[:length] == 3).nonzero()[:, 0].tolist()
        assert len(separators) == 2
        assert separators[1] == length - 1
        assert kinds.tolist() == [int(separators[0] < i < length) for i in range(len(row))]
        assert (row[length:] == task.pad_id).all()
    assert batch.labels.tolist() == [0, 1, 0]
    assert batch.soft_mask is None


@pytest.mark.parametrize("kind", ["headless", "csv", "jsonl", "parquet", "dataset"])
def test_the_same_rows_from_every_kind_of_file(kind: str, tokenizer: Path, tmp_path: Path) -> None:
    rows = [{"text": f'{sentence(i)[0]}, "so"', "label": sentence(i)[1]} for i in range(10)]
    (tmp_path / "plain.tsv").write_text(
        "".join(f"{r['text']}\t{r['label']}\n" for r in [{"text": "text", "label": "label"}, *rows])
    )
    data: dict[str, Any] = {"train": str(tmp_path / f"rows.{kind}")}
    if kind == "headless":
        data = {"train": str(tmp_path / "rows.tsv"), "columns": ["text", "label"]}
        (tmp_path / "rows.tsv").write_text("".join(f"{r['text']}\t{r['label']}\n" for r in rows))
    elif kind == "csv":
        quoted = [(r["text"].replace('"', '""'), r["label"]) for r in rows]
        (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in quoted))
    elif kind == "jsonl":
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    elif kind == "parquet":
        pytest.importorskip("pyarrow")
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(rows), tmp_path / "rows.parquet")
    else:
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
        data = {"dataset": str(tmp_path / "saved")}
    nothing_held_out = {"validation_share": 0.0}
    want = opened(tokenizer, "sequence_classification", {"train": str(tmp_path / "plain.tsv"), **nothing_held_out})[1].train
    got = opened(tokenizer, "sequence_classification", {**data, **nothing_held_out})[1].train
    assert got.digest == want.digest
    assert len(got) == 10


def test_faults_in_a_table_are_said_in_one_line(tokenizer: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.tsv"

    def fails(text: str, match: str, task: Any = "sequence_classification", **data: Any) -> None:
        file.write_text(text)
        with pytest.raises(ValueError, match=match):
            opened(tokenizer, task, {"train": str(file), **data})

    fails("a film\t0\na war\t1\n", r"data\.train: .*expected columns text, got a film, 0; .*data\.columns")
    fails("text\tlabel\na film\t0\tx\n", r"t\.tsv, line 2: expected 2 columns \(text, label\), got 3")
    fails("text\tlabel\na film\t0\n", r"data\.train: expected at least two different labels, got 0")
    named = {"name": "sequence_classification", "labels": ["no", "yes"]}
    fails("text\tlabel\na film\tmaybe\n", r"data\.train: expected one of the labels no, yes, got maybe; list all", named)
    fails("text\tlabel\n", r"data\.train: expected at least one row")


def test_a_teacher_of_other_classes_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    data = {"train": str(write_table(tmp_path / "train.tsv", True)), "validation_share": 0.0}
    teacher = run(values(tokenizer, tmp_path / "teacher", data, "sequence_classification", steps=1))
    turned = {"name": "sequence_classification", "labels": ["pos", "neg"]}
    changes = {"method": WORD_KD, "teacher": {"path": str(teacher.model)}}
    with pytest.raises(
        ValueError, match=r"teacher\.path: expected a model of the classes pos, neg in this order, got neg, pos"
    ):
        run(values(tokenizer, tmp_path / "student", data, turned, **changes))


def test_rows_without_label_count_in_the_soft_term_only() -> None:
    torch.manual_seed(0)
    logits, teacher = torch.randn(6, 5, dtype=torch.float64, requires_grad=True), torch.randn(6, 5, dtype=torch.float64)
    labels = torch.tensor([1, -100, 4, -100, -100, 0])
    mask = torch.tensor([True, True, True, True, True, False])
    labels[5] = -100  # neither
    options = {"temperature": 2.0, "soft_weight": 0.7, "hard_weight": 0.3, "label_smoothing": 0.1}
    loss, metrics = distillation(
        View(own_logits=logits), [View(own_logits=teacher)], labels, 5, soft_mask=mask, **options
    )  # fmt: skip
    soft = F.kl_div(F.log_softmax(logits[:5] / 2, -1), F.softmax(teacher[:5] / 2, -1), reduction="sum") * 4
    hard = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum", label_smoothing=0.1)
    want = (0.7 * soft + 0.3 * hard) / 5
    assert torch.allclose(loss, want, rtol=1e-6)
    (got_gradient,), (gradient,) = torch.autograd.grad(loss, logits), torch.autograd.grad(want, logits)
    assert torch.allclose(got_gradient, gradient, rtol=1e-5, atol=1e-9)
    assert float(metrics["hard"].count) == 2
    assert float(metrics["kl_at_T"].count) == 5
    assert Batch(torch.zeros(6, 1), labels, soft_mask=mask).count() == 5
    whole = torch.tensor([1, 2, 4, 3, 0, 1])
    split = distillation(View(own_logits=logits), [View(own_logits=teacher)], whole, 6, soft_mask=whole > -1, **options)[0]
    assert torch.allclose(split, distillation(View(own_logits=logits), [View(own_logits=teacher)], whole, 6, **options)[0])


def test_scores_of_a_table_by_hand() -> None:
    # labels 0 0 0 1 1, said 0 0 1 1 0: f1 of 0: 2/3, of 1: 1/2; mcc (2*1 - 1*1) / sqrt(3*2*3*2)
    logits = F.one_hot(torch.tensor([0, 0, 1, 1, 0, 1])).float()
    parts = [class_scores(logits[:2], torch.tensor([0, 0])), class_scores(logits[2:], torch.tensor([0, 1, 1, -100]))]
    found = class_summary(parts)
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert found["mcc"] == pytest.approx(1 / 6)
    assert found["rows"] == 5
    with pytest.raises(ValueError, match="at least one row with a label"):
        class_summary([class_scores(logits, torch.full((6,), -100))])


# Words


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O O O", []),
        ("B-per I-per O B-loc", [(0, 2, "per"), (3, 4, "loc")]),
        ("B-per B-per", [(0, 1, "per"), (1, 2, "per")]),
        ("I-per I-per O", [(0, 2, "per")]),
        ("B-per I-loc I-loc", [(0, 1, "per"), (1, 3, "loc")]),
        ("O I-per B-per I-per", [(1, 2, "per"), (2, 4, "per")]),
        ("", []),
    ],
    ids=["none", "two", "neighbours", "begins-inside", "changes-type", "inside-then-begin", "empty"],
)
def test_entities_in_tags(tags: str, found: list[Any]) -> None:
    assert entities(tags.split()) == found


def test_labels_stand_at_first_tokens_and_long_sentences_go_on(tokenizer: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.conll"
    file.write_text("-DOCSTART-\tO\n\nparisfilm\tB-loc\nin\tO\n\nwho\nplays\tO\n")
    data = {"train": str(file), "validation_share": 0.0}
    task, splits = opened(tokenizer, "token_classification", data)
    assert task.names == ["B-loc", "O"]
    batch = splits.train.batch([0, 1])
    pieces = Tokenizer.from_file(str(tokenizer)).encode("parisfilm", add_special_tokens=False).ids
    assert len(pieces) > 1
    row = [-100, 0, *[-100] * (len(pieces) - 1), 1, -100]
    assert batch.labels[0].tolist() == row
    # "who" has no tag: a teacher's word counts there, a label does not.
    who = len(Tokenizer.from_file(str(tokenizer)).encode("who", add_special_tokens=False).ids)
    assert (batch.labels[1] != -100).nonzero()[:, 0].tolist() == [1 + who]
    assert batch.labels[1, 1 + who] == 1
    assert batch.soft_mask[1].nonzero()[:, 0].tolist() == [1, 1 + who]

    long = str(write_conll(tmp_path / "long.conll", 2))
    rows = opened(tokenizer, "token_classification", {"train": long, "validation_share": 0.0, "max_length": 6})[1].train
    labels = rows.batch(range(len(rows))).labels
    assert rows.batch(range(len(rows))).input_ids.shape[1] <= 6
    assert (labels != -100).sum() == 2 * len(WORDS)


def test_a_tagger_learns_and_its_student_too(tokenizer: Path, tmp_path: Path) -> None:
    data = {"train": str(write_conll(tmp_path / "train.conll", 24)), "validation": str(write_conll(tmp_path / "dev.conll", 3))}
    teacher = run(values(tokenizer, tmp_path / "teacher", data, "token_classification"))
    assert teacher.evaluation["entity_f1"] == teacher.evaluation["accuracy"] == 1.0
    assert teacher.evaluation["rows"] == 3 * len(WORDS)
    assert teacher.headline == "entity F1 100.0%, token accuracy 100.0%"
    changes = {"method": {**WORD_KD, "hard_weight": 0.0}, "teacher": {"path": str(teacher.model)}}
    student = run(values(tokenizer, tmp_path / "student", data, "token_classification", **changes))
    assert student.evaluation["entity_f1"] == 1.0


def test_entity_f1_by_hand() -> None:
    task = task_class("token_classification")(None, None)
    task.names = ["B-a", "I-a", "O"]
    labels = torch.tensor([[-100, 0, 1, -100, 2, 0]])  # entities (0, 2) and (3, 4)
    said = F.one_hot(torch.tensor([[0, 0, 1, 2, 0, 2]]), 3).float()  # entities (0, 2) and (2, 3)
    found = task.summary([task.score(View(own_logits=said), Batch(labels, labels))])
    assert found["entity_f1"] == found["entity_precision"] == found["entity_recall"] == 0.5
    assert found["accuracy"] == 0.5


# Masked models and encoder-decoders


def test_a_masked_model_from_a_live_teacher_and_from_its_cache(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text("".join(json.dumps({"text": sentence(i)[0]}) + "\n" for i in range(40)))
    corpus = {"glob": "*.jsonl", "sequence_length": 16, "mask_share": 0.3}
    data = {"train": str(tmp_path / "text"), **corpus, "validation_share": 0.2}
    teacher = run(values(tokenizer, tmp_path / "teacher", data, "masked_lm"))
    assert teacher.evaluation["ppl"] < 20
    changes = {"method": WORD_KD, "teacher": {"path": str(teacher.model)}}
    live = run(values(tokenizer, tmp_path / "live", data, "masked_lm", **changes))
    assert live.evaluation["ppl"] < 40
    read = TextData(paths=(str(tmp_path / "text"),), **corpus)
    cache = build(teacher.model, read, tmp_path / "cache", k=20, temperatures=(1.0, 2.0), say=lambda line: None)
    assert cache.info.alignment == "same"
    changes = {"method": WORD_KD, "teacher": {"cache": str(tmp_path / "cache")}}
    cached = run(values(tokenizer, tmp_path / "cached", {"validation_share": 0.2}, "masked_lm", **changes))
    assert cached.evaluation["ppl"] < 40


def test_an_encoder_decoder_from_a_live_teacher_and_from_its_cache(tokenizer: Path, tmp_path: Path) -> None:
    """The target is one of six words, told by the source alone and each as often: blind to it, the word costs 6 at best.

    Of three labels a row, the begin that the tokenizer gives a text, the word and the end, two are sure: the best perplexity
    without the source is the cube root of 6, 1.82, with it 1.
    """
    blind = 6 ** (1 / 3)
    pairs = [{"source": f"{(*GOOD, *BAD)[i % 6]} film", "target": (*GOOD, *BAD)[i % 6]} for i in range(48)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs[:6]))
    pair = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in
            (("layers", 1), ("attention_heads", 2), ("ffn_dim", 64))}  # fmt: skip
    config = {**pair, "d_model": 32, "max_position_embeddings": 32, "pad_token_id": 0, "eos_token_id": 3, "bos_token_id": 2,
              "decoder_start_token_id": 0, "forced_eos_token_id": 3, "init_std": 0.1, "dropout": 0.0}  # fmt: skip
    size = Tokenizer.from_file(str(tokenizer)).get_vocab_size()
    torch.manual_seed(0)
    first = tmp_path / "first"
    MarianMTModel(MarianConfig(vocab_size=size, **config)).save_pretrained(first)
    (first / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    data = {"train": str(tmp_path / "pairs.jsonl"), "validation": str(tmp_path / "dev.jsonl"), "sequence_length": 16}
    changes = {"student": {"path": str(first)}, "steps": 130, "optimizer": {"lr": 4e-3, "schedule": "constant"}}
    teacher = run(values(first, tmp_path / "teacher", data, "seq2seq", **changes))
    recipe = Recipe.build(values(first, tmp_path / "opened", data, "seq2seq"))
    rows = open_inputs(recipe, tmp_path / "opened").validation
    assert rows is not None
    batch = rows.batch(range(6))
    counted = batch.labels != -100
    assert counted.sum(1).tolist() == [3] * 6, "the word and what stands around it"
    assert teacher.evaluation["ppl"] < 1.3 < blind
    kd = {**changes, "method": WORD_KD, "teacher": {"path": str(teacher.model)}}
    live = run(values(first, tmp_path / "live", data, "seq2seq", **kd))
    assert live.evaluation["ppl"] < 1.3
    corpus = TextData(paths=(str(tmp_path / "pairs.jsonl"),), sequence_length=16)
    build(teacher.model, corpus, tmp_path / "cache", k=20, temperatures=(1.0, 2.0), say=lambda line: None)
    kd["teacher"] = {"cache": str(tmp_path / "cache")}
    cached = run(values(first, tmp_path / "cached", {"validation": data["validation"]}, "seq2seq", **kd))
    assert cached.evaluation["ppl"] < 1.3
    # The same model with every source made one word cannot say which.
    model = AutoModelForSeq2SeqLM.from_pretrained(teacher.model).eval()
    same = batch.by_name["input_ids"][:1].expand(6, -1)
    logits = model(input_ids=same, decoder_input_ids=batch.by_name["decoder_input_ids"]).logits
    nll = F.cross_entropy(logits.flatten(0, 1).detach(), batch.labels.flatten(), ignore_index=-100)
    assert float(nll.exp()) >= blind * (1 - 1e-5)
