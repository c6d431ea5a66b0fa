"""Losses between hidden states, forward and backward, against PyTorch."""

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

KINDS = ("mse", "projected", "cosine")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class HiddenCase:
    """Student `[N, Ds]` and teacher `[N, Dt]`, a mask over the rows, and for "projected" the way between their sizes."""

    kind: str
    h_s: Tensor
    h_t: Tensor
    mask: Tensor
    projection: Tensor | None

    @classmethod
    def make(cls, kind: str, n: int, student: int, teacher: int, dtype: torch.dtype, device: str, seed: int = 0) -> HiddenCase:
        random = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=dtype, generator=random)

        projection = normal(teacher, student).div_(student**0.5).requires_grad_() if kind == "projected" else None
        student = student if kind == "projected" else teacher
        mask = torch.rand(n, device=device, generator=random) > 0.2
        return cls(kind, normal(n, student).requires_grad_(), normal(n, teacher), mask, projection)

    @property
    def wanted(self) -> tuple[Tensor, ...]:
        return (self.h_s,) if self.projection is None else (self.h_s, self.projection)

    def comparable(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return grads

    def truth(self) -> Outcome:
        wide = HiddenCase(
            self.kind, self.h_s.detach().double().requires_grad_(), self.h_t.double(), self.mask,
            None if self.projection is None else self.projection.detach().double().requires_grad_(),
        )  # fmt: skip
        return trained(eager)(wide)


def eager(c: HiddenCase) -> Tensor:
    """Plain PyTorch, the mask as a factor: an index would be a copy of both sides."""
    if c.kind == "cosine":
        row = 1 - F.cosine_similarity(c.h_s, c.h_t, -1)
    else:
        h = c.h_s if c.projection is None else F.linear(c.h_s, c.projection)
        row = F.mse_loss(h, c.h_t, reduction="none").mean(-1)
    return (row * c.mask).sum() / c.mask.sum()


def ours(c: HiddenCase) -> Tensor:
    if c.kind == "cosine":
        return kdfast.hidden_cosine(c.h_s, c.h_t, mask=c.mask)
    return kdfast.hidden_mse(c.h_s, c.h_t, c.projection, mask=c.mask)


def hidden_peers() -> list[Peer]:
    return [Peer("kdfast", trained(ours), ours=True), Peer("PyTorch", trained(eager))]


def contestants(kind: str, n: int, student: int, teacher: int, dtype: torch.dtype, device: str = "cpu") -> Contest:
    """Everybody on `[n, student]` against `[n, teacher]`; without a projection the student is as wide as the teacher."""
    make = functools.partial(_case, kind, n, student, teacher, dtype, device)
    small = functools.partial(_case, kind, 7, 5, 13, torch.float64, device, 0)
    if kind == "projected":
        worked = 6 * n * student * teacher
        model = Model(flops=worked, text=f"6*N*Ds*Dt = {worked / 1e9:.4g} GFLOP (the product and its two gradients)")
    else:
        moved = 3 * n * teacher * dtype.itemsize
        model = Model(bytes=moved, text=f"3*N*D*{dtype.itemsize} = {moved / 1e9:.3g} GB (read both, write the gradient)")
    sizes = f"Ds={student} Dt={teacher}" if kind == "projected" else f"D={teacher}"
    return Contest(f"hidden_{kind}", hidden_peers(), make, small, model, dtype, f"N={n} {sizes}")


def _case(kind: str, n: int, student: int, teacher: int, dtype: torch.dtype, device: str, seed: int) -> HiddenCase:
    return HiddenCase.make(kind, n, student, teacher, dtype, device, seed)


def main(argv: list[str]) -> int:
    p = parser("hidden", __doc__ or "", ["--quick", "--on cosine --dtype bfloat16", "--csv hidden.csv"])
    p.add_argument("--rows", type=positive, metavar="N", help="rows (default 8192, quick 1024)")
    p.add_argument("--student-dim", type=positive, default=312, metavar="D", help="student's hidden size (default 312)")
    p.add_argument("--teacher-dim", type=positive, default=768, metavar="D", help="teacher's hidden size (default 768)")
    p.add_argument("--on", choices=KINDS, action="append", help="may be repeated (default all three)")
    p.add_argument("--dtype", action="append", choices=tuple(_DTYPES), help="may be repeated (default float32)")
    args = p.parse_args(argv)
    settings = settings_of(args)
    n, sizes = args.rows or (1024 if args.quick else 8192), (args.student_dim, args.teacher_dim)
    dtypes = [_DTYPES[name] for name in args.dtype or ("float32",)]
    limits = measure_limits(args.device, copy=True, gemm=dtypes[0])
    rows = [
        contest(contestants(kind, n, *sizes, dtype, args.device), limits, settings)
        for dtype in dtypes
        for kind in args.on or KINDS
    ]
    return report(rows, limits, args)
