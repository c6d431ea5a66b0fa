"""Scaling a gradient formed in forward by the incoming gradient: free when that is 1, one pass when it is not."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdfast import dispatch

from .cases import Outcome
from .contest import Contest
from .peers import Peer
from .report import Model


@dataclass(frozen=True)
class ScaleCase:
    """A gradient `[N, V]`, and the incoming gradients -1 (a full pass) and 1 (nothing to do) on the device."""

    grad: Tensor
    upstream: Tensor
    one: Tensor

    @classmethod
    def make(cls, n: int, vocab: int, dtype: torch.dtype, device: str, seed: int = 0) -> ScaleCase:
        random = torch.Generator(device).manual_seed(seed)
        grad = torch.randn(n, vocab, device=device, dtype=dtype, generator=random)
        return cls(grad, torch.tensor(-1.0, device=device), torch.ones((), device=device))

    def fresh(self) -> ScaleCase:
        return ScaleCase(self.grad.clone(), self.upstream, self.one)

    def comparable(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (grads[0][:1024],)

    def truth(self) -> Outcome:
        first = self.grad[:1024].double() * self.upstream.double()
        return self.upstream.double(), (first,)


def _ours(case: ScaleCase) -> Outcome:
    backend = dispatch.choose("scale", case.grad.device, case.grad.dtype)
    torch.ops.kdfast.scale_(case.grad, case.upstream, backend)
    return case.upstream, (case.grad,)


def _ours_one(case: ScaleCase) -> Outcome:
    backend = dispatch.choose("scale", case.grad.device, case.grad.dtype)
    torch.ops.kdfast.scale_(case.grad, case.one, backend)
    return case.one, (case.grad,)


def _torch(case: ScaleCase) -> Outcome:
    return case.upstream, (case.grad.mul_(case.upstream),)


def contestants(n: int, vocab: int, dtype: torch.dtype, device: str = "cpu") -> Contest:
    """kdfast's scaling by -1 and by 1 against `mul_`, on `[n, vocab]`."""
    moved = 2 * n * vocab * dtype.itemsize
    model = Model(bytes=moved, text=f"2*N*V*{dtype.itemsize} = {moved / 1e9:.3g} GB (read and write the gradient)")
    peers = [
        Peer("kdfast", _ours, ours=True, fresh=True),
        Peer("kdfast, incoming gradient 1", _ours_one, ours=True, comparable=False, modelled=False, note="nothing to do"),
        Peer("mul_", _torch, fresh=True),
    ]

    def make(seed: int) -> Any:
        return ScaleCase.make(n, vocab, dtype, device, seed)

    small = functools.partial(ScaleCase.make, 7, 129, torch.float64, device)
    return Contest("scale", peers, make, small, model, dtype, f"N={n} V={vocab}")
