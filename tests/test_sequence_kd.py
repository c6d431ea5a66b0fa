"""Sequence-level distillation from the rows to the loss, word-level distillation of encoder-decoders, BLEU."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("transformers")

from tiny_translation import (
    SIZE,
    WORDS,
    llama,
    make_tokenizer,
    marian,
    marian_config,
    pairs,
    recipe_values,
    save,
    write_rows,
)  # fmt: skip
from transformers import AutoModelForSeq2SeqLM

from kdfast.cache import build
from kdfast.cli import main
from kdfast.models.ensemble import Ensemble
from kdfast.models.view import View
from kdfast.text import TextData
from kdfast.train import Batch, Recipe, distill, evaluate
from kdfast.train.documents import Documents
from kdfast.train.objective import Setting
from kdfast.train.recipes.sequence_kd import SequenceKD, SequenceKDOptions
from kdfast.train.tasks import task_class
from kdfast.train.teachers import LiveTeacher


@pytest.fixture
def home(tmp_path: Path) -> tuple[Path, Path, Path]:
    """tokenizer.json, rows, a teacher's folder."""
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    data = write_rows(tmp_path / "pairs.jsonl", pairs())
    return tokenizer, data, save(marian(0, width=24), tmp_path / "teacher", tokenizer)


def run(values: dict[str, Any], said: list[str] | None = None) -> Any:
    return distill(Recipe.build(values), say=(lambda line: None) if said is None else said.append)


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_student_learns_what_the_teacher_writes(home: tuple[Path, Path, Path], tmp_path: Path) -> None:
    tokenizer, data, teacher = home
    method = {"name": "sequence_kd", "beam": 3, "max_tokens": 6, "decode_batch_size": 7}
    values = recipe_values(tokenizer, data, tmp_path / "run", method=method, teacher={"path": str(teacher)}, steps=150,
                           batch_size=24, optimizer={"lr": 1e-2})  # fmt: skip
    result = run(values)
    targets = lines(tmp_path / "run" / "prepared" / "0" / "targets.jsonl")
    assert [line["row"] for line in targets] == list(range(24))
    assert all(line["rank"] == 0 and line["weight"] == 1.0 for line in targets)
    student = AutoModelForSeq2SeqLM.from_pretrained(result.model).eval()
    hits = 0
    for line in targets:
        ids = torch.tensor([[WORDS.index(word) + 1 for word in line["source"].split()]])
        said = student.generate(ids, max_new_tokens=6, num_beams=1, do_sample=False)[0, 1:].tolist()
        hits += said[: len(line["ids"])] == line["ids"]
    assert hits >= 20


def test_hypotheses_are_found_once_for_several_runs(home: tuple[Path, Path, Path], tmp_path: Path) -> None:
    tokenizer, data, teacher = home
    method = {"name": "sequence_kd", "beam": 4, "max_tokens": 6, "decoded": str(tmp_path / "decoded")}
    said: list[str] = []
    base = {"teacher": {"path": str(teacher)}, "steps": 2}
    run(recipe_values(tokenizer, data, tmp_path / "one", method=method, **base), said)
    assert any(line.startswith("decoded 24 sources") for line in said)
    said.clear()
    run(recipe_values(tokenizer, data, tmp_path / "n", method={**method, "nbest": 3}, **base), said)
    assert any(line.endswith("decoded before") for line in said)
    chosen = lines(tmp_path / "n" / "prepared" / "0" / "targets.jsonl")
    assert len(chosen) == 72
    for i in range(24):
        group = chosen[3 * i : 3 * i + 3]
        want = torch.tensor([line["score"] for line in group], dtype=torch.float64).softmax(0).tolist()
        assert [line["weight"] for line in group] == pytest.approx(want, abs=1e-12)


def test_interpolation_takes_the_hypothesis_most_like_the_gold(home: tuple[Path, Path, Path], tmp_path: Path) -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    tokenizer, data, teacher = home
    method = {"name": "sequence_kd", "beam": 5, "max_tokens": 6, "interpolation": True}
    run(recipe_values(tokenizer, data, tmp_path / "run", method=method, teacher={"path": str(teacher)}, steps=2))
    folder = tmp_path / "run" / "prepared" / "0"
    found = lines(folder / "decoded" / "hypotheses.jsonl")
    changed = 0
    for line, gold in zip(lines(folder / "targets.jsonl"), pairs(), strict=True):
        group = [other for other in found if other["row"] == line["row"]]
        score = [sacrebleu.sentence_bleu(other["target"], [gold["target"]]).score for other in group]
        assert line["rank"] == score.index(max(score))
        changed += line["rank"] > 0
    assert changed


@pytest.mark.parametrize("soft_weight", [0.0, 0.4])
def test_the_loss_is_its_definition(soft_weight: float) -> None:
    torch.manual_seed(0)
    logits, teacher = torch.randn(3, 4, 7, dtype=torch.float64, requires_grad=True), torch.randn(3, 4, 7, dtype=torch.float64)
    labels = torch.randint(0, 7, (3, 4))
    labels[1, 2:] = -100
    weight = torch.tensor([1.5, 0.2, 1.3])
    options = SequenceKDOptions(soft_weight=soft_weight, hard_weight=0.8, temperature=2.0, nbest=3)
    task = task_class("seq2seq")(None, task_class("seq2seq").Data())
    model = marian(0)
    objective = SequenceKD(options, Setting(model, [LiveTeacher(model)], task))
    assert (objective.needs_of_teacher() is None) == (soft_weight == 0)
    batch = Batch(torch.zeros(3, 4, dtype=torch.long), labels, extra={"weight": weight})
    views = [View(own_logits=teacher)] if soft_weight else []
    loss, metrics = objective(View(own_logits=logits), views, batch, 10)
    rows = weight.double()[:, None].expand(3, 4)[labels != -100]
    z, t, y = logits[labels != -100], teacher[labels != -100], labels[labels != -100]
    soft = F.kl_div((z / 2).log_softmax(-1), (t / 2).softmax(-1), reduction="none").sum(-1) * 4
    want = (rows * (0.8 * F.cross_entropy(z, y, reduction="none") + soft_weight * soft)).sum() / 10
    assert torch.allclose(loss.double(), want, rtol=1e-6)
    (got,), (gradient,) = torch.autograd.grad(loss, logits), torch.autograd.grad(want, logits)
    assert torch.allclose(got, gradient, rtol=1e-5, atol=1e-9)
    assert "hard" in metrics


@pytest.mark.parametrize("sampled", [False, True])
def test_completions_of_prompts_and_the_prompt_is_masked(sampled: bool, home: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Labelled rows and prompts alone, of different lengths, from two teachers together."""
    tokenizer, _, _ = home
    rows = [{"prompt": pair["source"], "completion": pair["target"]} for pair in pairs(8)]
    rows += [{"prompt": pair["source"]} for pair in pairs(14)[8:]]
    data = write_rows(tmp_path / "prompts.jsonl", rows)
    validation = write_rows(tmp_path / "held_out.jsonl", rows[:4])
    teachers = [{"path": str(save(llama(seed), tmp_path / f"teacher{seed}", tokenizer))} for seed in (3, 4)]
    method = {"name": "sequence_kd", "max_tokens": 5, "decode_batch_size": 4}
    method |= {"sample": True, "nbest": 2, "sample_top_p": 0.9} if sampled else {"beam": 2, "nbest": 2}
    student = {
        "model_type": "llama",
        "config": {
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        },
    }
    values = recipe_values(
        tokenizer, data, tmp_path / "run", method=method, teachers=teachers, task="causal_lm", student=student, steps=2,
        data={"train": [str(data)], "validation": [str(validation)], "sequence_length": 10, "unlabelled": True},
    )  # fmt: skip
    run(values)
    folder = tmp_path / "run" / "prepared" / "0"
    chosen = lines(folder / "targets.jsonl")
    assert len(chosen) == 28
    documents = Documents(folder / "rows")
    for i, line in enumerate(chosen):
        batch = documents.batch([i])
        asked = [WORDS.index(word) + 1 for word in rows[line["row"]]["prompt"].split()]
        assert line["source"] == rows[line["row"]]["prompt"]
        ids, labels = batch.input_ids[0].tolist(), batch.labels[0].tolist()
        assert ids == [*asked, *line["ids"]]
        assert len(ids) <= 10
        assert labels == [-100] * (len(asked) - 1) + line["ids"] + [-100]
    if sampled:
        assert {line["weight"] for line in chosen} == {0.5}
        run({**values, "out": str(tmp_path / "other"), "seed": 2})
        other = lines(tmp_path / "other" / "prepared" / "0" / "targets.jsonl")
        assert [line["ids"] for line in other] != [line["ids"] for line in chosen]


def test_hypotheses_do_not_depend_on_what_shares_a_batch(home: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """A long prompt takes no room from a short one, whose hypotheses end where the teacher ends them."""
    tokenizer, _, _ = home
    rows = [{"prompt": " ".join(WORDS[i % 7] for i in range(length)), "completion": "ein"} for length in (11, 2, 3, 7, 10, 12)]
    data = write_rows(tmp_path / "prompts.jsonl", rows)
    teacher = save(llama(3), tmp_path / "teacher", tokenizer)
    found = []
    for size in (1, 32):
        method = {"name": "sequence_kd", "beam": 3, "nbest": 3, "decode_batch_size": size}
        values = recipe_values(
            tokenizer, data, tmp_path / f"run{size}", method=method, teacher={"path": str(teacher)}, task="causal_lm", steps=1,
            student={"path": str(teacher)}, data={"train": [str(data)], "validation": [str(data)], "sequence_length": 12},
        )  # fmt: skip
        run(values)
        targets = lines(tmp_path / f"run{size}" / "prepared" / "0" / "targets.jsonl")
        found.append([(line["row"], line["rank"], line["ids"], round(line["score"], 3)) for line in targets])
    assert found[0] == found[1]
    assert {row for row, *_ in found[0]} == {0, 1, 2, 3, 4}
    assert max(len(ids) for row, _, ids, _ in found[0] if row == 1) > 1


def test_copies_in_a_folder_of_an_earlier_version_are_learned_once(home: tuple[Path, Path, Path], tmp_path: Path) -> None:
    tokenizer, data, teacher = home
    method = {"name": "sequence_kd", "beam": 4, "nbest": 3, "max_tokens": 4, "decoded": str(tmp_path / "decoded")}
    base = {"teacher": {"path": str(teacher)}, "steps": 1, "method": method}
    run(recipe_values(tokenizer, data, tmp_path / "one", **base))
    kept = tmp_path / "decoded" / "hypotheses.jsonl"
    found = lines(kept)
    write_rows(kept, [{**found[i - 1], "rank": 1} if line["rank"] == 1 else line for i, line in enumerate(found)])
    run(recipe_values(tokenizer, data, tmp_path / "two", **base))
    found = lines(tmp_path / "two" / "prepared" / "0" / "targets.jsonl")
    assert [line["rank"] for line in found] == [0, 2, 3] * 24
    for i in range(0, len(found), 3):
        want = torch.tensor([line["score"] for line in found[i : i + 3]], dtype=torch.float64).softmax(0).tolist()
        assert [line["weight"] for line in found[i : i + 3]] == pytest.approx(want, abs=1e-12)


def test_sources_without_a_target_carry_the_soft_loss_too(home: tuple[Path, Path, Path], tmp_path: Path) -> None:
    tokenizer, data, teacher = home
    rows = [pair if i < 10 else {"source": pair["source"]} for i, pair in enumerate(pairs())]
    some = write_rows(tmp_path / "some.jsonl", rows)
    method = {"name": "sequence_kd", "beam": 2, "max_tokens": 6, "soft_weight": 1.0, "hard_weight": 0.0}
    values = recipe_values(tokenizer, data, tmp_path / "run", method=method, teacher={"path": str(teacher)})
    values["data"] |= {"train": [str(some)], "unlabelled": True}
    run(values)
    assert len(lines(tmp_path / "run" / "prepared" / "0" / "targets.jsonl")) == 24
    values |= {"out": str(tmp_path / "none"), "method": "word_kd"}
    with pytest.raises(ValueError, match=r"data\.unlabelled: method word_kd learns from targets only"):
        run(values)


def test_a_run_that_is_stopped_while_decoding_goes_on(
    home: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, data, teacher = home
    method = {"name": "sequence_kd", "beam": 2, "max_tokens": 6, "decode_batch_size": 6}
    phases = [{"steps": 2, "method": {"name": "word_kd", "hard_weight": 0.5}}, {"steps": 3, "method": method}]
    base = recipe_values(tokenizer, data, tmp_path / "whole", teacher={"path": str(teacher)}, phases=phases)
    del base["steps"]
    run(base)
    import kdfast.train.decode as stage

    write = stage.write
    calls = []

    def killed(*args: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return write(*args, **more)

    monkeypatch.setattr(stage, "write", killed)
    with pytest.raises(KeyboardInterrupt, match="stopped after 12 of 24 sources"):
        run({**base, "out": str(tmp_path / "cut")})
    monkeypatch.setattr(stage, "write", write)
    said: list[str] = []
    run({**base, "out": str(tmp_path / "cut")}, said)
    assert any("going on after 2 of 4 batches" in line for line in said)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("cut", "whole")]
    assert weights[0] == weights[1]


# Word-level distillation of encoder-decoders


@pytest.mark.parametrize("teachers", [1, 2])
def test_a_cache_of_everything_says_what_the_live_teachers_say(
    teachers: int, home: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """Live and from caches that keep every id: the same rows in the same order, the same losses, the same student.

    Several caches' losses are summed, of which forward KL to the mean of live teachers differs by what no student changes.
    """
    tokenizer, data, teacher = home
    folders = [teacher, save(marian(5), tmp_path / "other", tokenizer)][:teachers]
    for folder in folders:
        corpus = TextData(paths=(str(data),), sequence_length=16)
        build(folder, corpus, tmp_path / f"cache-{folder.name}", k=SIZE, temperatures=(1.0, 2.0), max_kl=1e-7, batch_size=4,
              say=lambda line: None)  # fmt: skip
    method = {"name": "word_kd", "temperature": 2.0, "soft_weight": 0.7, "hard_weight": 0.3}
    base: dict[str, Any] = {"method": method, "steps": 6}
    grouped = {"group_by_length": True, "sequence_length": 16}
    live = recipe_values(tokenizer, data, tmp_path / "live", **base)
    weights = [{"weight": 3.0 - i} if teachers > 1 else {} for i in range(teachers)]  # one alone has none
    live |= {"teachers": [{"path": str(folder), **weights[i]} for i, folder in enumerate(folders)]}
    live["data"] |= grouped
    cached = recipe_values(tokenizer, data, tmp_path / "cached", **base)
    caches = [{"cache": str(tmp_path / f"cache-{folder.name}"), **weights[i]} for i, folder in enumerate(folders)]
    cached |= {"teachers": caches, "data": {**grouped, "validation": [str(data)]}}
    said: list[str] = []
    a, b = run(live), run(cached, said)
    assert sum(line.startswith("alignment of teacher " if teachers > 1 else "alignment:") for line in said) == teachers
    if teachers == 1:
        assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "live"), rel=1e-4)
    assert b.evaluation["nll"] == pytest.approx(a.evaluation["nll"], rel=1e-4)
    weights = [AutoModelForSeq2SeqLM.from_pretrained(result.model).state_dict() for result in (a, b)]
    # Adam turns a gradient of rounding into a step of lr: nearly all weights agree far better.
    gaps = torch.cat([(x - weights[1][name]).abs().flatten() for name, x in weights[0].items()])
    assert float(gaps.median()) < 1e-5


def test_a_student_with_fewer_decoder_layers_keeps_the_encoder(home: tuple[Path, Path, Path], tmp_path: Path) -> None:
    tokenizer, data, _ = home
    teacher = save(marian(0, decoder_layers=3), tmp_path / "deep", tokenizer)
    student = {"from_teacher": {"decoder_layers": [0]}}
    values = recipe_values(tokenizer, data, tmp_path / "run", student=student, method="word_kd", teacher={"path": str(teacher)},
                           steps=1, optimizer={"lr": 1e-9})  # fmt: skip
    model = AutoModelForSeq2SeqLM.from_pretrained(run(values).model)
    whole = AutoModelForSeq2SeqLM.from_pretrained(teacher)
    assert (model.config.encoder_layers, model.config.decoder_layers) == (1, 1)
    for (name, a), b in zip(whole.model.encoder.named_parameters(), model.model.encoder.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name


# BLEU


def test_bleu_of_batches_is_that_of_the_whole(home: tuple[Path, Path, Path], tmp_path: Path) -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    tokenizer, data, _ = home
    values = recipe_values(tokenizer, data, tmp_path / "run", steps=120, batch_size=24, optimizer={"lr": 1e-2},
                           task={"name": "seq2seq", "beams": [1, 3], "max_tokens": 8})  # fmt: skip
    result = run(values)
    student = AutoModelForSeq2SeqLM.from_pretrained(result.model).eval()

    def said(pair: dict[str, str], beams: int) -> str:
        ids = torch.tensor([[WORDS.index(word) + 1 for word in pair["source"].split()]])
        out: Tensor = student.generate(ids, max_new_tokens=8, num_beams=beams, do_sample=False, early_stopping=False)
        return " ".join(WORDS[i - 1] for i in out[0].tolist() if i)

    for name, beams in (("bleu_greedy", 1), ("bleu_beam3", 3)):
        want = sacrebleu.corpus_bleu([said(pair, beams) for pair in pairs()], [[pair["target"] for pair in pairs()]]).score
        assert result.evaluation[name] == pytest.approx(want, abs=1e-6)
        assert want > 20
    assert f"BLEU greedy {result.evaluation['bleu_greedy']:.2f}" in result.headline
    together = Ensemble([student, student])
    recipe = Recipe.build(values)
    task = task_class("seq2seq")(recipe.task.options, recipe.data)
    from kdfast.text.tokenizers import load_tokenizer

    found = task.open(load_tokenizer(tokenizer)[0], tokenizer, tmp_path / "read", False).validation
    scores = evaluate(together, found, batch_size=5, task=task)
    assert scores == pytest.approx(result.evaluation, rel=1e-4)


def test_eval_scores_a_saved_student(home: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sacrebleu")
    tokenizer, data, teacher = home
    (teacher / "generation_config.json").write_text((tokenizer.parent / "generation_config.json").read_text())
    assert main(["eval", str(teacher), "--data", str(data), "--set", "task.beams=[1]", "--json"]) == 0
    assert {"ppl", "bleu_greedy"} <= json.loads(capsys.readouterr().out).keys()


def test_pairs_that_are_not_whole_are_counted(
    home: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, _, teacher = home
    rows = [{"source": "a dog", "target": "ein hund"}, {"source": "", "target": "ein"}, {"source": "a", "target": "ein " * 20}]
    data, said = write_rows(tmp_path / "some.jsonl", rows), []
    run(recipe_values(tokenizer, data, tmp_path / "run", steps=1, batch_size=2), said)
    told = "1 of 3 documents cut to data.sequence_length 16, 1 dropped: nothing to learn within it"
    assert said[:2] == [f"data.train: {told}", f"data.validation: {told}"]
    capsys.readouterr()
    assert main(["eval", str(teacher), "--data", str(data), "--sequence-length", "16"]) == 0
    assert told.replace("data.sequence_length", "--sequence-length") in capsys.readouterr().err
    whole: list[str] = []
    run(recipe_values(tokenizer, home[1], tmp_path / "whole", steps=1), whole)
    assert not any("cut" in line for line in whole)


# Bad input


def test_faults_are_said_in_one_line_before_training(home: tuple[Path, Path, Path], tmp_path: Path) -> None:
    tokenizer, data, teacher = home
    other = make_tokenizer(tmp_path / "other")
    changed = json.loads(other.read_text())
    changed["model"]["vocab"] = {{"dog": "wolf"}.get(word, word): i for word, i in changed["model"]["vocab"].items()}
    other.write_text(json.dumps(changed))
    foreign = save(marian(0), tmp_path / "foreign", other)
    larger = marian(0)
    larger.resize_token_embeddings(SIZE + 3)
    larger = save(larger, tmp_path / "larger", tokenizer)
    empty = write_rows(tmp_path / "empty.jsonl", [])
    columns = write_rows(tmp_path / "columns.jsonl", [{"en": "a", "de": "b"}])
    paths = {"path": str(teacher)}

    def fails(match: str, **changes: Any) -> None:
        values = recipe_values(tokenizer, data, tmp_path / "run", **{"method": "sequence_kd", "teacher": paths, **changes})
        with pytest.raises(ValueError, match=match) as found:
            run(values)
        assert "\n" not in str(found.value)
        assert not (tmp_path / "run" / "run.json").exists()

    rows = {"validation": [str(data)], "sequence_length": 16}
    fails(r"data\.train: .*columns\.jsonl, line 1: expected an object with source and target, got en, de",
          data={**rows, "train": [str(columns)]})  # fmt: skip
    fails(r"data\.train: expected at least one document", data={**rows, "train": [str(empty)]})
    fails(r"data\.validation: expected at least one document", data={**rows, "train": [str(data)], "validation": [str(empty)]})
    fails(r"teacher\.path: expected the data's tokenizer, got one with other tokens", teacher={"path": str(foreign)})
    fails(rf"teachers\[1\]: its vocabulary has {SIZE + 3} ids, the student's {SIZE}", teacher=None, method="word_kd",
          teachers=[paths, {"path": str(larger)}])  # fmt: skip
    fails(r"method\.nbest: expected at most beam 2, got 3", method={"name": "sequence_kd", "beam": 2, "nbest": 3})
    fails(
        r"method\.interpolation: expected it with nbest: 1", method={"name": "sequence_kd", "nbest": 3, "interpolation": True}
    )
    fails(r"method\.prompt_tokens: expected task causal_lm", method={"name": "sequence_kd", "prompt_tokens": 3})
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": p["source"], "completion": p["target"]} for p in pairs(4)])
    llamas = {"task": "causal_lm", "teacher": {"path": str(save(llama(3), tmp_path / "llama", tokenizer))},
              "student": {"path": str(tmp_path / "llama")}}  # fmt: skip
    asked = {"train": [str(prompts)], "validation": [str(prompts)], "sequence_length": 16, "prompt_loss": True}
    fails(r"data\.prompt_loss: expected false with method sequence_kd", data=asked, **llamas)
    student = {"model_type": "marian", "config": {**marian_config(), "vocab_size": SIZE - 1}}
    fails(r"student: its vocabulary has 12 ids, expected at least the data's 13", student=student, teacher=None,
          method="supervised")  # fmt: skip
