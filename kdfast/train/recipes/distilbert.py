"""DistilBERT: soft targets, the labels and the direction of the last hidden states.

loss = soft_weight * T^2 * KL(teacher_T || student_T) + hard_weight * CE(labels) + cosine_weight * (1 - cos(h_s, h_t))

each a mean over its own rows. On task `masked_lm` the labels are the masked tokens, and the soft term is of every token; a
student of every other layer is `student.from_teacher`. A teacher without a head for it gets one first: `supervised` on
`masked_lm` with `student.freeze`.
Source: Sanh et al. 2019, arXiv 1910.01108, sections 3 and 4; the weights are those of the published training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdfast import hidden_cosine
from kdfast.models.load import vocab_of
from kdfast.models.view import Needs, View
from kdfast.strict import ranged
from kdfast.train.batch import IGNORE, Batch, token_positions, tokens_of_rows
from kdfast.train.kd import distillation, hard
from kdfast.train.match import one_teacher, shape_of, token_mask
from kdfast.train.objective import Metric, Metrics, Objective, Setting
from kdfast.train.schedule import Scheduled, scheduled
from kdfast.train.tasks.language import LanguageTask


@dataclass(frozen=True)
class DistilBERTOptions:
    """The three weights and the temperature.

    Args:
        temperature: T of the soft term. soft_weight: of it.
        hard_weight: of the cross-entropy with the labels: the masked tokens, or the classes of another task.
        cosine_weight: of the cosine distance of the last hidden states of tokens; student and teacher are equally wide.
        restrict_to_labels: the soft term is of the rows with a label only, on `masked_lm` the masked tokens.
        workspace_mb: MiB for logits through a head.
    """

    temperature: Scheduled = scheduled(2.0, above=0.0)
    soft_weight: Scheduled = scheduled(5.0, low=0.0)
    hard_weight: Scheduled = scheduled(2.0, low=0.0)
    cosine_weight: Scheduled = scheduled(1.0, low=0.0)
    restrict_to_labels: bool = False
    workspace_mb: float | None = ranged(None, above=0.0)

    def __post_init__(self) -> None:
        if self.soft_weight == 0 and self.hard_weight == 0 and self.cosine_weight == 0:
            raise ValueError("soft_weight: expected one of the weights above 0, got 0 for all: nothing to train on")


class DistilBERT(Objective):
    Options = DistilBERTOptions

    def __init__(self, options: DistilBERTOptions, setting: Setting) -> None:
        super().__init__(options, setting)
        teacher = one_teacher(setting, "distilbert")
        self._through_tokens = isinstance(setting.task, LanguageTask) and not options.restrict_to_labels
        own, its = vocab_of(setting.student), vocab_of(teacher)
        if isinstance(setting.task, LanguageTask) and None not in (own, its) and own != its:
            raise ValueError(f"teacher: its vocabulary has {its} ids, the student's {own}; distilbert expects one vocabulary")
        if options.cosine_weight != 0:
            (_, width), (_, their_width) = shape_of(setting.student, "student"), shape_of(teacher, "teacher")
            if width != their_width:
                raise ValueError(
                    f"student: method distilbert expects it as wide as its teacher, {their_width}, got {width}; leave out"
                    " student.from_teacher.width, or set method.cosine_weight: 0"
                )

    def needs_of_student(self) -> Needs:
        return Needs(layers=() if self.options.cosine_weight == 0 else (-1,))

    def needs_of_teacher(self) -> Needs:
        return self.needs_of_student()

    def hears_teachers(self) -> bool:
        return self.options.soft_weight != 0

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        heard = self._heard(batch)
        return {"heard": torch.tensor(batch.count()) if heard is None else heard.sum(), "tokens": tokens_of_rows(batch).sum()}

    def forward(self, student: View, teachers: Sequence[View], batch: Batch, num_items: int | Tensor) -> tuple[Tensor, Metrics]:
        now, share = self.now, batch.share(num_items)
        workspace = now["workspace_mb"]
        terms: list[Tensor] = []
        metrics: Metrics = {}
        if self.options.soft_weight != 0:
            heard = self._heard(batch)
            rows = batch.count() if heard is None else heard.sum()
            soft, metrics = distillation(
                student, teachers, None, rows, token_weight=None if heard is None else heard.float(),
                temperature=now["temperature"], soft_weight=now["soft_weight"], workspace_mb=workspace,
            )  # fmt: skip
            terms.append(self.share("heard", batch, num_items) * soft)
        if self.options.hard_weight != 0:
            if batch.labels is None:
                raise ValueError("data: method distilbert expects labels, got a batch without; or set method.hard_weight: 0")
            # Rows without a label, which only the teacher knows, leave the weight of the others as it is.
            of = (batch.labels != IGNORE).sum() if batch.soft_mask is None else batch.soft_mask.sum()
            labelled, found = hard(student, batch.labels, of, hard_weight=now["hard_weight"], workspace_mb=workspace)
            terms.append(share * labelled)
            metrics = {**metrics, **found}
        if self.options.cosine_weight != 0:
            cosine = hidden_cosine(student.layers[-1], teachers[0].layers[-1], mask=token_mask(batch))
            of_tokens = self.share("tokens", batch, num_items)
            terms.append(now["cosine_weight"] * of_tokens * cosine)
            metrics["cosine"] = Metric(cosine.detach() * of_tokens, of_tokens)
        return sum(terms[1:], terms[0]), metrics

    def _heard(self, batch: Batch) -> Tensor | None:
        """Rows of the soft term; None: all."""
        if self._through_tokens:
            return token_positions(batch)  # a decoder's where there is one: what is said, not what is read
        if batch.soft_mask is not None:
            return batch.soft_mask
        return None if batch.labels is None else batch.labels != IGNORE
