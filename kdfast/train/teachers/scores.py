"""How good the teachers are, on what the student is scored on: its mark."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator

from kdfast.files import write_json
from kdfast.train.evaluate import evaluate
from kdfast.train.recipe import Recipe
from kdfast.train.teachers import LiveTeacher, teacher_keys

if TYPE_CHECKING:
    from kdfast.train.inputs import Inputs

#: In a run's folder.
SCORES_FILE = "teachers.json"


def score_teachers(recipe: Recipe, inputs: Inputs, folder: Path, accelerator: Accelerator, say: Callable[[str], None]) -> None:
    """Says each live teacher's scores on the validation data and writes them to `folder/teachers.json`, if it is not there.

    A cache has no scores, nor has a teacher whose head its folder lacks.
    """
    assert inputs.validation is not None
    if (folder / SCORES_FILE).is_file():
        return
    found: dict[str, Any] = {}
    for key, teacher in zip(teacher_keys(len(inputs.teachers)), inputs.teachers, strict=True):
        if not isinstance(teacher, LiveTeacher):
            continue
        if teacher.missing:
            say(f"{key}: its folder has no head for this task, it is not scored")
            continue
        with accelerator.autocast():
            found[key] = evaluate(
                teacher.model, inputs.validation, batch_size=recipe.batch_size, limit=recipe.eval_sequences, task=inputs.task,
                share=(accelerator.process_index, accelerator.num_processes),
            )  # fmt: skip
        say(f"{key}: validation {inputs.task.headline(found[key])}")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(folder / SCORES_FILE, found)
