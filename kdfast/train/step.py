"""The one module that DDP or FSDP wraps."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from kdfast import Part
from kdfast.train.data import Batch
from kdfast.train.models import logits_of

#: Metrics of one step by name, as (sum, count) on the device.
Metrics = dict[str, Part]


class Loss(Protocol):
    """What a method is: a loss from the student's logits and whatever its teacher said."""

    def __call__(self, logits: Tensor, signal: Any, labels: Tensor, num_items: int | Tensor) -> tuple[Tensor, Metrics]: ...


class DistillStep(nn.Module):
    """loss, metrics = loss(student(batch), signal, labels): the loss is formed inside the wrapped module.

    So a head, which may be tied to the embedding, is used inside the root group of FSDP and inside DDP's forward, and
    its gradient is synchronised with everything else.
    """

    def __init__(self, student: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.student = student
        self.loss = loss

    def forward(self, batch: Batch, signal: Any, num_items: int | Tensor) -> tuple[Tensor, Metrics]:
        logits = logits_of(self.student, batch.input_ids, batch.attention_mask)
        return self.loss(logits, signal, batch.labels, num_items)
