"""Cross-entropy from hidden states and a head, no teacher: what is left of `linear_kd_loss` with hard labels alone.

kdfast has no function for it; a loss from captured targets at soft_weight 0 does the same three products, so that it can be
held against those who do nothing else.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast
from kdfast.ops.targets import TopKTargets

from .cases import LinearCase, Objective
from .contest import Contest
from .linear_topk import Products
from .peer import Peer, needs_gpu, ours_through_heads, trained, wide
from .peers_linear import no_linear_ce, torch_linear_ce
from .report import Model

_HARD = Objective(temperature=1.0, soft_weight=0.0, hard_weight=1.0)


@dataclass(frozen=True)
class HardCase(LinearCase):
    """A student's hidden states, head and labels; gradients of the first two. `targets` weigh nothing."""

    targets: TopKTargets | None = None

    @classmethod
    def of(cls, n: int, vocab: int, dim: int, dtype: torch.dtype, device: str, ignored: int, seed: int) -> HardCase:
        # A teacher of one column: `truth` multiplies its logits by 0.
        c = LinearCase.make(n, vocab, dim, 1, dtype, device=device, ignored=ignored, seed=seed, objective=_HARD)
        targets = kdfast.linear_topk_targets(c.teacher_hidden, c.teacher_weight, 1)
        sides = c.student_hidden, c.student_weight, c.teacher_hidden, c.teacher_weight
        return cls(*sides, c.labels, c.objective, c.ignored, targets)


def _ours(c: HardCase, logits_dtype: torch.dtype = torch.float32) -> Tensor:
    o = c.objective
    return kdfast.linear_topk_kd_loss(
        c.student_hidden, c.student_weight, c.targets, c.labels, soft_weight=0.0, hard_weight=1.0,
        ignore_index=o.ignore_index, logits_dtype=logits_dtype,
    )  # fmt: skip


def _eager(c: HardCase) -> Tensor:
    logits = wide(F.linear(c.student_hidden, c.student_weight))
    return F.cross_entropy(logits, c.labels, ignore_index=c.objective.ignore_index)


def _cut(c: HardCase) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(c.student_hidden, c.student_weight, c.labels, ignore_index=c.objective.ignore_index)


def _liger(c: HardCase) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(ignore_index=c.objective.ignore_index)
    return loss(c.student_weight, c.student_hidden, c.labels)


def hard_peers(device: str, *, compiled: bool = True, half: bool = False) -> list[Peer]:
    """For `HardCase`; `half`: the case is in bfloat16."""
    cut = needs_gpu(device, "cut_cross_entropy", "cut-cross-entropy")
    peers = ours_through_heads(_ours, half)
    peers += [
        Peer("three GEMMs alone", Products(), comparable=False, note="floor: no loss, outputs preallocated"),
        Peer("eager", trained(_eager), note="logits materialised"),
        Peer("F.linear_cross_entropy", trained(torch_linear_ce), missing=no_linear_ce()),
        Peer("Liger FusedLinearCE", trained(_liger), missing=needs_gpu(device, "liger_kernel", "liger-kernel")),
        # It takes half precision only; on a CPU it is F.cross_entropy under torch.compile, which is here as such.
        Peer("cut-cross-entropy", trained(_cut), missing=cut or ("" if half else "its backward takes half precision only"),
             note="gradients below its threshold dropped", plain=trained(_eager)),
    ]  # fmt: skip
    if compiled:
        run = trained(torch.compile(_eager, dynamic=False))
        peers.append(Peer("compile", run, note="logits materialised, loss compiled", plain=trained(_eager)))
    return peers


def contestants(
    n: int, vocab: int, dim: int, dtype: torch.dtype, device: str = "cpu", peers: list[Peer] | None = None
) -> Contest:
    """Everybody on `[n, dim]` hidden states and a `[vocab, dim]` head."""
    make = functools.partial(HardCase.of, n, vocab, dim, dtype, device, 0)
    small = functools.partial(HardCase.of, 7, 129, 8, torch.float64, device, 2, 0)
    worked = 6 * n * vocab * dim
    model = Model(flops=worked, text=f"6*N*V*D = {worked / 1e9:.4g} GFLOP (one forward product, two gradient products)")
    peers = hard_peers(device, half=dtype.itemsize < 4) if peers is None else peers
    return Contest("linear_hard", peers, make, small, model, dtype, f"N={n} V={vocab} D={dim}")
