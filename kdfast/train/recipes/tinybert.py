"""TinyBERT: a student drawn to its teacher's embeddings, hidden states and attention scores, then to its predictions.

loss = embedding_weight * mse(E_s W_e, E_t)
     + sum_m lambda_m * (hidden_weight * mse(H_s[m] W_h, H_t[g(m)]) + attention_weight * mse(scores_s[m], scores_t[g(m)]))
     + prediction_weight * CE(softmax(z_t / t), z_s / t) + hard_weight * CE(labels, z_s)

`kdfast.train.match.LayerMatch` has the terms of the layers. The cross-entropy with the teacher is taken as the KL divergence,
whose gradient it has; it differs by the teacher's entropy. Two stages are phases: general (a corpus, the teacher before it was
fine-tuned), then the task, intermediate layers first and the prediction after. Phases share their projections.
Source: Jiao et al. 2020, arXiv 1909.10351, equations 7 to 11 and section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kdfast.models.load import resolve_folder
from kdfast.models.view import Needs, View
from kdfast.strict import one_of, ranged, refuse_unused
from kdfast.text import TextData
from kdfast.text.documents import Corpus
from kdfast.text.tokenizers import load_tokenizer
from kdfast.train.augment import Augment, augmented
from kdfast.train.batch import Batch
from kdfast.train.data import Source, Subset, lengths_of
from kdfast.train.documents import Documents
from kdfast.train.kd import distillation
from kdfast.train.match import FLAVORS, TERMS, LayerMatch, one_teacher, shape_of, token_mask
from kdfast.train.objective import Metric, Metrics, Objective, Prepared, Setting
from kdfast.train.readers import load_reader
from kdfast.train.remember import heard, remembered
from kdfast.train.schedule import Scheduled, scheduled
from kdfast.train.tasks.classes import ClassTask
from kdfast.train.teachers import LiveTeacher

#: Numbers of a teacher that are kept for a stage.
_MOST = 1 << 28
#: Rows of which copies are made for `check: true`.
_TRIED = 64
STAGES = ("all", "general", "intermediate", "prediction")


@dataclass(frozen=True)
class TinyBERTOptions:
    """The terms, and what a stage trains on.

    Args:
        stage: `general`, `intermediate`: the terms of the layers; `prediction`: the last two; `all`: all at once.
        layer_map: for each of the student's layers the teacher's, counted from 1 (0 is the embedding; `student.from_teacher`
            counts layers from 0); none: evenly spaced (4 of 12: 3, 6, 9, 12).
        layer_weights: lambda_m, for each of the student's layers; none: 1.
        embedding_weight, hidden_weight, attention_weight, prediction_weight, hard_weight: of the terms; numbers or schedules.
            A term of weight 0 is not formed.
        temperature: t of the prediction.
        flavor: `paper`, or `reference`: as the published code has it, one projection with bias, padding counted as
            `kdfast.train.match.LayerMatch` says, and the prediction's mean over rows and classes.
        corpus: of stage `general`: text to train on (`paths`, `glob`, `sequence_length`, ...); none: the task's rows.
        teacher: of stage `general`: folder of the teacher before it was fine-tuned; null: the run's teacher.
        augment: copies of the rows with other words; the teacher alone says what they mean.
        workspace_mb: MiB for logits through a head.
    """

    stage: str = one_of("all", *STAGES)
    layer_map: tuple[int, ...] = ()
    layer_weights: tuple[float, ...] = ()
    embedding_weight: Scheduled = scheduled(1.0, low=0.0)
    hidden_weight: Scheduled = scheduled(1.0, low=0.0)
    attention_weight: Scheduled = scheduled(1.0, low=0.0)
    prediction_weight: Scheduled = scheduled(1.0, low=0.0)
    hard_weight: Scheduled = scheduled(0.0, low=0.0)
    temperature: Scheduled = scheduled(1.0, above=0.0)
    flavor: str = one_of("paper", *FLAVORS)
    corpus: TextData | None = None
    teacher: str | None = None
    augment: Augment | None = None
    workspace_mb: float | None = ranged(None, above=0.0)

    def __post_init__(self) -> None:
        for name in ("corpus", "teacher"):
            if getattr(self, name) is not None and self.stage != "general":
                raise ValueError(f"{name}: expected it with stage general, got stage {self.stage}; leave it out")
        if self.stage == "prediction":
            names = ("layer_map", "layer_weights", *(f"{term}_weight" for term in TERMS))
            refuse_unused(self, names, "with stage prediction, which compares no layers, expected none")
        elif self.stage != "all":
            names = ("prediction_weight", "hard_weight", "temperature", "workspace_mb")
            refuse_unused(self, names, f"with stage {self.stage}, which compares layers only, expected none")
        if self.augment is not None and self.corpus is not None:
            raise ValueError("augment: expected it without corpus, whose rows are text of its own; leave it out")
        if not self.terms and not self.predicts:
            raise ValueError(f"stage: {self.stage} has no term with a weight above 0: nothing to train on")

    @property
    def terms(self) -> tuple[str, ...]:
        """The terms of layers that are formed."""
        return () if self.stage == "prediction" else tuple(term for term in TERMS if getattr(self, f"{term}_weight") != 0)

    @property
    def predicts(self) -> bool:
        return self.stage in ("all", "prediction") and (self.prediction_weight != 0 or self.hard_weight != 0)


class TinyBERT(Objective):
    Options = TinyBERTOptions

    def __init__(self, options: TinyBERTOptions, setting: Setting) -> None:
        super().__init__(options, setting)
        teacher = one_teacher(setting, "tinybert")
        self._setting, self._shape, self._remembers = setting, shape_of(teacher, "teacher"), False
        self._checked = setting.recipe is not None and setting.recipe.check
        self.match: LayerMatch | None = None
        if options.terms:
            self.match = LayerMatch(
                setting.student, teacher, options.layer_map, options.layer_weights, flavor=options.flavor, terms=options.terms
            )
            self.match.share(o.match for o in setting.earlier if isinstance(o, TinyBERT) and o.match is not None)

    def needs_of_student(self) -> Needs:
        return Needs() if self.match is None else self.match.needs(of_teacher=False)

    def needs_of_teacher(self) -> Needs | None:
        if self._remembers:
            return None
        return Needs() if self.match is None else self.match.needs(of_teacher=True)

    def hears_teachers(self) -> bool:
        return self.options.predicts

    def prepare(self, inputs: Any, folder: Path, say: Any) -> Prepared:
        options = self.options
        rows: Source | None = None
        teachers, whole = None, None
        if options.teacher is not None:
            teachers = [LiveTeacher(self._general_teacher(inputs))]
        if options.corpus is not None:
            tokenizer, file = load_tokenizer(inputs.tokenizer)
            corpus = Corpus(
                options.corpus, tokenizer, file.parent, task="causal", name=lambda option: f"method.corpus.{option}"
            )  # fmt: skip
            rows = Documents.of(corpus, folder / "corpus")
        if options.augment is not None:
            if not isinstance(self._setting.task, ClassTask) or inputs.tokenizer is None:
                raise ValueError("method.augment: expected a task whose rows are texts with classes; leave it out")
            embeddings = inputs.teachers[0].model.get_input_embeddings().weight
            # A check tries it on some rows.
            some = Subset(inputs.train, range(min(_TRIED, len(inputs.train)))) if self._checked else inputs.train
            rows = augmented(some, inputs.tokenizer, options.augment, folder / "augmented", embeddings, say, self._setting.bar)
            whole = len(inputs.train) * (1 + options.augment.copies) if self._checked else None
        rows = inputs.train if rows is None else rows
        if self._reads_often(rows):
            self._remembers, setting = True, self._setting
            rows = remembered(
                rows, inputs.teachers[0], folder / "heard", setting.device, autocast=setting.autocast, bar=setting.bar
            )  # fmt: skip
        return Prepared(rows, teachers, whole)

    def _reads_often(self, rows: Source) -> bool:
        """Whether the teacher's predictions are all that is seen of it, of each row more than once, and few enough to keep."""
        recipe, phase = self._setting.recipe, self._setting.phase
        if self.options.stage != "prediction" or self._checked or recipe is None or phase is None:
            return False
        if not (isinstance(self._setting.task, ClassTask) and hasattr(rows, "lengths")):
            return False
        read = phase.steps * recipe.batch_size * recipe.accumulation
        size = int(lengths_of(rows).sum()) * len(self._setting.task.names)
        return read > len(rows) and size < _MOST

    def _general_teacher(self, inputs: Any) -> nn.Module:
        folder = resolve_folder(self.options.teacher, "method.teacher")
        model = load_reader(folder, "method.teacher", inputs.tokenizer, self._setting.task.kind)
        found = shape_of(model, "method.teacher")
        if found != self._shape:
            layers, width = self._shape
            raise ValueError(
                f"method.teacher: expected {layers} layers {width} wide like the run's teacher, got {found[0]} layers"
                f" {found[1]} wide"
            )
        return model

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {} if self.match is None else self.match.counts(batch)

    def forward(self, student: View, teachers: Sequence[View], batch: Batch, num_items: int | Tensor) -> tuple[Tensor, Metrics]:
        now = self.now
        metrics: Metrics = {}
        terms: list[Tensor] = []
        if self.match is not None:
            for name, value in self.match(student, teachers[0], token_mask(batch)).items():
                share = self.share(self.match.counted(name, student), batch, num_items)
                metrics[name] = Metric(value.detach() * share, share)
                terms.append(now[f"{name}_weight"] * share * value)
        if self.options.predicts:
            classes = student.logits.shape[-1] if student.head is None else student.head.weight.shape[0]
            loss, found = distillation(
                student, heard(batch) or teachers, batch.labels, num_items, soft_mask=batch.soft_mask,
                temperature=now["temperature"],
                soft_weight=now["prediction_weight"] / (classes if self.options.flavor == "reference" else 1),
                hard_weight=now["hard_weight"], scale_by_t2=False, workspace_mb=now["workspace_mb"],
            )  # fmt: skip
            terms.append(loss)
            metrics |= found
        return sum(terms[1:], terms[0]), metrics
