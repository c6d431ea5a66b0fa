"""Word-level distillation: soft_weight * T^2 * D(teacher_T, student_T) + hard_weight * CE(student, labels).

Teacher-forced over the gold prefix, from live teachers or from cached targets; on classes it is Hinton's distillation.
Sources: Hinton, Vinyals, Dean 2015, arXiv 1503.02531; Kim and Rush 2016, arXiv 1606.07947, section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.models.heads import call, logits_in
from kdfast.models.load import vocab_of
from kdfast.models.view import View
from kdfast.ops.tails import DIVERGENCES as CACHED_DIVERGENCES
from kdfast.options import DIVERGENCES, TEACHER_MIXES
from kdfast.strict import one_of, ranged, refuse_unused
from kdfast.train.batch import Batch
from kdfast.train.kd import distillation
from kdfast.train.objective import Metrics, Objective, Setting
from kdfast.train.schedule import Schedule, Scheduled, scheduled
from kdfast.train.teachers import teacher_keys

#: Parameters of divergences, and those that have them.
_PARAMETERS = {
    ("beta",): ("jsd",), ("skew",): ("skew_forward_kl", "skew_reverse_kl"), ("ab_alpha", "ab_beta"): ("alpha_beta",),
}  # fmt: skip


@dataclass(frozen=True)
class WordKDOptions:
    """What every row loss takes (`kdfast.kd_loss` has the equations).

    Args:
        temperature: what both sides' logits are divided by in the soft term; a number or a schedule
            `{start, end, shape, steps}`, its shape linear or cosine.
        soft_weight: of the divergence from the teacher, number or schedule.
        hard_weight: of the cross-entropy of the labels, number or schedule.
        divergence: of the teacher's distribution and the student's.
        beta: of jsd: the teacher's share of the mixture. skew: of the skewed KLs: the first side's own share of the mixture.
        ab_alpha: first exponent of alpha_beta. ab_beta: the second.
        scale_by_t2: multiply it by T^2.
        tail: what stands for the ids a cache does not hold; `auto`: as the cache's kind wants (`none` where ids were drawn).
        teacher_mix: of several teachers, their probabilities or their logits.
        label_smoothing, z_loss: of the hard term.
        workspace_mb: MiB for logits through a head; null: what suits the device.
    """

    temperature: Scheduled = scheduled(1.0, above=0.0)
    soft_weight: Scheduled = scheduled(1.0, low=0.0)
    hard_weight: Scheduled = scheduled(0.0, low=0.0)
    divergence: str = one_of("forward_kl", *DIVERGENCES)
    beta: float = ranged(0.5, low=0.0, high=1.0)
    skew: float = ranged(0.1, low=0.0, high=1.0)
    ab_alpha: float = ranged(1.0, low=0.0)
    ab_beta: float = ranged(0.0, low=0.0)
    scale_by_t2: bool = True
    tail: str = one_of("auto", "auto", "ghost", "renormalize", "uniform", "none")
    teacher_mix: str = one_of("probs", *TEACHER_MIXES)
    label_smoothing: float = ranged(0.0, low=0.0, high=1.0)
    z_loss: float = ranged(0.0, low=0.0)
    workspace_mb: float | None = ranged(None, above=0.0)

    def __post_init__(self) -> None:
        if self.soft_weight == 0 and self.hard_weight == 0:
            raise ValueError("soft_weight: expected soft_weight or hard_weight above 0, got 0 for both: nothing to train on")
        for names, divergences in _PARAMETERS.items():
            if self.divergence not in divergences:
                why = f"with divergence {self.divergence} expected none (it is for {' and '.join(divergences)})"
                refuse_unused(self, names, why)
        if self.hard_weight == 0:
            refuse_unused(self, ("label_smoothing",), "without hard_weight expected none")


class WordKD(Objective):
    Options = WordKDOptions

    def __init__(self, options: WordKDOptions, setting: Setting) -> None:
        super().__init__(options, setting)
        weights = [teacher.weight for teacher in setting.teachers]
        self.teacher_weights = None if len(set(weights)) <= 1 else weights
        caches = [teacher.info for teacher in setting.teachers if teacher.info is not None]
        self.tail = options.tail
        if options.tail == "auto":
            self.tail = "none" if any(info.kind in ("sampled", "mixed") for info in caches) else "ghost"
        self.captured = sorted(set.intersection(*(set(info.temperatures) for info in caches))) if caches else []
        if caches:
            self._check_cached(options)
        else:
            refuse_unused(options, ("tail",), "of a live teacher, which says all, expected none", "method")
        if self.voices(setting) == 1 or caches:
            of = "caches" if len(caches) > 1 else "a cache" if caches else "a single teacher"
            refuse_unused(options, ("teacher_mix",), f"of {of} expected probs", "method")
        if self.needs_of_teacher() is not None:
            self._check_vocabularies(setting)

    def voices(self, setting: Setting) -> int:
        """The most teachers that are ever heard together."""
        return len(setting.teachers)

    @staticmethod
    def _check_vocabularies(setting: Setting) -> None:
        live = [teacher.model for teacher in setting.teachers if teacher.info is None]
        own = vocabulary_in(setting.student, setting.task) if live else None
        for key, model in zip(teacher_keys(len(live)), live, strict=True):
            its = vocabulary_in(model, setting.task)
            if None not in (own, its) and own != its:
                raise ValueError(f"{key}: its vocabulary has {its} ids, the student's {own}; word_kd expects one vocabulary")

    def _check_cached(self, options: WordKDOptions) -> None:
        given = options.temperature
        for t in (given.start, given.end) if isinstance(given, Schedule) else (given,):
            if not any(abs(c - t) <= 1e-6 * c for c in self.captured):
                listed = ", ".join(f"{c:g}" for c in self.captured)
                raise ValueError(f"method.temperature: {t:g} is not in the cache, which holds {listed}; capture it too")
        if options.divergence not in CACHED_DIVERGENCES:
            raise ValueError(
                f"method.divergence: a cached teacher takes {', '.join(CACHED_DIVERGENCES)}, got {options.divergence!r};"
                " use a live teacher"
            )

    def begin_step(self, step: int, steps: int) -> None:
        """With a cache T steps through the captured temperatures, each time the nearest."""
        super().begin_step(step, steps)
        if self.captured:
            self.now["temperature"] = min(self.captured, key=lambda c: abs(c - self.now["temperature"]))

    def forward(self, student: View, teachers: Sequence[View], batch: Batch, num_items: int | Tensor) -> tuple[Tensor, Metrics]:
        return self.distilled(student, teachers, batch, num_items, self.row_options())

    def row_options(self) -> dict[str, Any]:
        """What of `self.now` the row losses take: a method of this kin has options beside."""
        return {f.name: self.now[f.name] for f in fields(WordKDOptions)}

    def distilled(
        self, student: View, teachers: Sequence[View], batch: Batch, num_items: int | Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, Metrics]:
        """The loss with `options` (and a `token_weight`, where a method of this kin has one)."""
        options = {**options, "tail": self.tail, "teacher_weights": self.teacher_weights}
        return distillation(student, teachers, batch.labels, num_items, soft_mask=batch.soft_mask, **options)


@torch.no_grad()
def vocabulary_in(model: nn.Module, task: Any) -> int | None:
    """What the model says, else how many logits it gives for a token of a language task."""
    size = vocab_of(model)
    if size is not None or not getattr(task, "through_head", False):
        return size
    was_training = model.training
    model.eval()
    try:
        return int(logits_in(call(model, task.example(model))).shape[-1])
    finally:
        model.train(was_training)
