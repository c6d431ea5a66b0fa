"""The linear forms of capture and loss: their cases, and the products that are their floor."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

import kdfast
from kdfast.ops.targets import TopKTargets

from .cases import CaptureCase, LinearCase, Outcome, ghost_sum
from .contest import Contest
from .peers import Peer, capture_peers, trained
from .report import Model


@dataclass(frozen=True)
class LinearCaptureCase:
    """Teacher's hidden states `[N, D]` and head `[V, D]` to reduce to k entries and log-sum-exps; outcome as `CaptureCase`."""

    hidden: Tensor
    weight: Tensor
    k: int

    @classmethod
    def make(cls, n: int, vocab: int, dim: int, k: int, dtype: torch.dtype, device: str, seed: int = 0) -> LinearCaptureCase:
        case = LinearCase.make(n, vocab, 1, dim, dtype, device=device, seed=seed)
        return cls(case.teacher_hidden, case.teacher_weight, k)

    def on_logits(self, dtype: torch.dtype | None = None) -> CaptureCase:
        """The same job with the logits materialised."""
        dtype = dtype or self.weight.dtype
        return CaptureCase(self.hidden.to(dtype) @ self.weight.to(dtype).t(), self.k)

    @property
    def shape(self) -> str:
        return f"{self.on_logits().shape} D={self.hidden.shape[1]}"

    def comparable(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return grads

    def truth(self) -> Outcome:
        return self.on_logits(torch.float64).truth()


@dataclass(frozen=True)
class LinearTopKCase(LinearCase):
    """A student's hidden states and head against captured targets; gradients of both."""

    targets: TopKTargets | None = None

    @classmethod
    def captured(cls, case: LinearCase, k: int) -> LinearTopKCase:
        """The case with its teacher reduced to k entries and a ghost bucket."""
        teacher = kdfast.linear_topk_targets(case.teacher_hidden, case.teacher_weight, k, temperatures=(1.0, 2.0))
        fields = (case.student_hidden, case.student_weight, case.teacher_hidden, case.teacher_weight, case.labels)
        return cls(*fields, case.objective, case.ignored, teacher)

    @property
    def held(self) -> TopKTargets:
        """The targets, which a case for this loss always has."""
        if self.targets is None:
            raise ValueError("LinearTopKCase: expected targets, got None; make it with LinearTopKCase.captured")
        return self.targets

    def loss(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Plain PyTorch in the dtype of the head, logits in float32 or wider."""
        logits = hidden @ weight.t()
        logits = logits if logits.dtype == torch.float64 else logits.float()
        count = (self.labels != self.objective.ignore_index).sum()
        return ghost_sum(logits, self.held, self.labels, self.objective) / count

    def truth(self) -> Outcome:
        hidden, weight = (x.detach().double().requires_grad_() for x in self.wanted)
        loss = self.loss(hidden, weight)
        return loss.detach(), torch.autograd.grad(loss, (hidden, weight))


class Products:
    """The products alone, into buffers that stand already: logits, and for a loss dHidden and dWeight."""

    def __init__(self) -> None:
        self._out: tuple[Tensor, ...] = ()

    @torch.no_grad()
    def __call__(self, c: LinearCaptureCase | LinearTopKCase) -> Outcome:
        hidden, weight = (c.hidden, c.weight) if isinstance(c, LinearCaptureCase) else c.wanted
        shape = hidden.shape[0], weight.shape[0]
        if not self._out or self._out[0].shape != shape:
            self._out = hidden.new_empty(shape), torch.empty_like(hidden), torch.empty_like(weight)
        logits, of_hidden, of_weight = self._out
        torch.mm(hidden, weight.t(), out=logits)
        if isinstance(c, LinearCaptureCase):
            return logits[0, 0], (logits[0],)
        torch.mm(logits, weight, out=of_hidden)
        torch.mm(logits.t(), hidden, out=of_weight)
        return logits[0, 0], (of_hidden, of_weight)


def _capture_ours(c: LinearCaptureCase) -> Outcome:
    t = kdfast.linear_topk_targets(c.hidden, c.weight, c.k, temperatures=(1.0, 2.0))
    return t.logprobs.mean(), (t.logprobs, t.log_z, t.log_tail)


def _loss_ours(c: LinearTopKCase) -> Tensor:
    o = c.objective
    return kdfast.linear_topk_kd_loss(
        c.student_hidden, c.student_weight, c.held, c.labels, temperature=o.temperature, soft_weight=o.soft_weight,
        hard_weight=o.hard_weight, ignore_index=o.ignore_index,
    )  # fmt: skip


def capture_contestants(n: int, vocab: int, dim: int, k: int, dtype: torch.dtype, device: str = "cpu") -> Contest:
    """Everybody capturing k entries and the log-sum-exps at two temperatures from `[n, dim]` hidden states."""
    eager = capture_peers()[-1].run
    peers = [
        Peer("kdfast", _capture_ours, ours=True),
        Peer("one GEMM alone", Products(), comparable=False, note="floor: no capture, output preallocated"),
        Peer("eager with log_tail", lambda c: eager(c.on_logits()), note="logits materialised"),
    ]
    make = functools.partial(LinearCaptureCase.make, n, vocab, dim, k, dtype, device)
    small = functools.partial(LinearCaptureCase.make, 7, 129, 8, 5, torch.float64, device)
    worked = 2 * n * vocab * dim
    model = Model(flops=worked, text=f"2*N*V*D = {worked / 1e9:.4g} GFLOP (one product)")
    return Contest("linear_topk_capture", peers, make, small, model, dtype, f"N={n} V={vocab} D={dim} k={k} T=1,2")


def _loss_case(
    n: int, vocab: int, dim: int, k: int, dtype: torch.dtype, device: str, ignored: int, seed: int
) -> LinearTopKCase:
    return LinearTopKCase.captured(LinearCase.make(n, vocab, dim, dim, dtype, device=device, ignored=ignored, seed=seed), k)


def contestants(n: int, vocab: int, dim: int, k: int, dtype: torch.dtype, device: str = "cpu") -> Contest:
    """Everybody on the loss of `[n, dim]` hidden states through a `[vocab, dim]` head, against k entries and a ghost bucket."""
    peers = [
        Peer("kdfast", trained(_loss_ours), ours=True),
        Peer("three GEMMs alone", Products(), comparable=False, note="floor: no loss, outputs preallocated"),
        Peer("eager ghost", trained(lambda c: c.loss(*c.wanted)), note="logits materialised"),
    ]
    make = functools.partial(_loss_case, n, vocab, dim, k, dtype, device, 0)
    small = functools.partial(_loss_case, 7, 129, 8, 5, torch.float64, device, 2, 0)
    worked = 6 * n * vocab * dim
    model = Model(flops=worked, text=f"6*N*V*D = {worked / 1e9:.4g} GFLOP (one forward product, two gradient products)")
    return Contest("linear_topk", peers, make, small, model, dtype, f"N={n} V={vocab} D={dim} k={k}")
