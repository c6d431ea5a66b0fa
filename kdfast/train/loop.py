"""The one training loop: phases, accumulation, clipping, metrics, evaluation, checkpoints, exact resume."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import Tensor, nn

from kdfast import linear_topk_targets, topk_targets
from kdfast.cache import check_alignment
from kdfast.models.load import vocab_of
from kdfast.models.view import Needs, View
from kdfast.train import checkpoint, run_folder
from kdfast.train.ahead import Ahead
from kdfast.train.batch import Batch
from kdfast.train.data import Order, PackedOrder, Source
from kdfast.train.evaluate import Evaluation, evaluate
from kdfast.train.inputs import Inputs, open_inputs
from kdfast.train.metrics import MetricLog
from kdfast.train.objective import Setting
from kdfast.train.optimizer import lr_at, make_optimizer
from kdfast.train.recipe import Phase, Recipe
from kdfast.train.recipes import objective_class
from kdfast.train.shard import fully_sharded, set_gradient_sync
from kdfast.train.step import DistillStep
from kdfast.train.stop import stop_signals
from kdfast.train.students import build_student
from kdfast.train.tasks.language import LanguageTask
from kdfast.train.teachers import LiveTeacher

#: Makes a progress bar: `bar(description, total, unit)` is a context manager yielding an object with `.update(done)`.
Bar = Callable[[str, int, str], contextlib.AbstractContextManager[Any]]


class Result(NamedTuple):
    """A finished run. `seconds` is time spent in training steps; `evaluation` is None without validation data.

    `main_process` is False on every process of a distributed run but the first, which should keep quiet; `headline` is the
    evaluation in a few words.
    """

    out: Path
    model: Path
    steps: int
    seconds: float
    evaluation: Evaluation | None
    main_process: bool = True
    headline: str = ""


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
        train_data, validation_data: used in place of the recipe's data: `len()` and `.batch(indices) -> Batch`.
        bar: makes a progress bar; None shows none.
        say: takes each line of the run's report.

    Raises:
        ValueError: a part of the recipe is missing or does not fit; `out` holds a run of another recipe.
        OSError: a file cannot be read or written.
        KeyboardInterrupt: SIGINT or SIGTERM, after the step at hand and a checkpoint.
    """
    folder = Path(recipe.out)
    # One process may train several times, each in a precision of its own.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(recipe.precision, recipe.precision),
        log_with=None if recipe.tracker == "none" or recipe.check else recipe.tracker,
        project_dir=str(folder),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=bool(recipe.phases))],
    )
    with accelerator.main_process_first():
        # A check leaves nothing behind.
        kept = Path(tempfile.mkdtemp()) if recipe.check else folder / "data"
        inputs = open_inputs(recipe, kept, train_data, validation_data)
    done = run_folder.finished(folder, recipe, inputs.digest)
    if done is not None and not recipe.check:
        say(f"{folder}: finished before; nothing to do")
        evaluation = None if done["evaluation"] is None else Evaluation(**done["evaluation"])
        headline = "" if evaluation is None else inputs.task.headline(evaluation)
        main = accelerator.is_main_process
        return Result(folder, folder / "model", done["steps"], done["seconds"], evaluation, main, headline)
    run = _Run(recipe, inputs, folder, accelerator, say)
    return run.check() if recipe.check else run.train(bar)


class _Run:
    def __init__(
        self, recipe: Recipe, inputs: Inputs, folder: Path, accelerator: Accelerator, say: Callable[[str], None]
    ) -> None:
        self.recipe, self.inputs, self.folder, self.accelerator = recipe, inputs, folder, accelerator
        self.say: Callable[[str], None] = say if accelerator.is_main_process else lambda line: None
        set_seed(recipe.seed)
        self.student = build_student(recipe, inputs.task, inputs.vocab_size)
        self._check_vocabulary()
        setting = Setting(self.student, inputs.teachers, inputs.task)
        objectives = [objective_class(p.method.name)(p.method.options, setting) for p in recipe.parts]
        self.step = DistillStep(self.student, objectives, inputs.task).name_head()
        if inputs.task.through_head and self.step.head is None:
            self.say(f"student: {type(self.student).__name__} has no plain linear head to go through; logits are formed whole")
        self._open_teachers()
        if recipe.student.compile:
            self.student.compile()
        self.module, self.optimizer = self._wrapped()
        self.order = self._order()
        self.first_row = 0  # row of the walk that step `first_step` begins with, in rows of all processes
        self.first_step = 1
        set_seed(recipe.seed, device_specific=True)

    def _open_teachers(self) -> None:
        needs = Needs()
        for objective in self.step.objectives:
            needs = needs | objective.needs_of_teacher()  # type: ignore[operator]
        for teacher in self.inputs.teachers:
            teacher.to(self.accelerator.device)
            if isinstance(teacher, LiveTeacher) and self.inputs.task.through_head and self.step.head is not None:
                teacher.name_head(self.inputs.task.example(teacher.model))
            if needs != Needs() and not isinstance(teacher, LiveTeacher):
                raise ValueError(
                    f"teacher.cache: method {self.recipe.method.name} needs more than a cache holds; use teacher.path"
                )

    def _wrapped(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        accelerator = self.accelerator
        if self.recipe.shard == "fsdp":
            module = fully_sharded(self.step.to(accelerator.device))
            return module, make_optimizer(module, self.recipe.optimizer)
        module, optimizer = accelerator.prepare(self.step, make_optimizer(self.step, self.recipe.optimizer))
        return module, optimizer

    def _order(self) -> Order | PackedOrder:
        caches = self.inputs.caches
        if caches and caches[0].pack:
            return PackedOrder(caches[0].reader.lengths(), caches[0].pack, self.recipe.seed)
        return Order(len(self.inputs.train), self.recipe.seed)

    def train(self, bar: Bar | None) -> Result:
        recipe, accelerator = self.recipe, self.accelerator
        if accelerator.is_main_process:
            run_folder.begin(self.folder, recipe, self.inputs.digest)
        accelerator.wait_for_everyone()
        log = MetricLog(recipe, self.folder, accelerator)
        start, seconds = 0, 0.0
        last = checkpoint.latest(self.folder)
        if last is not None:
            start, seconds = self._resume(last)
        else:
            for objective in self.step.objectives:
                objective.prepare(self.inputs, self.folder / "prepared", self.say)  # type: ignore[operator]
        log.truncate(start, seconds)
        accelerator.init_trackers("tensorboard")
        if recipe.alignment and start < recipe.total_steps:
            self._align()
        drawn = bar if accelerator.is_main_process else None
        title = f"{recipe.method.name if not recipe.phases else 'train'} {self.folder.name}"
        with drawn(title, recipe.total_steps, "steps") if drawn else contextlib.nullcontext() as shown:
            evaluation = self._steps(start, log, shown)
        checkpoint.export(self.folder, accelerator, self.module, self.student, self.inputs.tokenizer)
        if accelerator.is_main_process:
            run_folder.finish(self.folder, recipe.total_steps, log.seconds, evaluation)
        accelerator.end_training()
        model = self.folder / "model"
        headline = "" if evaluation is None else self.inputs.task.headline(evaluation)
        return Result(self.folder, model, recipe.total_steps, log.seconds, evaluation, accelerator.is_main_process, headline)

    def _resume(self, last: Path) -> tuple[int, float]:
        found = checkpoint.load(last, self.accelerator, self.module, getattr(self.optimizer, "optimizer", self.optimizer))
        self.first_step, self.first_row = found.step + 1, found.rows
        self.say(f"resuming from {last}")
        if not found.same_world:
            self.say(f"{last}: written by another number of processes; the data go on where they were, dropout draws anew")
        return found.step, found.seconds

    def _steps(self, start: int, log: MetricLog, shown: Any) -> Evaluation | None:
        recipe, evaluation = self.recipe, None
        log.start_clock()
        ahead = Ahead(self._read, self.accelerator.device, recipe.ahead)
        with stop_signals() as stop, contextlib.closing(ahead.steps(start + 1, recipe.total_steps + 1)) as steps:
            for step, batches in steps:
                self._step(step, batches, log, ahead.take_waited())
                final = step == recipe.total_steps
                stopping = self._anybody(stop.is_set())
                evaluating = final or (recipe.eval_every > 0 and step % recipe.eval_every == 0)
                saving = final or stopping or (recipe.save_every > 0 and step % recipe.save_every == 0)
                if evaluating or saving or step % recipe.log_every == 0:
                    row = log.flush()
                    if row["loss"] is None or not math.isfinite(row["loss"]):
                        raise RuntimeError(f"step {step}: the loss is {row['loss']}; lower optimizer.lr or set optimizer.clip")
                    if shown is not None:
                        shown.update(step)
                if evaluating and not stopping and self.inputs.validation is not None:
                    evaluation = self._evaluate()
                    log.evaluation(step, {f"validation_{k}": v for k, v in evaluation.items()})
                if saving:
                    self._save(step, log.seconds)
                if evaluating or saving:
                    log.start_clock()
                if stopping and not final:
                    raise KeyboardInterrupt(f"stopped after step {step}; run the same again to go on")
        return evaluation

    def _evaluate(self) -> Evaluation:
        assert self.inputs.validation is not None
        share = self.accelerator.process_index, self.accelerator.num_processes
        return evaluate(
            self.module,
            self.inputs.validation,
            batch_size=self.recipe.batch_size,
            limit=self.recipe.eval_sequences,
            share=share,
        )

    def _save(self, step: int, seconds: float) -> None:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        checkpoint.save(
            self.folder, step, seconds, self._rows_before(step + 1), self.recipe.keep, self.accelerator, self.module, optimizer
        )

    def _anybody(self, stopping: bool) -> bool:
        """Whether any process was told to stop: they end at the same step."""
        if self.accelerator.num_processes == 1:
            return stopping
        told = torch.tensor(int(stopping), device=self.accelerator.device)
        return bool(self.accelerator.reduce(told, "sum").item())

    def _step(self, step: int, batches: list[Batch], log: Any, waited: float = 0.0) -> Tensor:
        accelerator, device = self.accelerator, self.accelerator.device
        phase, within = self._phase(step)
        objective = self.step.objective
        objective.begin_step(within, phase.steps)
        tokens = torch.tensor(sum(batch.count() for batch in batches), device=device)
        # DDP averages gradients over processes: dividing by the mean count makes that the global mean over tokens.
        num_items = accelerator.reduce(tokens, "sum") / accelerator.num_processes
        lr = lr_at(within, phase.steps, phase.optimizer or self.recipe.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        total = torch.zeros((), device=device)
        metrics = []
        needs = objective.needs_of_teacher()
        for i, batch in enumerate(batches):
            views = self._views(batch, needs)
            with self._synchronised(last=i + 1 == len(batches)), self.accelerator.autocast():
                loss, found = self.module(batch, views, num_items)
            with self._synchronised(last=i + 1 == len(batches)):
                accelerator.backward(loss)
            total += loss.detach()
            metrics.append(found)
        clip = (phase.optimizer or self.recipe.optimizer).clip or math.inf
        norm = torch.as_tensor(accelerator.clip_grad_norm_(self.module.parameters(), clip))
        self.optimizer.step()
        self.optimizer.zero_grad()
        names = [name for name in ("temperature", "soft_weight", "hard_weight") if name in objective.now]
        constants: dict[str, float] = {name: objective.now[name] for name in names}
        log.add(step, lr, total, norm, metrics, tokens, {**constants, "data_wait_s": round(waited, 5)})
        return total

    def _views(self, batch: Batch, needs: Needs) -> list[View]:
        teachers = self.inputs.teachers
        if isinstance(batch.targets, tuple):
            return [View(targets=targets) for targets in batch.targets]
        return [teacher(batch, needs) for teacher in teachers]

    def _phase(self, step: int) -> tuple[Phase, int]:
        """The phase of a step, and the step's number within it; makes its objective the one that is used."""
        before = 0
        for number, phase in enumerate(self.recipe.parts):
            if step <= before + phase.steps:
                self.step.phase = number
                return phase, step - before
            before += phase.steps
        raise AssertionError(f"step {step} lies in no phase")

    @contextlib.contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        """Gradients go over the wire with the last micro-batch only."""
        if self.recipe.shard == "fsdp":
            set_gradient_sync(self.module, last)
            yield
            return
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.module):
            yield

    def _rows_before(self, step: int) -> int:
        """Rows of the walk that all processes have taken before `step`."""
        rows = self.recipe.batch_size * self.recipe.accumulation * self.accelerator.num_processes
        return self.first_row + (step - self.first_step) * rows

    def _read(self, step: int) -> list[Batch]:
        recipe, world, rank = self.recipe, self.accelerator.num_processes, self.accelerator.process_index
        size = recipe.batch_size
        starts = [self._rows_before(step) + (part * world + rank) * size for part in range(recipe.accumulation)]
        return [self.inputs.train.batch(self.order.take(start, size)) for start in starts]

    def _align(self) -> None:
        if not self.inputs.teachers or not isinstance(self.inputs.task, LanguageTask):
            return
        batch = self._read(self.first_step)[0].to(self.accelerator.device)
        for view in self._views(batch, Needs()):
            assert batch.labels is not None
            self.say(f"alignment: {check_alignment(targets_in(view), batch.labels)}")

    def _check_vocabulary(self) -> None:
        student, wanted = vocab_of(self.student), self.inputs.vocab_size
        if student is None or wanted is None or not isinstance(self.inputs.task, LanguageTask):
            return
        if student < wanted:
            raise ValueError(
                f"student: its vocabulary has {student} ids, expected at least the data's {wanted};"
                " set student.config.vocab_size"
            )
        for teacher in self.inputs.teachers:
            its = teacher.info.vocab_size if teacher.info is not None else vocab_of(teacher.model)
            if its is not None and its < wanted:
                raise ValueError(f"teacher: its vocabulary has {its} ids, expected at least the data's {wanted}")
            # Heads padded to another size are one vocabulary only when the tokenizers are known to be one.
            if teacher.info is not None and self.inputs.tokenizer is None and student != its:
                raise ValueError(
                    f"student: its vocabulary has {student} ids, the cache {its}; set tokenizer: PATH in the recipe so"
                    " that both can be seen to use the same one"
                )

    def check(self) -> Result:
        """Two steps, then memory, alignment and time left; leaves nothing behind."""
        if self.recipe.alignment:
            self._align()
        log = _Nothing()
        device = self.accelerator.device
        self._step(1, [batch.to(device) for batch in self._read(1)], log)
        began = time.perf_counter()
        number = min(2, self.recipe.total_steps)
        loss = float(self._step(number, [batch.to(device) for batch in self._read(number)], log))
        seconds = time.perf_counter() - began
        self.say(f"peak memory {run_folder.peak_memory_gb():.2f} GB on {device}")
        steps = self.recipe.total_steps
        self.say(f"loss {loss:.4f}, {seconds:.3f} s a step, {steps * seconds / 60:.1f} minutes for {steps} steps")
        return Result(self.folder, self.folder / "model", 2, seconds, None)


def targets_in(view: View) -> Any:
    """A teacher's view as top-k targets, for the alignment guard."""
    if view.targets is not None:
        return view.targets
    if view.head is None or view.hidden is None:
        return topk_targets(view.logits, min(64, view.logits.shape[-1]))
    k = min(64, view.head.weight.shape[0])
    return linear_topk_targets(view.hidden, view.head.weight, k, bias=view.head.bias, head=view.head.form)


class _Nothing:
    def add(self, *args: Any) -> None:
        """Metrics of a check are not kept."""
