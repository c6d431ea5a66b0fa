"""How often each entry of sampled targets was drawn, from its importance weight."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from kdfast.cache.format import CacheError
from kdfast.ops.targets import TopKTargets

_WHOLE = 0.05  # how far from a whole number a draw count may come out, in float32 weights


def draws_of(
    targets: TopKTargets, samples: int, temperature: float, exact: int, counted: np.ndarray | None = None
) -> np.ndarray:
    """Draw counts int32 `[L, k]`, 0 in exact entries and empty slots. Inverts, for entries drawn from r at `temperature`,

        weights = draws / samples * exp(logprobs) / r

    where r is the teacher's distribution (exact = 0), or that outside the first `exact` slots, renormalised.

    Args:
        counted: bool `[L]`, False in rows that may say anything: one without such weights has no draws. None: all count.

    Raises:
        CacheError: the weights are not those of `samples` draws; names the row.
    """
    if targets.weights is None:
        raise CacheError("targets.weights: expected the weights of drawn entries, got None")
    ids, logp, weights = _array(targets.ids), _array(targets.logprobs), _array(targets.weights)
    column = targets.column(temperature)
    there = (ids >= 0) & (logp > -np.inf)
    drawn = there.copy()
    drawn[:, :exact] = False
    with np.errstate(all="ignore"):  # rows that do not count may hold anything
        log_r = np.where(there, logp, 0) / temperature - _array(targets.log_z)[:, column, None]
        r = np.where(drawn, np.exp(log_r), 0)
        if exact:
            r = r / (r.sum(-1, keepdims=True) + np.exp(_array(targets.log_tail)[:, column, None]))
        counts = np.where(drawn, weights * samples * r / np.exp(logp), 0)
    whole = np.rint(counts)
    sound = (np.abs(counts - whole) <= _WHOLE * np.maximum(whole, 1)).all(-1) & ~(drawn & (whole < 1)).any(-1)
    sound &= ~there.any(-1) | (whole.sum(-1) == samples)
    wrong = ~sound if counted is None else ~sound & counted
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise CacheError(
            f"targets.weights: expected those of {samples} draws a row at temperature {temperature:g}, got"
            f" {whole[row].sum():g} draws ({counts[row].sum():.3f} before rounding) in row {row}"
        )
    return np.where(sound[:, None], whole, 0).astype(np.int32)


def _array(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()
