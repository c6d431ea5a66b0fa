"""`kd_loss` (soft and hard) from logits, forward and backward, against PyTorch, torch.compile and Liger."""

from __future__ import annotations

import functools

import torch

from kdfast.options import DIVERGENCES

from .cases import LogitsCase, Objective
from .contest import Contest, contest, measure_limits, parser, positive, report, settings_of
from .peers import Peer, divergence_peers, logits_peers
from .report import Model
from .shapes import LLAMA3

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def model(n: int, vocab: int, dtype: torch.dtype) -> Model:
    """Read the student, read the teacher, write the gradient."""
    moved = 3 * n * vocab * dtype.itemsize
    return Model(
        bytes=moved, text=f"3*N*V*{dtype.itemsize} = {moved / 1e9:.3g} GB (read student, read teacher, write gradient)"
    )


def contestants(
    n: int, vocab: int, dtype: torch.dtype, device: str = "cpu", peers: list[Peer] | None = None,
    divergence: str = "forward_kl",
) -> Contest:  # fmt: skip
    """Everybody on `[n, vocab]` logits."""
    objective = Objective(divergence=divergence)
    make = functools.partial(_case, n, vocab, dtype, device, objective)
    small = functools.partial(LogitsCase.make, 7, 129, torch.float64, device=device, ignored=2, objective=objective)
    peers = logits_peers(device) if peers is None else peers
    of = "" if divergence == "forward_kl" else f" {divergence}"
    return Contest("logits", peers, make, small, model(n, vocab, dtype), dtype, f"N={n} V={vocab}{of}")


def _case(n: int, vocab: int, dtype: torch.dtype, device: str, objective: Objective, seed: int) -> LogitsCase:
    return LogitsCase.make(n, vocab, dtype, device=device, seed=seed, objective=objective)


def main(argv: list[str]) -> int:
    p = parser(
        "logits",
        __doc__ or "",
        ["--quick", "--divergence all --dtype float32", "--rows 512 --vocab 32000 --dtype float32", "--csv logits.csv"],
    )
    p.add_argument("--rows", type=positive, metavar="N", help="rows (default 256, quick 64)")
    p.add_argument("--vocab", type=positive, metavar="V", help=f"vocabulary (default {LLAMA3.vocab}, quick 32000)")
    p.add_argument("--dtype", action="append", choices=tuple(_DTYPES), help="may be repeated (default float32 bfloat16)")
    p.add_argument("--divergence", action="append", choices=(*DIVERGENCES, "all"), help="may be repeated (default forward_kl)")
    args = p.parse_args(argv)
    settings = settings_of(args)
    n, vocab = args.rows or (64 if args.quick else 256), args.vocab or (32000 if args.quick else LLAMA3.vocab)
    limits = measure_limits(args.device, copy=True)
    rows = []
    for name in args.dtype or ("float32", "bfloat16"):
        peers = logits_peers(args.device, compiled=() if args.quick else ("log_target", "probs"))
        wanted = args.divergence or ["forward_kl"]
        for divergence in DIVERGENCES if "all" in wanted else wanted:
            who = peers if divergence == "forward_kl" else divergence_peers()
            job = contestants(n, vocab, _DTYPES[name], args.device, who, divergence)
            rows.append(contest(job, limits, settings))
    return report(rows, limits, args)
