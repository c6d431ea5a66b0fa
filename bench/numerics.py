"""Error of values and gradients against float64 as student and teacher come to agree: kdfast's backends beside PyTorch.

    kdfast bench numerics --write docs/numerics.md

rewrites the tables between the marks of that file. The Triton backend runs under its interpreter, where no GPU is.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast
from kdfast.options import DIVERGENCES

from .attention import KINDS, AttentionCase, attention_peers
from .cases import LinearCase, LogitsCase, Objective
from .measure import relative_error
from .peers import Peer, divergence_peers, linear_peers, logits_peers
from .report import between_marks, dtype_name

OVERLAPS = (0.88, 0.95, 0.98, 0.999, 0.9999)
DISTANCES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OBJECTIVE = Objective(temperature=1.0, soft_weight=1.0, hard_weight=0.0)
MARKS = "<!-- numerics: begin -->", "<!-- numerics: end -->"


@dataclass(frozen=True)
class Line:
    """One contestant's errors: (gradient, value) at each of `points`, overlaps or distances."""

    table: str
    points: tuple[float, ...]
    contestant: str
    errors: tuple[tuple[float, float], ...]


def noise_for(overlap: float, distribution: Callable[[float], tuple[Tensor, Tensor]]) -> float:
    """The size of noise at which sum_v min(p, q), averaged over rows, is `overlap`; (p, q) from a size."""
    low, high = 0.0, 10.0
    for _ in range(40):
        size = (low + high) / 2
        p, q = distribution(size)
        low, high = (size, high) if float(torch.minimum(p, q).sum(-1).mean()) > overlap else (low, size)
    return size


def logits_case(overlap: float, dtype: torch.dtype, divergence: str, n: int, vocab: int) -> LogitsCase:
    """A student whose distribution overlaps with the teacher's by `overlap`, both rounded to `dtype`."""
    random = torch.Generator().manual_seed(0)
    teacher = torch.randn(n, vocab, generator=random) * 3
    noise = torch.randn(n, vocab, generator=random)
    size = noise_for(overlap, lambda x: (teacher.softmax(-1), (teacher + x * noise).softmax(-1)))
    objective = Objective(temperature=1.0, soft_weight=1.0, hard_weight=0.0, divergence=divergence)
    student = (teacher + size * noise).to(dtype).requires_grad_()
    return LogitsCase(student, teacher.to(dtype), torch.zeros(n, dtype=torch.int64), objective)


def linear_case(overlap: float, dtype: torch.dtype, n: int, vocab: int, dim: int) -> LinearCase:
    """Hidden states apart by noise through one head, so that the distributions overlap by `overlap`."""
    random = torch.Generator().manual_seed(0)
    teacher, noise = (torch.randn(n, dim, generator=random) for _ in range(2))
    weight = torch.randn(vocab, dim, generator=random) * 3 * dim**-0.5
    size = noise_for(overlap, lambda x: ((teacher @ weight.T).softmax(-1), ((teacher + x * noise) @ weight.T).softmax(-1)))
    student = (teacher + size * noise).to(dtype).requires_grad_()
    weight = weight.to(dtype)
    labels = torch.zeros(n, dtype=torch.int64)
    return LinearCase(student, weight.clone().requires_grad_(), teacher.to(dtype), weight, labels, _OBJECTIVE)


def attention_case(kind: str, distance: float, length: int, student_size: int, teacher_size: int) -> AttentionCase:
    """Queries and keys that give the teacher's scores, but for noise of the size `distance` on every entry."""
    random = torch.Generator().manual_seed(0)
    q_t, k_t = (torch.randn(2, 4, length, teacher_size, generator=random) for _ in range(2))
    # A wider head pads with zeros; its default scale is smaller, which its queries make up for.
    q, k = (F.pad(x, (0, student_size - teacher_size)) for x in (q_t * (student_size / teacher_size) ** 0.5, k_t))
    q_s, k_s = (x + distance * torch.randn(x.shape, generator=random) for x in (q, k))
    return AttentionCase(kind, q_s.requires_grad_(), k_s.requires_grad_(), q_t, k_t)


def _on(backend: str, peer: Peer) -> Peer:
    def run(case: object) -> tuple[Tensor, tuple[Tensor, ...]]:
        with kdfast.use_backend(backend):
            return peer.run(case)

    return Peer(f"kdfast {backend}", run, ours=True)


def _contestants(peers: Sequence[Peer]) -> list[Peer]:
    able = {b.name for b in kdfast.backends() if b.available}
    ours = [_on(name, peers[0]) for name in ("cpp", "triton", "reference") if name in able]
    return [*ours, *(p for p in peers[1:] if p.comparable and not p.ours and not p.missing)]


def errors_of(peer: Peer, cases: Sequence[LogitsCase | LinearCase | AttentionCase]) -> tuple[tuple[float, float], ...]:
    """(gradient, value) errors on each case."""
    found: list[tuple[float, float]] = []
    for case in cases:
        truth = case.truth()
        loss, grads = peer.run(case)
        got = (loss, case.comparable(grads))
        found.append((relative_error(got[1], truth[1]), relative_error(got[:1], truth[:1])))
    return tuple(found)


def measure(quick: bool) -> list[Line]:
    """All tables."""
    n, vocab = (4, 1000) if quick else (16, 8000)
    lines = []
    for dtype in _DTYPES:
        for divergence in DIVERGENCES if dtype == torch.float32 else DIVERGENCES[:1]:
            cases = [logits_case(o, dtype, divergence, n, vocab) for o in OVERLAPS]
            peers = logits_peers("cpu", compiled=()) if divergence == "forward_kl" else divergence_peers()
            title = f"`kd_loss`, {divergence}, {dtype_name(dtype)}, N={n} V={vocab}"
            lines += [Line(title, OVERLAPS, p.name, errors_of(p, cases)) for p in _contestants(peers)]
    for dtype in _DTYPES[:2]:
        linear = [linear_case(o, dtype, n, vocab, 64) for o in OVERLAPS]
        title = f"`linear_kd_loss`, forward_kl, {dtype_name(dtype)}, N={n} V={vocab} D=64"
        peers = linear_peers("cpu", compiled=False)
        lines += [Line(title, OVERLAPS, p.name, errors_of(p, linear)) for p in _contestants(peers)]
    return lines + _attention(40 if quick else 128)


def _attention(length: int) -> list[Line]:
    lines = []
    for kind, sizes in (*((kind, (64, 64)) for kind in KINDS), ("scores", (64, 48))):
        attention = [attention_case(kind, d, length, *sizes) for d in DISTANCES]
        title = f"attention, {kind}, float32, L={length}, head sizes {sizes[0]} and {sizes[1]}"
        lines += [Line(title, DISTANCES, p.name, errors_of(p, attention)) for p in _contestants(attention_peers(length))]
    return lines


def as_markdown(lines: Sequence[Line]) -> str:
    """One table per case: gradient error / value error at each overlap."""
    text = []
    for title in dict.fromkeys(line.table for line in lines):
        of_table = [line for line in lines if line.table == title]
        points = of_table[0].points
        text += ["", f"### {title}", "", "| | " + " | ".join(f"{x:g}" for x in points) + " |"]
        text.append("|---" * (1 + len(points)) + "|")
        for line in of_table:
            cells = (f"{e[0]:.1e} / {e[1]:.1e}" for e in line.errors)
            text.append(f"| {line.contestant} | " + " | ".join(cells) + " |")
    return "\n".join([*text, ""])


def main(argv: list[str]) -> int:
    p = argparse.ArgumentParser(prog="kdfast bench numerics", description=(__doc__ or "").split("\n")[0])
    p.add_argument("--quick", action="store_true", help="4 rows of 1000 instead of 16 of 8000")
    p.add_argument("--write", metavar="FILE", type=Path, help="put the tables between the marks of FILE")
    args = p.parse_args(argv)
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported, which kernels do when they are first used
    tables = as_markdown(measure(args.quick))
    if args.write is None:
        print(tables)
        return 0
    try:
        between_marks(args.write, MARKS, tables)
    except ValueError as error:
        print(f"bench numerics: --write: {error}", file=sys.stderr)
        return 2
    return 0
