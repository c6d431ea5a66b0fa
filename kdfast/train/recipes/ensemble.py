"""Ensemble distillation: several teachers, their probabilities (or logits) averaged, teach one student, over generations too.

The loss is that of `word_kd`. With `generations: n` the teachers first teach `members`, whose ensemble teaches the next
members, and so on; the run's student learns from the last ones. Without teachers the first members learn from the labels.
Sources: Hinton, Vinyals, Dean 2015, arXiv 1503.02531, section 3; Furlanello et al. 2018, arXiv 1805.04770.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdfast.strict import ranged, refuse_unused
from kdfast.train.generations import Generations, stand_ins
from kdfast.train.objective import Prepared, Setting
from kdfast.train.recipe import Model
from kdfast.train.recipes.word_kd import WordKD, WordKDOptions


@dataclass(frozen=True)
class EnsembleOptions(WordKDOptions):
    """The options of `word_kd`, and generations.

    Args:
        generations: how often members are taught by the generation before; 0: the teachers teach the run's student.
        members: the students of each generation, written like `student`; several shapes stay unlike each other longer.
        member_steps: steps of each; null: as many as the run's student, or its phase.
    """

    generations: int = ranged(0, low=0)
    members: tuple[Model, ...] = ()
    member_steps: int | None = ranged(None, low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.generations and len(self.members) < 2:
            raise ValueError(f"members: expected at least two students for a generation, got {len(self.members)}")
        if self.members and not self.generations:
            raise ValueError("generations: expected a number >= 1 for the members, got 0")
        if not self.generations:
            refuse_unused(self, ("member_steps",), "without generations expected none")


class EnsembleKD(WordKD):
    Options = EnsembleOptions
    teacher = "optional"
    students_teach = True

    def __init__(self, options: EnsembleOptions, setting: Setting) -> None:
        super().__init__(options, setting)
        if not options.generations and len(setting.teachers) < 2:
            raise ValueError(
                f"teachers: method ensemble expects at least two, got {len(setting.teachers)}; add some, or members"
            )
        if options.generations and any(teacher.info is not None for teacher in setting.teachers):
            raise ValueError("teachers: method ensemble with generations expects live ones, whose students read the same rows")
        self._setting = setting

    def voices(self, setting: Setting) -> int:
        return max(len(setting.teachers), len(self.options.members))

    def prepare(self, inputs: Any, folder: Path, say: Any) -> Prepared | None:
        options, recipe = self.options, self._setting.recipe
        generations = Generations(self._setting, options, inputs, folder, say)
        if options.generations:
            self.teacher_weights = None  # those are of the teachers, whom the members take the place of
            generations.check(options.members)
        live = [teacher for teacher in inputs.teachers if teacher.info is None]
        if recipe.check:
            generations.announce(options.generations * len(options.members))
            return Prepared(teachers=stand_ins(self._setting.student, len(options.members))) if options.generations else None
        if len(live) > 1:
            weights = [teacher.weight for teacher in live]
            generations.report("teachers", [teacher.model for teacher in live], recipe.all_teachers, weights)
        device, before = next(self._setting.student.parameters()).device, recipe.all_teachers
        opened = None
        for number in range(1, options.generations + 1):
            before = generations.train(number, options.members, before)
            opened = generations.open(before, device)
            generations.report(f"generation {number}", [teacher.model for teacher in opened], before)
        return Prepared(teachers=opened)
