"""Perplexity and top-1 accuracy on held-out sequences."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from kdfast.text import IGNORE
from kdfast.train.data import Source
from kdfast.train.models import logits_of


class Evaluation(NamedTuple):
    """`ppl` = exp(mean negative log-likelihood of the labels in nats); `top1` = share of labels that are the argmax."""

    ppl: float
    nll: float
    top1: float
    tokens: int


@torch.no_grad()
def evaluate(model: nn.Module, data: Source, *, batch_size: int = 16, limit: int = 0) -> Evaluation:
    """The model on the first `limit` sequences of `data` (0 = all), in evaluation mode, which is then put back.

    Raises:
        ValueError: no position has a label.
    """
    device = next(model.parameters()).device
    n = min(limit, len(data)) if limit else len(data)
    was_training = model.training
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64)
    for start in range(0, n, batch_size):
        batch = data.batch(range(start, min(start + batch_size, n))).to(device)
        logits = logits_of(model, batch.input_ids, batch.attention_mask).float().flatten(0, -2)
        labels = batch.labels.flatten()
        nll = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
        hits = (logits.argmax(-1) == labels).sum()
        totals += torch.stack([nll, hits, (labels != IGNORE).sum()]).cpu()
    model.train(was_training)
    nll_sum, right, tokens = totals.tolist()
    if tokens == 0:
        raise ValueError("validation: expected at least one labelled position, got none; add files")
    mean = nll_sum / tokens
    return Evaluation(math.exp(min(mean, 700.0)), mean, right / tokens, int(tokens))
