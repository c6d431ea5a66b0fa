"""Meta-KD: rows' weights and terms against loops in float64, teacher and student from their files, what they refuse."""

from __future__ import annotations

import json
import math
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

from task_rows import BAD, BERT, GOOD, opened, run, tokenizer_file, values  # noqa: F401
from test_tinybert import batch, model, truth
from transformers import BertConfig, BertForSequenceClassification, BertModel

from kdfast.cache import load_teacher
from kdfast.models.load import load_folder
from kdfast.train import Batch, distill
from kdfast.train.batch import IGNORE
from kdfast.train.domains import DomainState, load_state, mean_state, save_state, weights_of_rows
from kdfast.train.objective import Setting
from kdfast.train.recipe import Recipe
from kdfast.train.recipes.meta_kd import MetaKD, MetaKDOptions
from kdfast.train.recipes.meta_teacher import MetaTeacher, MetaTeacherOptions
from kdfast.train.step import DistillStep
from kdfast.train.tasks import task_class
from kdfast.train.teachers import LiveTeacher

TASK = "sequence_classification"


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_weights_equal_a_loop_over_rows_and_domains(alpha: float) -> None:
    torch.manual_seed(0)
    e = torch.randn(30, 6) + 0.5
    y, d = torch.randint(0, 2, (30,)), torch.arange(30) % 3
    cos = F.cosine_similarity
    for i in range(30):
        own = [e[(d == k) & (y == y[i])].mean(0) for k in range(3)]
        others = sum(float(cos(e[i], own[k], dim=0)) for k in range(3) if k != d[i])
        want = alpha * float(cos(e[i], own[int(d[i])], dim=0)) + (1 - alpha) / 2 * others
        got = weights_of_rows(e, y, d, "abc", alpha=alpha, flavor="paper")
        assert float(got[i]) == pytest.approx(want, abs=1e-6)
        centre = [e[d == k].mean(0) for k in range(3)]
        mean = sum(float(cos(e[i], centre[k], dim=0)) for k in range(3) if k != d[i]) / 2
        want = (float(cos(e[i], centre[int(d[i])], dim=0)) + mean) / 2
        assert float(weights_of_rows(e, y, d, "abc", alpha=alpha, flavor="reference")[i]) == pytest.approx(want, abs=1e-6)
    alone = weights_of_rows(e, y, torch.zeros_like(d), "a", alpha=alpha, flavor="paper")
    assert float(alone[0]) == pytest.approx(alpha * float(cos(e[0], e[y == y[0]].mean(0), dim=0)), abs=1e-6)


def test_a_domain_without_an_example_is_named() -> None:
    e, y, d = torch.randn(4, 3), torch.tensor([0, 1, 0, 0]), torch.tensor([0, 0, 1, 1])
    with pytest.raises(
        ValueError, match=r"data\.train: expected an example of class 1 in every domain.*got none in domain 'dvd'"
    ):
        weights_of_rows(e, y, d, ["books", "dvd"], alpha=0.5, flavor="paper")
    assert len(weights_of_rows(e, y, d, ["books", "dvd"], alpha=0.5, flavor="reference")) == 4
    with pytest.raises(ValueError, match=r"data\.train: expected an example in every domain.*got none in domain 'kitchen'"):
        weights_of_rows(e, y, d, ["books", "dvd", "kitchen"], alpha=0.5, flavor="reference")


def task_of(*domains: str) -> Any:
    made = task_class(TASK)(None, task_class(TASK).Data(domain="domain"))
    made.domains = list(domains)
    return made


def with_domains(weight: bool = True) -> Batch:
    b = batch()
    extra = {"domain": torch.tensor([0, 1, 1, 0])}
    if weight:
        extra["row_weight"] = torch.tensor([0.9, 0.4, -0.2, 0.7])
    return Batch(b.by_name, b.labels, extra=extra)


def state_by_hand(state: DomainState, hidden: Tensor, mask: Tensor, domain: Tensor) -> Tensor:
    """h_d, row by row."""
    rows = [hidden[i, mask[i]].mean(0) + state.embedding.weight[domain[i]] for i in range(len(hidden))]
    return torch.tanh(torch.stack(rows) @ state.dense.weight.T + state.dense.bias)


@pytest.mark.parametrize("flavor", ["paper", "reference"])
def test_the_meta_teacher_equals_its_definition(flavor: str) -> None:
    student = model(2, 12, 2, seed=1)
    method = MetaTeacher(MetaTeacherOptions(domain_weight=0.3, flavor=flavor), Setting(student, [], task_of("a", "b")))
    b = with_domains()
    torch.manual_seed(5)
    loss, metrics = DistillStep(student, method, task_of("a", "b"))(b, [], 8)
    loss.backward()
    got = method.state.dense.weight.grad.clone()  # type: ignore[union-attr]
    method.zero_grad()
    torch.manual_seed(5)
    shuffled = b.extra["domain"][torch.randperm(4)]
    wrong = shuffled if flavor == "reference" else 1 - b.extra["domain"]  # of two domains the other one
    student.double(), method.double()
    out = student(**b.by_name, output_hidden_states=True)
    state = state_by_hand(method.state, out.hidden_states[-1], b.attention_mask.bool(), b.extra["domain"])  # type: ignore
    said = state @ method.head.weight.T + method.head.bias  # type: ignore[union-attr]
    rows = F.cross_entropy(out.logits, b.labels, reduction="none") + 0.3 * F.cross_entropy(said, wrong, reduction="none")
    want = (b.extra["row_weight"].clamp(min=0) * rows).sum() / 8
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert {"hard", "wrong_domain"} <= metrics.keys()
    torch.testing.assert_close(got.double(), method.state.dense.weight.grad, rtol=1e-4, atol=1e-7)  # type: ignore[union-attr]


@pytest.mark.parametrize("width", [12, 8], ids=["same-width", "narrower"])
def test_meta_distillation_equals_its_definition(width: int, tmp_path: Path) -> None:
    """Five terms, each row weighed by lambda."""
    student, teacher = model(2, width, 2, seed=1), model(4, 12, 2, seed=2)
    torch.manual_seed(3)
    theirs = DomainState(2, 12)
    save_state(tmp_path, {n: w.detach() for n, w in theirs.state_dict().items()}, ["a", "b"])
    teacher.save_pretrained(tmp_path)
    recipe = Recipe.build({"student": {"model_type": "bert"}, "teacher": {"path": str(tmp_path)}, "method": "meta_kd"})
    weights = {
        "embedding_weight": 0.5,
        "hidden_weight": 2.0,
        "attention_weight": 3.0,
        "transfer_weight": 0.7,
        "temperature": 2.0,
    }
    method = MetaKD(MetaKDOptions(**weights), Setting(student, [LiveTeacher(teacher)], task_of("a", "b"), recipe))
    b = with_domains()
    step, live = DistillStep(student, method, task_of("a", "b")), LiveTeacher(teacher)
    loss, metrics = step(b, [live(b, method.needs_of_teacher())], 8)
    loss.backward()
    got = student.bert.embeddings.word_embeddings.weight.grad.clone()
    student.zero_grad(), method.zero_grad()
    rows = truth(student, teacher, method.match, b, 2, False)  # type: ignore[arg-type]  # makes both float64
    method.double(), theirs.double()
    mask, domain = b.attention_mask.bool(), b.extra["domain"]  # type: ignore[union-attr]
    out_s, out_t = (m(**b.by_name, output_hidden_states=True) for m in (student, teacher))
    h_s = state_by_hand(method.state, out_s.hidden_states[-1], mask, domain)  # type: ignore[arg-type]
    h_s = h_s if method.projection is None else method.projection(h_s)
    transfer = (h_s - state_by_hand(theirs, out_t.hidden_states[-1], mask, domain)).square().mean(-1)
    kl = F.kl_div(
        (out_s.logits / 2).log_softmax(-1), (out_t.logits / 2).log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    right = out_t.logits.softmax(-1).gather(1, b.labels[:, None])[:, 0]  # type: ignore[index]
    by_hand = torch.tensor(
        [(1 + float(t)) / (math.exp((1 - float(p)) ** 2) + 1) for t, p in zip(b.extra["row_weight"], right, strict=True)]
    )
    want = 0.5 * rows["embedding"] + 2 * rows["hidden"] + 3 * rows["attention"] + 0.7 * transfer + kl
    want = (by_hand.double() * want).sum() / 8
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert {"embedding", "hidden", "attention", "transfer", "kl_at_T", "row_weight"} <= metrics.keys()
    torch.testing.assert_close(got.double(), student.bert.embeddings.word_embeddings.weight.grad, rtol=1e-4, atol=1e-6)


def test_a_domain_that_the_teacher_never_saw_has_the_mean_embedding(tmp_path: Path) -> None:
    state = DomainState(2, 4)
    save_state(tmp_path, {n: w.detach() for n, w in state.state_dict().items()}, ["books", "dvd"])
    found = load_state(tmp_path, ["dvd", "kitchen"])
    assert found is not None
    assert torch.equal(found.embedding.weight[0], state.embedding.weight[1])
    torch.testing.assert_close(found.embedding.weight[1], state.embedding.weight.mean(0))
    assert load_state(tmp_path / "none", ["dvd"]) is None


# From files


def write_reviews(folder: Path, pair: bool = False, rows: int = 30) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    files = {}
    for k, domain in enumerate(("books", "dvd", "kitchen")):
        lines = []
        for i in range(rows):
            word = (GOOD if i % 2 else BAD)[(i + k) % 3]
            row = {"text": " ".join(["the", ("film", "paris", "york")[k], *["really"] * (i % 3), word]),
                   "label": "pos" if i % 2 else "neg", "domain": domain}  # fmt: skip
            lines.append(json.dumps({**row, "other": "who plays in paris"} if pair else row))
        files[domain] = folder / f"{domain}.jsonl"
        files[domain].write_text("\n".join(lines) + "\n")
    return files


def test_shares_of_a_domain_are_drawn_one_within_the_other(tokenizer: Path, tmp_path: Path) -> None:
    files = write_reviews(tmp_path / "r", rows=200)
    data = {"train": [str(f) for f in files.values()], "domain": "domain", "validation_share": 0.0}

    def of(share: float) -> tuple[Any, list[tuple[int, ...]]]:
        task, splits = opened(tokenizer, TASK, {**data, "domain_shares": {"dvd": share}})
        rows = [splits.train.batch([i]) for i in range(len(splits.train))]
        return task, [tuple(r.input_ids[0].tolist()) for r in rows if task.domains[int(r.extra["domain"][0])] == "dvd"]

    task, few = of(0.1)
    assert task.domains == ["books", "dvd", "kitchen"]
    _, more = of(0.3)
    assert 8 < len(few) < 35 < len(more) < 90
    assert set(few) <= set(more)
    assert len(of(1.0)[1]) == 200
    task, splits = opened(tokenizer, TASK, {**data, "domain_shares": {"dvd": 0}, "validation": str(files["dvd"])})
    assert task.domains == ["books", "kitchen"]
    assert len(splits.train) == 400
    assert splits.validation.batch([0]).extra["domain"].tolist() == [IGNORE]
    with pytest.raises(
        ValueError, match=r"data\.domain_shares: expected domains of data\.train \(books, dvd, kitchen\), got 'dvds'"
    ):
        opened(tokenizer, TASK, {**data, "domain_shares": {"dvds": 0.5}})
    with pytest.raises(ValueError, match=r"data\.domain_shares\.dvd: expected a share from 0 to 1, got 2"):
        opened(tokenizer, TASK, {**data, "domain_shares": {"dvd": 2}})
    with pytest.raises(ValueError, match=r"data\.domain_shares: expected data\.domain"):
        opened(tokenizer, TASK, {"train": data["train"], "domain_shares": {"dvd": 0.5}})


@pytest.fixture(scope="module")
def encoder(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    size = Tokenizer.from_file(str(tokenizer)).get_vocab_size()
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=size, **{**BERT, "num_hidden_layers": 2})).save_pretrained(folder)
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    return folder


def recipe(files: dict[str, Path], out: Path, encoder: Path, method: Any, pair: bool = False, **changes: Any) -> dict[str, Any]:
    data = {"train": [str(f) for f in files.values()], "validation": str(files["kitchen"]), "domain": "domain",
            **({"text_pair": "other"} if pair else {}), **changes.pop("data", {})}  # fmt: skip
    named = {"student": {"path": str(encoder)}, "optimizer": {"lr": 3e-3}, "steps": 40, "method": method, **changes}
    return values(None, out, data, TASK, **named)


@pytest.mark.parametrize("pair", [False, True], ids=["sentences", "pairs"])
def test_teacher_and_student_from_their_files(pair: bool, encoder: Path, tmp_path: Path) -> None:
    """A teacher that never saw the domain teaches a student who sees a little of it, and goes on exactly when killed."""
    files = write_reviews(tmp_path / "reviews", pair)
    unseen = {"domain_shares": {"kitchen": 0}}
    method = {"name": "meta_teacher", "encoder": str(encoder)}
    made = recipe(files, tmp_path / "teacher", encoder, method, pair, data=unseen, save_every=20, keep=9)
    teacher = run(made)
    assert teacher.evaluation["accuracy"] > 0.7  # of a domain it never saw
    state = load_file(teacher.model / "domains.safetensors")
    assert {name: list(value.shape) for name, value in state.items()} == {
        "embedding.weight": [2, 16], "dense.weight": [16, 16], "dense.bias": [16],
    }  # fmt: skip
    shutil.copytree(teacher.out, tmp_path / "cut")
    (tmp_path / "cut" / "result.json").unlink()
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000040")
    again = run({**made, "out": str(tmp_path / "cut")})
    for name in ("model.safetensors", "domains.safetensors"):
        assert (again.model / name).read_bytes() == (teacher.model / name).read_bytes()

    shares = {"domain_shares": {"kitchen": 0.5}}
    changes = {
        "teacher": {"path": str(teacher.model)},
        "student": {"from_teacher": {"layers": [1], "width": 8}},
        "data": shares,
    }
    phases = [
        {"steps": 30, "method": {"name": "meta_kd", "domain": "kitchen", "stage": "intermediate", "flavor": "reference"}},
        {"steps": 60, "method": {"name": "meta_kd", "domain": "kitchen", "stage": "prediction", "flavor": "reference"}},
    ]
    in_phases = recipe(files, tmp_path / "phases", encoder, None, pair, phases=phases, **changes)
    del in_phases["steps"], in_phases["method"]
    assert run(in_phases).steps == 90
    rows = [json.loads(line) for line in (tmp_path / "phases/metrics.jsonl").read_text().splitlines()]
    assert rows[29]["transfer"] < rows[0]["transfer"]
    student = run(recipe(files, tmp_path / "student", encoder, {"name": "meta_kd", "domain": "kitchen"}, pair, **changes))
    weights = load_file(tmp_path / "student/prepared/0/weights.safetensors")["weights"]
    assert 60 < len(weights) < 90
    assert student.evaluation["rows"] == 30


def test_faults_are_said_in_one_line_before_training(encoder: Path, tmp_path: Path) -> None:
    files = write_reviews(tmp_path / "reviews")
    size = Tokenizer.from_file(str(encoder / "tokenizer.json")).get_vocab_size()
    teacher = tmp_path / "teacher"
    BertForSequenceClassification(BertConfig(vocab_size=size, **BERT)).save_pretrained(teacher)

    def fails(match: str, method: Any, **changes: Any) -> None:
        changes = {**({} if method["name"] == "meta_teacher" else {"teacher": {"path": str(teacher)}}), **changes}
        with pytest.raises(ValueError, match=match) as caught:
            run(recipe(files, tmp_path / "run", encoder, method, **changes))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run" / "metrics.jsonl").exists()

    kd = {"name": "meta_kd"}
    fails(r"teacher\.path: expected the model of a meta_teacher run with its domains\.safetensors, found none", kd)
    without = {**kd, "transfer_weight": 0}
    fails(
        r"method\.domain: expected a domain of data\.train \(books, dvd, kitchen\), got 'music'", {**without, "domain": "music"}
    )
    gone = {"domain_shares": {"kitchen": 0}}
    fails(r"method\.domain: .* got 'kitchen', of which there is no example", {**without, "domain": "kitchen"}, data=gone)
    fails(r"method\.layer_map: expected layers of the teacher from 1 to 1, got 3", {**without, "layer_map": [1, 3]})
    fails(r"data\.domain: method meta_kd expects the column with a row's domain", without, data={"domain": None})
    one = {"domain_shares": {"kitchen": 0, "dvd": 0}}
    fails(
        r"data\.domain: method meta_teacher mixes up domains, expected at least two, got books only",
        {"name": "meta_teacher"},
        data=one,
    )
    few = tmp_path / "few"
    for changes, match in (
        ({"vocab_size": 8}, r"method\.encoder: its vocabulary has 8 ids, expected at least the tokenizer's \d+"),
        (
            {"vocab_size": size, "max_position_embeddings": 3},
            r"at most the 3 positions of the method\.encoder;",
        ),
    ):
        BertModel(BertConfig(**{**BERT, **changes})).save_pretrained(few)
        fails(match, {"name": "meta_teacher", "encoder": str(few)})
    bare = tmp_path / "bare.jsonl"
    bare.write_text(json.dumps({"text": "the film", "domain": "books"}) + "\n")
    more = {"data": {"train": [*map(str, files.values()), str(bare)]}}
    fails(
        r"data\.train: expected a label in every row, which is weighed by its class, got 1 without",
        {"name": "meta_teacher"},
        **more,
    )
    nobody = tmp_path / "nobody.jsonl"
    nobody.write_text(json.dumps({"text": "the film", "label": "pos"}) + "\n")
    fails(r"nobody\.jsonl, line 1: expected .*domain", {"name": "meta_teacher"}, data={"train": str(nobody)})


def test_what_padding_holds_is_in_no_state() -> None:
    hidden, mask = torch.randn(2, 4, 3), torch.tensor([[True, True, False, False], [True] * 4])
    want = mean_state(hidden, mask)
    torch.testing.assert_close(want[0], hidden[0, :2].mean(0))
    hidden[0, 2:] = torch.nan
    assert torch.equal(mean_state(hidden, mask), want)


def test_weights_kept_by_a_stopped_preparation_are_those_of_their_model(encoder: Path, tmp_path: Path) -> None:
    """A run that is killed before its first step binds nobody to its recipe: what it kept is known by what made it."""
    files = write_reviews(tmp_path / "r")

    def weights(seed: int) -> Tensor:
        made = recipe(files, tmp_path / "run", encoder, "meta_teacher", steps=1, seed=seed,
                      student={"model_type": "bert", "config": BERT})  # fmt: skip
        for name in ("run.json", "result.json"):
            (tmp_path / "run" / name).unlink(missing_ok=True)
        shutil.rmtree(tmp_path / "run" / "checkpoints", ignore_errors=True)
        run({**made, "tokenizer": str(encoder)})
        found: Tensor = load_file(tmp_path / "run" / "prepared" / "0" / "weights.safetensors")["weights"]
        return found

    first, other = weights(1), weights(2)
    assert not torch.equal(first, other)
    assert torch.equal(weights(1), first)


def test_a_teacher_without_a_head_is_heard_by_nobody(encoder: Path, tmp_path: Path) -> None:
    """Its head would be random: what it says is noise, its layers are not."""
    files = write_reviews(tmp_path / "r")
    small = {"student": {"model_type": "bert", "config": BERT}, "teacher": {"path": str(encoder)}, "steps": 1}
    lacking = r"the folder has no weights classifier\.bias, classifier\.weight, which would be random; train it"
    for method in ("word_kd", "tinybert", "distilbert", {"name": "meta_kd", "transfer_weight": 0.0}):
        with pytest.raises(ValueError, match=rf"^teacher\.path: {lacking} for task sequence_classification first"):
            run(recipe(files, tmp_path / "run", encoder, method, **small))
    two = {**small, "teacher": None, "teachers": [{"path": str(encoder)}] * 2}
    with pytest.raises(ValueError, match=rf"^teachers\[0\]\.path: {lacking}"):
        run(recipe(files, tmp_path / "run", encoder, "ensemble", **two))
    for i, method in enumerate(({"name": "tinybert", "stage": "intermediate"}, {"name": "distilbert", "soft_weight": 0.0})):
        assert run(recipe(files, tmp_path / f"layers-{i}", encoder, method, **small)).steps == 1


def test_a_student_from_a_folder_without_a_head_says_so(encoder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    made = recipe(write_reviews(tmp_path / "r"), tmp_path / "run", encoder, "supervised", steps=1)
    distill(Recipe.build(made), say=said.append)
    assert "student: its folder has no weights classifier.bias, classifier.weight, which are random" in said


def test_a_model_of_another_kind_is_neither_evaluated_nor_captured(encoder: Path) -> None:
    """An encoder has no words to say; a head for them would be random."""
    with pytest.raises(
        ValueError, match=r"^model: .* has no weights cls\..*, \.\.\., which would be random; .* than causal_lm"
    ):
        load_folder(encoder, "model")
    with pytest.raises(ValueError, match=r"^teacher: .* has no weights cls\."):
        load_teacher(encoder, "masked")
