"""Whether student, teachers, rows and labels belong to one another, looked at before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from kdfast import linear_topk_targets, topk_targets
from kdfast.cache import check_alignment
from kdfast.models.load import check_ids, lacks, vocab_of
from kdfast.models.view import View
from kdfast.train.batch import Batch
from kdfast.train.data import batches
from kdfast.train.tasks.classes import ClassTask
from kdfast.train.tasks.language import LanguageTask
from kdfast.train.teachers import teacher_keys

if TYPE_CHECKING:
    from kdfast.train.inputs import Inputs

#: Entries a live teacher is looked at with.
_K = 64
#: Rows in which labels are looked for at a time.
_ROWS = 256


def align(views: Sequence[View], batch: Batch, say: Callable[[str], None]) -> None:
    """Says each teacher's loss on the labels at three shifts; a batch without labels says nothing.

    Raises:
        AlignmentError: another shift fits better.
    """
    if batch.labels is None:
        return
    for i, view in enumerate(views):
        which = f" of teacher {i}" if len(views) > 1 else ""
        say(f"alignment{which}: {check_alignment(targets_in(view), batch.labels)}")


def targets_in(view: View) -> Any:
    """A teacher's view as top-k targets."""
    if view.targets is not None:
        return view.targets
    if view.head is None or view.hidden is None:
        return topk_targets(view.logits, min(_K, view.logits.shape[-1]))
    k = min(_K, view.head.weight.shape[0])
    return linear_topk_targets(view.hidden, view.head.weight, k, bias=view.head.bias, head=view.head.form)


def check_heads(objectives: Iterable[Any], inputs: Inputs) -> None:
    """Raises where a method hears a teacher whose head its folder did not have."""
    if not any(objective.teacher != "none" and objective.hears_teachers() for objective in objectives):
        return
    for key, teacher in zip(teacher_keys(len(inputs.teachers)), inputs.teachers, strict=True):
        missing = getattr(teacher, "missing", ())
        if missing:
            raise ValueError(
                f"{key}.path: the folder {lacks(missing)}, which would be random; train it for task {inputs.task.kind} first"
                " (method: supervised)"
            )


def check_labelled(parts: Iterable[tuple[Any, Any]], inputs: Inputs) -> None:
    """Raises where a method learns from labels and no row has one: its loss would be 0.

    Args:
        parts: methods, each with the rows it trains on.
    """
    if not isinstance(inputs.task, ClassTask):
        return
    for objective, rows in parts:
        hard = objective.teacher == "none" or getattr(objective.options, "hard_weight", 0) != 0
        if hard and not any(batch.labelled for batch in batches(rows, _ROWS)):
            remedy = "name their column in data.label" if hasattr(inputs.task.data, "label") else "add them"
            remedy += "" if objective.teacher == "none" else ", or set method.hard_weight: 0"
            raise ValueError(
                f"data.train: expected labels, which the method learns from, got {len(rows)} rows without; {remedy}"
            )


def check_vocabulary(student_model: nn.Module, inputs: Inputs) -> None:
    """Raises where student, teachers and data do not share one vocabulary, or one is too small for the data's tokens."""
    student, wanted = vocab_of(student_model), inputs.vocab_size
    if wanted is not None and not isinstance(inputs.task, LanguageTask):
        live = [teacher.model for teacher in inputs.teachers if teacher.info is None]
        for key, model in (("student", student_model), *(("teacher", model) for model in live)):
            check_ids(model, wanted, key)
    if student is None or wanted is None or not isinstance(inputs.task, LanguageTask):
        return
    if student < wanted:
        raise ValueError(
            f"student: its vocabulary has {student} ids, expected at least the data's {wanted}; set student.config.vocab_size"
        )
    for teacher in inputs.teachers:
        its = teacher.info.vocab_size if teacher.info is not None else vocab_of(teacher.model)
        if its is not None and its < wanted:
            raise ValueError(f"teacher: its vocabulary has {its} ids, expected at least the data's {wanted}")
        # Heads padded to another size are one vocabulary only when the tokenizers are known to be one.
        if teacher.info is not None and inputs.tokenizer is None and student != its:
            raise ValueError(
                f"student: its vocabulary has {student} ids, the cache {its}; set tokenizer: PATH in the recipe so"
                " that both can be seen to use the same one"
            )
