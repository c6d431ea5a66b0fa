"""Peers of `kd_loss`: PyTorch in the spellings people use, torch.compile, Liger's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast

from .cases import LogitsCase, Objective, Outcome
from .peer import Peer, Run, needs_gpu, options, trained, wide
from .plain import from_logs, from_probs


def _mean(kl: Tensor, student: Tensor, labels: Tensor, o: Objective) -> Tensor:
    """Soft loss per row and hard loss, over the rows that count."""
    keep = labels != o.ignore_index
    soft = o.soft_weight * o.temperature**2 * (kl * keep).sum() / keep.sum()
    return soft + o.hard_weight * F.cross_entropy(student, labels, ignore_index=o.ignore_index)


def eager_log_target(s: Tensor, t: Tensor, labels: Tensor, o: Objective) -> Tensor:
    s, t = wide(s), wide(t)
    log_q, log_p = F.log_softmax(s / o.temperature, -1), F.log_softmax(t / o.temperature, -1)
    return _mean(from_logs(o, log_p, log_q), s, labels, o)


def eager_probs(s: Tensor, t: Tensor, labels: Tensor, o: Objective) -> Tensor:
    s, t = wide(s), wide(t)
    log_q, p = F.log_softmax(s / o.temperature, -1), F.softmax(t / o.temperature, -1)
    return _mean(F.kl_div(log_q, p, reduction="none").sum(-1), s, labels, o)


def eager_probs_of_logs(s: Tensor, t: Tensor, labels: Tensor, o: Objective) -> Tensor:
    s, t = wide(s), wide(t)
    log_q, log_p = F.log_softmax(s / o.temperature, -1), F.log_softmax(t / o.temperature, -1)
    return _mean(from_probs(o, log_p, log_q), s, labels, o)


Plain = Callable[[Tensor, Tensor, Tensor, Objective], Tensor]
SPELLINGS: tuple[tuple[str, Plain], ...] = (("log_target", eager_log_target), ("probs", eager_probs))


def on_logits(function: Plain) -> Run:
    return trained(lambda c: function(c.student, c.teacher, c.labels, c.objective))


def logits_peers(device: str, *, compiled: tuple[str, ...] = ("log_target", "probs")) -> list[Peer]:
    """For `LogitsCase`. `compiled` names the spellings to time under torch.compile as well."""

    def ours(overwrite: bool) -> Run:
        return trained(
            lambda c: kdfast.kd_loss(c.student, c.teacher, c.labels, overwrite_logits=overwrite, **options(c.objective))
        )

    peers = [
        Peer("kdfast", ours(False), ours=True),
        Peer("kdfast overwrite_logits", ours(True), ours=True, fresh=True, note="no second N x V buffer"),
    ]
    if device == "cuda":
        peers.append(_cluster_peer(ours(False)))
    peers += [Peer(f"eager {name}", on_logits(f)) for name, f in SPELLINGS]
    peers += [
        Peer(f"compile {name}", on_logits(torch.compile(f, dynamic=False)), plain=on_logits(f))
        for name, f in SPELLINGS
        if name in compiled
    ]
    missing = needs_gpu(device, "liger_kernel", "liger-kernel")
    note = "KL from log-probabilities, T and CE by PyTorch around it"
    peers.append(Peer("Liger KLDIVLoss", trained(_liger_kl), missing=missing, note=f"{note}; no ignore_index"))
    peers.append(Peer("Liger JSD beta=0", trained(_liger_jsd), missing=missing, note=note))
    return peers


def _cluster_peer(ours: Run) -> Peer:
    """The unproven CUDA backend; it has no float64, where the default stands for it."""

    def run(case: Any) -> Outcome:
        with kdfast.use_backend("cuda"):
            return ours(case)

    reason = next(b.reason for b in kdfast.backends() if b.name == "cuda")
    return Peer("cluster kernel", run, missing=reason, note='use_backend("cuda"), unproven', ours=True, plain=ours)


def divergence_peers() -> list[Peer]:
    """For `LogitsCase` with any divergence; Liger's kernels know forward KL and JSD, on a GPU."""
    return [
        *(p for p in logits_peers("cpu", compiled=()) if p.ours),
        Peer("eager logs", on_logits(eager_log_target), note="KLs by F.kl_div, mixtures by logaddexp"),
        Peer("eager probs", on_logits(eager_probs_of_logs), note="probabilities formed"),
    ]


def _liger_kl(case: LogitsCase) -> Tensor:
    from liger_kernel.transformers import LigerKLDIVLoss

    o, s, t = case.objective, wide(case.student), wide(case.teacher)
    hard = F.cross_entropy(s, case.labels, ignore_index=o.ignore_index)
    if case.ignored:  # it knows no mask, so its user drops rows first
        keep = case.labels != o.ignore_index
        s, t = s[keep], t[keep]
    log_q, log_p = F.log_softmax(s / o.temperature, -1), F.log_softmax(t / o.temperature, -1)
    soft = LigerKLDIVLoss(reduction="batchmean", log_target=True)(log_q, log_p)
    return o.soft_weight * o.temperature**2 * soft + o.hard_weight * hard


def _liger_jsd(case: LogitsCase) -> Tensor:
    from liger_kernel.transformers import LigerJSD

    o, s, t = case.objective, wide(case.student), wide(case.teacher)
    log_q, log_p = F.log_softmax(s / o.temperature, -1), F.log_softmax(t / o.temperature, -1)
    # beta 0 is KL(teacher || student) there, without T^2; the first argument is the student.
    soft = LigerJSD(beta=0.0, ignore_index=o.ignore_index)(log_q, log_p, case.labels)
    return o.soft_weight * o.temperature**2 * soft + o.hard_weight * F.cross_entropy(
        s, case.labels, ignore_index=o.ignore_index
    )
