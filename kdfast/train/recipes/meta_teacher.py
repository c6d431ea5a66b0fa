"""Meta-KD's teacher: one model of several domains, pushed not to show which of them a row is from.

loss_i = t_i * (CE(y_i, z_i) + domain_weight * CE(d', W_d h_d)),  h_d = tanh(W (e_domain + mean H) + b)

with d' a wrong domain and t_i the row's weight (`kdfast.train.domains.weights_of_rows`): what is typical of its class in every
domain counts more. h_d is kept beside the model, for `meta_kd`.
Source: Pan et al. 2021, arXiv 2012.01266, section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.models.view import Needs, View
from kdfast.strict import one_of, ranged, refuse_unused
from kdfast.train.batch import IGNORE, Batch
from kdfast.train.domains import DomainState, check_domains, instance_weights, save_state
from kdfast.train.kd import hard
from kdfast.train.match import FLAVORS, shape_of, token_mask
from kdfast.train.objective import Metrics, Objective, Prepared, Setting
from kdfast.train.schedule import Scheduled, scheduled


@dataclass(frozen=True)
class MetaTeacherOptions:
    """What the rows weigh, and how much the domains are mixed up; `data.domain` names the column with a row's domain.

    Args:
        domain_weight: gamma_1 of the wrong domain's term; the paper takes 0.2 to 0.5. 0: no corruption.
        instance_weights: weigh rows by t_i; otherwise all alike.
        alpha: of a row's own domain in t_i.
        encoder: folder of the model whose mean last hidden state is E(x); null: the student before its first step.
        flavor: `paper`: prototypes of each class, and d' drawn among the other domains; `reference`: centroids of whole
            domains, and d' the domains of the batch in another order.
    """

    domain_weight: Scheduled = scheduled(0.3, low=0.0)
    instance_weights: bool = True
    alpha: float = ranged(0.5, low=0.0, high=1.0)
    encoder: str | None = None
    flavor: str = one_of("paper", *FLAVORS)

    def __post_init__(self) -> None:
        if self.flavor == "reference":
            refuse_unused(self, ("alpha",), "with flavor reference, which has 1/2, expected none")


class MetaTeacher(Objective):
    Options = MetaTeacherOptions
    teacher = "none"

    def __init__(self, options: MetaTeacherOptions, setting: Setting) -> None:
        super().__init__(options, setting)
        self._autocast = setting.autocast
        self.names = check_domains(setting.task, "meta_teacher")
        self._student = [setting.student]  # no submodule
        self.state: DomainState | None = None
        self.head: nn.Linear | None = None
        if options.domain_weight != 0:
            if len(self.names) < 2:
                raise ValueError(
                    f"data.domain: method meta_teacher mixes up domains, expected at least two, got {self.names[0]} only; set"
                    " method.domain_weight: 0"
                )
            _, width = shape_of(setting.student, "student")
            self.state, self.head = DomainState(len(self.names), width), nn.Linear(width, len(self.names))

    def needs_of_student(self) -> Needs:
        return Needs() if self.state is None else Needs(layers=(-1,))

    def prepare(self, inputs: Any, folder: Path, say: Any) -> Prepared | None:
        options = self.options
        if not options.instance_weights:
            return None
        rows = instance_weights(
            inputs, self.names, folder, model=self._student[0], encoder=options.encoder, alpha=options.alpha,
            flavor=options.flavor, autocast=self._autocast,
        )  # fmt: skip
        say(f"instance weights: mean {rows.weights.mean():.3f}, {rows.weights.min():.3f} to {rows.weights.max():.3f}")
        return Prepared(train=rows)

    def export(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        own = {name.removeprefix("state."): value for name, value in weights.items() if name.startswith("state.")}
        if own:
            save_state(folder, own, self.names)

    def forward(self, student: View, teachers: Sequence[View], batch: Batch, num_items: int | Tensor) -> tuple[Tensor, Metrics]:
        if batch.labels is None:
            raise ValueError("data: method meta_teacher expects labels, got a batch without")
        # Weights of a loss are not negative: a row that is like no prototype is left out.
        weight = batch.extra["row_weight"].clamp(min=0) if self.options.instance_weights else None
        loss, metrics = hard(student, batch.labels, num_items, token_weight=weight)
        if self.state is not None and self.head is not None:
            state = self.state(student.layers[-1], token_mask(batch), batch.extra["domain"])
            said, wrong = self.head(state), self._corrupted(batch.extra["domain"]).masked_fill(batch.labels == IGNORE, IGNORE)
            corruption, found = hard(
                View(own_logits=said), wrong, num_items, token_weight=weight, hard_weight=self.now["domain_weight"]
            )
            loss, metrics = loss + corruption, {**metrics, "wrong_domain": found["hard"]}
        return loss, metrics

    def _corrupted(self, domain: Tensor) -> Tensor:
        if self.options.flavor == "reference":
            return domain[torch.randperm(len(domain), device=domain.device)]
        others = len(self.names) - 1
        return (domain + 1 + torch.randint(others, domain.shape, device=domain.device)) % len(self.names)
