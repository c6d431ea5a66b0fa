"""Peers of the capture of top-k targets, and of the loss from them."""

from __future__ import annotations

import torch
from torch import Tensor

import kdfast

from .cases import CaptureCase, Outcome, TopKCase, ghost_sum
from .peer import Peer, Run, options, topk_options, trained, wide
from .peers_logits import eager_log_target, on_logits


def capture_peers() -> list[Peer]:
    """For `CaptureCase`."""
    note = "floor: no log_tail"
    return [
        Peer("kdfast", _capture_ours, ours=True),
        Peer("torch.topk + logsumexps", _capture_torch, comparable=False, note=note),
        Peer("the same with log_tail", _capture_torch_tail),
    ]


def _capture_ours(c: CaptureCase) -> Outcome:
    targets = kdfast.topk_targets(c.logits, c.k, temperatures=c.temperatures)
    return targets.logprobs.mean(), (targets.logprobs, targets.log_z, targets.log_tail)


@torch.no_grad()
def _capture_torch(c: CaptureCase) -> Outcome:
    logits = wide(c.logits)
    top, _ = logits.topk(c.k)
    lse = logits.logsumexp(-1)
    log_z = torch.stack([(lse if t == 1 else (logits / t).logsumexp(-1)) - lse / t for t in c.temperatures], -1)
    logprobs = top - lse[:, None]
    return logprobs.mean(), (logprobs, log_z)


@torch.no_grad()
def _capture_torch_tail(c: CaptureCase) -> Outcome:
    logits = wide(c.logits)
    top, ids = logits.topk(c.k)
    rest = logits.scatter(-1, ids, -torch.inf)
    at = [((logits / t).logsumexp(-1), (rest / t).logsumexp(-1)) for t in c.temperatures]
    lse = logits.logsumexp(-1)
    log_z = torch.stack([z - lse / t for (z, _), t in zip(at, c.temperatures, strict=True)], -1)
    logprobs = top - lse[:, None]
    return logprobs.mean(), (logprobs, log_z, torch.stack([tail - z for z, tail in at], -1))


def topk_peers(*, compiled: bool = True) -> list[Peer]:
    """For `TopKCase`: the ghost-bucket loss, and the dense losses it stands in for."""

    def ours(overwrite: bool) -> Run:
        return trained(
            lambda c: kdfast.topk_kd_loss(
                c.student, c.targets, c.labels, overwrite_logits=overwrite, **topk_options(c.objective)
            )
        )

    def dense(c: TopKCase) -> Tensor:
        return kdfast.kd_loss(c.student, c.teacher, c.labels, **options(c.objective))

    peers = [
        Peer("kdfast", ours(False), ours=True),
        Peer("kdfast overwrite_logits", ours(True), ours=True, fresh=True, note="no second N x V buffer"),
        Peer("eager ghost", trained(_eager_ghost)),
    ]
    if compiled:
        run = trained(torch.compile(_eager_ghost, dynamic=False))
        peers.append(Peer("compile ghost", run, plain=trained(_eager_ghost)))
    other = "another loss: dense teacher"
    peers.append(Peer("kdfast dense kd_loss", trained(dense), comparable=False, modelled=False, note=other))
    peers.append(Peer("eager dense log_target", on_logits(eager_log_target), comparable=False, modelled=False, note=other))
    return peers


def _eager_ghost(c: TopKCase) -> Tensor:
    count = (c.labels != c.objective.ignore_index).sum()
    return ghost_sum(wide(c.student), c.held, c.labels, c.objective) / count
