"""TinyBERT: its terms against their definition in float64, its stages as phases, its augmented rows, what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("transformers")

from task_rows import BERT, run, sentence, tokenizer_file, values, write_table  # noqa: F401
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
)

from kdfast.models.view import View, look
from kdfast.train import Batch, Recipe
from kdfast.train.augment import Augment, Augmented, augmented, word_tokens
from kdfast.train.batch import IGNORE
from kdfast.train.match import LayerMatch
from kdfast.train.objective import Setting
from kdfast.train.recipes.tinybert import TinyBERT, TinyBERTOptions
from kdfast.train.step import DistillStep
from kdfast.train.tasks import task_class
from kdfast.train.teachers import LiveTeacher

TASK = "sequence_classification"
SMALL = {**BERT, "num_hidden_layers": 2}


def model(layers: int, width: int, heads: int, classes: int = 3, seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(
        vocab_size=40, num_labels=classes, initializer_range=0.4, attn_implementation="sdpa", max_position_embeddings=16,
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, intermediate_size=2 * width,
    )).eval()  # fmt: skip


def batch(soft: bool = False) -> Batch:
    torch.manual_seed(1)
    lengths = torch.tensor([7, 3, 5, 6])
    ids = torch.randint(5, 40, (4, 7))
    labels = torch.tensor([0, IGNORE, 2, 1] if soft else [0, 1, 2, 1])
    mask = (torch.arange(7) < lengths[:, None]).long()
    return Batch(ids, labels, mask, soft_mask=torch.tensor([True] * 4) if soft else None)


def scores(module: Any, hidden: Tensor, heads: int) -> Tensor:
    """Q K^T / sqrt(d) of a BERT layer, from its weights, in float64."""
    own = module.attention.self
    q, k = (
        F.linear(hidden, x.weight.double(), x.bias.double()).unflatten(-1, (heads, -1)).transpose(1, 2)
        for x in (own.query, own.key)
    )
    return q @ k.mT / (hidden.shape[-1] / heads) ** 0.5


def truth(student: Any, teacher: Any, found: LayerMatch, b: Batch, heads: int, reference: bool) -> dict[str, Tensor]:
    """The terms for every row by itself, `[B]`, in float64, looping over rows, layers and heads."""
    student, teacher = student.double(), teacher.double()
    mask = b.attention_mask.bool()  # type: ignore[union-attr]
    h_s = student(**b.by_name, output_hidden_states=True).hidden_states
    h_t = teacher(**b.by_name, output_hidden_states=True).hidden_states

    def project(term: str, h: Tensor) -> Tensor:
        module = found.projection(term)
        return h if module is None else module.double()(h)

    terms: dict[str, list[Tensor]] = {"embedding": [], "hidden": [], "attention": []}
    for i in range(len(mask)):
        tokens = torch.ones(mask.shape[1], dtype=torch.bool) if reference else mask[i]
        terms["embedding"].append((project("embedding", h_s[0][i, tokens]) - h_t[0][i, tokens]).square().mean())
        hidden: Any = 0.0
        attention: Any = 0.0
        for m, (g, weight) in enumerate(zip(found.layer_map, found.layer_weights, strict=True), 1):
            hidden += weight * (project("hidden", h_s[m][i, tokens]) - h_t[g][i, tokens]).square().mean()
            a_s = scores(student.bert.encoder.layer[m - 1], h_s[m - 1][i : i + 1], heads)[0]
            a_t = scores(teacher.bert.encoder.layer[g - 1], h_t[g - 1][i : i + 1], heads)[0]
            if reference:  # a mask of -10000 on keys of padding; scores <= -1e2 become 0; the mean over everything
                a_s, a_t = (a.masked_fill(~mask[i], 0.0) for a in (a_s, a_t))
                attention += weight * (a_s - a_t).square().mean()
            else:
                attention += weight * (a_s - a_t)[:, mask[i]][:, :, mask[i]].square().mean()
        terms["hidden"].append(hidden)
        terms["attention"].append(attention)
    return {name: torch.stack(rows) for name, rows in terms.items()}


def of_batch(rows: dict[str, Tensor], b: Batch, reference: bool) -> dict[str, Tensor]:
    """Means over the batch from the means over rows: each row by its tokens, or its pairs."""
    lengths = b.attention_mask.sum(1).double()  # type: ignore[union-attr]
    if reference:
        return {name: value.mean() for name, value in rows.items()}
    power = {"embedding": 1, "hidden": 1, "attention": 2}
    return {name: (value * lengths ** power[name]).sum() / (lengths ** power[name]).sum() for name, value in rows.items()}


@pytest.mark.parametrize("flavor", ["paper", "reference"])
@pytest.mark.parametrize("width", [12, 8], ids=["same-width", "narrower"])
def test_the_terms_equal_their_definition(flavor: str, width: int) -> None:
    student, teacher = model(2, width, 2, seed=1), model(5, 12, 2, seed=2)
    found = LayerMatch(student, teacher, (2, 5), (0.5, 2.0), flavor=flavor)
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    assert (found.projection("hidden") is None) == (flavor == "paper" and width == 12)
    b = batch()
    views = [look(m, b.by_name, found.needs(of_teacher=teaches)) for m, teaches in ((student, False), (teacher, True))]
    got = found(*views, b.attention_mask.bool())  # type: ignore[union-attr]
    weight = torch.tensor([0.3, 1.2, 0.0, 2.0])
    weighed = found(*views, b.attention_mask.bool(), weight)  # type: ignore[union-attr]
    torch.stack(list(got.values())).sum().backward()
    slope = student.bert.encoder.layer[0].attention.self.query.weight.grad.clone()
    student.zero_grad()
    rows = truth(student, teacher, found, b, 2, flavor == "reference")
    want = of_batch(rows, b, flavor == "reference")
    torch.stack(list(want.values())).sum().backward()
    for name in ("embedding", "hidden", "attention"):
        assert got[name].item() == pytest.approx(want[name].item(), rel=1e-5), name
        assert weighed[name].item() == pytest.approx((weight.double() * rows[name]).sum().item(), rel=1e-5), name
    torch.testing.assert_close(
        slope.double(), student.bert.encoder.layer[0].attention.self.query.weight.grad, rtol=1e-4, atol=1e-6
    )


def test_padding_counts_nowhere() -> None:
    student, teacher = model(1, 8, 2, seed=1), model(2, 12, 2, seed=2)
    found = LayerMatch(student, teacher)
    b = batch()
    other = Batch(torch.where(b.attention_mask.bool(), b.input_ids, 7), b.labels, b.attention_mask)  # type: ignore[union-attr]
    got = [
        found(*[look(m, x.by_name, found.needs(of_teacher=teaches)) for m, teaches in ((student, False), (teacher, True))],
              x.attention_mask.bool()) for x in (b, other)
    ]  # fmt: skip
    for name in got[0]:
        assert got[0][name].item() == pytest.approx(got[1][name].item(), rel=1e-5)


def test_layers_are_evenly_spaced_and_other_head_counts_are_compared_by_their_divisor() -> None:
    teacher = model(12, 12, 6)
    assert LayerMatch(model(4, 12, 2), teacher).layer_map == (3, 6, 9, 12)
    found = LayerMatch(model(5, 8, 4), teacher)
    assert found.layer_map == (3, 5, 8, 10, 12)
    b = batch()
    views = [look(m, b.by_name, found.needs(t)) for m, t in ((model(5, 8, 4), False), (teacher, True))]
    assert bool(found(*views)["attention"].isfinite())


def objective(options: dict[str, Any], student: Any, teacher: Any) -> DistillStep:
    task = task_class(TASK)(None, task_class(TASK).Data())
    return DistillStep(student, TinyBERT(TinyBERTOptions(**options), Setting(student, [LiveTeacher(teacher)], task)), task)


@pytest.mark.parametrize("flavor", ["paper", "reference"])
def test_the_prediction_has_the_gradient_of_the_soft_cross_entropy(flavor: str) -> None:
    student, teacher = model(1, 8, 2, seed=1), model(2, 12, 2, seed=2)
    step = objective({"stage": "prediction", "temperature": 2.0, "hard_weight": 0.25, "flavor": flavor}, student, teacher)
    b = batch(soft=True)
    loss, metrics = step(b, [LiveTeacher(teacher)(b)], 8)  # one of two batches of an optimiser step
    loss.backward()
    got = student.classifier.weight.grad.clone()
    student.zero_grad()
    z_s, z_t = student(**b.by_name).logits, teacher(**b.by_name).logits.detach()
    soft = -((z_t / 2).softmax(-1) * (z_s / 2).log_softmax(-1))
    soft = soft.sum(-1).sum() / 8 if flavor == "paper" else soft.mean() / 2
    hard = F.cross_entropy(z_s, b.labels, ignore_index=IGNORE, reduction="sum") / 8
    (soft + 0.25 * hard).backward()
    torch.testing.assert_close(got, student.classifier.weight.grad, rtol=1e-4, atol=1e-6)
    assert {"kl_at_T", "hard"} <= metrics.keys()


def test_the_loss_is_the_weighted_sum_and_a_term_of_weight_0_is_not_formed() -> None:
    student, teacher = model(1, 8, 2, seed=1), model(2, 12, 2, seed=2)
    b = batch()
    weights = {"embedding_weight": 0.5, "hidden_weight": 2.0, "attention_weight": 3.0, "prediction_weight": 0.0}
    step = objective({"stage": "all", **weights}, student, teacher)
    live = LiveTeacher(teacher)
    loss, metrics = step(b, [live(b, step.objective.needs_of_teacher() or None)], 4)  # type: ignore[arg-type]
    want = sum(weights[f"{name}_weight"] * float(metrics[name].total) for name in ("embedding", "hidden", "attention"))
    assert float(loss) == pytest.approx(want, rel=1e-6)
    without = objective({"stage": "intermediate", "attention_weight": 0.0, "hidden_weight": 0.0}, student, teacher).objective
    assert without.needs_of_student().layers == (0,)
    assert without.needs_of_student().attention == ()
    assert [name for name, _ in without.named_parameters()] == ["match.projections.embedding.weight"]


@pytest.fixture(scope="module")
def folders(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A table, a plain encoder, and a teacher that was fine-tuned from it."""
    home = tmp_path_factory.mktemp("folders")
    size = Tokenizer.from_file(str(tokenizer)).get_vocab_size()
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=size, **{**SMALL, "num_hidden_layers": 4})).save_pretrained(home / "encoder")
    shutil.copyfile(tokenizer, home / "encoder" / "tokenizer.json")
    train = write_table(home / "train.tsv", True)
    dev = write_table(home / "dev.tsv", True, rows=12)
    (home / "text").mkdir()
    (home / "text" / "a.jsonl").write_text("".join(json.dumps({"text": sentence(i)[0]}) + "\n" for i in range(40)))
    data = {"train": str(train), "validation": str(dev)}
    student = {"path": str(home / "encoder")}
    teacher = run(values(tokenizer, home / "teacher", data, TASK, student=student, optimizer={"lr": 3e-3}, steps=60))
    assert teacher.evaluation["accuracy"] == 1.0
    return {"train": train, "dev": dev, "encoder": home / "encoder", "teacher": teacher.model, "text": home / "text"}


def recipe(folders: dict[str, Path], out: Path, **changes: Any) -> dict[str, Any]:
    data = {"train": str(folders["train"]), "validation": str(folders["dev"]), "group_by_length": True}
    student = {"from_teacher": {"layers": [1, 3], "width": 8}}
    named = {"student": student, "teacher": {"path": str(folders["teacher"])}, **changes}
    made = values(named.pop("tokenizer", None), out, data, named.pop("task", TASK), **named)
    if "phases" in changes:
        del made["steps"], made["method"]
    return made


def phases(folders: dict[str, Path], **general: Any) -> list[dict[str, Any]]:
    corpus = {"paths": [str(folders["text"])], "glob": "*.jsonl", "sequence_length": 16}
    first = {"name": "tinybert", "stage": "general", "corpus": corpus, "teacher": str(folders["encoder"]), **general}
    return [
        {"steps": 4, "method": first},
        {"steps": 20, "method": {"name": "tinybert", "stage": "intermediate"}},
        {"steps": 96, "method": {"name": "tinybert", "stage": "prediction"}},
    ]


def test_two_stages_are_phases_that_share_projections_and_resume_exactly(folders: dict[str, Path], tmp_path: Path) -> None:
    made = recipe(folders, tmp_path / "whole", phases=phases(folders), save_every=1, keep=120, log_every=1)
    whole = run(made)
    assert whole.evaluation["accuracy"] == 1.0
    rows = [json.loads(line) for line in (whole.out / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    assert ["hidden" in row for row in rows] == [True] * 24 + [False] * 96
    assert ["kl_at_T" in row for row in rows] == [False] * 24 + [True] * 96
    assert rows[23]["hidden"] < rows[0]["hidden"]
    final = load_file(whole.out / "checkpoints/step-00000120/training.safetensors")
    names = [name for name in final if "projections" in name and name.startswith("module.")]
    assert names == [f"module.objectives.0.match.projections.{term}.weight" for term in ("embedding", "hidden")]
    student = AutoModel.from_pretrained(whole.model)
    assert (student.config.num_hidden_layers, student.config.hidden_size) == (2, 8)
    text = folders["text"] / "a.jsonl"
    before = text.read_text()
    text.write_text(before + json.dumps({"text": sentence(50)[0]}) + "\n")
    longer = [*made["phases"][:2], {**made["phases"][2], "steps": 97}]
    with pytest.raises(ValueError, match=r"^out: .* holds a run that differs in the corpus of a phase; set another out"):
        run({**made, "phases": longer})
    text.write_text(before)
    for last in (3, 5):
        out = tmp_path / str(last)
        shutil.copytree(whole.out, out)
        (out / "result.json").unlink()
        for step in range(last + 1, 121):
            shutil.rmtree(out / "checkpoints" / f"step-{step:08d}")
        run({**made, "out": str(out)})
        kept = load_file(out / "checkpoints/step-00000120/training.safetensors")
        assert [name for name in final if not torch.equal(kept[name], final[name])] == []


def test_a_student_of_tags(folders: dict[str, Path], tokenizer: Path, tmp_path: Path) -> None:
    """All stages on token classification, where a word without a tag is the teacher's."""
    lines = [
        f"who O\nplays O\nin O\n{'paris B-loc' if i % 2 else 'new B-loc'}\n{'film' if i % 3 else 'york I-loc'}\n"
        for i in range(24)
    ]
    (tmp_path / "a.conll").write_text("\n".join(lines))
    data = {"train": str(tmp_path / "a.conll"), "validation_share": 0.2, "group_by_length": True}
    task = {"name": "token_classification", "labels": ["O", "B-loc", "I-loc"]}
    teacher = run(
        values(
            None, tmp_path / "teacher", data, task, student={"path": str(folders["encoder"])}, optimizer={"lr": 3e-3}, steps=50
        )
    )
    assert teacher.evaluation["entity_f1"] > 0.9
    plain = {"from_teacher": {"layers": [1, 3], "path": str(folders["encoder"])}}  # which has no tags of its own
    alone = run(values(None, tmp_path / "alone", data, task, student=plain, steps=1))
    assert json.loads((alone.model / "config.json").read_text())["id2label"] == {"0": "O", "1": "B-loc", "2": "I-loc"}
    student = {"from_teacher": {"layers": [1, 3], "width": 8}}
    for method in ("tinybert", "distilbert"):
        chosen: Any = {"name": method, "cosine_weight": 0.0} if method == "distilbert" else method
        made = values(
            None, tmp_path / method, data, task, student=student, teacher={"path": str(teacher.model)}, method=chosen, steps=60
        )
        assert run(made).evaluation["entity_f1"] > 0.7


def test_words_that_could_stand_in_the_place_of_others(tokenizer: Path) -> None:
    words = Tokenizer.from_file(str(tokenizer))
    begins, continues = word_tokens(words, words.get_vocab_size())
    named = {token: (bool(begins[i]), bool(continues[i])) for token, i in words.get_vocab().items()}
    assert named["film"] == (True, False)
    assert named["##film"] == (False, True)
    assert named["[MASK]"] == named[","] == (False, False)


@pytest.mark.parametrize("by", ["embeddings", "masked_lm"])
def test_copies_with_other_words(by: str, folders: dict[str, Path], tokenizer: Path, tmp_path: Path) -> None:
    made = task_class(TASK)(None, task_class(TASK).Data(train=(str(folders["train"]),), validation_share=0.0))
    words = Tokenizer.from_file(str(tokenizer))
    rows = made.open(words, tokenizer, tmp_path, True).train
    text = {"train": str(folders["text"]), "glob": "*.jsonl", "validation_share": 0.0}
    encoder = {"path": str(folders["encoder"])}
    masked = run(values(tokenizer, tmp_path / "mlm", text, "masked_lm", student=encoder, steps=2)).model
    # Models of one tokenizer may be padded to sizes of their own.
    table = AutoModel.from_pretrained(folders["encoder"]).get_input_embeddings().weight
    table = torch.cat([table, table.new_zeros(6, table.shape[1])])
    options = Augment(copies=3, share=0.5, candidates=4, by=by, path=str(masked) if by == "masked_lm" else None)
    found = augmented(rows, tokenizer, options, tmp_path / "augmented", table, lambda line: None)
    assert len(rows) < len(found) <= 4 * len(rows)
    begins, _ = word_tokens(words, words.get_vocab_size())
    whole = found.batch(range(len(found)))
    assert whole.soft_mask is not None
    assert bool(whole.soft_mask.all())
    assert (whole.labels[: len(rows)] != IGNORE).all()
    assert (whole.labels[len(rows) :] == IGNORE).all()
    changed = 0
    for i in range(len(rows), len(found)):
        copy, row = (x.batch([j]).input_ids[0] for x, j in ((found, i), (rows, int(found._origin[i - len(rows)]))))
        other = copy != row
        changed += int(other.sum())
        assert bool(other.any())
        assert bool(begins[copy[other]].all())
        assert bool(begins[row[other]].all())
        if by == "embeddings":
            unit = F.normalize(table.detach(), dim=-1)
            for was, now in zip(row[other], copy[other], strict=True):
                likeness = (unit @ unit[was])[: len(begins)].masked_fill(~begins, -2.0)
                likeness[was] = -2.0
                assert int(now) in likeness.topk(4).indices.tolist()
    assert changed > len(found) - len(rows)
    # Killed amid its windows it writes the same again.
    files = sorted((tmp_path / "augmented").glob("*.safetensors"))
    before = files[0].read_bytes()
    files[0].unlink()
    again = augmented(rows, tokenizer, options, tmp_path / "augmented", table, lambda line: None)
    assert files[0].read_bytes() == before
    assert isinstance(again, Augmented)
    assert again.digest == found.digest
    # Another seed draws other words, and what was remembered of these is none of theirs.
    other = augmented(
        rows, tokenizer, dataclasses.replace(options, seed=1), tmp_path / "other", table, lambda line: None
    )  # fmt: skip
    assert isinstance(other, Augmented)
    assert not torch.equal(other._ids, found._ids)
    assert other.digest != found.digest
    assert found.lengths().tolist() == [len(found.batch([i]).input_ids[0]) for i in range(len(found))]


def test_a_run_on_copies(folders: dict[str, Path], tmp_path: Path) -> None:
    method = {"name": "tinybert", "augment": {"copies": 2}}
    assert run(recipe(folders, tmp_path / "run", method=method, steps=6)).steps == 6


def test_faults_are_said_in_one_line_before_training(folders: dict[str, Path], tokenizer: Path, tmp_path: Path) -> None:
    def fails(match: str, method: Any = "tinybert", **changes: Any) -> None:
        with pytest.raises(ValueError, match=match) as caught:
            run(recipe(folders, tmp_path / "run", **{"method": method, **changes}))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run" / "metrics.jsonl").exists()

    fails(r"method\.layer_map: expected layers of the teacher from 1 to 4, got 5", {"name": "tinybert", "layer_map": [2, 5]})
    fails(
        r"method\.layer_map: expected a layer .* each of the student's 2 layers, got 3",
        {"name": "tinybert", "layer_map": [1, 2, 3]},
    )
    fails(r"method\.layer_weights: expected a weight for each", {"name": "tinybert", "layer_weights": [1.0]})
    task = {"name": TASK, "labels": ["neg", "pos", "so-so"]}
    fails(r"teacher\.path: expected a model of the classes neg, pos, so-so in this order, got neg, pos", task=task)
    other = tmp_path / "other"
    shutil.copytree(folders["teacher"], other)
    text = json.loads((other / "tokenizer.json").read_text())
    text["model"]["vocab"]["filme"] = text["model"]["vocab"].pop("film")
    (other / "tokenizer.json").write_text(json.dumps(text))
    fails(
        r"teacher\.path: expected the data's tokenizer, got one with other tokens",
        teacher={"path": str(other)},
        tokenizer=str(tokenizer),
    )
    fails(
        r"student\.from_teacher\.path: expected the data's tokenizer, got one with other tokens",
        student={"from_teacher": {"layers": [1, 3], "path": str(other)}},
        tokenizer=str(tokenizer),
    )
    general = {"name": "tinybert", "stage": "general", "teacher": str(other)}
    fails(r"method\.teacher: expected the data's tokenizer", general)
    small = tmp_path / "small"
    shutil.copytree(folders["encoder"], small)
    BertModel(BertConfig(vocab_size=40, **BERT)).save_pretrained(small)
    fails(
        r"method\.teacher: expected 4 layers 16 wide like the run's teacher, got 1 layers 16 wide",
        {**general, "teacher": str(small)},
    )
    few = tmp_path / "few"
    BertModel(BertConfig(vocab_size=8, **{**BERT, "num_hidden_layers": 4})).save_pretrained(few)
    fails(r"method\.teacher: its vocabulary has 8 ids, expected at least the tokenizer's \d+", {**general, "teacher": str(few)})
    masked = {"name": "tinybert", "augment": {"by": "masked_lm", "path": str(few)}}
    BertForMaskedLM(BertConfig(vocab_size=8, **BERT)).save_pretrained(few)
    fails(r"method\.augment\.path: its vocabulary has 8 ids, expected at least the tokenizer's \d+", masked)
    BertForMaskedLM(BertConfig(vocab_size=64, **{**BERT, "max_position_embeddings": 4})).save_pretrained(few)
    fails(
        r"at most the 4 positions of the method\.augment\.path; lower data\.max_length",
        masked,
    )
    two = [{"path": str(folders["teacher"])}] * 2
    fails(r"teachers: method tinybert expects one teacher, got 2", teacher=None, teachers=two)


def test_attention_that_cannot_be_seen_is_refused() -> None:
    config = DebertaV2Config(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, relative_attention=True
    )
    student, teacher = DebertaV2Model(config), DebertaV2Model(config)
    with pytest.raises(ValueError, match=r"^student: DebertaV2Model does not .*; set method\.attention_weight: 0$"):
        LayerMatch(student, teacher)
    assert LayerMatch(student, teacher, terms=("embedding", "hidden")).layer_map == (1, 2)


def test_options_that_do_not_go_together() -> None:
    def fails(match: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            Recipe.build(
                {"student": {"model_type": "bert"}, "teacher": {"path": "t"}, "method": {"name": "tinybert", **options}}
            )

    fails(r"method\.corpus: expected it with stage general, got stage all", corpus={"paths": ["a"]})
    fails(r"method\.stage: prediction has no term", stage="prediction", prediction_weight=0)
    fails(r"method\.augment\.path: expected the folder of a masked language model", augment={"by": "masked_lm"})
    fails(r"method\.stage: expected one of all, general, intermediate, prediction", stage="attention")


@pytest.mark.parametrize("task", ["sequence_classification", "token_classification"])
def test_a_teacher_is_asked_once_for_each_row(
    task: str, folders: dict[str, Path], tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Where its predictions are all that a stage sees of it, and rows are read again; the losses are the same."""
    if task == "sequence_classification":
        train = str(write_table(tmp_path / "train.tsv", True, rows=40, unlabelled=20))
    else:
        (tmp_path / "train.conll").write_text("the O\nfilm O\nwas O\nin O\nparis B-loc\n\nnew B-loc\nyork I-loc\n\n" * 20)
        train = str(tmp_path / "train.conll")
    data = {"train": train, "validation_share": 0.0}
    teacher = run(values(tokenizer, tmp_path / "teacher", data, task)).model
    asked: list[int] = []
    plain = LiveTeacher.__call__

    def ask(self: LiveTeacher, batch: Batch, *needs: Any) -> View:
        asked.append(len(batch.input_ids))
        return plain(self, batch, *needs)

    monkeypatch.setattr(LiveTeacher, "__call__", ask)
    weights, losses = {}, {}
    for name in ("once", "always"):
        if name == "always":
            monkeypatch.setattr(TinyBERT, "_reads_often", lambda self, rows: False)
        asked.clear()
        method = {"name": "tinybert", "stage": "prediction"}
        made = values(tokenizer, tmp_path / name, data, task, method=method, teacher={"path": str(teacher)}, save_every=8)
        found = run(made)
        weights[name] = load_file(found.model / "model.safetensors")
        lines = (found.out / "metrics.jsonl").read_text().splitlines()
        losses[name] = torch.tensor([row["loss"] for row in map(json.loads, lines) if "loss" in row])
        assert sum(asked) == (40 if name == "once" else 30 * 8)
        if name == "once":  # killed after the preparation, it is not asked again
            (found.out / "result.json").unlink()
            shutil.rmtree(found.out / "checkpoints" / "step-00000030")
            asked.clear()
            again = load_file(run(made).model / "model.safetensors")
            assert sum(asked) == 0
            for key, value in again.items():
                assert torch.equal(value, weights["once"][key])
    assert len(losses["once"]) == 30
    torch.testing.assert_close(losses["once"], losses["always"], rtol=1e-3, atol=1e-6)
