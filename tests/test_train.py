"""The trainer: exact resume, equal gradients from a live and a cached teacher, and a run folder that can be trusted."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import STUDENT, TEXT, make_sequences, make_tokenizer, recipe_values
from torch.nn import functional as F

from kdfast import topk_targets
from kdfast.cache import AlignmentError, CacheMismatch, CacheWriter, capture, check_alignment
from kdfast.models.heads import call, logits_in
from kdfast.models.load import load_folder
from kdfast.models.view import View
from kdfast.text import IGNORE
from kdfast.text.files import list_files, share_of, split_files
from kdfast.text.tokenizers import file_hash
from kdfast.train import Recipe, distill, evaluate
from kdfast.train.alignment import targets_in
from kdfast.train.data import Order, Sequences
from kdfast.train.objective import Setting
from kdfast.train.optimizer import lr_at
from kdfast.train.recipe import Optimizer
from kdfast.train.recipes import objective_class
from kdfast.train.step import DistillStep
from kdfast.train.students import build_student
from kdfast.train.tasks import task_class
from kdfast.train.teachers import CachedTeacher, LiveTeacher


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def teacher(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher trained just enough to know more than chance."""
    out = tmp_path_factory.mktemp("teacher")
    return distill(Recipe.build(recipe_values(tokenizer, out, steps=60, batch_size=8)), say=lambda line: None).model


@pytest.fixture(scope="module")
def cache(tokenizer: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher on every sequence, all of its vocabulary kept."""
    path = tmp_path_factory.mktemp("cache") / "full"
    model = load_folder(teacher, "teacher").eval()
    data = make_sequences(tokenizer)
    with CacheWriter(
        path, vocab_size=300, k=300, teacher="tiny", tokenizer_hash=file_hash(tokenizer), temperatures=(1.0, 2.0), max_kl=1e-7
    ) as writer:
        capture(model, list(data.ids[:16].long()), writer, batch_size=8)
    return path


def _quiet(line: str) -> None:
    pass


def test_a_killed_run_resumes_to_the_same_bits(tokenizer: Path, tmp_path: Path) -> None:
    """All three in processes of their own: bits depend on the thread count, and this process may have had others."""
    changes = {"steps": 24, "save_every": 3, "accumulation": 2, "log_every": 1, "keep": 1}
    commands = {}
    for name in ("whole", "killed"):
        recipe = Recipe.build(recipe_values(tokenizer, tmp_path / name, **changes))
        (tmp_path / f"{name}.yaml").write_text(recipe.to_yaml())
        commands[name] = [sys.executable, "-m", "kdfast.cli", "train", str(tmp_path / f"{name}.yaml")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(commands["whole"], env=env, stdout=subprocess.DEVNULL, check=True)
    process = subprocess.Popen(commands["killed"], env=env, stdout=subprocess.DEVNULL)
    checkpoints = tmp_path / "killed" / "checkpoints"
    deadline = time.monotonic() + 120
    while not any(checkpoints.glob("step-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (tmp_path / "killed" / "result.json").exists()

    done = subprocess.run(commands["killed"], env=env, capture_output=True, text=True, check=True)
    assert "resuming from" in done.stdout + done.stderr
    whole, resumed = tmp_path / "whole", tmp_path / "killed"
    for file in ("model/model.safetensors", "checkpoints/step-00000024/training.safetensors"):
        assert (resumed / file).read_bytes() == (whole / file).read_bytes(), file
    results = [json.loads((r / "result.json").read_text()) for r in (whole, resumed)]
    assert results[0]["evaluation"] == results[1]["evaluation"]
    rows = [[json.loads(x) for x in (r / "metrics.jsonl").read_text().splitlines()] for r in (whole, resumed)]
    assert [r["step"] for r in rows[0] if "loss" in r] == list(range(1, 25))
    assert [(r["step"], r.get("loss")) for r in rows[0]] == [(r["step"], r.get("loss")) for r in rows[1]]


def make_step(recipe: Recipe, *teachers: LiveTeacher | CachedTeacher, through_head: bool = True) -> DistillStep:
    """The wrapped module of a run, its student in evaluation mode."""
    task = task_class(recipe.task.name)(recipe.task.options, recipe.data)
    torch.manual_seed(0)
    student = build_student(recipe, task, 300).eval()
    objective = objective_class(recipe.method.name)(recipe.method.options, Setting(student, teachers, task))
    step = DistillStep(student, objective, task)
    return step.name_head() if through_head else step


WORD_KD = {"name": "word_kd", "temperature": 2.0, "soft_weight": 0.7, "hard_weight": 0.3}


@pytest.mark.parametrize("through_head", [True, False], ids=["through-head", "logits"])
def test_cached_and_live_gradients_agree_when_all_ids_are_kept(
    tokenizer: Path, teacher: Path, cache: Path, through_head: bool
) -> None:
    recipe = Recipe.build(recipe_values(tokenizer, Path("unused"), method=WORD_KD, teacher={"path": str(teacher)}))
    cached, live = CachedTeacher(cache), LiveTeacher(load_folder(teacher, "teacher"))
    step = make_step(recipe, live, through_head=through_head)
    if through_head:
        live.name_head(step.task.example(live.model))
        assert step.head is not None
        assert live.head is not None
    batch = cached.batch(range(8))
    items = batch.count()
    exact = View(targets=topk_targets(live(batch).logits, 300, temperatures=(2.0,)))
    gradients, losses = [], []
    for view in (live(batch), exact, cached(batch)):
        step.zero_grad()
        loss, _ = step(batch, [view], items)
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in step.parameters() if p.grad is not None]))
    scale = gradients[0].norm()
    assert (gradients[1] - gradients[0]).norm() <= 1e-5 * scale
    # The codec's own error: KL <= 1e-7 a token moves a distribution by at most sqrt(2e-7) = 4.5e-4 in L1.
    assert (gradients[2] - gradients[0]).norm() <= 4.5e-4 * scale
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("through_head", [True, False], ids=["through-head", "logits"])
def test_word_kd_equals_plain_pytorch(tokenizer: Path, teacher: Path, through_head: bool) -> None:
    recipe = Recipe.build(recipe_values(tokenizer, Path("unused"), method=WORD_KD, teacher={"path": str(teacher)}))
    batch = make_sequences(tokenizer).batch(range(4))
    live = LiveTeacher(load_folder(teacher, "teacher"))
    step = make_step(recipe, live, through_head=through_head)
    if through_head:
        live.name_head(step.task.example(live.model))
    loss, metrics = step(batch, [live(batch)], batch.count())
    logits = logits_in(call(step.student, batch.inputs))
    q, p = F.log_softmax(logits / 2, -1), F.log_softmax(live(batch).logits / 2, -1)
    kl = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)[batch.labels != IGNORE]
    ce = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    assert loss.item() == pytest.approx((0.7 * 4 * kl.mean() + 0.3 * ce).item(), rel=1e-5)
    for name, want in (("kl_at_T", kl.mean()), ("hard", ce)):
        assert (metrics[name].total / metrics[name].count).item() == pytest.approx(want.item(), rel=1e-5)


def test_training_from_a_cache_logs_every_metric(tokenizer: Path, cache: Path, tmp_path: Path) -> None:
    values = recipe_values(tokenizer, tmp_path / "run", teacher={"cache": str(cache)}, tracker="tensorboard")
    said: list[str] = []
    result = distill(
        Recipe.build({**values, "data": {}, "method": {"name": "word_kd", "hard_weight": 0.5, "temperature": 2.0}}),
        say=said.append,
    )
    assert any("teacher's loss on the labels" in line for line in said)
    row = json.loads((result.out / "metrics.jsonl").read_text().splitlines()[-1], parse_constant=pytest.fail)
    expected = {"step", "seconds", "loss", "kl_at_T", "kl_at_1", "lse_squared", "hard", "student_ppl", "teacher_ppl",
                "teacher_entropy", "top1_agreement", "lr", "grad_norm", "tokens_per_s", "temperature", "soft_weight",
                "hard_weight", "data_wait_s"}  # fmt: skip
    assert set(row) - {"student_entropy"} == expected
    assert row["loss"] == pytest.approx(4 * row["kl_at_T"] + 0.5 * row["hard"], rel=1e-4)
    assert list((result.out / "tensorboard").rglob("events.out.tfevents.*"))
    assert {p.name for p in result.out.iterdir()} >= {"recipe.yaml", "run.json", "result.json", "model", "checkpoints"}
    about = json.loads((result.out / "run.json").read_text())
    assert about["seed"] == 1
    assert about["packages"]["torch"] == torch.__version__
    assert not list(result.out.rglob("*.part"))
    assert not list(result.out.rglob("*.bin"))


def test_a_finished_run_is_summed_up_and_drawn(tokenizer: Path, tmp_path: Path) -> None:
    result = distill(Recipe.build(recipe_values(tokenizer, tmp_path / "run", steps=4, eval_every=2)), say=lambda line: None)
    summary = json.loads((result.out / "summary.json").read_text(), parse_constant=pytest.fail)
    assert [scores["step"] for scores in summary["evaluations"]] == [2, 4]
    assert result.evaluation is not None
    assert summary["evaluation"]["ppl"] == summary["evaluations"][-1]["ppl"] == result.evaluation.ppl
    assert (summary["method"], summary["task"], summary["steps"], summary["rows_per_step"]) == ("supervised", "causal_lm", 4, 4)
    weights = load_file(result.model / "model.safetensors")
    assert summary["parameters"] == sum(value.numel() for value in weights.values())
    assert summary["last_step"]["step"] == 4
    assert (result.out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_accumulation_equals_a_larger_batch(tokenizer: Path, tmp_path: Path) -> None:
    config = {**STUDENT, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    models = []
    for batch_size, accumulation in ((8, 1), (4, 2)):
        values = recipe_values(
            tokenizer, tmp_path / str(accumulation), steps=3, batch_size=batch_size, accumulation=accumulation
        )
        result = distill(Recipe.build({**values, "student": {"model_type": "gpt2", "config": config}}), say=_quiet)
        models.append(load_folder(result.model, "model").state_dict())
    for name, weights in models[0].items():
        torch.testing.assert_close(weights, models[1][name], rtol=1e-4, atol=1e-5)


def test_two_processes_equal_one(tokenizer: Path, tmp_path: Path) -> None:
    config = {**STUDENT, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    student = {"model_type": "gpt2", "config": config}
    one = recipe_values(tokenizer, tmp_path / "one", steps=3, batch_size=8, student=student)
    two = recipe_values(tokenizer, tmp_path / "two", steps=3, batch_size=4, student=student)
    (tmp_path / "two.yaml").write_text(Recipe.build(two).to_yaml())
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "kdfast.cli", "train"]
    subprocess.run(
        [sys.executable, "-m", *launch, str(tmp_path / "two.yaml")], check=True, capture_output=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    result = distill(Recipe.build(one), say=_quiet)
    weights = [load_folder(tmp_path / name / "model", "model").state_dict() for name in ("one", "two")]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-4, atol=1e-5)
    rows = [json.loads((result.out.parent / n / "metrics.jsonl").read_text().splitlines()[2]) for n in ("one", "two")]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-4)
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-3)


def test_another_recipe_does_not_continue_a_run(tokenizer: Path, tmp_path: Path) -> None:
    values = recipe_values(tokenizer, tmp_path / "run", steps=2)
    first = distill(Recipe.build(values), say=_quiet)
    again = distill(Recipe.build({**values, "log_every": 1}), say=_quiet)
    assert again == first
    with pytest.raises(ValueError, match=r"^out: .* differs in batch_size; set another out"):
        distill(Recipe.build({**values, "batch_size": 3}), say=_quiet)
    with pytest.raises(ValueError, match="differs in the training data"):
        distill(Recipe.build(values), train_data=Sequences(torch.zeros(4, 32, dtype=torch.int32)), say=_quiet)


def test_check_runs_two_steps_and_leaves_nothing(tokenizer: Path, teacher: Path, tmp_path: Path) -> None:
    values = recipe_values(tokenizer, tmp_path / "run", method="word_kd", teacher={"path": str(teacher)}, check=True)
    said: list[str] = []
    assert distill(Recipe.build(values), say=said.append).steps == 2
    text = "\n".join(said)
    assert "peak memory" in text
    assert "teacher's loss on the labels" in text
    assert "minutes for 8 steps" in text
    assert not (tmp_path / "run").exists()


def test_shifted_labels_are_caught() -> None:
    ids = torch.randint(300, (4, 32), generator=torch.Generator().manual_seed(0))
    right = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORE)], 1)
    knowing = targets_in(View(own_logits=8.0 * F.one_hot(right.clamp(min=0), 300).float()))
    assert "teacher's loss" in str(check_alignment(knowing, right))
    with pytest.raises(AlignmentError, match="shifted"):
        check_alignment(knowing, ids)


def test_identity_is_checked_before_the_first_step(cache: Path, tokenizer: Path, tmp_path: Path) -> None:
    values = recipe_values(tokenizer, tmp_path / "run", method="word_kd", teacher={"cache": str(cache)}, data={})
    other = make_tokenizer(tmp_path, 280)
    with pytest.raises(CacheMismatch, match="tokenizer_hash"):
        distill(Recipe.build({**values, "tokenizer": str(other)}), say=_quiet)
    config = {**STUDENT, "vocab_size": 290}
    student = {"model_type": "gpt2", "config": config}
    with pytest.raises(ValueError, match=r"^student: its vocabulary has 290 ids, expected at least the data's 300"):
        distill(Recipe.build({**values, "student": student}), say=_quiet)
    padded = {"model_type": "gpt2", "config": {**STUDENT, "vocab_size": 304}}
    with pytest.raises(ValueError, match="set tokenizer: PATH"):
        distill(Recipe.build({**values, "student": padded, "tokenizer": None}), say=_quiet)
    with pytest.raises(ValueError, match=r"^method\.temperature: 3 is not in the cache.* holds 1, 2"):
        distill(Recipe.build({**values, "method": {"name": "word_kd", "temperature": 3.0}}), say=_quiet)
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"tokenizer": "nowhere"}, r"^tokenizer: expected a tokenizer\.json .* 'nowhere'", id="no-tokenizer"),
        pytest.param(
            {"data": {"train": ["nowhere"]}}, r"^data\.train: expected a file or a folder, got 'nowhere'", id="no-data"
        ),
        pytest.param(
            {"data": {"train": [str(TEXT)], "glob": "*.rs"}}, r"^data\.train: no file matches '\*\.rs'", id="empty-glob"
        ),
        pytest.param({"data": {}}, r"^data\.train: expected files or folders, got none", id="no-train"),
        pytest.param({"init_from": "nowhere"}, r"^init_from: expected a safetensors file", id="no-weights"),
        pytest.param({"student": {"path": "nowhere"}}, r"^student\.path: expected a folder with config\.json", id="no-folder"),
        pytest.param(
            {"student": {"function": "json:nothing"}},
            r"^student\.function: 'json:nothing' cannot be imported: module 'json' has no attribute 'nothing'$",
            id="no-function",
        ),
        pytest.param(
            {"student": {"function": "nowhere:make"}},
            r"^student\.function: 'nowhere:make' cannot be imported: No module named .*; put the folder .* on PYTHONPATH$",
            id="no-module",
        ),
        pytest.param(
            {"student": {"model_type": "gpt3"}}, r"^student\.model_type 'gpt3': unknown key; did you mean", id="no-such-model"
        ),
        pytest.param(
            {"student": {"model_type": "gpt2", "config": {"n_layers": 2}}},
            r"^student\.config\.n_layers: unknown key; .* 'n_layer'",
            id="no-such-field",
        ),
    ],
)
def test_missing_inputs_are_one_line(changes: dict, message: str, tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        distill(Recipe.build({**recipe_values(tokenizer, tmp_path / "run"), **changes}), say=_quiet)
    assert "\n" not in str(error.value)


def test_an_empty_corpus_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    data = {"train": [str(tmp_path / "empty.txt")], "validation_share": 0.0}
    with pytest.raises(ValueError, match=r"^data\.train: expected at least one sequence of 128 tokens, found less in 1 files"):
        distill(Recipe.build({**recipe_values(tokenizer, tmp_path / "run"), "data": data}), say=_quiet)


def test_any_module_can_be_a_student(tokenizer: Path, tmp_path: Path) -> None:
    student = {"function": "test_train:make_embedding_model", "arguments": {"vocab_size": 300}}
    result = distill(Recipe.build({**recipe_values(tokenizer, tmp_path / "run"), "student": student}), say=_quiet)
    assert result.evaluation is not None
    again = {**recipe_values(tokenizer, tmp_path / "again", steps=1), "student": student, "init_from": str(result.model)}
    assert distill(Recipe.build(again), say=_quiet).steps == 1


def make_embedding_model(vocab_size: int) -> torch.nn.Module:
    class Bigram(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(vocab_size, vocab_size)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.table(input_ids)

    return Bigram()


def test_order_is_a_permutation_per_epoch_and_needs_no_state() -> None:
    order = Order(10, seed=3)
    walk = order.take(0, 30)
    for epoch in range(3):
        assert sorted(walk[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert walk[:10] != walk[10:20]
    assert Order(10, seed=3).take(7, 9) == walk[7:16]
    for seed in (4, 3 + 4096, 3 + 2**31):
        assert Order(10, seed=seed).take(0, 30) != walk


def test_split_by_file_does_not_depend_on_the_other_files(tmp_path: Path) -> None:
    for i in range(60):
        (tmp_path / f"f{i}.txt").write_text("x")
    held_out, rest = split_files(list_files([tmp_path], "*.txt"), [0.3], seed=1)
    assert len(held_out) + len(rest) == 60
    assert {p.name for p in held_out} == {f"f{i}.txt" for i in range(60) if share_of(f"f{i}.txt", 1) < 0.3}
    assert 5 < len(held_out) < 30
    assert list_files([tmp_path], "*.txt", exclude=["f0.txt"])[0][0] == "f1.txt"


def test_evaluate_equals_plain_pytorch(tokenizer: Path) -> None:
    data = make_sequences(tokenizer)
    model = make_step(Recipe.build(recipe_values(tokenizer, Path("unused")))).student.train()
    found = evaluate(model, data, batch_size=3, limit=7)
    assert model.training
    batch = data.batch(range(7))
    logits = model.eval()(input_ids=batch.input_ids).logits
    nll = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    assert found.nll == pytest.approx(nll.item(), rel=1e-5)
    assert found.tokens == 7 * 31
    right = (logits.argmax(-1) == batch.labels)[batch.labels != IGNORE].float().mean()
    assert found.top1 == pytest.approx(float(right))


def test_learning_rate_schedule() -> None:
    options = Optimizer(lr=1.0, warmup_steps=10, schedule="linear", final_lr_share=0.1)
    assert [lr_at(s, 110, options) for s in (1, 10, 60, 110)] == pytest.approx([0.1, 1.0, 0.55, 0.1])
    cosine = Optimizer(lr=1.0, schedule="cosine", final_lr_share=0.0)
    assert [lr_at(s, 100, cosine) for s in (50, 100)] == pytest.approx([0.5, 0.0], abs=1e-12)
    assert lr_at(77, 100, Optimizer(lr=0.3, schedule="constant")) == 0.3


def test_without_the_extra_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "tensorboard" else real(name))
    monkeypatch.delitem(sys.modules, "kdfast.train")
    train = importlib.import_module("kdfast.train")  # a model's scores need none of it
    with pytest.raises(ImportError, match=r"needs tensorboard: pip install 'kdfast\[train\]'"):
        _ = train.distill
