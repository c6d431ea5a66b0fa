"""How often each entry of sampled targets was drawn, from its importance weight."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from kdfast.cache.format import CacheError
from kdfast.ops.targets import TopKTargets

_WHOLE = 0.05  # how far from a whole number a draw count may come out, in float32 weights
_HELD = 2.0**-140  # the least weight with as many digits as that takes
_LEAST = -87.0  # the least p / r (before r is renormalised) that a decoder computes, as a logarithm
_RARE = 2.0**-120  # no weight of an entry that is too rare is above it
_NOTHING = 2.0**-13  # mass outside the exact entries that is none: no level would show it in their weights


def without_rare(targets: TopKTargets, samples: int, temperature: float, exact: int) -> TopKTargets:
    """The targets without drawn entries so rare that float32 holds no weight of theirs; their mass goes to the tails.

    Args:
        samples, temperature, exact: as in `draws_of`.
    """
    ids, logp, weights = _array(targets.ids), _array(targets.logprobs), _weights(targets)
    with np.errstate(all="ignore"):  # rows that do not count may hold anything
        drawn, log_one, log_ratio = _draws(targets, ids, logp, samples, temperature, exact)
        rare = (log_one < np.log(_HELD)) | (log_ratio < _LEAST)
        rare &= drawn & (weights >= 0) & (weights <= _RARE)
    if not rare.any():
        return targets
    gone = torch.from_numpy(rare).to(targets.ids.device)
    lost = torch.where(gone, targets.logprobs.double(), -torch.inf)
    at = torch.tensor(targets.temperatures, dtype=torch.float64, device=lost.device)
    mass = (lost[:, None] / at[:, None]).logsumexp(-1) - targets.log_z
    return dataclasses.replace(
        targets,
        ids=targets.ids.masked_fill(gone, -1),
        logprobs=targets.logprobs.masked_fill(gone, -torch.inf),
        log_tail=torch.logaddexp(targets.log_tail.double(), mass).to(targets.log_tail.dtype),
        weights=None if targets.weights is None else targets.weights.masked_fill(gone, 0),
    )


def draws_of(
    targets: TopKTargets, samples: int, temperature: float, exact: int, counted: np.ndarray | None = None
) -> np.ndarray:
    """Draw counts int32 `[L, k]`, 0 in exact entries and empty slots. Inverts, for entries drawn from r at `temperature`,

        weights = draws / samples * exp(logprobs) / r

    where r is the teacher's distribution (exact = 0), or that outside the first `exact` slots, renormalised. A row whose exact
    entries hold everything has nothing to draw from: all draws go to its likeliest entry, whose weight then is its probability.

    Args:
        targets: those of `without_rare`.
        counted: bool `[L]`, False in rows that may say anything: one without such weights has no draws. None: all count.

    Raises:
        CacheError: the weights are not those of `samples` draws; names the row.
    """
    ids, logp, weights = _array(targets.ids), _array(targets.logprobs), _weights(targets)
    there = (ids >= 0) & (logp > -np.inf)
    with np.errstate(all="ignore"):  # rows that do not count may hold anything
        drawn, log_one, _ = _draws(targets, ids, logp, samples, temperature, exact)
        counts = np.where(drawn, np.exp(np.log(weights) - log_one), 0)
        left = np.exp(_array(targets.log_tail)[:, targets.column(temperature)])
    whole = np.rint(counts)
    nothing = there.any(-1) & ~drawn.any(-1) & (exact > 0) & (left <= _NOTHING)
    whole[nothing, np.where(there, logp, -np.inf).argmax(-1)[nothing]] = samples
    sound = (np.abs(counts - whole) <= _WHOLE * np.maximum(whole, 1)).all(-1) | nothing
    sound &= ~(drawn & ~(whole >= 1)).any(-1) & (~there.any(-1) | (whole.sum(-1) == samples))
    wrong = ~sound if counted is None else ~sound & counted
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        hint = "; ids too rare for a weight in float32 are none, draw at a lower temperature" if temperature > 1 else ""
        raise CacheError(
            f"targets.weights: expected those of {samples} draws a row at temperature {temperature:g}, got"
            f" {whole[row].sum():g} draws ({counts[row].sum():.3f} before rounding) in row {row}{hint}"
        )
    return np.where(sound[:, None], whole, 0).astype(np.int32)


def _draws(
    targets: TopKTargets, ids: np.ndarray, logp: np.ndarray, samples: int, temperature: float, exact: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which entries were drawn; of each (0 of the others) the log of the weight that a single draw gives it, and log p / r."""
    column = targets.column(temperature)
    drawn = (ids >= 0) & (logp > -np.inf)
    drawn[:, :exact] = False
    log_r = np.where(drawn, logp / temperature - _array(targets.log_z)[:, column, None], -np.inf)
    log_ratio = np.where(drawn, logp - log_r, 0)
    log_rest = np.logaddexp(np.logaddexp.reduce(log_r, -1), _array(targets.log_tail)[:, column])[:, None] if exact else 0.0
    return drawn, np.where(drawn, log_ratio + log_rest - np.log(samples), 0), log_ratio


def _weights(targets: TopKTargets) -> np.ndarray:
    if targets.weights is None:
        raise CacheError("targets.weights: expected the weights of drawn entries, got None")
    return _array(targets.weights)


def _array(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()
