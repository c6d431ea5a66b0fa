"""The one training loop: phases, accumulation, clipping, metrics, evaluation, checkpoints, exact resume."""

from __future__ import annotations

import contextlib
import copy
import math
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import Tensor, nn

from kdfast.files import remove_orphans, write_json
from kdfast.models.view import Needs, View
from kdfast.train import best, checkpoint, run_folder
from kdfast.train.ahead import Ahead, Read
from kdfast.train.alignment import align, check_heads, check_labelled, check_vocabulary
from kdfast.train.batch import Batch
from kdfast.train.check import NoLog, check
from kdfast.train.data import SEEDS, Order, PackedOrder, Source
from kdfast.train.documents import Documents
from kdfast.train.evaluate import evaluate
from kdfast.train.inputs import Inputs, open_inputs
from kdfast.train.metrics import MetricLog, check_finite
from kdfast.train.objective import Objective, Prepared, Setting
from kdfast.train.optimizer import lr_at, make_optimizer, set_options
from kdfast.train.positions import check_positions
from kdfast.train.recipe import Phase, Recipe
from kdfast.train.recipes import make_objectives
from kdfast.train.result import Result
from kdfast.train.shard import fully_sharded, synchronised
from kdfast.train.step import DistillStep
from kdfast.train.stop import Anybody, stop_signals
from kdfast.train.students import build_student, check_models
from kdfast.train.summary import step_note, write_summary
from kdfast.train.tasks.language import LanguageTask
from kdfast.train.tasks.task import Evaluation
from kdfast.train.teachers import LiveTeacher, Teacher
from kdfast.train.teachers.scores import score_teachers
from kdfast.train.unused import leaves_out

#: Makes a progress bar: `bar(description, total, unit)` is a context manager yielding an object with `.update(done)`.
Bar = Callable[[str, int, str], contextlib.AbstractContextManager[Any]]
#: Options of a method that are logged with every step: they may follow a schedule.
_CONSTANTS = ("temperature", "soft_weight", "hard_weight")


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
        KeyboardInterrupt: SIGINT or SIGTERM, after the step at hand and a checkpoint; in or after the last step when all is
            done, so that nothing else is begun.
    """
    if recipe.precision == "fp16" and (recipe.shard == "fsdp" or not torch.cuda.is_available()):
        raise ValueError("precision: fp16 expects a GPU and shard: none, got neither or one of them; use bf16")
    with contextlib.ExitStack() as stack:
        # A check leaves nothing behind.
        kept = Path(stack.enter_context(tempfile.TemporaryDirectory()) if recipe.check else recipe.out)
        return _distill(recipe, kept, train_data, validation_data, bar, say)


def _distill(
    recipe: Recipe,
    kept: Path,
    train_data: Source | None,
    validation_data: Source | None,
    bar: Bar | None,
    say: Callable[[str], None],
) -> Result:
    """`distill`; what is made of the data lies in `kept`."""
    folder = Path(recipe.out)
    # One process may train several times, each in a precision of its own.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(recipe.precision, recipe.precision),
        log_with=None if recipe.tracker == "none" or recipe.check else recipe.tracker,
        project_dir=str(folder),
        kwargs_handlers=[DistributedDataParallelKwargs()],
    )
    with accelerator.main_process_first():
        if accelerator.is_main_process and not recipe.check:
            remove_orphans(folder)
        inputs = open_inputs(recipe, kept / "data", train_data, validation_data)
    for note in inputs.notes if accelerator.is_main_process else ():
        say(note)
    done = run_folder.finished(folder, recipe, inputs)
    if done is not None and done["steps"] < recipe.total_steps and accelerator.is_main_process:
        say(f"{folder}: finished {done['steps']} steps before; going on to {recipe.total_steps}")
    if done is not None and done["steps"] >= recipe.total_steps:
        say(f"{folder}: finished before; nothing to do")
        if recipe.keep_best:
            say(best.described(folder, inputs.task))
        evaluation = None if done["evaluation"] is None else Evaluation(**done["evaluation"])
        return Result.of(folder, inputs.task, done["steps"], done["seconds"], evaluation, accelerator.is_main_process)
    run = _Run(recipe, inputs, kept, accelerator, say, bar if accelerator.is_main_process else None)
    if recipe.check:
        return run.check()
    with run_folder.claimed(folder, accelerator.is_main_process), stop_signals() as stop:
        result = run.train(stop)
    if run.anybody(stop.is_set()):
        raise KeyboardInterrupt(f"stopped after step {result.steps}, the last: {folder} is done; run the same again to go on")
    return result


class _Run:
    def __init__(
        self, recipe: Recipe, inputs: Inputs, kept: Path, accelerator: Accelerator, say: Callable[[str], None], bar: Bar | None
    ) -> None:
        self.recipe, self.inputs, self.folder, self.accelerator = recipe, inputs, Path(recipe.out), accelerator
        self.say: Callable[[str], None] = say if accelerator.is_main_process else lambda line: None
        self.bar = bar
        set_seed(recipe.seed)
        self.student = build_student(recipe, inputs.task, inputs.vocab_size, self.say)
        check_vocabulary(self.student, inputs)
        check_models(self.student, inputs)
        setting = Setting(
            self.student, inputs.teachers, inputs.task, recipe, bar, autocast=accelerator.autocast, device=accelerator.device
        )  # fmt: skip
        objectives = make_objectives([part.method for part in recipe.parts], setting)
        self.step = DistillStep(self.student, objectives, inputs.task).name_head()
        if inputs.task.through_head and self.step.head is None:
            self.say(f"student: {type(self.student).__name__} has no plain linear head to go through; logits are formed whole")
        check_heads(objectives, inputs)
        self._open_teachers(inputs.teachers)
        with accelerator.main_process_first():
            prepared = [self._prepare(objective, kept / "prepared" / str(i)) for i, objective in enumerate(objectives)]
        #: Of each phase: the rows it trains on, and the teachers it hears.
        self.rows = [inputs.train if found.train is None else found.train for found in prepared]
        self.teachers = [inputs.teachers if found.teachers is None else found.teachers for found in prepared]
        check_labelled(zip(objectives, self.rows, strict=True), inputs)
        self.whole = [found.whole or len(rows) for rows, found in zip(self.rows, prepared, strict=True)]
        for rows, teachers in zip(self.rows, self.teachers, strict=True):
            live = [teacher.model for teacher in teachers if isinstance(teacher, LiveTeacher)]
            models = [("student", self.student), *(("teacher", model) for model in live)]
            check_positions(models, rows, inputs.task, bool(inputs.caches))
        self.orders = self._orders()
        self.first_row = 0  # row of the walk that step `first_step` begins with, in rows of all processes
        self.first_step = 1
        if accelerator.num_processes > 1 and recipe.shard == "none":
            accelerator.ddp_handler.find_unused_parameters = bool(recipe.phases) or self._leaves_out()
        if recipe.student.compile:
            self.student.compile()
        self.module, self.optimizer = self._wrapped()
        self.anybody = Anybody()
        set_seed((recipe.seed + accelerator.process_index) % SEEDS)

    def _prepare(self, objective: Objective, folder: Path) -> Prepared:
        found = objective.prepare(self.inputs, folder, self.say) or Prepared()
        if found.teachers is not None:
            self._open_teachers(found.teachers)
        return found

    def _open_teachers(self, teachers: Sequence[Teacher]) -> None:
        needs = Needs()
        for objective in self.step.objectives:
            needs = needs | (objective.needs_of_teacher() or Needs())  # type: ignore[operator]
        for teacher in teachers:
            teacher.to(self.accelerator.device)
            if isinstance(teacher, LiveTeacher) and self.inputs.task.through_head and self.step.head is not None:
                teacher.name_head(self.inputs.task.example(teacher.model))
            if needs != Needs() and not isinstance(teacher, LiveTeacher):
                raise ValueError(
                    f"teacher.cache: method {self.recipe.method.name} needs more than a cache holds; use teacher.path"
                )

    def _leaves_out(self) -> bool:
        """Whether a step may leave parameters without a gradient, on any process."""
        accelerator = self.accelerator
        batch = self._read(1).batches[0].to(accelerator.device)
        self.step.to(accelerator.device)
        with accelerator.autocast():
            found = leaves_out(self.step, batch, self._views(batch, self.step.objective.needs_of_teacher()), self.say)
        return bool(accelerator.reduce(torch.tensor(float(found), device=accelerator.device), "sum") > 0)

    def _wrapped(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        accelerator = self.accelerator
        if self.recipe.shard == "fsdp":
            module = fully_sharded(self.step.to(accelerator.device))
            return module, make_optimizer(module, self.recipe.optimizer)
        module, optimizer = accelerator.prepare(self.step, make_optimizer(self.step, self.recipe.optimizer))
        return module, optimizer

    def _orders(self) -> list[Order | PackedOrder]:
        """The walk of each phase; phases with the same rows go on with the same one."""
        walks = {id(rows): self.inputs.walk(rows, self.recipe) for rows in self.rows}
        return [walks[id(rows)] for rows in self.rows]

    def train(self, stop: threading.Event) -> Result:
        recipe, accelerator = self.recipe, self.accelerator
        if accelerator.is_main_process:
            corpora = [rows.digest for rows in self.rows if isinstance(rows, Documents) and rows is not self.inputs.train]
            run_folder.begin(self.folder, recipe, self.inputs, corpora, self.say)
        accelerator.wait_for_everyone()
        log = MetricLog(recipe, self.folder, accelerator)
        start, seconds = 0, 0.0
        last = checkpoint.latest(self.folder)
        if last is not None:
            start, seconds = self._resume(last)
        log.truncate(start, seconds)
        accelerator.init_trackers("tensorboard")
        if recipe.alignment and start < recipe.total_steps:
            self._align()
        if recipe.eval_teacher:
            with checkpoint.drawing_apart():
                score_teachers(recipe, self.inputs, self.folder, accelerator, self.say)
        title = f"{'train' if recipe.phases else recipe.method.name} {self.folder.name}"
        with self.bar(title, recipe.total_steps, "steps") if self.bar else contextlib.nullcontext() as shown:
            evaluation = self._steps(start, log, shown, stop)
        checkpoint.export(self.folder / "model", accelerator, self.module, self.student, self.inputs)
        if recipe.keep_best:
            self.say(best.described(self.folder, self.inputs.task))
        if accelerator.is_main_process:
            for objective in self.step.objectives:
                objective.conclude(self.student.eval(), self.say)  # type: ignore[operator]
            write_summary(self.folder, recipe, self.student, log.seconds, evaluation, run_folder.environment())
            run_folder.finish(self.folder, recipe.total_steps, log.seconds, evaluation)
        accelerator.end_training()
        main, task = accelerator.is_main_process, self.inputs.task
        return Result.of(self.folder, task, recipe.total_steps, log.seconds, evaluation, main)

    def _resume(self, last: Path) -> tuple[int, float]:
        found = checkpoint.load(last, self.accelerator, self.module, getattr(self.optimizer, "optimizer", self.optimizer))
        if found.step > self.recipe.total_steps:
            raise ValueError(f"steps: {last} has done {found.step} of them, expected at least as many; set another out")
        self.first_step, self.first_row = found.step + 1, found.rows
        self.say(f"resuming from {last}")
        if not found.same_world:
            self.say(f"{last}: written by another number of processes; the data go on where they were, dropout draws anew")
        return found.step, found.seconds

    def _steps(self, start: int, log: MetricLog, shown: Any, stop: threading.Event) -> Evaluation | None:
        recipe, evaluation = self.recipe, self._missed(start, log)
        log.start_clock()
        ahead = Ahead(self._read, self.accelerator.device, recipe.ahead)
        with contextlib.closing(ahead.steps(start + 1, recipe.total_steps + 1)) as steps:
            for step, read in steps:
                self._step(step, read, log, ahead.take_waited())
                final = step == recipe.total_steps
                stopping = self.anybody(stop.is_set())
                # Who is told to stop has no time for an evaluation; it is made up for when the run goes on.
                evaluating = self._evaluates(step) and (final or not stopping)
                saving = final or stopping or (recipe.save_every > 0 and step % recipe.save_every == 0)
                if evaluating or saving or step % recipe.log_every == 0:
                    row = log.flush()
                    check_finite(row, recipe.precision)
                    if shown is not None:
                        shown.update(step, note=step_note(recipe, self.step.phase, row))
                # What was trained is kept before anything else may fail.
                if saving:
                    self._save(step, log.seconds)
                if evaluating:
                    evaluation = self._evaluate(step, log)
                if evaluating or saving:
                    log.start_clock()
                if stopping and not final:
                    raise KeyboardInterrupt(f"stopped after step {step}; run the same again to go on")
        return evaluation

    def _evaluates(self, step: int) -> bool:
        every = self.recipe.eval_every
        return self.inputs.validation is not None and (step == self.recipe.total_steps or (every > 0 and step % every == 0))

    def _missed(self, start: int, log: MetricLog) -> Evaluation | None:
        """The evaluation after step `start` of a run that was stopped or killed before it came to it."""
        if not start or not self._evaluates(start):
            return None
        known = log.evaluated(start)
        return None if known and start < self.recipe.total_steps else self._evaluate(start, None if known else log)

    def _evaluate(self, step: int, log: MetricLog | None) -> Evaluation:
        assert self.inputs.validation is not None
        with self.accelerator.autocast(), checkpoint.drawing_apart():
            evaluation = evaluate(
                self.module, self.inputs.validation, batch_size=self.recipe.batch_size, limit=self.recipe.eval_sequences,
                share=(self.accelerator.process_index, self.accelerator.num_processes),
            )  # fmt: skip
        better = self._keep_best(step, evaluation)
        if log is not None:
            log.evaluation(step, {f"validation_{k}": v for k, v in evaluation.items()})
        if step < self.recipe.total_steps:
            self.say(f"step {step}: validation {self.inputs.task.headline(evaluation)}{', the best so far' if better else ''}")
        return evaluation

    def _keep_best(self, step: int, evaluation: Evaluation) -> bool:
        """Before its line is logged: a run killed in between evaluates this step again, and comes here again."""
        name, sign = self.inputs.task.chosen_by(evaluation)
        main = self.accelerator.is_main_process
        better = self.recipe.keep_best and self.anybody(main and best.beats(self.folder, evaluation, name, sign))
        if better:
            apart = copy.deepcopy(self.student) if hasattr(self.student, "merge_and_unload") else self.student
            checkpoint.export(self.folder / best.FOLDER, self.accelerator, self.module, apart, self.inputs)
            if main:
                write_json(self.folder / best.FILE, {"step": step, **evaluation})
        return better

    def _save(self, step: int, seconds: float) -> None:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        checkpoint.save(
            self.folder, step, seconds, self._rows_before(step + 1), self.recipe.keep, self.accelerator, self.module, optimizer
        )

    def _step(self, step: int, read: Read, log: Any, waited: float = 0.0) -> Tensor:
        accelerator, device = self.accelerator, self.accelerator.device
        phase, within = self._phase(step)
        objective = self.step.objective
        objective.begin_step(within, phase.steps)
        counted = torch.tensor([read.items, *read.counts.values()], device=device)
        # DDP averages gradients over processes: dividing by the mean count makes that the global mean. Without labels it is 0.
        num_items, *others = accelerator.reduce(counted, "sum").clamp(min=1) / accelerator.num_processes
        objective.of_step = dict(zip(read.counts, others, strict=True))
        options = phase.optimizer or self.recipe.optimizer
        lr = lr_at(within, phase.steps, options)
        set_options(self.optimizer, options, lr)
        total = torch.zeros((), device=device)
        metrics = []
        needs = objective.needs_of_teacher()
        for i, batch in enumerate(read.batches):
            with synchronised(self.module, accelerator, last=i + 1 == len(read.batches)):
                with accelerator.autocast():
                    views = self._views(batch, needs)
                    loss, found = self.module(batch, views, num_items)
                accelerator.backward(loss)
            total += loss.detach()
            metrics.append(found)
        norm = torch.as_tensor(accelerator.clip_grad_norm_(self.module.parameters(), options.clip or math.inf))
        self.optimizer.step()
        self.optimizer.zero_grad()
        known: dict[str, float] = {k: objective.now[k] for k in _CONSTANTS if k in objective.now}
        log.add(step, lr, total, norm, metrics, counted[0], {**known, "data_wait_s": round(waited, 5)})
        return total

    def _views(self, batch: Batch, needs: Needs | None) -> list[View]:
        if needs is None:
            return []
        if isinstance(batch.targets, tuple):
            return [View(targets=targets) for targets in batch.targets]
        return [teacher(batch, needs) for teacher in self.teachers[self.step.phase]]

    def _phase(self, step: int) -> tuple[Phase, int]:
        """The phase of a step, and the step's number within it; makes its objective the one that is used."""
        self.step.phase, within = self.recipe.place(step)
        return self.recipe.parts[self.step.phase], within

    def _rows_before(self, step: int) -> int:
        """Rows of the walk that all processes have taken before `step`."""
        rows = self.recipe.batch_size * self.recipe.accumulation * self.accelerator.num_processes
        return self.first_row + (step - self.first_step) * rows

    def _read(self, step: int) -> Read:
        recipe, world, rank = self.recipe, self.accelerator.num_processes, self.accelerator.process_index
        size = recipe.batch_size
        starts = [self._rows_before(step) + (part * world + rank) * size for part in range(recipe.accumulation)]
        number, _ = recipe.place(step)
        objective: Any = self.step.objectives[number]
        taught = bool(self.teachers[number]) and objective.teacher != "none"
        batches = (self.rows[number].batch(self.orders[number].take(start, size)) for start in starts)
        return Read.of([batch.heard(taught, self.inputs.task) for batch in batches], objective.counts)

    def _align(self) -> None:
        self._phase(self.first_step)
        objective = self.step.objective
        if objective.needs_of_teacher() is None or not objective.hears_teachers():
            return  # the labels may be what a teacher wrote, at a temperature of its own
        if not self.teachers[self.step.phase] or not isinstance(self.inputs.task, LanguageTask):
            return
        batch = self._read(self.first_step).batches[0].to(self.accelerator.device)
        align(self._views(batch, Needs()), batch, self.say)

    def check(self) -> Result:
        """Two steps of each phase, then memory, alignment and time; leaves nothing behind."""
        if self.recipe.alignment:
            self._align()
        device, world = self.accelerator.device, self.accelerator.num_processes
        rows = [None if isinstance(order, PackedOrder) else n for order, n in zip(self.orders, self.whole, strict=True)]
        take = lambda n: self._step(n, self._read(n).to(device), NoLog())  # noqa: E731
        seconds = check(self.recipe, take, rows, world, device, self.say)
        return Result(self.folder, self.folder / "model", 2 * len(self.recipe.parts), seconds, None)
