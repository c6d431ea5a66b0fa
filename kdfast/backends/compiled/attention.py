"""Attention maps of student and teacher compared on a CPU. Contract: `kdfast.backends`.

Three ways, each where it is fastest:
- Gram matrices for scores of long maps. Their GEMMs are torch's own (MKL or oneDNN), with operands of megabytes.
- `csrc/cpu/attention_direct.cpp` where there is a group of heads for every thread: scores, rows and gradients of 48 queries
  stay in the second-level cache, and one parallel region takes the place of five GEMM calls.
- torch's GEMMs around `attention_tile`, which works on rows in place, for the rest: few heads, odd or unequal head sizes.
All keep O(L) memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kdfast import _C, grams, memory
from kdfast.backends.compiled.extension import address, dtype_code, threads
from kdfast.grams import Inputs
from kdfast.options import ATTENTION_KINDS, AttentionOptions

#: Bytes of one tile of scores: with its twin for the teacher it stays in a second-level cache while rows are worked on.
_TILE_BYTES = 1 << 20
#: How much dearer a product in a Gram is than one of the fused kernel for short maps.
_GRAM_COST = 3


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
    if options.kind == "scores" and grams.preferred(x.q_s, x.k_t, options, _GRAM_COST if _group_a_thread(x) else 1):
        loss, grad_q, grad_k = grams.score_mse(x, scale, options, need_grad)
    else:
        loss, grad_q, grad_k = (_direct if _group_a_thread(x) else _tiled)(x, query_mask, key_mask, scale, options, need_grad)
    if grad_q is None or grad_k is None:
        return loss, q_s.new_empty(0), k_s.new_empty(0)
    return loss, _as(grad_q, q_s), _as(grad_k, k_s)


def _as(grad: Tensor, student: Tensor) -> Tensor:
    return grad if grad.dtype == student.dtype else grad.to(student.dtype)


@dataclass(frozen=True)
class _Tile:
    """Rows `rows` of the flattened `[R * Lq]` queries of groups `groups`, against the first `keys` keys."""

    groups: slice
    rows: slice
    keys: int
    whole: bool  # all groups, rows and keys

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.groups.stop - self.groups.start, self.rows.stop - self.rows.start, self.keys

    def of_queries(self, x: Tensor) -> Tensor:
        return x if self.whole else x[self.groups, self.rows]

    def of_keys(self, x: Tensor) -> Tensor:
        return x if self.whole else x[self.groups, : self.keys]


def _tiles(n: int, heads: int, lq: int, lk: int, causal: bool) -> Iterator[_Tile]:
    """Several whole groups a tile where they are small, else a part of one head: its rows see the same keys when causal."""
    group = heads * lq
    several = _TILE_BYTES // (4 * group * lk)
    if several >= 1:
        for begin in range(0, n, several):
            yield _Tile(slice(begin, min(n, begin + several)), slice(0, group), lk, several >= n)
        return
    step = max(16, _TILE_BYTES // (4 * lk))
    for g in range(n):
        for head in range(heads):
            for begin in range(0, lq, step):
                end = min(lq, begin + step)
                rows = slice(head * lq + begin, head * lq + end)
                yield _Tile(slice(g, g + 1), rows, min(lk, end) if causal else lk, False)


class _Products:
    """Tiles of score differences, in units of the student's scale, and of the teacher's products.

    Where head sizes are equal the difference is formed from differences of queries and keys (see `grams`): a tile is two
    products, as the student's and the teacher's scores would be, and exact however close the two are.
    """

    def __init__(self, x: Inputs, options: AttentionOptions) -> None:
        self.ratio = options.scale_t / options.scale_s
        self.q_s, self.q_t = (_queries(q, x.groups) for q in (x.q_s, x.q_t))
        self.k_s, self.k_t = (_keys(k, x.groups) for k in (x.k_s, x.k_t))
        self.close = x.same_size
        self._wide: tuple[Tensor, ...] | None = None
        if self.close:
            self.dq = grams.query_difference(self.q_s, self.q_t, self.ratio)
            self.dk = self.k_s - self.k_t

    def difference(self, tile: _Tile, out: Tensor) -> None:
        k_s, q_t = tile.of_keys(self.k_s), tile.of_queries(self.q_t)
        if self.close:
            torch.bmm(tile.of_queries(self.dq), k_s.mT, out=out)
            out.baddbmm_(q_t, tile.of_keys(self.dk).mT, alpha=self.ratio)
            return
        q_s = tile.of_queries(self.q_s)
        torch.bmm(q_s, k_s.mT, out=out)
        out.baddbmm_(q_t, tile.of_keys(self.k_t).mT, alpha=-self.ratio)
        if _cancelled(out, q_s, k_s):
            out.copy_(self._in_float64(tile))

    def _in_float64(self, tile: _Tile) -> Tensor:
        if self._wide is None:
            self._wide = tuple(x.double() for x in (self.q_s, self.k_s, self.q_t, self.k_t))
        q_s, k_s, q_t, k_t = self._wide
        out = torch.bmm(tile.of_queries(q_s), tile.of_keys(k_s).mT)
        return out.baddbmm_(tile.of_queries(q_t), tile.of_keys(k_t).mT, alpha=-self.ratio)

    def teacher(self, tile: _Tile, out: Tensor) -> None:
        torch.bmm(tile.of_queries(self.q_t), tile.of_keys(self.k_t).mT, out=out)


def _queries(q: Tensor, groups: int) -> Tensor:
    """`[N, R * Lq, D]`: the heads that see the same keys on both sides one after another."""
    return q.reshape(q.shape[0] * groups, -1, q.shape[3])


def _keys(k: Tensor, groups: int) -> Tensor:
    """`[N, Lk, D]`, repeated only where the other side's heads share fewer."""
    batch, heads, length, size = k.shape
    if heads == groups:
        return k.reshape(batch * heads, length, size)
    return k[:, :, None].expand(batch, heads, groups // heads, length, size).reshape(batch * groups, length, size)


def _cancelled(difference: Tensor, q_s: Tensor, k_s: Tensor) -> bool:
    """Whether the difference is small beside the student's scores, by their size if their directions were random."""
    scores = q_s.square().sum((-1, -2)) * k_s.square().sum((-1, -2)) / q_s.shape[-1]
    return bool((scores > grams.CANCELLED * difference.square().sum((-1, -2))).any())


def _group_a_thread(x: Inputs) -> bool:
    """Whether the fused kernel can take these: whole groups for every thread, and heads it has products for."""
    return x.same_size and x.q_s.shape[3] % 16 == 0 and x.q_s.shape[0] * x.groups >= threads()


def _direct(
    x: Inputs, query_mask: Tensor | None, key_mask: Tensor | None, scale: Tensor, options: AttentionOptions, need_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    q_s, q_t = (_queries(q, x.groups).contiguous() for q in (x.q_s, x.q_t))
    k_s, k_t = (_keys(k, x.groups).contiguous() for k in (x.k_s, x.k_t))
    (n, rows, size), lq, lk = q_s.shape, x.q_s.shape[2], k_s.shape[1]
    loss = torch.empty(n, rows, dtype=torch.float64)
    grads = (torch.empty(q_s.shape), torch.empty(k_s.shape)) if need_grad else (None, None)
    _C.attention_direct(
        ATTENTION_KINDS.index(options.kind), tuple(address(s) for s in (q_s, k_s, q_t, k_t)),
        (address(grads[0]), address(grads[1])),
        (n, x.groups, x.shared, lq, lk, size), address(query_mask), address(key_mask), address(scale), address(loss),
        options.scale_s, options.scale_t / options.scale_s, options.causal, threads(),
    )  # fmt: skip
    return grams.finish(x, loss.view(-1, lq).sum(-1).to(scale.dtype), *grads)


def _tiled(
    x: Inputs, query_mask: Tensor | None, key_mask: Tensor | None, scale: Tensor, options: AttentionOptions, need_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    products = _Products(x, options)
    q_s, k_s = products.q_s, products.k_s
    (n, rows, _), lq, lk = q_s.shape, x.q_s.shape[2], k_s.shape[1]
    softmax = options.kind != "scores"
    tiles = list(_tiles(n, x.shared, lq, lk, options.causal))
    room = [torch.empty(max(math.prod(t.sizes) for t in tiles)) for _ in range(1 + softmax)]
    loss = torch.zeros(n, rows, dtype=torch.float64)
    every_row = tiles[0].rows == slice(0, rows)
    grad_q = torch.empty(q_s.shape)
    grad_k = torch.empty(k_s.shape) if every_row else torch.zeros(k_s.shape)
    for tile in tiles:
        scores, *teacher = [r[: math.prod(tile.sizes)].view(tile.sizes) for r in room]
        products.difference(tile, scores)
        if softmax:
            products.teacher(tile, teacher[0])
        _C.attention_tile(
            ATTENTION_KINDS.index(options.kind), address(scores), address(teacher[0]) if softmax else 0, tile.sizes,
            tile.groups.start, tile.rows.start, x.groups, x.shared, lq, address(query_mask), address(key_mask), lk,
            address(scale), address(loss), options.scale_s, options.scale_t, options.causal, threads(),
        )  # fmt: skip
        if not need_grad:
            continue
        torch.bmm(scores, tile.of_keys(k_s), out=tile.of_queries(grad_q))
        if every_row:
            torch.bmm(scores.mT, tile.of_queries(q_s), out=tile.of_keys(grad_k))
        else:
            tile.of_keys(grad_k).baddbmm_(scores.mT, tile.of_queries(q_s))
    total = loss.view(n * x.shared, lq).sum(-1).to(scale.dtype)
    return grams.finish(x, total, *((grad_q, grad_k) if need_grad else (None, None)))


def map_forward(maps_s: Tensor, maps_t: Tensor, mask: Tensor | None, scale: Tensor, need_grad: bool) -> tuple[Tensor, Tensor]:
    student, teacher = (x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous() for x in (maps_s, maps_t))
    teacher = teacher.float() if teacher.dtype == torch.float64 else teacher
    if mask is not None and mask.stride(3) not in (0, 1):
        mask = mask.contiguous()
    batch, heads, lq, _ = student.shape
    loss = torch.zeros(batch, heads, lq, dtype=torch.float64)
    grad = memory.empty(student.shape if need_grad else (0,), dtype=student.dtype, device=student.device)
    if student.numel():
        _C.attention_maps(
            student.data_ptr(), dtype_code(student), teacher.data_ptr(), dtype_code(teacher),
            address(grad) if need_grad else 0, 0 if mask is None else mask.data_ptr(), tuple(student.shape),
            student.stride()[:3], teacher.stride()[:3], (0, 0, 0, 0) if mask is None else mask.stride(),
            address(scale), address(loss), threads(),
        )  # fmt: skip
    return loss.sum(-1).to(scale.dtype), grad
