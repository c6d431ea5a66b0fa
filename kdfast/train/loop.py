"""The one training loop: accumulation, clipping, metrics, evaluation, checkpoints, exact resume."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from kdfast.text import IGNORE
from kdfast.train import checkpoint, run_folder
from kdfast.train.data import Batch, Order, Source
from kdfast.train.evaluate import Evaluation, evaluate
from kdfast.train.inputs import Inputs, open_inputs
from kdfast.train.metrics import MetricLog
from kdfast.train.models import build_student, load_weights, vocab_of
from kdfast.train.recipe import Optimizer, Recipe
from kdfast.train.recipes import make_loss
from kdfast.train.step import DistillStep
from kdfast.train.teacher import CachedTeacher, alignment_line

#: Makes a progress bar: `bar(description, total, unit)` is a context manager yielding an object with `.update(done)`.
Bar = Callable[[str, int, str], contextlib.AbstractContextManager[Any]]


class Result(NamedTuple):
    """A finished run. `seconds` is time spent in training steps; `evaluation` is None without validation data.

    `main_process` is False on every process of a distributed run but the first, which should keep quiet.
    """

    out: Path
    model: Path
    steps: int
    seconds: float
    evaluation: Evaluation | None
    main_process: bool = True


def distill(
    recipe: Recipe,
    *,
    train_data: Source | None = None,
    validation_data: Source | None = None,
    bar: Bar | None = None,
    say: Callable[[str], None] = print,
) -> Result:
    """Trains `recipe.student` and returns where it lies; a killed run goes on from its last checkpoint, exactly.

    Args:
        recipe: everything the run depends on.
        train_data, validation_data: used in place of the recipe's text files: `len()` and `.batch(indices) -> Batch`.
        bar: makes a progress bar; None shows none.
        say: takes each line of the run's report.

    Raises:
        ValueError: a part of the recipe is missing or does not fit; `out` holds a run of another recipe.
        OSError: a file cannot be read or written.
    """
    inputs = open_inputs(recipe, train_data, validation_data)
    folder = Path(recipe.out)
    done = run_folder.finished(folder, recipe, inputs.digest)
    if done is not None and not recipe.check:
        say(f"{folder}: finished before; nothing to do")
        evaluation = None if done["evaluation"] is None else Evaluation(**done["evaluation"])
        return Result(folder, folder / "model", done["steps"], done["seconds"], evaluation)
    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(recipe.precision, recipe.precision),
        log_with=None if recipe.tracker == "none" or recipe.check else recipe.tracker,
        project_dir=str(folder),
    )
    run = _Run(recipe, inputs, folder, accelerator, say)
    return run.check() if recipe.check else run.train(bar)


class _Run:
    def __init__(
        self, recipe: Recipe, inputs: Inputs, folder: Path, accelerator: Accelerator, say: Callable[[str], None]
    ) -> None:
        self.recipe, self.inputs, self.folder, self.accelerator = recipe, inputs, folder, accelerator
        self.say: Callable[[str], None] = say if accelerator.is_main_process else lambda line: None
        set_seed(recipe.seed)
        self.student = build_student(recipe.student, inputs.vocab_size)
        if recipe.init_from:
            load_weights(self.student, recipe.init_from)
        self._check_vocabulary()
        optimizer = make_optimizer(self.student, recipe.optimizer)
        self.module, self.optimizer = accelerator.prepare(DistillStep(self.student, make_loss(recipe)), optimizer)
        if inputs.teacher is not None:
            inputs.teacher.to(accelerator.device)
        self.order = Order(len(inputs.train), recipe.seed)
        set_seed(recipe.seed, device_specific=True)

    def train(self, bar: Bar | None) -> Result:
        recipe, accelerator = self.recipe, self.accelerator
        if accelerator.is_main_process:
            run_folder.begin(self.folder, recipe, self.inputs.digest)
        accelerator.wait_for_everyone()
        log = MetricLog(recipe, self.folder, accelerator)
        start, seconds = 0, 0.0
        last = checkpoint.latest(self.folder)
        if last is not None:
            start, seconds = checkpoint.load(last, accelerator, self.module, self.optimizer.optimizer)
            self.say(f"resuming from {last}")
        log.truncate(start, seconds)
        if recipe.tracker != "none":
            accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": start}})
        self._align()
        drawn = bar if accelerator.is_main_process else None
        title = f"{recipe.method} {self.folder.name}"
        with drawn(title, recipe.steps, "steps") if drawn else contextlib.nullcontext() as shown:
            evaluation = self._steps(start, log, shown)
        checkpoint.export(self.folder, accelerator, self.module, self.student, self.inputs.tokenizer)
        if accelerator.is_main_process:
            run_folder.finish(self.folder, recipe.steps, log.seconds, evaluation)
        accelerator.end_training()
        return Result(self.folder, self.folder / "model", recipe.steps, log.seconds, evaluation, accelerator.is_main_process)

    def _steps(self, start: int, log: MetricLog, shown: Any) -> Evaluation | None:
        recipe, evaluation = self.recipe, None
        log.start_clock()
        for step in range(start + 1, recipe.steps + 1):
            self._step(step, log)
            final = step == recipe.steps
            evaluating = final or (recipe.eval_every > 0 and step % recipe.eval_every == 0)
            saving = final or (recipe.save_every > 0 and step % recipe.save_every == 0)
            if evaluating or saving or step % recipe.log_every == 0:
                row = log.flush()
                if not math.isfinite(row["loss"]):
                    raise RuntimeError(f"step {step}: the loss is {row['loss']}; lower optimizer.lr or set optimizer.clip")
                if shown is not None:
                    shown.update(step)
            data = self.inputs.validation
            if evaluating and data is not None:
                evaluation = evaluate(self.student, data, batch_size=recipe.batch_size, limit=recipe.eval_sequences)
                log.evaluation(step, {"validation_ppl": evaluation.ppl, "validation_top1": evaluation.top1})
            if saving:
                checkpoint.save(
                    self.folder, step, log.seconds, recipe.keep, self.accelerator, self.module, self.optimizer.optimizer
                )
            if evaluating or saving:
                log.start_clock()
        return evaluation

    def _step(self, step: int, log: MetricLog) -> Tensor:
        recipe, accelerator, device = self.recipe, self.accelerator, self.accelerator.device
        batches = [self._batch(step, part) for part in range(recipe.accumulation)]
        tokens = torch.tensor(sum(int((b.labels != IGNORE).sum()) for b in batches), device=device)
        # DDP averages gradients over processes: dividing by the mean count makes that the global mean over tokens.
        num_items = accelerator.reduce(tokens, "sum") / accelerator.num_processes
        lr = lr_at(step, recipe.steps, recipe.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        total = torch.zeros((), device=device)
        metrics = []
        for i, cpu_batch in enumerate(batches):
            batch = cpu_batch.to(device)
            signal = self.inputs.signal(batch) if self.inputs.signal else None
            waiting = i + 1 < len(batches)
            with accelerator.no_sync(self.module) if waiting else contextlib.nullcontext():
                loss, parts = self.module(batch, signal, num_items)
                accelerator.backward(loss)
            total += loss.detach()
            metrics.append(parts)
        clip = recipe.optimizer.clip or math.inf
        norm = torch.as_tensor(accelerator.clip_grad_norm_(self.module.parameters(), clip))
        self.optimizer.step()
        self.optimizer.zero_grad()
        log.add(step, lr, total, norm, metrics, tokens)
        return total

    def _batch(self, step: int, part: int) -> Batch:
        recipe, world = self.recipe, self.accelerator.num_processes
        position = ((step - 1) * recipe.accumulation + part) * world + self.accelerator.process_index
        return self.inputs.train.batch(self.order.take(position * recipe.batch_size, recipe.batch_size))

    def _align(self) -> None:
        if self.inputs.signal is None:
            return
        batch = self._batch(1, 0).to(self.accelerator.device)
        self.say(alignment_line(self.inputs.signal(batch), batch))

    def _check_vocabulary(self) -> None:
        student = vocab_of(self.student)
        if student is None or self.inputs.vocab_size is None:
            return
        if student < self.inputs.vocab_size:
            raise ValueError(
                f"student: its vocabulary has {student} ids, expected at least the data's {self.inputs.vocab_size};"
                " set student.config.vocab_size"
            )
        # Heads padded to another size are one vocabulary only when the tokenizers are known to be one.
        if isinstance(self.inputs.signal, CachedTeacher) and self.inputs.tokenizer is None:
            cached = self.inputs.signal.reader.info.vocab_size
            if student != cached:
                raise ValueError(
                    f"student: its vocabulary has {student} ids, the cache {cached}; set tokenizer: PATH in the recipe so"
                    " that both can be seen to use the same one"
                )

    def check(self) -> Result:
        """Two steps, then memory, alignment and time left; leaves nothing behind."""
        self._align()
        log = _Nothing()
        self._step(1, log)  # type: ignore[arg-type]
        began = time.perf_counter()
        loss = float(self._step(2, log))  # type: ignore[arg-type]
        seconds = time.perf_counter() - began
        self.say(f"peak memory {run_folder.peak_memory_gb():.2f} GB on {self.accelerator.device}")
        steps = self.recipe.steps
        self.say(f"loss {loss:.4f}, {seconds:.3f} s a step, {steps * seconds / 60:.1f} minutes for {steps} steps")
        return Result(self.folder, self.folder / "model", 2, seconds, None)


class _Nothing:
    def add(self, *args: Any) -> None:
        """Metrics of a check are not kept."""


def make_optimizer(student: nn.Module, options: Optimizer) -> torch.optim.AdamW:
    """AdamW over what trains; biases and norms (fewer than two dimensions) do not decay."""
    trained = [p for p in student.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    return torch.optim.AdamW(groups, lr=options.lr, betas=(options.beta1, options.beta2), eps=options.eps)


def lr_at(step: int, steps: int, options: Optimizer) -> float:
    """The learning rate of `step` (1-based): linear warm-up, then the schedule down to `final_lr_share * lr`."""
    if step <= options.warmup_steps:
        return options.lr * step / options.warmup_steps
    if options.schedule == "constant":
        return options.lr
    done = (step - options.warmup_steps) / max(steps - options.warmup_steps, 1)
    left = 1 - done if options.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return options.lr * (options.final_lr_share + (1 - options.final_lr_share) * left)
