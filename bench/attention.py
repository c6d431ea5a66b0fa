"""Attention losses from queries and keys, forward and backward, against PyTorch with its maps: time and memory by length."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast

from .cases import Outcome
from .contest import Contest, contest, measure_limits, parser, positive, report, settings_of
from .peers import Peer, trained
from .plot import draw_scaling
from .report import Model, read_csv

KINDS = ("scores", "probs", "kl")
_BATCH, _HEADS, _SIZE = 2, 4, 64
_LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
#: Above this the materialised form is not run: it needs about five maps at once.
_MAPS_BYTES = 6 << 30
#: Rows of a map in float64 that the truth works on at a time.
_ROWS = 512


@dataclass(frozen=True)
class AttentionCase:
    """Queries and keys `[B, H, L, D]` of both sides; gradients are of the student's."""

    kind: str
    q_s: Tensor
    k_s: Tensor
    q_t: Tensor
    k_t: Tensor

    @classmethod
    def make(cls, kind: str, length: int, size: int, dtype: torch.dtype, device: str, seed: int = 0) -> AttentionCase:
        random = torch.Generator(device).manual_seed(seed)
        shape = (_BATCH, _HEADS, length, size)
        q_s, k_s, q_t, k_t = (torch.randn(shape, device=device, dtype=dtype, generator=random) for _ in range(4))
        return cls(kind, q_s.requires_grad_(), k_s.requires_grad_(), q_t, k_t)

    @property
    def sides(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.q_s, self.k_s, self.q_t, self.k_t

    @property
    def wanted(self) -> tuple[Tensor, Tensor]:
        return self.q_s, self.k_s

    def comparable(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return grads

    def truth(self) -> Outcome:
        """In float64, a few rows of one head at a time."""
        grads = tuple(torch.zeros(x.shape, dtype=torch.float64, device=x.device) for x in self.wanted)
        total = torch.zeros((), dtype=torch.float64, device=self.q_s.device)
        for part, rows in self._parts():
            q_s, k_s, q_t, k_t = (x.detach()[part].double() for x in self.sides)
            q, k = q_s[rows].requires_grad_(), k_s.requires_grad_()
            loss = materialised(self.kind, q, k, q_t[rows], k_t) * (q.shape[0] / self.q_s.shape[:3].numel())
            grad_q, grad_k = torch.autograd.grad(loss, (q, k))
            grads[0][part][rows] += grad_q
            grads[1][part] += grad_k
            total += loss.detach()
        return total, grads

    def _parts(self) -> Iterator[tuple[tuple[int, int], slice]]:
        batch, heads, length, _ = self.q_s.shape
        for b in range(batch):
            for h in range(heads):
                for begin in range(0, length, _ROWS):
                    yield (b, h), slice(begin, begin + _ROWS)


def materialised(kind: str, q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor) -> Tensor:
    """Plain PyTorch with both maps."""
    u_s, u_t = ((q @ k.mT) * q.shape[-1] ** -0.5 for q, k in ((q_s, k_s), (q_t, k_t)))
    if kind == "scores":
        return F.mse_loss(u_s, u_t)
    if kind == "probs":
        return F.mse_loss(u_s.softmax(-1), u_t.softmax(-1))
    return F.kl_div(u_s.log_softmax(-1), u_t.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()


def scaled_queries(kind: str, q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor) -> Tensor:
    """The same with the scale on the queries, a pass over each map less, and the teacher outside the graph."""
    with torch.no_grad():
        u_t = (q_t * q_t.shape[-1] ** -0.5) @ k_t.mT
    u_s = (q_s * q_s.shape[-1] ** -0.5) @ k_s.mT
    if kind == "scores":
        return (u_s - u_t).square().mean()
    if kind == "probs":
        return (u_s.softmax(-1) - u_t.softmax(-1)).square().mean()
    p = u_t.softmax(-1)
    return (p * (u_t.log_softmax(-1) - u_s.log_softmax(-1))).sum(-1).mean()


def ours(kind: str, q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor) -> Tensor:
    if kind == "kl":
        return kdfast.attention_kl(q_s, k_s, q_t, k_t)
    return kdfast.attention_mse(q_s, k_s, q_t, k_t, on=kind)


def attention_peers(length: int) -> list[Peer]:
    maps = 5 * _BATCH * _HEADS * length * length * 4
    missing = "" if maps <= _MAPS_BYTES else f"not run: five maps of {length} x {length} need {maps / 2**30:.0f} GiB"
    run = lambda function: trained(lambda case: function(case.kind, *case.sides))  # noqa: E731
    return [
        Peer("kdfast", run(ours), ours=True, modelled=False),
        Peer("PyTorch, materialised", run(materialised), missing=missing),
        Peer("PyTorch, scaled queries", run(scaled_queries), missing=missing),
    ]


def contestants(kind: str, length: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Contest:
    """Everybody on maps of `length` x `length`."""
    make = functools.partial(_case, kind, length, _SIZE, dtype, device)
    small = functools.partial(_case, kind, 17, 8, torch.float64, device, 0)
    worked = 8 * _BATCH * _HEADS * length**2 * _SIZE
    model = Model(flops=worked, text=f"8*B*H*L^2*D = {worked / 1e9:.4g} GFLOP (the four products of the materialised form)")
    shape = f"B={_BATCH} H={_HEADS} L={length} D={_SIZE}"
    return Contest(f"attention_{kind}", attention_peers(length), make, small, model, dtype, shape)


def _case(kind: str, length: int, size: int, dtype: torch.dtype, device: str, seed: int) -> AttentionCase:
    return AttentionCase.make(kind, length, size, dtype, device, seed)


def main(argv: list[str]) -> int:
    p = parser("attention", __doc__ or "", ["--quick", "--csv attention.csv --figure attention.png", "--length 2048 --on kl"])
    p.add_argument("--length", type=positive, action="append", metavar="L", help="may be repeated (default 128 to 8192)")
    p.add_argument("--on", choices=KINDS, action="append", help="may be repeated (default all three)")
    p.add_argument("--figure", metavar="FILE", help="draw time and memory against the length; needs --csv")
    args = p.parse_args(argv)
    settings = settings_of(args)
    lengths = args.length or ((128, 512) if args.quick else _LENGTHS)
    limits = measure_limits(args.device, gemm=torch.float32)
    jobs = [contestants(kind, length, device=args.device) for kind in args.on or KINDS for length in lengths]
    code = report([contest(job, limits, settings) for job in jobs], limits, args)
    if args.figure and args.csv:
        draw_scaling(read_csv(args.csv), args.figure)
    return code
