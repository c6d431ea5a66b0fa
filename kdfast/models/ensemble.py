"""Several models as one: logits whose softmax is the weighted mean of the members' probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdfast.models.heads import call, logits_in
from kdfast.models.view import taken


class Ensemble(nn.Module):
    """logits = log(sum_m weight_m * softmax(member_m(**inputs))), the weights summing to 1; each member gets what it takes.

    For scores and for text that is written together (`kdfast.models.generate`); losses take the members one by one, in one
    fused call.
    """

    def __init__(self, members: Sequence[nn.Module], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        if not members:
            raise ValueError("members: expected at least one model, got none")
        self.members = nn.ModuleList(members)
        given = [1.0] * len(members) if weights is None else list(weights)
        self.weights = [weight / sum(given) for weight in given]
        self.config = None  # each member has its own, which says what it takes

    def get_output_embeddings(self) -> None:
        """No head of its own."""

    def forward(self, **inputs: Tensor) -> Tensor:
        inputs = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        return mean_logits([logits_in(call(member, taken(member, inputs))) for member in self.members], self.weights)


def mean_logits(logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """log(sum_m weight_m * softmax(logits_m)), float32: normalised."""
    if len(logits) == 1:
        return logits[0].float().log_softmax(-1)
    logs = torch.stack([z.float().log_softmax(-1) for z in logits])
    return (logs + torch.tensor(weights, device=logs.device).log().view(-1, *[1] * (logs.dim() - 1))).logsumexp(0)
