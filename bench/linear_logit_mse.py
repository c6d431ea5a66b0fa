"""`linear_logit_mse`, forward and backward, against the same loss through logits, at several distances from the teacher."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast

from .cases import Outcome
from .contest import Contest, contest, measure_limits, parser, positive, report, settings_of
from .peers import Peer, trained
from .report import Model

#: Elements of float64 logits that the truth works on at a time.
_CHUNK = 1 << 23


@dataclass(frozen=True)
class LogitMatchCase:
    """Hidden states `[N, D]` and heads `[V, D]`; the student's are the teacher's plus `distance` times noise."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor

    @classmethod
    def make(
        cls, n: int, vocab: int, student_dim: int, teacher_dim: int, distance: float, dtype: torch.dtype, device: str,
        seed: int = 0,
    ) -> LogitMatchCase:  # fmt: skip
        random = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, generator=random, dtype=torch.float64)

        h, w = normal(n, student_dim), normal(vocab, student_dim) * (3 * student_dim**-0.5)
        turn = torch.linalg.qr(normal(teacher_dim, student_dim)).Q if teacher_dim != student_dim else None
        h_t, w_t = (x if turn is None else x @ turn.T for x in (h, w))
        noise = normal(n, student_dim), normal(vocab, student_dim) * (3 * student_dim**-0.5)
        student = [(x + distance * y).to(dtype).requires_grad_() for x, y in zip((h, w), noise, strict=True)]
        return cls(*student, h_t.to(dtype), w_t.to(dtype))

    @property
    def wanted(self) -> tuple[Tensor, ...]:
        return self.student_hidden, self.student_weight

    def comparable(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return grads

    def truth(self) -> Outcome:
        """From float64 logits, vocabulary chunk by vocabulary chunk."""
        h, h_t = self.student_hidden.detach().double(), self.teacher_hidden.double()
        rows = max(1, _CHUNK // h.shape[0])
        elements = h.shape[0] * self.student_weight.shape[0]
        total, grad_hidden, grad_weight = h.new_zeros(()), torch.zeros_like(h), []
        for w, w_t in zip(self.student_weight.detach().split(rows), self.teacher_weight.split(rows), strict=True):
            difference = (h @ w.double().t()).sub_(h_t @ w_t.double().t())
            total += difference.square().sum()
            grad_hidden += difference @ w.double()
            grad_weight.append(difference.t() @ h)
        return total / elements, (grad_hidden * (2 / elements), torch.cat(grad_weight) * (2 / elements))


def through_logits(c: LogitMatchCase) -> Tensor:
    with torch.no_grad():
        teacher = F.linear(c.teacher_hidden, c.teacher_weight)
    return F.mse_loss(F.linear(c.student_hidden, c.student_weight), teacher)


def ours(c: LogitMatchCase, method: str) -> Tensor:
    sides = c.student_hidden, c.student_weight, c.teacher_hidden, c.teacher_weight
    return kdfast.linear_logit_mse(*sides, method=method)


def logit_match_peers() -> list[Peer]:
    by_logits = functools.partial(ours, method="logits")
    return [
        Peer("kdfast", trained(functools.partial(ours, method="auto")), ours=True, modelled=False),
        Peer("kdfast, logits in blocks", trained(by_logits), note="method='logits'"),
        Peer("PyTorch, through logits", trained(through_logits)),
    ]


def contestants(
    n: int, vocab: int, student_dim: int, teacher_dim: int, distance: float, dtype: torch.dtype, device: str = "cpu"
) -> Contest:
    """Everybody at one distance; the teacher's Gram is in the cache from the warm-up on."""
    make = functools.partial(_case, n, vocab, student_dim, teacher_dim, distance, dtype, device)
    small = functools.partial(_case, 9, 129, 8, 12, 0.5, torch.float64, device, 0)
    worked = 2 * n * vocab * (3 * student_dim + teacher_dim)
    text = f"2*N*V*(3*Ds + Dt) = {worked / 1e9:.4g} GFLOP through logits"
    shape = f"N={n} V={vocab} Ds={student_dim} Dt={teacher_dim} distance={distance:g}"
    return Contest("linear_logit_mse", logit_match_peers(), make, small, Model(flops=worked, text=text), dtype, shape)


def _case(
    n: int, vocab: int, student_dim: int, teacher_dim: int, distance: float, dtype: torch.dtype, device: str, seed: int
) -> LogitMatchCase:
    return LogitMatchCase.make(n, vocab, student_dim, teacher_dim, distance, dtype, device, seed)


def main(argv: list[str]) -> int:
    examples = ["--quick", "--distance 1 --distance 1e-5", "--student-dim 384 --csv linear_logit_mse.csv"]
    p = parser("linear_logit_mse", __doc__ or "", examples)
    p.add_argument("--rows", type=positive, metavar="N", help="rows (default 4096, quick 512)")
    p.add_argument("--vocab", type=positive, metavar="V", help="vocabulary (default 32000, quick 8192)")
    p.add_argument("--student-dim", type=positive, metavar="D", help="student's hidden size (default 512, quick 128)")
    p.add_argument("--teacher-dim", type=positive, metavar="D", help="teacher's hidden size (default the student's)")
    p.add_argument("--distance", type=float, action="append", help="may be repeated (default 1, 1e-1 ... 1e-5; quick 1, 1e-3)")
    args = p.parse_args(argv)
    settings = settings_of(args)
    n, vocab, dim = (512, 8192, 128) if args.quick else (4096, 32000, 512)
    n, vocab, dim = args.rows or n, args.vocab or vocab, args.student_dim or dim
    distances = args.distance or ((1.0, 1e-3) if args.quick else tuple(10.0**-i for i in range(6)))
    limits = measure_limits(args.device, gemm=torch.float32)
    rows = [
        contest(contestants(n, vocab, dim, args.teacher_dim or dim, d, torch.float32, args.device), limits, settings)
        for d in distances
    ]
    return report(rows, limits, args)
