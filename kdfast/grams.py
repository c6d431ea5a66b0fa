"""Score differences from Gram matrices: what every backend shares of `attention_mse(on="scores")`.

The difference of two score matrices is one product E = c Q K^T, with the two sides' queries and keys side by side:

    Q = [Qs, -r Qt]      K = [Ks, Kt]           r = scale_t / scale_s, c = scale_s
    Q = [Qs - r Qt, r Qt]  K = [Ks, Ks - Kt]    the difference basis, where head sizes are equal: the same product

and sum E^2 = c^2 <Q^T Q, K^T K>, E Ks = c Q (K^T Ks): nothing of size L x L. In the first basis both fail once student and
teacher agree, because two large numbers are subtracted (relative error 1e-2 of the value at distance 1e-3 in
float32); in the difference basis each term is as small as the difference itself.

The products are torch's: a Gram matrix of width 128 over 2048 positions runs at 0.9 of the rate of a 1024-cubed GEMM on a
CPU with MKL. On a GPU only causal pairs come here; all pairs have kernels (`kdfast.backends.triton.attention_grams`).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kdfast.options import AttentionOptions

#: Terms this much larger than their sum are summed again in float64.
CANCELLED = 1e2


@dataclass(frozen=True)
class Inputs:
    """Cleaned inputs: float32 or wider, zero where a mask leaves a position out.

    `shared` consecutive query heads see the same keys on both sides; they form one of `groups` groups.
    """

    q_s: Tensor
    k_s: Tensor
    q_t: Tensor
    k_t: Tensor

    @functools.cached_property
    def shared(self) -> int:
        heads = self.q_s.shape[1]
        return math.gcd(heads // self.k_s.shape[1], heads // self.k_t.shape[1])

    @functools.cached_property
    def groups(self) -> int:
        return self.q_s.shape[1] // self.shared

    @property
    def same_size(self) -> bool:
        return self.q_s.shape[3] == self.q_t.shape[3]

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(*(x.to(dtype) for x in (self.q_s, self.k_s, self.q_t, self.k_t)))


def clean(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, query_mask: Tensor | None, key_mask: Tensor | None) -> Inputs:
    """Widened inputs whose masked positions are 0, whatever they held."""

    def one(x: Tensor, mask: Tensor | None) -> Tensor:
        if x.dtype != torch.float32:
            x = x.float()
        return x if mask is None else x.masked_fill(~mask[:, None, :, None], 0)

    return Inputs(one(q_s, query_mask), one(k_s, key_mask), one(q_t, query_mask), one(k_t, key_mask))


@dataclass(frozen=True)
class Basis:
    """Q `[N, R, Lq, w]` and K `[N, Lk, w]` with E = factor * Q K^T; N = batch x groups, R query heads a group.

    In the difference basis the student's queries are the sum of both halves of Q; else they are the first half.
    """

    q: Tensor
    k: Tensor
    width: int  # of the student's half
    factor: float
    difference: bool

    def student_queries(self, product: Tensor) -> Tensor:
        """X^T Qs from X^T Q: `[..., w]` -> `[..., width]`."""
        first = product[..., : self.width]
        return first + product[..., self.width :] if self.difference else first


def basis(x: Inputs, options: AttentionOptions, *, difference: bool, multiple: int = 1) -> Basis:
    """Queries and keys side by side; lengths are padded with zeros to a common multiple when `multiple` is above 1."""
    batch, heads, lq, ds = x.q_s.shape
    lk, dt = x.k_s.shape[2], x.q_t.shape[3]
    if multiple > 1:
        padded = -(-lq // multiple) * multiple
        q = x.q_s.new_zeros(batch, heads, padded, ds + dt)
        k = x.q_s.new_zeros(batch, x.groups, padded, ds + dt)
        lk = min(lk, padded)
    else:
        q = x.q_s.new_empty(batch, heads, lq, ds + dt)
        k = x.q_s.new_empty(batch, x.groups, lk, ds + dt)
    ratio = options.scale_t / options.scale_s
    _fill_queries(q[:, :, :lq, :ds], q[:, :, :lq, ds:], x, ratio, difference)
    student, teacher = k[:, :, :lk, :ds], k[:, :, :lk, ds:]
    k_s, k_t = x.k_s[:, :, :lk], x.k_t[:, :, :lk]
    _by_key_head(student, k_s).copy_(k_s[:, :, None])
    if difference:
        torch.sub(_by_key_head(student, k_t), k_t[:, :, None], out=_by_key_head(teacher, k_t))
    else:
        _by_key_head(teacher, k_t).copy_(k_t[:, :, None])
    q = q.view(batch * x.groups, x.shared, q.shape[2], ds + dt)
    return Basis(q, k.view(batch * x.groups, k.shape[2], ds + dt), ds, options.scale_s, difference)


def _by_key_head(groups: Tensor, keys: Tensor) -> Tensor:
    """`[B, G, ...]` as `[B, Hk, G / Hk, ...]`: the groups that see each key head."""
    return groups.unflatten(1, (keys.shape[1], -1))


def query_difference(q_s: Tensor, q_t: Tensor, ratio: float) -> Tensor:
    """q_s - ratio * q_t, rounded once: rounding the product first would cost what the difference basis is for."""
    if ratio == 1:
        return q_s - q_t
    return q_s.double().sub_(q_t.double(), alpha=ratio).to(q_s.dtype)


def _fill_queries(student: Tensor, teacher: Tensor, x: Inputs, ratio: float, difference: bool) -> None:
    if difference and ratio == 1:
        torch.sub(x.q_s, x.q_t, out=student)
        teacher.copy_(x.q_t)
        return
    student.copy_(query_difference(x.q_s, x.q_t, ratio) if difference else x.q_s)
    torch.mul(x.q_t, ratio if difference else -ratio, out=teacher)


@dataclass(frozen=True)
class Result:
    """loss `[N, R]`; magnitude `[N, R]`, the sum of the terms that the loss is left of; gradients, or None.

    grad_q `[N, R, Lq, ds]`, grad_k `[N, Lk, ds]`.
    """

    loss: Tensor
    magnitude: Tensor
    grad_q: Tensor | None
    grad_k: Tensor | None


def gram(b: Basis, scale: Tensor, need_grad: bool) -> Result:
    """All pairs, in work linear in both lengths. scale: `[N, R]`."""
    n, r, lq, w = b.q.shape
    rows = b.q.view(n * r, lq, w)
    gram_q = torch.bmm(rows.mT, rows).view(n, r, w, w)
    gram_k = torch.bmm(b.k.mT, b.k)
    loss, magnitude = _inner(b, gram_q, gram_k[:, None], scale)
    if not need_grad:
        return Result(loss, magnitude, None, None)
    factor = (2 * b.factor**2 * scale)[..., None, None]
    to_q = gram_k[:, None, :, : b.width] * factor
    to_k = (b.student_queries(gram_q) * factor).sum(1)
    grad_q = torch.bmm(rows, to_q.view(n * r, w, b.width)).view(n, r, lq, b.width)
    return Result(loss, magnitude, grad_q, torch.bmm(b.k, to_k))


def causal_gram(b: Basis, scale: Tensor, chunk: int, need_grad: bool) -> Result:
    """Pairs with key <= query: running Gram matrices between chunks, direct products inside. Lengths are padded to chunks."""
    n, r, length, w = b.q.shape
    count = length // chunk
    q, k = b.q.view(n, r, count, chunk, w), b.k.view(n, count, chunk, w)
    gram_q, gram_k = q.mT @ q, k.mT @ k
    before = torch.zeros_like(gram_k)  # the keys of all earlier chunks
    torch.cumsum(gram_k[:, :-1], 1, out=before[:, 1:])
    loss, magnitude = _inner(b, gram_q, before[:, None], scale[..., None])
    inside = torch.matmul(q, k.mT[:, None]).tril_()
    loss, magnitude = loss.sum(-1), magnitude.sum(-1)
    diagonal = b.factor**2 * scale * inside.square().sum((-1, -2, -3))
    loss, magnitude = loss + diagonal, magnitude + diagonal
    if not need_grad:
        return Result(loss, magnitude, None, None)
    factor = (2 * b.factor**2 * scale)[..., None, None, None]
    inside.mul_(factor)
    grad_q = torch.matmul(q, before[:, None, :, :, : b.width] * factor)
    grad_q += torch.matmul(inside, k[:, None, :, :, : b.width])
    after = (b.student_queries(gram_q) * factor).sum(1).flip(1)
    after = torch.cat([torch.zeros_like(after[:, :1]), after[:, :-1].cumsum(1)], 1).flip(1)  # the queries of all later chunks
    grad_k = torch.matmul(k, after)
    grad_k += torch.matmul(inside.mT, b.student_queries(q)).sum(1)
    return Result(loss, magnitude, grad_q.view(n, r, length, b.width), grad_k.view(n, length, b.width))


def _inner(b: Basis, gram_q: Tensor, gram_k: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of squares, the size of its two diagonal terms), both times scale."""
    product = gram_q * gram_k
    factor = b.factor**2 * scale
    own = product[..., : b.width, : b.width].sum((-1, -2)) + product[..., b.width :, b.width :].sum((-1, -2))
    return product.sum((-1, -2)).clamp_(min=0) * factor, own * factor


def preferred(q_s: Tensor, k_t: Tensor, options: AttentionOptions, cost: float = 1) -> bool:
    """Whether Grams are asked for, or cost less than scores do; `cost`: of a Gram's product, in the direct kernel's."""
    if options.method != "auto":
        return options.method == "gram"
    (lq, ds), (lk, dt) = q_s.shape[2:], k_t.shape[2:]
    return 2 * lq * lk > cost * (lq + lk) * (ds + dt)


def score_mse(
    x: Inputs, scale: Tensor, options: AttentionOptions, need_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss `[B, H]` and gradients `[B, H, Lq, ds]`, `[B, Hk, Lk, ds]` (or None) by Gram matrices.

    On a CPU the groups whose terms cancel by more than `CANCELLED` are done again in float64, which is asked of the
    host. On a GPU, where the host must not wait, unequal head sizes are done in float64 from the start.
    """
    scale_n = scale.view(-1, x.shared)
    on_gpu = scale.device.type != "cpu"
    wide = on_gpu and not x.same_size
    result = _once(x.to(torch.float64) if wide else x, scale_n, options, x.same_size, need_grad)
    if not on_gpu and scale.dtype == torch.float32:
        result = _redo_cancelled(result, x, scale_n, options, need_grad)
    return finish(x, result.loss, result.grad_q, result.grad_k)


def _once(x: Inputs, scale: Tensor, options: AttentionOptions, difference: bool, need_grad: bool) -> Result:
    if not options.causal:
        return gram(basis(x, options, difference=difference), scale, need_grad)
    chunk = min(_chunk(x), max(x.q_s.shape[2], 1))
    return causal_gram(basis(x, options, difference=difference, multiple=max(chunk, 2)), scale, max(chunk, 2), need_grad)


def _chunk(x: Inputs) -> int:
    """Where direct products cost about what the Gram matrices do."""
    return max(32, min(256, x.q_s.shape[3] + x.q_t.shape[3]))


def _redo_cancelled(result: Result, x: Inputs, scale: Tensor, options: AttentionOptions, need_grad: bool) -> Result:
    bad = (result.magnitude > CANCELLED * result.loss).any(1)
    if not bool(bad.any()):
        return result
    # Straight from the inputs: in float64 the plain basis has digits to spare, and rounds nothing on the way.
    index = bad.nonzero()[:, 0]
    again = _once(_groups(x, index), scale[index].double(), options, False, need_grad)
    for old, new in ((result.loss, again.loss), (result.grad_q, again.grad_q), (result.grad_k, again.grad_k)):
        if old is not None and new is not None:
            old[index] = new.to(old.dtype)
    return result


def _groups(x: Inputs, index: Tensor) -> Inputs:
    """These of the batch x groups groups, in float64, each as a batch of its own."""
    batch, keys = index // x.groups, index % x.groups * x.shared
    heads = keys[:, None] + torch.arange(x.shared, device=index.device)
    total = x.q_s.shape[1]

    def key_heads(k: Tensor) -> Tensor:
        return k[batch, keys // (total // k.shape[1])][:, None].double()

    q_s, q_t = (q[batch[:, None], heads].double() for q in (x.q_s, x.q_t))
    return Inputs(q_s, key_heads(x.k_s), q_t, key_heads(x.k_t))


def finish(
    x: Inputs, loss: Tensor, grad_q: Tensor | None, grad_k: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """From groups to batch and heads: padding is cut off, key heads add up what their groups say."""
    shape, keys = x.q_s.shape, x.k_s.shape
    if grad_q is None or grad_k is None:
        return loss.view(shape[:2]), None, None
    if grad_q.numel() == shape.numel() and grad_k.numel() == keys.numel():
        return loss.view(shape[:2]), grad_q.view(shape), grad_k.view(keys)
    grad_q = grad_q.view(*shape[:2], -1, shape[3])[:, :, : shape[2]]
    if grad_k.shape[1] < keys[2]:  # causal keys beyond the last query are seen by none
        grad_k = torch.nn.functional.pad(grad_k, (0, 0, 0, keys[2] - grad_k.shape[1]))
    return loss.view(shape[:2]), grad_q, grad_k[:, : keys[2]].unflatten(0, (*keys[:2], -1)).sum(2)
