"""`linear_kd_loss` from hidden states and head weights, forward and backward, against the GEMMs alone, Liger and others.

With --labels hard, the student's cross-entropy alone, against those who do nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch

from . import linear_hard
from .cases import LinearCase
from .contest import Contest, contest, measure_limits, parser, positive, report, settings_of
from .peers import Peer, linear_peers
from .report import Model, Row

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def model(n: int, vocab: int, student_dim: int, teacher_dim: int) -> Model:
    """Student and teacher logits, dHidden and dWeight."""
    worked = 2 * n * vocab * (3 * student_dim + teacher_dim)
    return Model(
        flops=worked, text=f"2*N*V*(3*Ds + Dt) = {worked / 1e9:.4g} GFLOP (two forward products, two gradient products)"
    )


def contestants(
    n: int,
    vocab: int,
    student_dim: int,
    teacher_dim: int,
    dtype: torch.dtype,
    device: str = "cpu",
    peers: list[Peer] | None = None,
) -> Contest:
    """Everybody on `[n, dim]` hidden states and `[vocab, dim]` heads."""
    make = functools.partial(_case, n, vocab, student_dim, teacher_dim, dtype, device)
    small = functools.partial(LinearCase.make, 7, 129, 8, 12, torch.float64, device=device, ignored=2)
    shape = f"N={n} V={vocab} Ds={student_dim} Dt={teacher_dim}"
    peers = linear_peers(device) if peers is None else peers
    return Contest("linear", peers, make, small, model(n, vocab, student_dim, teacher_dim), dtype, shape)


def _case(n: int, vocab: int, student_dim: int, teacher_dim: int, dtype: torch.dtype, device: str, seed: int) -> LinearCase:
    return LinearCase.make(n, vocab, student_dim, teacher_dim, dtype, device=device, seed=seed)


def with_room(rows: list[Row], n: int, vocab: int, dim: int, dtype: torch.dtype) -> list[Row]:
    """kdfast's rows with what their peak holds beside the gradients and the float32 sum behind the weight's gradient."""
    kept = (n + vocab) * dim * dtype.itemsize + (vocab * dim * 4 if dtype.itemsize < 4 else 0)
    return [
        dataclasses.replace(r, note=f"{r.note}; {r.peak_mib - kept / 2**20:.0f} MiB beside gradients".lstrip("; "))
        if r.contestant.startswith("kdfast") and not math.isnan(r.peak_mib)
        else r
        for r in rows
    ]


def main(argv: list[str]) -> int:
    p = parser("linear", __doc__ or "", ["--quick", "--rows 2048 --vocab 50257 --student-dim 768", "--csv linear.csv"])
    p.add_argument("--rows", type=positive, metavar="N", help="rows (default 1024, quick 256)")
    p.add_argument("--vocab", type=positive, metavar="V", help="vocabulary (default 32000, quick 8192)")
    p.add_argument("--student-dim", type=positive, metavar="D", help="student's hidden size (default 512, quick 256)")
    p.add_argument("--teacher-dim", type=positive, metavar="D", help="teacher's hidden size (default 1024, quick 512)")
    p.add_argument("--dtype", action="append", choices=tuple(_DTYPES), help="may be repeated (default float32 bfloat16)")
    p.add_argument(
        "--labels", choices=("both", "kd", "hard"), default="both", help="distillation, hard labels alone, or (default) both"
    )
    args = p.parse_args(argv)
    settings = settings_of(args)
    default = (256, 8192, 256, 512) if args.quick else (1024, 32000, 512, 1024)
    n, vocab = args.rows or default[0], args.vocab or default[1]
    dims = args.student_dim or default[2], args.teacher_dim or default[3]
    dtypes = [_DTYPES[name] for name in args.dtype or tuple(_DTYPES)]
    limits = [measure_limits(args.device, gemm=dtype) for dtype in dtypes]
    rows = []
    for dtype, limit in zip(dtypes, limits, strict=True):
        who = {"compiled": not args.quick, "half": dtype.itemsize < 4}
        jobs = []
        if args.labels != "hard":
            jobs.append(contestants(n, vocab, *dims, dtype, args.device, linear_peers(args.device, **who)))
        if args.labels != "kd":
            peers = linear_hard.hard_peers(args.device, **who)
            jobs.append(linear_hard.contestants(n, vocab, dims[0], dtype, args.device, peers))
        rows += [with_room(contest(job, limit, settings), n, vocab, dims[0], dtype) for job in jobs]
    return report(rows, limits[0], args)
