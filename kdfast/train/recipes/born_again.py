"""Born-again networks: a student of one architecture teaches the next one of the same, and all of them vote at the end.

f_1 learns from the teacher, or from the labels where there is none; f_k from f_(k-1) by the loss of `word_kd`; the last one is
the run's own student. The mean of the probabilities of all of them is scored at the end.
Source: Furlanello et al. 2018, arXiv 1805.04770.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from kdfast.strict import ranged
from kdfast.train.generations import Generations, stand_ins
from kdfast.train.objective import Prepared, Setting
from kdfast.train.recipe import Teacher
from kdfast.train.recipes.word_kd import WordKD, WordKDOptions


@dataclass(frozen=True)
class BornAgainOptions(WordKDOptions):
    """The options of `word_kd`, and generations.

    Args:
        generations: students one after another, the run's own the last.
        member_steps: steps of those before it; null: as many as the run's, or its phase's.
    """

    generations: int = ranged(2, low=2)
    member_steps: int | None = ranged(None, low=1)


class BornAgain(WordKD):
    Options = BornAgainOptions
    teacher = "optional"
    students_teach = True

    def __init__(self, options: BornAgainOptions, setting: Setting) -> None:
        super().__init__(options, setting)
        if any(teacher.info is not None for teacher in setting.teachers):
            raise ValueError("teacher.cache: method born_again has students teach on the same rows, expected path or function")
        self._setting = setting
        self._generations: Generations | None = None
        self._before: list[tuple[Teacher, nn.Module]] = []

    def voices(self, setting: Setting) -> int:
        return max(len(setting.teachers), 1)

    def prepare(self, inputs: Any, folder: Path, say: Any) -> Prepared | None:
        options, recipe = self.options, self._setting.recipe
        self.teacher_weights = None  # those are of the teachers, whom the members take the place of
        generations = Generations(self._setting, options, inputs, folder, say)
        generations.check([recipe.student])
        if recipe.check:
            generations.announce(options.generations - 1)
            return Prepared(teachers=stand_ins(self._setting.student, 1))
        device, before = next(self._setting.student.parameters()).device, recipe.all_teachers
        opened = []
        for number in range(1, options.generations):
            before = generations.train(number, [recipe.student], before)
            opened += generations.open(before, device)
            self._before.append((before[0], opened[-1].model))
            generations.report(f"generation {number}", [opened[-1].model], before)
        self._generations = generations
        return Prepared(teachers=opened[-1:])

    def conclude(self, student: nn.Module, say: Any) -> None:
        if self._generations is not None:
            steps = self._setting.recipe.total_steps  # more of them when a run that was done goes on
            of, models = zip(*self._before, strict=True)
            self._generations.report(f"generation {self.options.generations}", [student], steps=steps)
            self._generations.report("all together", [*models, student], of, steps=steps)
