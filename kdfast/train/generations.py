"""Students that teach the next students: members of a generation trained one after another, and what their ensemble gains.

Every member is an ordinary run of its own, in `generation-1/member-0/` and so on, that is stopped and gone on with like any
other. `generations.json` has, for each generation, the members' scores, the scores of the mean of their probabilities, and how
far the members are one: top-1 agreement of pairs, and the Jensen-Shannon divergence, the mean of KL(member || mean).
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from kdfast import files
from kdfast.models.ensemble import Ensemble, mean_logits
from kdfast.models.load import weights_hash
from kdfast.models.view import look
from kdfast.strict import plain
from kdfast.train.alignment import check_vocabulary
from kdfast.train.batch import IGNORE
from kdfast.train.data import SEEDS, Source, batches, digest_of
from kdfast.train.evaluate import evaluate
from kdfast.train.objective import Setting
from kdfast.train.recipe import Model, Named, Phase, Recipe, Teacher
from kdfast.train.recipes.supervised import SupervisedOptions
from kdfast.train.recipes.word_kd import WordKDOptions, vocabulary_in
from kdfast.train.students import build_student, check_models
from kdfast.train.teachers import LiveTeacher


class Generations:
    """The generations of one run, kept in `folder`.

    Args:
        setting: of the method that asks. options: the row loss the members learn by (`WordKDOptions` or a kin), and
            `member_steps`, without which they train as long as the phase that hears them.
        inputs: the run's (`kdfast.train.inputs.Inputs`). say: as in `kdfast.train.distill`.
    """

    def __init__(
        self, setting: Setting, options: Any, inputs: Any, folder: Path, say: Callable[[str], None]
    ) -> None:  # fmt: skip
        phase: Phase = setting.phase
        self.recipe: Recipe = setting.recipe
        self.options, self.inputs, self.folder = options, inputs, folder
        self._steps, self._bar, self._say = options.member_steps or phase.steps, setting.bar, say
        self._optimizer = phase.optimizer or setting.recipe.optimizer
        self._file, self._student = folder / "generations.json", setting.student

    def check(self, members: Sequence[Model]) -> None:
        """Builds every member and forgets it, so that what cannot be is known before the first one is trained.

        Raises:
            ValueError: one cannot be built, does not fit the data, or has another vocabulary than the run's student.
        """
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world > 1:
            raise ValueError(f"method: expected one process for generations, whose members train one by one, got {world}")
        for i, student in enumerate(members):
            if student == self.recipe.student:
                continue  # built already
            key = f"method.members[{i}]"
            try:
                self._build(self._recipe(1, i, student, self.recipe.all_teachers))
            except ValueError as error:
                said = re.sub(r"\bstudent(?=[.:])", key, str(error))
                raise ValueError(said if key in said else f"{key}: {said}") from None

    def announce(self, members: int) -> None:
        """What `check: true`, which trains none, leaves out of the time it tells."""
        if members:
            self._say(f"{members} members of {self._steps} steps each are trained first; the time below is without them")

    def _build(self, recipe: Recipe) -> None:
        task = self.inputs.task
        model = build_student(recipe, task, self.inputs.vocab_size)
        check_vocabulary(model, self.inputs)
        check_models(model, self.inputs)
        its, own = vocabulary_in(model, task), vocabulary_in(self._student, task)
        if None not in (its, own) and its != own:
            raise ValueError(f"student: its vocabulary has {its} ids, that of the run's student {own}; expected one vocabulary")

    def train(self, number: int, members: Sequence[Model], teachers: Sequence[Teacher]) -> list[Teacher]:
        """Trains a generation from the one before (none: from the labels); its members as teachers of the next."""
        from kdfast.train.loop import distill  # which runs the method that asks for this

        found = []
        for i, student in enumerate(members):
            recipe = self._recipe(number, i, student, teachers)
            distill(recipe, bar=self._bar, say=self._said_by(f"generation {number}, member {i}"), **self.inputs.brought)
            model = str(Path(recipe.out) / "model")
            by_name = {"function": student.function, "arguments": student.arguments, "weights": model}
            found.append(Teacher(**by_name) if student.function else Teacher(path=model))  # type: ignore[arg-type]
        return found

    def _recipe(self, number: int, i: int, student: Model, teachers: Sequence[Teacher]) -> Recipe:
        """Of member `i` of a generation."""
        rows = self.recipe.data
        if not teachers and getattr(rows, "unlabelled", False):  # of those nobody says anything yet
            rows = dataclasses.replace(rows, unlabelled=())
        return dataclasses.replace(
            self.recipe, method=self._method(len(teachers)), phases=(), steps=self._steps, data=rows,
            student=self._fixed(student), optimizer=self._optimizer, teacher=None, teachers=tuple(teachers),
            out=str(self.folder / f"generation-{number}" / f"member-{i}"),
            init_from=self.recipe.init_from if student == self.recipe.student else None,
            seed=(self.recipe.seed * 1000 + number * 100 + i) % SEEDS,
            tokenizer=None if self.inputs.tokenizer is None else str(self.inputs.tokenizer),
        )  # fmt: skip

    def _fixed(self, student: Model) -> Model:
        """The student as the run's recipe means it: cut out of the run's teacher, whoever teaches the member."""
        cut, teachers = student.from_teacher, self.recipe.all_teachers
        if cut is None or cut.path is not None:
            return student
        path = next((teacher.path for teacher in teachers if teacher.path), None)
        return dataclasses.replace(student, from_teacher=dataclasses.replace(cut, path=path))

    def _said_by(self, name: str) -> Callable[[str], None]:
        return lambda line: self._say(f"{name}: {line}")

    def open(self, teachers: Sequence[Teacher], device: torch.device) -> list[LiveTeacher]:
        opened = [LiveTeacher.load(spec, "teacher", self.inputs.task.kind) for spec in teachers]
        for teacher in opened:
            teacher.to(device)
        return opened

    def report(
        self,
        name: str,
        models: Sequence[nn.Module],
        of: Sequence[Teacher] = (),
        weights: Sequence[float] | None = None,
        steps: int | None = None,
    ) -> dict[str, Any]:
        """Scores of the members, of their ensemble, and their agreement, on the validation data; found there when resumed.

        Args:
            of: what the models were opened from. steps: how long they were trained; None: as members are.
        """
        known = files.read_json(self._file) if self._file.is_file() else {}
        if self.inputs.validation is None:
            return {}
        size, limit = self.recipe.batch_size, self.recipe.eval_sequences
        about = files.json_value({
            "steps": steps or self._steps, "of": [self._identity(teacher) for teacher in of],
            "data": digest_of(self.inputs.validation), "limit": limit,
        })  # fmt: skip
        row = known.get(name, {})
        if {key: row.get(key) for key in about} == about:
            return dict(row)
        scored: dict[str, Any] = {"batch_size": size, "limit": limit, "task": self.inputs.task}
        members = [evaluate(model, self.inputs.validation, **scored) for model in models]
        together = (
            evaluate(Ensemble(models, weights).eval(), self.inputs.validation, **scored) if len(models) > 1 else members[0]
        )
        row = {
            **about,
            "members": members,
            "ensemble": together,
            **agreement(models, self.inputs.validation, size, limit),
        }
        files.write_json(self._file, {**known, name: row})
        self._say(f"{name}: {self._told(row)}")
        return row

    def _told(self, row: Mapping[str, Any]) -> str:
        members, together, headline = row["members"], row["ensemble"], self.inputs.task.headline
        if len(members) == 1:
            return headline(together)
        best = min(members, key=lambda scores: scores["nll"])
        gain = best["nll"] - together["nll"]
        alike = f", members agree on {row['top1_agreement']:.1%}" if "top1_agreement" in row else ""
        told = f"{abs(gain):.4f} nats {'gained' if gain >= 0 else 'lost'}"
        return f"best of {len(members)} {headline(best)}; together {headline(together)}, {told}{alike}"

    def _identity(self, teacher: Teacher) -> Any:
        """A member by its weights, which another may lie in the place of; a teacher of the run's by its name."""
        found = teacher.weights or teacher.path
        if found is None or not Path(found).is_relative_to(self.folder):
            return plain(teacher)
        return weights_hash(found)

    def _method(self, teachers: int) -> Named:
        """What a member learns by from so many teachers."""
        values = {f.name: getattr(self.options, f.name) for f in dataclasses.fields(WordKDOptions)}
        if teachers == 1:
            del values["teacher_mix"]  # it is of generations with several
        if teachers:
            return Named("word_kd", WordKDOptions(**values))
        return Named("supervised", SupervisedOptions(**{f.name: values[f.name] for f in dataclasses.fields(SupervisedOptions)}))


def stand_ins(student: nn.Module, count: int) -> list[LiveTeacher]:
    """The student as its own teachers, for `check: true`, which trains no members."""
    return [LiveTeacher(copy.deepcopy(student)) for _ in range(count)]


@torch.no_grad()
def agreement(models: Sequence[nn.Module], data: Source, batch_size: int = 16, limit: int = 0) -> dict[str, float]:
    """How far models are one, on the labelled rows: `top1_agreement`, the mean over pairs, and `js` in nats."""
    if len(models) < 2:
        return {}
    device = next(models[0].parameters()).device
    pairs = list(itertools.combinations(range(len(models)), 2))
    same = apart = rows = 0.0
    for batch in batches(data, batch_size, limit):
        batch = batch.to(device)
        if batch.labels is None:
            return {}
        counted = batch.labels != IGNORE
        logs = [look(model, batch.by_name).logits[counted].float().log_softmax(-1) for model in models]
        best = [z.argmax(-1) for z in logs]
        mean = mean_logits(logs, [1 / len(models)] * len(models))
        same += sum(float((best[i] == best[j]).sum()) for i, j in pairs) / len(pairs)
        # What a model excludes adds nothing to its divergence from the mean.
        apart += sum(float((z.exp() * (z - mean).masked_fill(z.isneginf(), 0)).sum()) for z in logs) / len(models)
        rows += float(counted.sum())
    return {"top1_agreement": same / max(rows, 1.0), "js": apart / max(rows, 1.0)}
