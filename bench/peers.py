"""Whom kdfast is compared with: PyTorch in the spellings people use, torch.compile, Liger. All imported, none pasted."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast

from .cases import CaptureCase, LinearCase, LogitsCase, Objective, Outcome, TopKCase, ghost_sum
from .measure import relative_error
from .plain import from_logs, from_probs

Run = Callable[[Any], Outcome]


@dataclass(frozen=True)
class Peer:
    """A contestant.

    Args:
        run: a case -> (loss, gradients): forward and backward.
        missing: why it cannot run here, with the remedy; "" when it can.
        note: what a reader must know beside its number.
        ours: kdfast; ratios are to the first of these.
        comparable: it computes the same result, so that it is checked against ours and can be ahead of us. A floor
            (less work than the job) is not.
        modelled: it does the work that the op's byte and FLOP model counts, so that a rate can be told from its time.
        fresh: it destroys the case's logits, so that each call gets its own copy (made outside the timing).
        plain: the same function before compilation, which `agree` runs to spare a second compilation.
    """

    name: str
    run: Run
    missing: str = ""
    note: str = ""
    ours: bool = False
    comparable: bool = True
    fresh: bool = False
    modelled: bool = True
    plain: Run | None = None


def trained(loss: Callable[[Any], Tensor]) -> Run:
    """Forward and backward of a loss: gradients of what the case wants, nothing accumulated."""

    def run(case: Any) -> Outcome:
        value = loss(case)
        return value.detach(), torch.autograd.grad(value, case.wanted)

    return run


def agree(peer: Peer, ours: Peer, case: Any, tolerance: float = 1e-5) -> str:
    """ "" when loss and gradients of both are within `tolerance` of each other on a float64 case, else what differs.

    Several peers accumulate in float32 whatever they are given, hence 1e-5; another objective (T^2, the sides, the
    divisor) is off by orders more.
    """
    theirs, mine = ((p.plain or p.run)(case.fresh() if p.fresh else case) for p in (peer, ours))
    return differs(theirs, mine, tolerance)


def differs(got: Outcome, truth: Outcome, tolerance: float) -> str:
    """ "" when loss and gradients are within the relative `tolerance`, else the sentence that says what is off."""
    for name, error in (("loss", relative_error(got[:1], truth[:1])), ("gradient", relative_error(got[1], truth[1]))):
        if not error <= tolerance:  # NaN is off too
            return f"disagrees: {name} off by {error:.2g} of its norm, allowed {tolerance:.0e}"
    return ""


def _options(o: Objective) -> dict[str, Any]:
    return dataclasses.asdict(o)


def _topk_options(o: Objective) -> dict[str, Any]:
    names = ("temperature", "soft_weight", "hard_weight", "ignore_index")
    return {name: getattr(o, name) for name in names}


def _mean(kl: Tensor, student: Tensor, labels: Tensor, o: Objective) -> Tensor:
    """Soft loss per row and hard loss, over the rows that count."""
    keep = labels != o.ignore_index
    soft = o.soft_weight * o.temperature**2 * (kl * keep).sum() / keep.sum()
    return soft + o.hard_weight * F.cross_entropy(student, labels, ignore_index=o.ignore_index)


def _wide(logits: Tensor) -> Tensor:
    """Half precision in float32, as Transformers' and TRL's losses do: in bfloat16 the gradient is off by percents."""
    return logits if logits.dtype == torch.float64 else logits.float()


def eager_log_target(s: Tensor, t: Tensor, labels: Tensor, o: Objective) -> Tensor:
    s, t = _wide(s), _wide(t)
    log_q, log_p = F.log_softmax(s / o.temperature, -1), F.log_softmax(t / o.temperature, -1)
    return _mean(from_logs(o, log_p, log_q), s, labels, o)


def eager_probs(s: Tensor, t: Tensor, labels: Tensor, o: Objective) -> Tensor:
    s, t = _wide(s), _wide(t)
    log_q, p = F.log_softmax(s / o.temperature, -1), F.softmax(t / o.temperature, -1)
    return _mean(F.kl_div(log_q, p, reduction="none").sum(-1), s, labels, o)


def eager_probs_of_logs(s: Tensor, t: Tensor, labels: Tensor, o: Objective) -> Tensor:
    s, t = _wide(s), _wide(t)
    log_q, log_p = F.log_softmax(s / o.temperature, -1), F.log_softmax(t / o.temperature, -1)
    return _mean(from_probs(o, log_p, log_q), s, labels, o)


Plain = Callable[[Tensor, Tensor, Tensor, Objective], Tensor]
SPELLINGS: tuple[tuple[str, Plain], ...] = (("log_target", eager_log_target), ("probs", eager_probs))


def _on_logits(function: Plain) -> Run:
    return trained(lambda c: function(c.student, c.teacher, c.labels, c.objective))


def logits_peers(device: str, *, compiled: tuple[str, ...] = ("log_target", "probs")) -> list[Peer]:
    """For `LogitsCase`. `compiled` names the spellings to time under torch.compile as well."""

    def ours(overwrite: bool) -> Run:
        return trained(
            lambda c: kdfast.kd_loss(c.student, c.teacher, c.labels, overwrite_logits=overwrite, **_options(c.objective))
        )

    peers = [
        Peer("kdfast", ours(False), ours=True),
        Peer("kdfast overwrite_logits", ours(True), ours=True, fresh=True, note="no second N x V buffer"),
    ]
    if device == "cuda":
        peers.append(_cluster_peer(ours(False)))
    peers += [Peer(f"eager {name}", _on_logits(f)) for name, f in SPELLINGS]
    peers += [
        Peer(f"compile {name}", _on_logits(torch.compile(f, dynamic=False)), plain=_on_logits(f))
        for name, f in SPELLINGS
        if name in compiled
    ]
    missing = liger_missing() or ("" if device == "cuda" else "its kernels are Triton and need a GPU")
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
        Peer("eager logs", _on_logits(eager_log_target), note="KLs by F.kl_div, mixtures by logaddexp"),
        Peer("eager probs", _on_logits(eager_probs_of_logs), note="probabilities formed"),
    ]


def liger_missing() -> str:
    found = importlib.util.find_spec("liger_kernel") is not None
    return "" if found else "liger-kernel is not installed: pip install liger-kernel"


def _liger_kl(case: LogitsCase) -> Tensor:
    from liger_kernel.transformers import LigerKLDIVLoss

    o, s, t = case.objective, _wide(case.student), _wide(case.teacher)
    hard = F.cross_entropy(s, case.labels, ignore_index=o.ignore_index)
    if case.ignored:  # it knows no mask, so its user drops rows first
        keep = case.labels != o.ignore_index
        s, t = s[keep], t[keep]
    log_q, log_p = F.log_softmax(s / o.temperature, -1), F.log_softmax(t / o.temperature, -1)
    soft = LigerKLDIVLoss(reduction="batchmean", log_target=True)(log_q, log_p)
    return o.soft_weight * o.temperature**2 * soft + o.hard_weight * hard


def _liger_jsd(case: LogitsCase) -> Tensor:
    from liger_kernel.transformers import LigerJSD

    o, s, t = case.objective, _wide(case.student), _wide(case.teacher)
    log_q, log_p = F.log_softmax(s / o.temperature, -1), F.log_softmax(t / o.temperature, -1)
    # beta 0 is KL(teacher || student) there, without T^2; the first argument is the student.
    soft = LigerJSD(beta=0.0, ignore_index=o.ignore_index)(log_q, log_p, case.labels)
    return o.soft_weight * o.temperature**2 * soft + o.hard_weight * F.cross_entropy(
        s, case.labels, ignore_index=o.ignore_index
    )


def linear_peers(device: str, *, compiled: bool = True, half: bool = False) -> list[Peer]:
    """For `LinearCase`; `compiled=False` leaves out what needs torch.compile, `half` adds logits rounded to bfloat16."""
    peers = [Peer("kdfast", trained(_linear_ours), ours=True, note="float32 logits" if half else "")]
    if half:
        run = trained(functools.partial(_linear_ours, logits_dtype=torch.bfloat16))
        peers.append(Peer("kdfast bfloat16 logits", run, ours=True, note="the precision of the others"))
    peers += [
        Peer("four GEMMs alone", FourGemms(), comparable=False, note="floor: no loss, outputs preallocated"),
        Peer("eager log_target", _on_hidden(eager_log_target), note="logits materialised"),
        Peer("Liger FusedLinearJSD", trained(functools.partial(_liger_linear, compiled=False)), missing=liger_missing()),
    ]
    if compiled:
        plain = trained(functools.partial(_liger_linear, compiled=False))
        run = trained(functools.partial(_liger_linear, compiled=True))
        peers.append(Peer("Liger FusedLinearJSD compiled", run, missing=liger_missing(), plain=plain))
        run = _on_hidden(torch.compile(eager_log_target, dynamic=False))
        peers.append(
            Peer("compile log_target", run, note="logits materialised, loss compiled", plain=_on_hidden(eager_log_target))
        )
    missing = "" if hasattr(F, "linear_cross_entropy") else "needs torch >= 2.13"
    note = "floor: hard loss only, no teacher"
    peers.append(
        Peer("F.linear_cross_entropy", trained(_torch_linear_ce), missing=missing, comparable=False, modelled=False, note=note)
    )
    return peers


def _linear_ours(c: LinearCase, logits_dtype: torch.dtype = torch.float32) -> Tensor:
    return kdfast.linear_kd_loss(
        c.student_hidden, c.student_weight, c.teacher_hidden, c.teacher_weight, c.labels, logits_dtype=logits_dtype,
        **_options(c.objective),
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


def _torch_linear_ce(c: LinearCase) -> Tensor:
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
    logits = _wide(c.logits)
    top, _ = logits.topk(c.k)
    lse = logits.logsumexp(-1)
    log_z = torch.stack([(lse if t == 1 else (logits / t).logsumexp(-1)) - lse / t for t in c.temperatures], -1)
    logprobs = top - lse[:, None]
    return logprobs.mean(), (logprobs, log_z)


@torch.no_grad()
def _capture_torch_tail(c: CaptureCase) -> Outcome:
    logits = _wide(c.logits)
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
                c.student, c.targets, c.labels, overwrite_logits=overwrite, **_topk_options(c.objective)
            )
        )

    def dense(c: TopKCase) -> Tensor:
        return kdfast.kd_loss(c.student, c.teacher, c.labels, **_options(c.objective))

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
    peers.append(Peer("eager dense log_target", _on_logits(eager_log_target), comparable=False, modelled=False, note=other))
    return peers


def _eager_ghost(c: TopKCase) -> Tensor:
    count = (c.labels != c.objective.ignore_index).sum()
    return ghost_sum(_wide(c.student), c.held, c.labels, c.objective) / count
