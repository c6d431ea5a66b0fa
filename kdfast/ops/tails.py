"""What sparse targets leave open: from `TopKTargets` and a `tail` to the rows that the kernels of `topk` compare with.

Every tail comes down to k log-probabilities and the log mass of all other ids, which sum to 1, a factor `mass` of the row's
soft term, and whether the other ids' mass lies evenly on them (`spread`) or as the student's own does:

    ghost        entries and tail as captured
    renormalize  entries divided by their sum, no tail
    uniform      entries and tail as captured, spread
    none         t = weights * p_T / p; entries t / t.sum(), no tail, mass t.sum(): sum t * (log t - log q) is
                 mass * KL(t / mass || q) + mass * log(mass)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdfast.ops import rows
from kdfast.ops.codec import EncodedTargets
from kdfast.ops.targets import TopKTargets
from kdfast.options import MASS_ERROR, PARTS, RowOptions

TAILS = ("ghost", "renormalize", "uniform", "none")
#: Divergences whose sum over a bucket is that of the bucket's masses, or that have a sum over an even tail.
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


def as_list(targets: Any) -> list[TopKTargets]:
    """One or several targets as a list, those in code decoded.

    Raises:
        ValueError: something else than `TopKTargets` or `EncodedTargets`, or teachers of different vocabularies.
    """
    several = list(targets) if isinstance(targets, Sequence) else [targets]
    several = [t.decode() if isinstance(t, EncodedTargets) else t for t in several]
    for i, t in enumerate(several):
        name = rows.member("targets", i, len(several))
        if not isinstance(t, TopKTargets):
            got = type(t).__name__
            raise ValueError(f"{name}: expected TopKTargets, got {got}; topk_targets makes them, a cache holds them")
        if t.vocab_size != several[0].vocab_size:
            raise ValueError(f"{name}: expected vocab_size {several[0].vocab_size} like targets[0], got {t.vocab_size}")
    return several


def check(targets: Sequence[TopKTargets], tail: str, options: RowOptions) -> None:
    """Raises where a tail and a divergence, or drawn entries and a tail, have no loss together."""
    rows.check_choice("tail", tail, TAILS)
    rows.check_choice("divergence", options.divergence, DIVERGENCES)
    if tail == "renormalize" and options.kind == "reverse_kl":
        raise ValueError(
            f"divergence: {options.divergence} (beta {options.beta:g}) with tail 'renormalize' is infinite: the student has"
            " mass where a renormalized teacher has none; use tail 'ghost' or 'uniform'"
        )
    if tail == "none" and options.kind != "forward_kl":
        raise ValueError(
            f"divergence: expected forward_kl with tail 'none', whose targets need not sum to 1, got {options.divergence}"
        )
    drawn = [i for i, t in enumerate(targets) if t.weights is not None]
    if drawn and tail in ("ghost", "uniform"):
        raise ValueError(
            f"tail: expected 'none' (unbiased) or 'renormalize' because {rows.member('targets', drawn[0], len(targets))} holds"
            f" drawn entries (weights), whose unselected ids are already stood for, got {tail!r}"
        )


def check_row_inputs(
    targets: Sequence[TopKTargets], lead: torch.Size, device: torch.device, student: str, vocab: int, head: str | None = None
) -> None:
    """Raises unless the targets have a row for each of the student's and its vocabulary holds all their ids.

    `head` is the argument that says how large the vocabulary is, where that is not `student`.
    """
    for i, t in enumerate(targets):
        name = rows.member("targets", i, len(targets))
        rows.check_lead(name, t.ids.shape[:-1], lead, student)
        if t.ids.device != device:
            raise ValueError(f"{name}: expected device {device} like {student}, got {t.ids.device}")
    if vocab < targets[0].vocab_size:
        raise ValueError(
            f"{head or student}: expected a vocabulary of at least {targets[0].vocab_size} like the targets', got {vocab}"
        )


def kernel_rows(
    targets: Sequence[TopKTargets], tail: str, options: RowOptions, student: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """(ids [N, K], log_p [N, M, K], log_tail [N, M], mass [N, M]) of M targets, as `kdfast.backends` describes them.

    Several targets stand side by side in one list of K slots; a slot is -inf in the targets it does not belong to. All but ids
    are float32, or float64 beside a float64 student.
    """
    dtype = torch.float64 if student == torch.float64 else torch.float32
    parts = [_resolved(t, tail, options.temperature) for t in targets]
    ids = torch.cat([part[0] for part in parts], 1)
    log_p = torch.full((ids.shape[0], len(parts), ids.shape[1]), -torch.inf, dtype=dtype, device=ids.device)
    begin = 0
    for m, part in enumerate(parts):
        end = begin + part[0].shape[1]
        log_p[:, m, begin:end] = part[1]
        begin = end
    log_tail, mass = (torch.stack([part[i] for part in parts], 1).to(dtype) for i in (2, 3))
    return ids, log_p, log_tail, mass


def _resolved(t: TopKTargets, tail: str, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    column = t.column(temperature)
    ids, logprobs = t.ids.reshape(-1, t.k), t.logprobs.reshape(-1, t.k)
    log_p = logprobs / temperature - t.log_z[..., column].reshape(-1, 1)
    log_tail = t.log_tail[..., column].reshape(-1)
    mass = torch.ones_like(log_tail)
    if tail in ("ghost", "uniform"):
        return ids, log_p, log_tail, mass
    log_p = torch.where(ids >= 0, log_p, -torch.inf)
    total = log_p.logsumexp(-1)
    # More than all of a distribution is no part of one. Left as it is, it does not sum to 1, which the kernels look at.
    excess = total > math.log1p(MASS_ERROR)
    if t.weights is not None:
        drawn = log_p + (t.weights.reshape(-1, t.k).log() - logprobs)
        log_p = torch.where(excess[:, None] | (ids < 0), log_p, drawn)
        total = log_p.logsumexp(-1)
    if tail == "none":
        # Without entries there is no soft loss; without a tail either there is no distribution, which a mass of 1 shows.
        mass = torch.where(total.isneginf() & log_tail.isneginf(), mass, total.exp())
    else:
        mass = torch.where(total.isneginf(), torch.nan, mass)  # nothing to renormalize
    log_p = log_p - torch.where(total.isneginf() | excess, 0, total)[:, None]
    return ids, log_p, torch.full_like(log_tail, -torch.inf), mass


def check_ids(targets: Sequence[Tensor], row: int, vocab: int) -> None:
    """Raises when the target is what makes a row's loss NaN."""
    ids, log_p, log_tail, mass = (x[row] for x in targets)
    if bool((ids >= vocab).any()):
        raise ValueError(f"targets: row {row} lists id {int(ids.max())}, expected ids < {vocab} (the targets' vocab_size)")
    if bool((log_p.isnan() & (ids >= 0)).any() | log_tail.isnan().any()):
        raise ValueError(f"targets: row {row} holds NaN, expected log-probabilities <= 0 and weights >= 0")
    if bool(mass.isnan().any()):
        raise ValueError(f"targets: row {row} has no entries, expected at least one with tail 'renormalize'")
    total = torch.where(ids >= 0, log_p.exp(), 0).sum(-1) + log_tail.exp()
    wrong = (mass != 0) & ~((total - 1).abs() <= MASS_ERROR)
    if not bool(wrong.any()):
        return
    m = int(wrong.nonzero()[0])
    name, found = rows.member("targets", m, len(mass)), float(total[m])
    if found == 0:
        raise ValueError(
            f"{name}: row {row} has neither entries nor a tail, expected a distribution; give it label ignore_index or token"
            " weight 0"
        )
    remedy = (
        "logprobs are logits.log_softmax(-1) over the whole vocabulary, not logits: topk_targets makes them"
        if found > 1
        else "log_tail is the log mass of all ids that are no entries; tail 'renormalize' does without it"
    )
    raise ValueError(f"{name}: row {row} has probabilities that sum to {found:.4g} with the tail, expected 1; {remedy}")


def label_logprobs(targets: TopKTargets | EncodedTargets, labels: Tensor) -> Tensor:
    """The teacher's log-probability of each label at T = 1, from its entry or its even share of the bucket.

    Args:
        targets: captured at T = 1 among others.
        labels: `[...]` like the targets' leading dimensions; negative labels give the bucket's share.
    """
    targets = targets.decode()
    share = targets.log_tail[..., targets.column(1.0)] - _unlisted(targets).log()
    hit = targets.ids == labels.clamp(min=0)[..., None]
    found = torch.where(hit, targets.logprobs, -torch.inf).amax(-1)
    return torch.where(hit.any(-1), found, share)


def _unlisted(targets: TopKTargets) -> Tensor:
    """How many ids share the bucket of each row, at least 1."""
    return (targets.vocab_size - (targets.ids >= 0).sum(-1)).clamp(min=1)


def _teacher_metrics(targets: TopKTargets, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """(teacher_nll, teacher_entropy) of each row at T = 1; NaN when T = 1 was not captured."""
    unknown = torch.full(targets.ids.shape[:-1], torch.nan, dtype=torch.float32, device=targets.ids.device).reshape(-1)
    if not any(abs(t - 1) <= 1e-6 for t in targets.temperatures):
        return unknown, unknown
    tail = targets.log_tail[..., targets.column(1.0)]
    share = tail - _unlisted(targets).log()
    entropy = torch.special.entr(targets.logprobs.exp()).sum(-1) - torch.where(tail.isneginf(), 0, tail.exp() * share)
    nll = torch.zeros_like(unknown) if labels is None else -label_logprobs(targets, labels.view(tail.shape)).reshape(-1)
    return nll, entropy.reshape(-1)


def with_teacher_metrics(
    parts: Tensor, targets: Sequence[TopKTargets], labels: Tensor | None, scale: Tensor, weights: Sequence[float]
) -> Tensor:
    """The kernel's parts with teacher_nll and teacher_entropy, weighted means over the targets, in rows that count."""
    metrics = [_teacher_metrics(t, labels) for t in targets]
    parts = parts.clone()
    for i, name in enumerate(("teacher_nll", "teacher_entropy")):
        mean = sum(w * m[i] for w, m in zip(weights, metrics, strict=True))
        parts[:, PARTS.index(name)] = torch.where(scale != 0, mean, 0)
    return parts
