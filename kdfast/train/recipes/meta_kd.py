"""Meta-distillation: a student of one domain learns of a teacher of many, of each row as much as the teacher has to give.

loss_i = lambda_i * (embedding + hidden + attention + transfer_weight * mse(h_d_s W, h_d_t) + CE(softmax(z_t / T), z_s / T))
lambda_i = (1 + t_i) / (exp((1 - p_teacher(y_i))^2) + 1)

The first three are TinyBERT's (`kdfast.train.match.LayerMatch`), each a row's own mean; h_d is the state that knows its domain
(`kdfast.train.domains.DomainState`), the teacher's as `meta_teacher` left it, the student's its own; the last term has the
gradient of the cross-entropy and is taken as the KL divergence. t_i is how typical a row is (`weights_of_rows`).
Source: Pan et al. 2021, arXiv 2012.01266, section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdfast import hidden_mse
from kdfast.models.load import resolve_folder
from kdfast.models.view import Needs, View
from kdfast.strict import one_of, ranged, refuse_unused
from kdfast.train.batch import Batch, divisor
from kdfast.train.data import Subset
from kdfast.train.domains import STATE_FILE, DomainState, check_domains, instance_weights, labels_of, load_state
from kdfast.train.kd import distillation
from kdfast.train.match import FLAVORS, TERMS, LayerMatch, leading, one_teacher, shape_of, token_mask
from kdfast.train.objective import Metric, Metrics, Objective, Prepared, Setting
from kdfast.train.schedule import Scheduled, scheduled

STAGES = ("all", "intermediate", "prediction")


@dataclass(frozen=True)
class MetaKDOptions:
    """Which rows, and what the terms weigh; `data.domain` names the column with a row's domain.

    Args:
        domain: the one that is learned; the other domains of `data.train` count in t_i only. null: all rows are learned.
        stage: `intermediate`: all terms but the prediction; `prediction`: that alone; `all`: all at once, as in the paper. The
            published code has the first two as phases.
        layer_map, layer_weights: as in `tinybert`; layers are counted from 1.
        embedding_weight, hidden_weight, attention_weight, prediction_weight: of the terms; one of weight 0 is not formed.
        transfer_weight: gamma_2; 0 for a teacher that is no `meta_teacher`.
        temperature: of the prediction.
        instance_weights: weigh rows by lambda_i; otherwise all alike.
        alpha, encoder, flavor: of t_i, as in `meta_teacher`; encoder null: the teacher.
    """

    domain: str | None = None
    stage: str = one_of("all", *STAGES)
    layer_map: tuple[int, ...] = ()
    layer_weights: tuple[float, ...] = ()
    embedding_weight: Scheduled = scheduled(1.0, low=0.0)
    hidden_weight: Scheduled = scheduled(1.0, low=0.0)
    attention_weight: Scheduled = scheduled(1.0, low=0.0)
    transfer_weight: Scheduled = scheduled(0.5, low=0.0)
    prediction_weight: Scheduled = scheduled(1.0, low=0.0)
    temperature: Scheduled = scheduled(1.0, above=0.0)
    instance_weights: bool = True
    alpha: float = ranged(0.5, low=0.0, high=1.0)
    encoder: str | None = None
    flavor: str = one_of("paper", *FLAVORS)

    def __post_init__(self) -> None:
        if self.stage == "prediction":
            names = ("layer_map", "layer_weights", "transfer_weight", *(f"{term}_weight" for term in TERMS))
            refuse_unused(self, names, "with stage prediction, which compares no layers, expected none")
        elif self.stage == "intermediate":
            refuse_unused(self, ("prediction_weight", "temperature"), "with stage intermediate expected none")
        if self.flavor == "reference":
            refuse_unused(self, ("alpha",), "with flavor reference, which has 1/2, expected none")
        if not (self.terms or self.transfers or self.predicts):
            raise ValueError(f"stage: {self.stage} has no term with a weight above 0: nothing to train on")

    @property
    def terms(self) -> tuple[str, ...]:
        """The terms of layers that are formed."""
        return () if self.stage == "prediction" else tuple(term for term in TERMS if getattr(self, f"{term}_weight") != 0)

    @property
    def transfers(self) -> bool:
        return self.stage != "prediction" and self.transfer_weight != 0

    @property
    def predicts(self) -> bool:
        return self.stage != "intermediate" and self.prediction_weight != 0


class MetaKD(Objective):
    Options = MetaKDOptions

    def __init__(self, options: MetaKDOptions, setting: Setting) -> None:
        super().__init__(options, setting)
        self._autocast = setting.autocast
        self._teacher_model = [one_teacher(setting, "meta_kd")]  # no submodule
        teacher, student = self._teacher_model[0], setting.student
        self.names = check_domains(setting.task, "meta_kd")
        if options.domain is not None and options.domain not in self.names:
            raise ValueError(
                f"method.domain: expected a domain of data.train ({', '.join(self.names)}), got {options.domain!r}, of which"
                " there is no example"
            )
        earlier = [o for o in reversed(setting.earlier) if isinstance(o, MetaKD)]
        self.match: LayerMatch | None = None
        if options.terms:
            self.match = LayerMatch(student, teacher, options.layer_map, options.layer_weights, terms=options.terms)
            self.match.share(o.match for o in reversed(earlier) if o.match is not None)
        self.state: DomainState | None = None
        self.projection: nn.Linear | None = None
        self._theirs: list[DomainState] = []  # no submodule: it is read from the teacher's folder
        if options.transfers:
            self._open_states(setting, earlier)

    def _open_states(self, setting: Setting, earlier: Sequence[MetaKD]) -> None:
        spec = setting.recipe.all_teachers[0] if setting.recipe is not None else None
        folder = resolve_folder(spec.path, "teacher.path") if spec is not None and spec.path else None
        theirs = None if folder is None else load_state(folder, self.names)
        if theirs is None:
            raise ValueError(
                f"teacher.path: expected the model of a meta_teacher run with its {STATE_FILE}, found none; or set"
                " method.transfer_weight: 0"
            )
        self._theirs = [theirs]
        before = next((o for o in earlier if o.state is not None), None)
        if before is not None:
            self.state, self.projection = before.state, before.projection
            return
        (_, width), their_width = shape_of(setting.student, "student"), theirs.dense.weight.shape[0]
        self.state = DomainState(len(self.names), width)
        self.projection = None if width == their_width else leading(width, their_width)

    def needs_of_student(self) -> Needs:
        return self._needs(of_teacher=False)

    def needs_of_teacher(self) -> Needs:
        return self._needs(of_teacher=True)

    def hears_teachers(self) -> bool:
        return self.options.instance_weights or self.options.predicts

    def _needs(self, of_teacher: bool) -> Needs:
        found = Needs() if self.match is None else self.match.needs(of_teacher)
        return found | Needs(layers=(-1,)) if self.options.transfers else found

    def prepare(self, inputs: Any, folder: Path, say: Any) -> Prepared | None:
        options, rows = self.options, inputs.train
        if options.instance_weights:
            rows = instance_weights(
                inputs, self.names, folder, model=self._teacher_model[0], encoder=options.encoder, alpha=options.alpha,
                flavor=options.flavor, autocast=self._autocast,
            )  # fmt: skip
            say(f"instance weights: mean {rows.weights.mean():.3f}, {rows.weights.min():.3f} to {rows.weights.max():.3f}")
        if options.domain is not None:
            chosen = (labels_of(inputs.train)[1] == self.names.index(options.domain)).nonzero()[:, 0].tolist()
            if not chosen:
                raise ValueError(f"method.domain: expected an example of {options.domain!r} to learn from, got none")
            rows = Subset(rows, chosen)
        return Prepared(train=rows)

    def forward(self, student: View, teachers: Sequence[View], batch: Batch, num_items: int | Tensor) -> tuple[Tensor, Metrics]:
        now, teacher, mask = self.now, teachers[0], token_mask(batch)
        weight = self.weights(teacher, batch)
        summed = divisor(num_items, weight.device)
        metrics: Metrics = {"row_weight": Metric(weight.sum(), torch.tensor(len(weight), device=weight.device))}
        terms: list[Tensor] = []

        def add(name: str, value: Tensor) -> None:
            metrics[name] = Metric(value.detach(), weight.sum())
            terms.append(now[f"{name}_weight"] * value / summed)

        if self.match is not None:
            for name, value in self.match(student, teacher, mask, weight).items():
                add(name, value)
        if self.options.transfers:
            add("transfer", (weight * self._transfer(student, teacher, mask, batch.extra["domain"])).sum())
        if self.options.predicts:
            loss, found = distillation(
                student, teachers, None, num_items, token_weight=weight, temperature=now["temperature"],
                soft_weight=now["prediction_weight"], scale_by_t2=False,
            )  # fmt: skip
            terms.append(loss)
            metrics |= found
        return sum(terms[1:], terms[0]), metrics

    @torch.no_grad()
    def weights(self, teacher: View, batch: Batch) -> Tensor:
        """lambda_i `[B]`."""
        if batch.labels is None:
            raise ValueError("data: method meta_kd expects labels, got a batch without")
        logits = teacher.logits.float()
        if not self.options.instance_weights:
            return torch.ones(len(logits), device=logits.device)
        right = logits.softmax(-1).gather(1, batch.labels[:, None])[:, 0]
        return (1 + batch.extra["row_weight"]) / (((1 - right) ** 2).exp() + 1)

    def _transfer(self, student: View, teacher: View, mask: Tensor | None, domain: Tensor) -> Tensor:
        """`[B]`: how far the student's state that knows its domain is from the teacher's."""
        assert self.state is not None
        theirs = self._theirs[0].to(domain.device)
        with torch.no_grad():
            wanted = theirs(teacher.layers[-1], mask, domain)
        projection = None if self.projection is None else self.projection.weight
        return hidden_mse(self.state(student.layers[-1], mask, domain), wanted, projection, reduction="none")
