"""Peers of `linear_kd_loss`."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast

from .cases import LinearCase, Outcome
from .peer import Peer, Run, needs_gpu, not_installed, options, ours_through_heads, trained
from .peers_logits import Plain, eager_log_target


def linear_peers(device: str, *, compiled: bool = True, half: bool = False) -> list[Peer]:
    """For `LinearCase`; `compiled=False` leaves out what needs torch.compile, `half` adds logits rounded to bfloat16."""
    liger = not_installed("liger_kernel", "liger-kernel")
    peers = ours_through_heads(_linear_ours, half)
    peers += [
        Peer("four GEMMs alone", FourGemms(), comparable=False, note="floor: no loss, outputs preallocated"),
        Peer("eager log_target", _on_hidden(eager_log_target), note="logits materialised"),
        Peer("Liger FusedLinearJSD", trained(functools.partial(_liger_linear, compiled=False)), missing=liger),
    ]
    if compiled:
        plain = trained(functools.partial(_liger_linear, compiled=False))
        run = trained(functools.partial(_liger_linear, compiled=True))
        peers.append(Peer("Liger FusedLinearJSD compiled", run, missing=liger, plain=plain))
        run = _on_hidden(torch.compile(eager_log_target, dynamic=False))
        peers.append(
            Peer("compile log_target", run, note="logits materialised, loss compiled", plain=_on_hidden(eager_log_target))
        )
    note = "soft and hard loss are two passes, each with its own logits"
    missing = needs_gpu(device, "fla", "fla-core")
    peers.append(Peer("fla fused_kl_div", trained(_fla), missing=missing, modelled=False, note=note))
    note = "floor: hard loss only, no teacher"
    peers.append(
        Peer(
            "F.linear_cross_entropy", trained(torch_linear_ce), missing=no_linear_ce(), comparable=False, modelled=False,
            note=note,
        )
    )  # fmt: skip
    return peers


def _linear_ours(c: LinearCase, logits_dtype: torch.dtype = torch.float32) -> Tensor:
    return kdfast.linear_kd_loss(
        c.student_hidden, c.student_weight, c.teacher_hidden, c.teacher_weight, c.labels, logits_dtype=logits_dtype,
        **options(c.objective),
    )  # fmt: skip


def _on_hidden(function: Plain) -> Run:
    return trained(
        lambda c: function(
            c.student_hidden @ c.student_weight.t(), c.teacher_hidden @ c.teacher_weight.t(), c.labels, c.objective
        )
    )


def _liger_linear(c: LinearCase, compiled: bool) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    o = c.objective
    # beta 0 is KL(teacher || student) there; it applies T to the soft loss but not T^2, which goes into its weight.
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=o.hard_weight, weight_soft_loss=o.soft_weight * o.temperature**2, beta=0.0,
        ignore_index=o.ignore_index, temperature=o.temperature, compiled=compiled,
    )  # fmt: skip
    return loss(c.student_hidden, c.student_weight, c.teacher_hidden, c.teacher_weight, c.labels)


def _fla(c: LinearCase) -> Tensor:
    from fla.modules.fused_kl_div import fused_kl_div_loss
    from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss

    o, sides = c.objective, (c.student_hidden, c.teacher_hidden, c.student_weight, c.teacher_weight)
    # Its kernels have no float64: the small case is checked in their float32.
    hidden, teacher, weight, teacher_weight = (x.float() if x.dtype == torch.float64 else x for x in sides)
    hard = fused_linear_cross_entropy_loss(hidden, c.labels, weight, ignore_index=o.ignore_index)
    if c.ignored:  # its soft loss knows no mask, so its user drops rows first
        keep = c.labels != o.ignore_index
        hidden, teacher = hidden[keep], teacher[keep]
    # It has no temperature: logits of divided hidden states are divided logits.
    soft = fused_kl_div_loss(hidden / o.temperature, teacher / o.temperature, weight, teacher_weight)
    return o.soft_weight * o.temperature**2 * soft + o.hard_weight * hard


def no_linear_ce() -> str:
    """ "" where torch has `F.linear_cross_entropy`."""
    return "" if hasattr(F, "linear_cross_entropy") else "needs torch >= 2.13"


def torch_linear_ce(c: LinearCase) -> Tensor:
    return F.linear_cross_entropy(c.student_hidden, c.student_weight, c.labels, ignore_index=c.objective.ignore_index)


class FourGemms:
    """Student logits, teacher logits, dHidden and dWeight into buffers that stand already: the arithmetic floor."""

    def __init__(self) -> None:
        self._shape: tuple[int, ...] = ()
        self._out: tuple[Tensor, ...] = ()

    @torch.no_grad()
    def __call__(self, c: LinearCase) -> Outcome:
        n, v = c.student_hidden.shape[0], c.student_weight.shape[0]
        if self._shape != (n, v):
            new = functools.partial(c.student_hidden.new_empty, dtype=c.student_hidden.dtype)
            self._shape = (n, v)
            self._out = new((n, v)), new((n, v)), torch.empty_like(c.student_hidden), torch.empty_like(c.student_weight)
        student, teacher, hidden, weight = self._out
        torch.mm(c.student_hidden, c.student_weight.t(), out=student)
        torch.mm(c.teacher_hidden, c.teacher_weight.t(), out=teacher)
        torch.mm(student, c.student_weight, out=hidden)
        torch.mm(student.t(), c.student_hidden, out=weight)
        return student[0, 0], (hidden, weight)
