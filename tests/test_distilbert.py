"""DistilBERT: its three terms against their definition in float64, the head that is trained first, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn import functional as F

pytest.importorskip("transformers")

from task_rows import BERT, run, sentence, tokenizer_file, values, write_table  # noqa: F401
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
)

from kdfast.train import Batch
from kdfast.train.batch import IGNORE
from kdfast.train.objective import Setting
from kdfast.train.recipes.distilbert import DistilBERT, DistilBERTOptions
from kdfast.train.step import DistillStep
from kdfast.train.tasks import task_class
from kdfast.train.teachers import LiveTeacher

CONFIG: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 16,
    "initializer_range": 0.4,
}  # fmt: skip


def step_of(kind: str, made: Any, options: dict[str, Any]) -> tuple[DistillStep, LiveTeacher]:
    torch.manual_seed(1)
    student, teacher = (made(BertConfig(num_hidden_layers=n, **CONFIG)).eval() for n in (1, 2))
    task = task_class(kind)(None, task_class(kind).Data())
    live = LiveTeacher(teacher)
    step = DistillStep(student, DistilBERT(DistilBERTOptions(**options), Setting(student, [live], task)), task).name_head()
    if task.through_head:
        live.name_head(task.example(teacher))
    return step, live


def same(step: DistillStep, live: LiveTeacher, batch: Batch, num_items: int, want: Any) -> None:
    """Loss and the gradient of a weight deep down, against `want(student, teacher)` in float64."""
    loss, metrics = step(batch, [live(batch, step.objective.needs_of_teacher())], num_items)  # type: ignore[arg-type]
    loss.backward()
    weight = step.student.bert.encoder.layer[0].attention.self.query.weight  # type: ignore[union-attr,index]
    got = weight.grad.clone()
    step.student.zero_grad()
    step.student.double(), live.model.double()
    truth = want(step.student, live.model)
    truth.backward()
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    assert "cosine" in metrics
    torch.testing.assert_close(got.double(), weight.grad.double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("restricted", [False, True], ids=["all-tokens", "masked-tokens"])
def test_the_masked_model_equals_its_definition(restricted: bool) -> None:
    torch.manual_seed(0)
    step, live = step_of("masked_lm", BertForMaskedLM, {"restrict_to_labels": restricted})
    ids, lengths = torch.randint(0, 40, (3, 9)), torch.tensor([9, 4, 7])
    mask = torch.arange(9) < lengths[:, None]
    labels = torch.full((3, 9), IGNORE)
    labels[0, 2], labels[0, 7], labels[1, 1], labels[2, 5] = 3, 5, 7, 9
    batch = Batch(ids, labels, mask.long())

    def want(student: Any, teacher: Any) -> Any:
        out_s, out_t = (m(**batch.by_name, output_hidden_states=True) for m in (student, teacher))
        heard = labels != IGNORE if restricted else mask
        log_q, log_p = ((out.logits[heard] / 2).log_softmax(-1) for out in (out_s, out_t))
        kl = F.kl_div(log_q, log_p.detach(), log_target=True, reduction="batchmean")
        ce = F.cross_entropy(out_s.logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
        h_s, h_t = (out.hidden_states[-1][mask] for out in (out_s, out_t))
        cosine = (1 - F.cosine_similarity(h_s, h_t.detach(), dim=-1)).mean()
        return (5 * 4 * kl + 2 * ce + cosine) / 2

    same(step, live, batch, 8, want)  # one of two batches of an optimiser step with 8 masked tokens


def test_an_encoder_decoder_is_heard_on_what_it_writes() -> None:
    """Where its decoder's tokens are: not where those are that its encoder reads."""
    torch.manual_seed(0)
    tiny = {"vocab_size": 40, "d_model": 12, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 16,
            "init_std": 0.4, "pad_token_id": 1}  # fmt: skip
    student, teacher = (BartForConditionalGeneration(BartConfig(**tiny)).eval() for _ in range(2))
    task, live = task_class("seq2seq")(None, task_class("seq2seq").Data()), LiveTeacher(teacher)
    options = DistilBERTOptions(cosine_weight=0.0, hard_weight=0.0)
    step = DistillStep(student, DistilBERT(options, Setting(student, [live], task)), task).name_head()
    read, written = (torch.arange(n) < torch.tensor(lengths)[:, None] for n, lengths in ((7, [7, 3]), (4, [2, 4])))
    inputs = {"input_ids": torch.randint(2, 40, (2, 7)), "attention_mask": read.long(),
              "decoder_input_ids": torch.randint(2, 40, (2, 4)), "decoder_attention_mask": written.long()}  # fmt: skip
    batch = Batch(inputs, torch.full((2, 4), 5))
    loss, _ = step(batch, [live(batch, step.objective.needs_of_teacher())], 8)  # type: ignore[arg-type]
    log_q, log_p = ((m(**batch.by_name).logits[written] / 2).log_softmax(-1) for m in (student, teacher))
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    assert loss.item() == pytest.approx(5 * 4 * kl.item(), rel=1e-4)


def test_classes_equal_their_definition_with_rows_of_the_teacher_only() -> None:
    torch.manual_seed(0)
    step, live = step_of("sequence_classification", BertForSequenceClassification, {"temperature": 1.5})
    labels = torch.tensor([1, IGNORE, 0, IGNORE])
    batch = Batch(torch.randint(0, 40, (4, 6)), labels, soft_mask=torch.tensor([True, True, True, False]))

    def want(student: Any, teacher: Any) -> Any:
        out_s, out_t = (m(**batch.by_name, output_hidden_states=True) for m in (student, teacher))
        log_q, log_p = ((out.logits[:3] / 1.5).log_softmax(-1) for out in (out_s, out_t))
        kl = F.kl_div(log_q, log_p.detach(), log_target=True, reduction="batchmean")
        ce = F.cross_entropy(out_s.logits, labels, ignore_index=IGNORE, reduction="sum") / 3
        cosine = (1 - F.cosine_similarity(out_s.hidden_states[-1], out_t.hidden_states[-1].detach(), dim=-1)).mean()
        return 5 * 1.5**2 * kl + 2 * ce + cosine

    same(step, live, batch, 3, want)


def test_a_head_first_then_every_other_layer_then_a_task(tokenizer: Path, tmp_path: Path) -> None:
    encoder = tmp_path / "encoder"
    size = Tokenizer.from_file(str(tokenizer)).get_vocab_size()
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=size, **{**BERT, "num_hidden_layers": 4})).save_pretrained(encoder)
    shutil.copyfile(tokenizer, encoder / "tokenizer.json")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text("".join(json.dumps({"text": sentence(i)[0]}) + "\n" for i in range(40)))
    data = {
        "train": str(tmp_path / "text"),
        "glob": "*.jsonl",
        "sequence_length": 16,
        "mask_share": 0.3,
        "validation_share": 0.2,
    }
    head = run(values(None, tmp_path / "head", data, "masked_lm", student={"path": str(encoder), "freeze": ["bert"]}, steps=60))
    assert head.evaluation["ppl"] < 12  # of 26 tokens
    before, after = load_file(encoder / "model.safetensors"), load_file(head.model / "model.safetensors")
    shared = [name for name in before if f"bert.{name}" in after]
    assert len(shared) > 60
    assert all(torch.equal(before[name], after[f"bert.{name}"]) for name in shared)

    student = {"from_teacher": {"layers": [0, 2]}}
    changes = {"student": student, "teacher": {"path": str(head.model)}, "method": "distilbert", "log_every": 1}
    small = run(values(None, tmp_path / "student", data, "masked_lm", **changes))
    rows = [json.loads(line) for line in (small.out / "metrics.jsonl").read_text().splitlines()]
    assert {"kl_at_T", "hard", "cosine"} <= rows[0].keys()
    assert rows[-2]["cosine"] < rows[0]["cosine"]
    assert rows[-2]["kl_at_T"] < rows[0]["kl_at_T"]
    table = {
        "train": str(write_table(tmp_path / "t.tsv", True)),
        "validation": str(write_table(tmp_path / "d.tsv", True, rows=12)),
    }
    tuned = run(values(None, tmp_path / "tuned", table, "sequence_classification", student={"path": str(small.model)}))
    assert tuned.evaluation["accuracy"] == 1.0


def test_faults_are_said_in_one_line_before_training(tokenizer: Path, tmp_path: Path) -> None:
    size = Tokenizer.from_file(str(tokenizer)).get_vocab_size()
    for name, vocabulary in (("teacher", size), ("larger", size + 1)):
        BertForMaskedLM(BertConfig(vocab_size=vocabulary, **BERT)).save_pretrained(tmp_path / name)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": sentence(i)[0]}) + "\n" for i in range(40)))
    data = {"train": str(tmp_path / "a.jsonl"), "sequence_length": 16}

    def fails(match: str, **changes: Any) -> None:
        changes = {"method": "distilbert", "teacher": {"path": str(tmp_path / "teacher")}, **changes}
        with pytest.raises(ValueError, match=match):
            run(values(tokenizer, tmp_path / "run", data, "masked_lm", **changes))
        assert not (tmp_path / "run" / "metrics.jsonl").exists()

    narrow = {"from_teacher": {"width": 8}}
    fails(
        r"student: method distilbert expects it as wide as its teacher, 16, got 8; .*method\.cosine_weight: 0", student=narrow
    )
    fails(r"teacher: its vocabulary has 27 ids, the student's 26", teacher={"path": str(tmp_path / "larger")})
    frozen = {"path": str(tmp_path / "teacher"), "freeze": ["encoder"]}
    fails(r"student\.freeze: expected modules of BertForMaskedLM \(bert, cls\), got 'encoder'", student=frozen)
    fails(r"student\.freeze: nothing of BertForMaskedLM would train", student={**frozen, "freeze": ["bert", "cls"]})
    cosine = {"name": "distilbert", "soft_weight": 0, "hard_weight": 0}
    fails(
        r"student\.freeze: the loss of DistilBERT depends on nothing",
        student=frozen | {"freeze": ["bert"]},
        method=cosine,
    )
    nothing = {"name": "distilbert", "soft_weight": 0, "hard_weight": 0, "cosine_weight": 0}
    fails(r"method\.soft_weight: expected one of the weights above 0", method=nothing)
