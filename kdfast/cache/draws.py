"""How often each entry of sampled targets was drawn, from its importance weight."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from kdfast.cache.format import CacheError
from kdfast.ops.targets import TopKTargets

_WHOLE = 0.05  # how far from a whole number a draw count may come out, in float32 weights
_NORMAL = float(np.finfo(np.float32).tiny)  # a weight below it has lost its digits
_NOTHING = 2.0**-24  # a mass that float32 does not tell from none beside 1


def draws_of(
    targets: TopKTargets, samples: int, temperature: float, exact: int, counted: np.ndarray | None = None
) -> np.ndarray:
    """Draw counts int32 `[L, k]`, 0 in exact entries and empty slots. Inverts, for entries drawn from r at `temperature`,

        weights = draws / samples * exp(logprobs) / r

    where r is the teacher's distribution (exact = 0), or that outside the first `exact` slots, renormalised. Entries so rare
    that float32 holds no weight of theirs share evenly the draws that the others leave. A row whose exact entries hold
    everything has nothing to draw from: all draws are put on its likeliest entry, whose weight is its probability either way.

    Args:
        counted: bool `[L]`, False in rows that may say anything: one without such weights has no draws. None: all count.

    Raises:
        CacheError: the weights are not those of `samples` draws; names the row.
    """
    if targets.weights is None:
        raise CacheError("targets.weights: expected the weights of drawn entries, got None")
    ids, logp, weights = _array(targets.ids), _array(targets.logprobs), _array(targets.weights)
    column = targets.column(temperature)
    log_z, log_tail = _array(targets.log_z)[:, column, None], _array(targets.log_tail)[:, column, None]
    there = (ids >= 0) & (logp > -np.inf)
    drawn = there.copy()
    drawn[:, :exact] = False
    with np.errstate(all="ignore"):  # rows that do not count may hold anything
        log_r = np.where(drawn, logp / temperature - log_z, -np.inf)
        if exact:
            log_r = log_r - np.logaddexp(np.logaddexp.reduce(log_r, -1, keepdims=True), log_tail)
        log_one = np.where(drawn, logp - log_r - np.log(samples), 0)  # log of the weight of a single draw
        told = drawn & (log_one >= np.log(_NORMAL))
        lost = drawn & ~told & (weights >= 0) & (weights <= samples * _NORMAL)
        counts = np.where(told, np.exp(np.log(weights) - log_one), 0)
        whole = np.rint(counts)
        sound = (np.abs(counts - whole) <= _WHOLE * np.maximum(whole, 1)).all(-1)
        left, sharing = samples - whole.sum(-1, keepdims=True), lost.sum(-1, keepdims=True)
        share = left // np.maximum(sharing, 1) + (lost.cumsum(-1) <= left % np.maximum(sharing, 1))
    whole = np.where(lost, share, whole)
    nothing = there.any(-1) & ~drawn.any(-1) & (exact > 0) & (np.exp(log_tail[:, 0]) <= _NOTHING)
    likeliest = np.where(there, logp, -np.inf).argmax(-1)
    whole[nothing, likeliest[nothing]] = samples
    sound &= ~(drawn & ~(told | lost)).any(-1) & ~((told | lost) & ~(whole >= 1)).any(-1)
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
