"""Capture of top-k targets, and the loss from them, against PyTorch and the dense loss; and both through a linear head."""

from __future__ import annotations

import functools

import torch

import kdfast

from . import linear_topk
from .cases import CaptureCase, LogitsCase, TopKCase
from .contest import Contest, contest, measure_limits, parser, positive, report, settings_of
from .peers import Peer, capture_peers, topk_peers
from .report import Model
from .shapes import QWEN3

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_TEMPERATURES = (1.0, 2.0)


def capture_contestants(n: int, vocab: int, k: int, dtype: torch.dtype, device: str = "cpu") -> Contest:
    """Everybody capturing k entries and the log-sum-exps at two temperatures from `[n, vocab]` logits."""
    make = functools.partial(_capture_case, n, vocab, k, dtype, device)
    small = functools.partial(CaptureCase.make, 7, 129, 5, torch.float64, device=device)
    moved = n * vocab * dtype.itemsize
    model = Model(bytes=moved, text=f"N*V*{dtype.itemsize} = {moved / 1e9:.3g} GB (read the logits once)")
    return Contest("topk_capture", capture_peers(), make, small, model, dtype, f"N={n} V={vocab} k={k} T=1,2")


def _capture_case(n: int, vocab: int, k: int, dtype: torch.dtype, device: str, seed: int) -> CaptureCase:
    return CaptureCase.make(n, vocab, k, dtype, device=device, seed=seed)


def contestants(
    n: int, vocab: int, k: int, dtype: torch.dtype, device: str = "cpu", peers: list[Peer] | None = None
) -> Contest:
    """Everybody on the loss of `[n, vocab]` student logits against k entries and a ghost bucket."""
    make = functools.partial(_loss_case, n, vocab, k, dtype, device, 0)
    small = functools.partial(_loss_case, 7, 129, 5, torch.float64, device, 2, 0)
    moved = 2 * n * vocab * dtype.itemsize
    model = Model(bytes=moved, text=f"2*N*V*{dtype.itemsize} = {moved / 1e9:.3g} GB (read student, write gradient)")
    peers = topk_peers() if peers is None else peers
    return Contest("topk", peers, make, small, model, dtype, f"N={n} V={vocab} k={k}")


def _loss_case(n: int, vocab: int, k: int, dtype: torch.dtype, device: str, ignored: int, seed: int) -> TopKCase:
    dense = LogitsCase.make(n, vocab, dtype, device=device, ignored=ignored, seed=seed)
    return TopKCase.captured(dense, kdfast.topk_targets(dense.teacher, k, temperatures=_TEMPERATURES))


def main(argv: list[str]) -> int:
    p = parser("topk", __doc__ or "", ["--quick", "--rows 256 --k 128", "--json"])
    p.add_argument("--rows", type=positive, metavar="N", help="rows (default 64, quick 16)")
    p.add_argument("--vocab", type=positive, metavar="V", help=f"vocabulary (default {QWEN3.vocab}, quick 32000)")
    p.add_argument("--dim", type=positive, default=1024, metavar="D", help="hidden size of the linear forms (default 1024)")
    p.add_argument("--linear-rows", type=positive, metavar="N", help="their rows (default 256, quick 64)")
    p.add_argument("--k", type=positive, default=64, help="entries a row (default 64)")
    p.add_argument("--dtype", action="append", choices=tuple(_DTYPES), help="may be repeated (default float32)")
    args = p.parse_args(argv)
    settings = settings_of(args)
    n, vocab = args.rows or (16 if args.quick else 64), args.vocab or (32000 if args.quick else QWEN3.vocab)
    limits = measure_limits(args.device, copy=True)
    rows = []
    for name in args.dtype or ("float32",):
        dtype = _DTYPES[name]
        rows.append(contest(capture_contestants(n, vocab, args.k, dtype, args.device), limits, settings))
        peers = topk_peers(compiled=not args.quick)
        rows.append(contest(contestants(n, vocab, args.k, dtype, args.device, peers), limits, settings))
        through_head = args.linear_rows or (64 if args.quick else 256), vocab, args.dim, args.k, dtype, args.device
        rows.append(contest(linear_topk.capture_contestants(*through_head), limits, settings))
        rows.append(contest(linear_topk.contestants(*through_head), limits, settings))
    return report(rows, limits, args)
