"""||Hs Ws^T - Ht Wt^T||_F^2 through Gram matrices: (N + V) * D^2 work and not one logit.

With A = [Hs, -Ht] and B = [Ws, Wt] the difference of logits is A B^T and its squared norm <A^T A, B^T B>. The terms of that
sum cancel once student and teacher agree, so there is a ladder of forms, each exact on paper and each dearer and better
conditioned than the one before:

1. float32 Grams of [Hs, -Ht] and [Ws, Wt]; Wt^T Wt, the teacher's own, comes from a cache.
2. equal hidden sizes: float32 Grams of the difference basis [Hs - Ht, Ht] and [Ws, Ws - Wt]. With one head on both sides
   the second half is zero and this form alone remains.
3. the same in float64, in the difference basis where sizes allow.
4. the logits themselves in float64, a few vocabulary rows at a time.

`kept` says what is left of the terms after they cancelled; where it may be read (on a CPU) a form that keeps too little
hands over to the next. What is O(V * D) is done in chunks of vocabulary rows, and chunk products are summed in float64:
that costs D^2 a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdfast import memory
from kdfast.chunks import Needs, Side, grad_buffers, grad_hidden_dtype
from kdfast.head_grams import Head, chunks, column_mean, head_chunk, head_of, square

#: Bytes of the block of logits that the last form holds.
_BLOCK_BYTES = 32 << 20


@dataclass(frozen=True)
class Problem:
    """Hidden states `[N, Ds]`, `[N, Dt]` with rows that do not count zeroed, heads `[V, Ds]`, `[V, Dt]`.

    `head_s` lives for one call, so that several forms share a Gram; `head_t` may come from an earlier one.
    """

    hidden_s: Tensor
    weight_s: Tensor
    hidden_t: Tensor
    weight_t: Tensor
    head_s: Head
    head_t: Head
    needs: Needs

    @property
    def vocab(self) -> int:
        return self.weight_s.shape[0]

    @property
    def equal_sizes(self) -> bool:
        return self.weight_s.shape == self.weight_t.shape

    def head_difference(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Rows of Ws - Wt, both centred. Means are subtracted afterwards: before, their rounding would be most of it."""
        difference = self.weight_s[rows].to(dtype) - self.weight_t[rows].to(dtype)
        if self.head_s.mean is None or self.head_t.mean is None:
            return difference
        return difference - (self.head_s.mean - self.head_t.mean).to(dtype)

    @property
    def one_head(self) -> bool:
        s, t = self.weight_s, self.weight_t
        return self.equal_sizes and s.dtype == t.dtype and s.data_ptr() == t.data_ptr() and s.stride() == t.stride()


Gradients = Callable[[Tensor], tuple["Tensor | None", "Tensor | None"]]


@dataclass(frozen=True)
class Solution:
    """Squared norm (float64, on the device), the share of its terms that did not cancel, and its gradients.

    `gradients(factor)` gives factor times half the gradients of hidden and head.
    """

    value: Tensor
    kept: Tensor
    gradients: Gradients


def _products(parts: Iterator[tuple[Tensor, Tensor]], first: bool, second: bool) -> list[Tensor]:
    """X^T Y of two tall matrices that come in chunks, then X^T X if `first`, Y^T Y if `second`; summed in float64."""
    sums: list[Tensor] = []
    for x, y in parts:
        products = [x.t() @ y, *([square(x)] if first else []), *([square(y)] if second else [])]
        sums = [p.double() for p in products] if not sums else [s.add_(p) for s, p in zip(sums, products, strict=True)]
    return sums


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.reshape(-1), b.reshape(-1))


def _kept(value: Tensor, *terms: Tensor) -> Tensor:
    size = torch.stack([t.abs() for t in terms]).sum()
    # Terms that are all zero cancel nothing, and a NaN will be the same in every form.
    return torch.where((size == 0) | size.isnan(), 1.0, value / size)


def plain(p: Problem, dtype: torch.dtype) -> Solution:
    """From [Hs, -Ht] and [Ws, Wt] in `dtype`."""
    hidden_s, hidden_t = p.hidden_s.to(dtype), p.hidden_t.to(dtype)
    h_st, h_ss, h_tt = _products(((hidden_s[r], hidden_t[r]) for r in chunks(hidden_s.shape[0])), True, True)

    def heads() -> Iterator[tuple[slice, Tensor, Tensor]]:
        for rows in chunks(p.vocab):
            yield rows, head_chunk(p.weight_s, p.head_s.mean, rows, dtype), head_chunk(p.weight_t, p.head_t.mean, rows, dtype)

    w_ss = p.head_s.gram(p.weight_s, dtype)
    (w_st,) = _products(((s, t) for _, s, t in heads()), False, False)
    terms = _inner(h_ss, w_ss), -2 * _inner(h_st, w_st), _inner(h_tt, p.head_t.gram(p.weight_t, dtype))
    value = terms[0] + terms[1] + terms[2]

    def gradients(factor: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden = weight = None
        if p.needs.hidden:
            hidden = torch.addmm(hidden_s @ (factor * w_ss).to(dtype), hidden_t, (factor * w_st.t()).to(dtype), alpha=-1)
        if p.needs.weight:
            weight = _empty_like(p.weight_s)
            by_s, by_t = (factor * h_ss).to(dtype), (factor * h_st.t()).to(dtype)
            for rows, s, t in heads():
                _add_up(weight[rows], s, by_s, t, -by_t)
        return hidden, weight

    return Solution(value, _kept(value, *terms), gradients)


def difference(p: Problem, dtype: torch.dtype) -> Solution:
    """From [Hs - Ht, Ht] and [Ws, Ws - Wt] in `dtype`; hidden sizes are equal."""
    hidden_t = p.hidden_t.to(dtype)
    hidden_d = p.hidden_s.to(dtype) - hidden_t
    h_dt, h_dd, h_tt = _products(((hidden_d[r], hidden_t[r]) for r in chunks(hidden_t.shape[0])), True, True)
    if p.one_head:
        return _one_head(p, dtype, hidden_d, h_dd, h_dt)

    def heads() -> Iterator[tuple[slice, Tensor, Tensor]]:
        for rows in chunks(p.vocab):
            yield rows, head_chunk(p.weight_s, p.head_s.mean, rows, dtype), p.head_difference(rows, dtype)

    w_ss = p.head_s.gram(p.weight_s, dtype)
    w_sd, w_dd = _products(((s, d) for _, s, d in heads()), False, True)
    terms = _inner(h_dd, w_ss), 2 * _inner(h_dt, w_sd), _inner(h_tt, w_dd)
    value = terms[0] + terms[1] + terms[2]

    def gradients(factor: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden = weight = None
        if p.needs.hidden:
            hidden = torch.addmm(hidden_d @ (factor * w_ss).to(dtype), hidden_t, (factor * w_sd.t()).to(dtype))
        if p.needs.weight:
            weight = _empty_like(p.weight_s)
            by_s, by_d = (factor * (h_dd + h_dt)).to(dtype), (factor * (h_dt.t() + h_tt)).to(dtype)
            for rows, s, d in heads():
                _add_up(weight[rows], s, by_s, d, by_d)
        return hidden, weight

    return Solution(value, _kept(value, *terms), gradients)


def _one_head(p: Problem, dtype: torch.dtype, hidden_d: Tensor, h_dd: Tensor, h_dt: Tensor) -> Solution:
    w_ss = p.head_t.gram(p.weight_t, dtype)

    def gradients(factor: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden = hidden_d @ (factor * w_ss).to(dtype) if p.needs.hidden else None
        weight = None
        if p.needs.weight:
            weight, by = _empty_like(p.weight_s), (factor * (h_dd + h_dt)).to(dtype)
            for rows in chunks(p.vocab):
                weight[rows] = head_chunk(p.weight_s, p.head_s.mean, rows, dtype) @ by
        return hidden, weight

    value = _inner(h_dd, w_ss)
    return Solution(value, torch.ones_like(value), gradients)


def direct(p: Problem, dtype: torch.dtype) -> Solution:
    """From the differences of logits in `dtype`, a block of vocabulary rows at a time; nothing of N x V is held."""
    hidden_s, hidden_t = p.hidden_s.to(dtype), p.hidden_t.to(dtype)
    first = hidden_s - hidden_t if p.equal_sizes else hidden_s
    hidden = torch.zeros_like(hidden_s) if p.needs.hidden else None
    weight = _empty_like(p.weight_s) if p.needs.weight else None
    terms = [torch.zeros((), dtype=torch.float64, device=hidden_s.device) for _ in range(2)]
    for rows in chunks(p.vocab, max(1, _BLOCK_BYTES // (hidden_s.shape[0] * dtype.itemsize))):
        s = head_chunk(p.weight_s, p.head_s.mean, rows, dtype)
        z = first @ s.t()
        terms[0] += _squares(z)
        # Where sizes allow: (Hs - Ht) Ws^T + Ht (Ws - Wt)^T, which cancels less than Hs Ws^T - Ht Wt^T.
        if p.equal_sizes:
            z.addmm_(hidden_t, p.head_difference(rows, dtype).t())
        else:
            z.addmm_(hidden_t, head_chunk(p.weight_t, p.head_t.mean, rows, dtype).t(), alpha=-1)
        terms[1] += _squares(z)
        if hidden is not None:
            hidden.addmm_(z, s)
        if weight is not None:
            weight[rows] = z.t() @ hidden_s

    def gradients(factor: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return None if hidden is None else hidden.mul_(factor), None if weight is None else weight.mul_(factor)

    return Solution(terms[1], _kept(terms[1], terms[0]), gradients)


def _add_up(out: Tensor, a: Tensor, by_a: Tensor, b: Tensor, by_b: Tensor) -> None:
    """out = a @ by_a + b @ by_b."""
    if out.dtype == a.dtype:
        torch.mm(a, by_a, out=out)
        out.addmm_(b, by_b)
    else:
        out.copy_(torch.addmm(a @ by_a, b, by_b))


def _squares(z: Tensor) -> Tensor:
    return torch.linalg.vector_norm(z, dim=1).double().square().sum()


def _empty_like(weight: Tensor) -> Tensor:
    """A gradient of a head: float32, or float64 beside float64."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return memory.empty(weight.shape, dtype=dtype, device=weight.device)


def gram_is_cheaper(n: int, vocab: int, student_dim: int, teacher_dim: int) -> bool:
    """Whether Grams take fewer multiplications than logits, both with gradients of hidden and head."""
    grams = (n + vocab) * 2 * student_dim * (student_dim + teacher_dim) + n * teacher_dim**2
    return grams < n * vocab * (3 * student_dim + teacher_dim)


def uses_grams(p: Problem, method: str) -> bool:
    """Whether `method` means Grams here."""
    if method != "auto":
        return method == "gram"
    return gram_is_cheaper(p.hidden_s.shape[0], p.vocab, p.weight_s.shape[1], p.weight_t.shape[1])


@dataclass(frozen=True)
class Rung:
    """A form of the ladder in a dtype, and the least share of its terms that must be left for its value to be used."""

    form: Callable[[Problem, torch.dtype], Solution]
    dtype: torch.dtype
    keep: float


def climbed(p: Problem, ladder: Sequence[Rung]) -> Solution:
    """The first form that keeps enough, or the last; reads `kept` on the host."""
    for rung in ladder[:-1]:
        solution = rung.form(p, rung.dtype)
        if float(solution.kept) >= rung.keep:
            return solution
    return ladder[-1].form(p, ladder[-1].dtype)


def solve(
    choose: Callable[[Problem, str], Solution],
    student: Side,
    teacher: Side,
    mask: Tensor | None,
    center: bool,
    method: str,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients of hidden and head, by the form that `choose(problem, method)` picks."""
    n, double = student.hidden.shape[0], student.weight.dtype == torch.float64
    if n == 0:
        hidden, weight, _ = grad_buffers(student, needs)
        return weight.new_zeros(()), hidden, weight.zero_()
    hidden_s, hidden_t = student.hidden, teacher.hidden
    if mask is not None:
        hidden_s, hidden_t = (torch.where(mask[:, None], h, 0) for h in (hidden_s, hidden_t))
    head_s = Head(column_mean(student.weight) if center else None)
    p = Problem(hidden_s, student.weight, hidden_t, teacher.weight, head_s, head_of(teacher.weight, center), needs)
    solution = choose(p, method)
    # Not torch.tensor(n): a copy of the host's number is one the host waits for.
    counts = hidden_s.new_full((), n, dtype=torch.int64) if mask is None else mask.sum().clamp(min=1)
    elements = counts.double() * p.vocab
    loss = (solution.value / elements).clamp(min=0).to(torch.float64 if double else torch.float32)
    of_hidden, of_weight = solution.gradients(2 / elements) if needs.any else (None, None)
    return (
        loss,
        (loss.new_empty(0) if of_hidden is None else of_hidden).to(grad_hidden_dtype(student.hidden)),
        loss.new_empty(0) if of_weight is None else of_weight,
    )
