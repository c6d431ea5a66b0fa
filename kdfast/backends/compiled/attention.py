"""Attention maps of student and teacher compared on a CPU. Contract: `kdfast.backends`.

The GEMMs are torch's own (MKL or oneDNN): with two of its operands a few megabytes at most, nothing written here would beat
them. Between them stands `csrc/cpu/attention.cpp`, which turns a tile of scores into its loss and its gradient in place, so
that a tile goes through memory once and the tiles of a call share one workspace: O(L) memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kdfast import _C, grams
from kdfast.backends.compiled.extension import address, dtype_code, fresh, threads
from kdfast.grams import Basis, Inputs
from kdfast.options import AttentionOptions

_KINDS = {"scores": 0, "probs": 1, "kl": 2}
#: Bytes of one tile of scores: with its twin for the teacher it stays in a second-level cache while rows are worked on.
_TILE_BYTES = 1 << 20


def forward(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    scale: Tensor,
    options: AttentionOptions,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x = grams.clean(q_s, k_s, q_t, k_t, query_mask, key_mask)
    if options.kind == "scores" and _prefers_grams(x, options):
        loss, grad_q, grad_k = grams.score_mse(x, scale, options, need_grad)
    else:
        loss, grad_q, grad_k = _tiled(x, query_mask, key_mask, scale, options, need_grad)
    if grad_q is None or grad_k is None:
        return loss, q_s.new_empty(0), k_s.new_empty(0)
    return loss, grad_q.to(q_s.dtype), grad_k.to(k_s.dtype)


def _prefers_grams(x: Inputs, options: AttentionOptions) -> bool:
    """Short maps cost less directly: a tile of 128 x 128 needs no more than the Gram matrices of two heads of 64."""
    if options.method != "auto":
        return options.method == "gram"
    (lq, ds), (lk, dt) = x.q_s.shape[2:], x.k_t.shape[2:]
    return 2 * lq * lk > (lq + lk) * (ds + dt)


@dataclass(frozen=True)
class _Tile:
    """Rows `rows` of the flattened `[R * Lq]` queries of groups `groups`, against the first `keys` keys."""

    groups: slice
    rows: slice
    keys: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.groups.stop - self.groups.start, self.rows.stop - self.rows.start, self.keys


def _tiles(n: int, heads: int, lq: int, lk: int, causal: bool) -> Iterator[_Tile]:
    """Several whole groups a tile where they are small, else a part of one head: its rows see the same keys when causal."""
    group = heads * lq
    several = _TILE_BYTES // (4 * group * lk)
    if several >= 1:
        for begin in range(0, n, several):
            yield _Tile(slice(begin, min(n, begin + several)), slice(0, group), lk)
        return
    step = max(16, _TILE_BYTES // (4 * lk))
    for g in range(n):
        for head in range(heads):
            for begin in range(0, lq, step):
                end = min(lq, begin + step)
                rows = slice(head * lq + begin, head * lq + end)
                yield _Tile(slice(g, g + 1), rows, min(lk, end) if causal else lk)


def _tiled(
    x: Inputs, query_mask: Tensor | None, key_mask: Tensor | None, scale: Tensor, options: AttentionOptions, need_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    b = grams.basis(x, options, difference=x.same_size)
    n, heads, lq, w = b.q.shape
    lk, ds, rows = b.k.shape[1], b.width, heads * lq
    queries = b.q.view(n, rows, w)
    # The student's and the teacher's own keys, and the student's queries, as the GEMMs after the difference want them.
    keys_t = _teacher_keys(x, b) if options.kind != "scores" else None
    queries_s = b.student_queries(queries) if need_grad else None
    loss = torch.zeros(n, heads, lq, dtype=torch.float64)
    grad_q = torch.zeros(n, rows, ds) if need_grad else None
    grad_k = torch.zeros(n, lk, ds) if need_grad else None
    tiles = list(_tiles(n, heads, lq, lk, options.causal)) if n * rows * lk else []
    room = [torch.empty(max(count * size * keys for count, size, keys in (t.sizes for t in tiles)))
            for _ in range(1 if keys_t is None else 2)] if tiles else []  # fmt: skip
    exact = _Float64(x, options)
    for tile in tiles:
        views = [r[: _count(tile.sizes)].view(tile.sizes) for r in room]
        q = queries[tile.groups, tile.rows]
        torch.bmm(q, b.k[tile.groups, : tile.keys].mT, out=views[0])
        if not b.difference and _cancelled(views[0], q[..., :ds], b.k[tile.groups, : tile.keys, :ds]):
            exact.difference(tile, views[0])
        if keys_t is not None:
            torch.bmm(q[..., ds:], keys_t[tile.groups, : tile.keys].mT, out=views[1])
        _C.attention_tile(
            _KINDS[options.kind], address(views[0]), address(views[1]) if keys_t is not None else 0, tile.sizes,
            tile.groups.start, tile.rows.start, x.groups, heads, lq, address(query_mask), address(key_mask), lk,
            address(scale), address(loss), b.factor, b.factor if b.difference else -b.factor, options.causal, threads(),
        )  # fmt: skip
        if grad_q is not None and grad_k is not None and queries_s is not None:
            torch.bmm(views[0], b.k[tile.groups, : tile.keys, :ds], out=grad_q[tile.groups, tile.rows])
            grad_k[tile.groups, : tile.keys].baddbmm_(views[0].mT, queries_s[tile.groups, tile.rows])
    total = loss.sum(-1).to(scale.dtype)
    return grams.finish(x, total, grad_q, grad_k)


class _Float64:
    """Differences of scores whose terms cancel, from a basis that is widened when the first tile asks."""

    def __init__(self, x: Inputs, options: AttentionOptions) -> None:
        self._x, self._options = x, options
        self._basis: Basis | None = None

    def difference(self, tile: _Tile, out: Tensor) -> None:
        if self._basis is None:
            self._basis = grams.basis(self._x.to(torch.float64), self._options, difference=False)
        b = self._basis
        queries = b.q.view(b.q.shape[0], -1, b.q.shape[3])
        out.copy_(torch.bmm(queries[tile.groups, tile.rows], b.k[tile.groups, : tile.keys].mT))


def _cancelled(difference: Tensor, q_s: Tensor, k_s: Tensor) -> bool:
    """Whether the difference is small beside the student's scores, by their size if their directions were random."""
    scores = q_s.square().sum((-1, -2)) * k_s.square().sum((-1, -2)) / q_s.shape[-1]
    return bool((scores > grams.CANCELLED * difference.square().sum((-1, -2))).any())


def _count(sizes: tuple[int, int, int]) -> int:
    return sizes[0] * sizes[1] * sizes[2]


def _teacher_keys(x: Inputs, b: Basis) -> Tensor:
    """`[N, Lk, dt]`: half of the basis, or where that holds differences a copy."""
    if not b.difference:
        return b.k[..., b.width :]
    batch, heads, lk, dt = x.k_t.shape
    return x.k_t[:, :, None].expand(batch, heads, x.groups // heads, lk, dt).reshape(-1, lk, dt)


def map_forward(
    maps_s: Tensor, maps_t: Tensor, mask: Tensor | None, scale: Tensor, need_grad: bool
) -> tuple[Tensor, Tensor]:
    student, teacher = (x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous() for x in (maps_s, maps_t))
    teacher = teacher.float() if teacher.dtype == torch.float64 else teacher
    if mask is not None and mask.stride(3) not in (0, 1):
        mask = mask.contiguous()
    batch, heads, lq, _ = student.shape
    loss = torch.zeros(batch, heads, lq, dtype=torch.float64)
    grad = torch.empty(student.shape if need_grad else (0,), dtype=student.dtype)
    if student.numel():
        _C.attention_maps(
            address(student), dtype_code(student), address(teacher), dtype_code(teacher),
            address(fresh(grad)) if need_grad else 0, address(mask), tuple(student.shape), student.stride()[:3],
            teacher.stride()[:3], mask.stride() if mask is not None else (0, 0, 0, 0), address(scale), address(loss), threads(),
        )  # fmt: skip
    return loss.sum(-1).to(scale.dtype), grad
