"""linear_kd_loss: the same numbers as kd_loss on materialised logits, without ever holding them."""

from __future__ import annotations

import os
import subprocess
import sys

import plain
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import linear_kd_loss, use_backend
from kdfast.chunks import cut, rows_per_chunk
from kdfast.options import RowOptions

BACKENDS = ["cpp", "reference"]
OPTIONS = {"temperature": 2.0, "soft_weight": 0.7, "hard_weight": 0.3}
LEAD = (3, 37)


def heads(
    dtype: torch.dtype, bias: bool, vs: int = 301, vt: int = 301
) -> tuple[list[Tensor | None], list[Tensor | None], Tensor]:
    """(student hidden, weight, bias), (teacher hidden, weight, bias), labels."""
    sides = []
    for vocab, width in ((vs, 32), (vt, 48)):
        side = [torch.randn(*LEAD, width), torch.randn(vocab, width) / 4, torch.randn(vocab) if bias else None]
        sides.append([None if x is None else x.to(dtype) for x in side])
    labels = torch.randint(0, vs, LEAD)
    labels[1, :5] = -100
    return sides[0], sides[1], labels


def eager(student: list[Tensor | None], teacher: list[Tensor | None], labels: Tensor) -> Tensor:
    return plain.rows(F.linear(*student), F.linear(*teacher), labels, temperature=2.0, soft=0.7, hard=0.3)


def run(loss, student: list[Tensor | None], dtype: torch.dtype, upstream: Tensor) -> tuple[Tensor, list[Tensor]]:
    leaves = [None if x is None else x.to(dtype).detach().requires_grad_() for x in student]
    value = loss(leaves)
    grads = torch.autograd.grad(value, [x for x in leaves if x is not None], upstream.to(value.dtype))
    return value.detach().double(), [g.double() for g in grads]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("reduction", ["mean", "none"], ids=["in-forward", "in-backward"])
@pytest.mark.parametrize("workspace_mb", [None, 0.1], ids=["one-chunk", "chunks-with-remainder"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_value_and_gradients(bias: bool, workspace_mb: float | None, reduction: str, dtype: torch.dtype, backend: str) -> None:
    student, teacher, labels = heads(dtype, bias)
    upstream = torch.rand(LEAD) + 0.5 if reduction == "none" else torch.tensor(1.7)

    def cast(side: list[Tensor | None], like: Tensor) -> list[Tensor | None]:
        return [None if x is None else x.to(like.dtype) for x in side]

    def theirs(leaves: list[Tensor]) -> Tensor:
        loss = eager(leaves, cast(teacher, leaves[0]), labels)
        return plain.mean(loss, labels) if reduction == "mean" else torch.where(labels != -100, loss, 0)

    def ours(leaves: list[Tensor]) -> Tensor:
        h, w, b = cast(teacher, leaves[0])
        return linear_kd_loss(
            leaves[0], leaves[1], h, w, labels, student_bias=leaves[2], teacher_bias=b, reduction=reduction,
            workspace_mb=workspace_mb, **OPTIONS,
        )  # fmt: skip

    truth, truth_grads = run(theirs, student, torch.float64, upstream)
    value, grads = run(theirs, student, dtype, upstream)
    with use_backend(backend):
        our_value, our_grads = run(ours, student, dtype, upstream)
    plain.assert_as_good(our_value, value, truth, dtype, "value")
    for name, a, b, c in zip(("hidden", "weight", "bias"), our_grads, grads, truth_grads, strict=False):
        plain.assert_as_good(a, b, c, dtype, f"gradient of {name}")


def test_sizes_that_differ_and_parts() -> None:
    (h, w, _), (ht, wt, _), labels = heads(torch.float32, bias=False, vs=301, vt=277)
    loss, parts = linear_kd_loss(h, w, ht, wt, labels, workspace_mb=0.05, return_parts=True, **OPTIONS)
    truth = plain.mean(eager([h.double(), w.double()], [ht.double(), wt.double()], labels), labels)
    assert torch.allclose(loss.double(), truth, rtol=1e-5)
    assert parts.soft.count == (labels != -100).sum()
    hard = F.cross_entropy(F.linear(h, w).flatten(0, 1), labels.flatten())
    assert torch.allclose(parts.hard.mean, hard, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_side_gets_no_gradient(frozen: str, backend: str) -> None:
    (h, w, _), (ht, wt, _), labels = heads(torch.float32, bias=False)
    h.requires_grad_(frozen != "hidden"), w.requires_grad_(frozen != "weight")
    with use_backend(backend):
        linear_kd_loss(h, w, ht, wt, labels, **OPTIONS).backward()
    assert (h.grad is None) == (frozen == "hidden")
    assert (w.grad is None) == (frozen == "weight")


def test_no_gradient_without_grad_mode() -> None:
    (h, w, _), (ht, wt, _), labels = heads(torch.float32, bias=False)
    with torch.no_grad():
        loss = linear_kd_loss(h.requires_grad_(), w.requires_grad_(), ht, wt, labels, **OPTIONS)
    assert not loss.requires_grad


def test_backward_twice() -> None:
    (h, w, _), (ht, wt, _), labels = heads(torch.float32, bias=False)
    w.requires_grad_()
    loss = linear_kd_loss(h, w, ht, wt, labels, **OPTIONS)
    (first,) = torch.autograd.grad(loss, w, torch.tensor(3.0), retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, w, torch.tensor(0.5))
    assert torch.equal(first, kept)
    assert torch.allclose(first, 6 * second)


def test_tied_weight_and_hidden_of_another_dtype() -> None:
    """The head is also what made the hidden states, and autocast left those in bfloat16."""
    weight = torch.randn(97, 16, requires_grad=True)
    ids = torch.randint(0, 97, (4, 9))
    teacher = torch.randn(4, 9, 16)

    def loss(fused: bool) -> Tensor:
        hidden = F.embedding(ids, weight).bfloat16()
        if fused:
            return linear_kd_loss(hidden, weight, teacher, weight.detach(), ids, **OPTIONS)
        return plain.rows(
            hidden.float() @ weight.T, teacher @ weight.detach().T, ids, temperature=2.0, soft=0.7, hard=0.3
        ).mean()

    (ours,) = torch.autograd.grad(loss(True), weight)
    (theirs,) = torch.autograd.grad(loss(False), weight)
    assert plain.error(ours, theirs.double()) < 4e-3  # the hidden's gradient is rounded to bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lead", [(0,), (2, 0)])
def test_empty(lead: tuple[int, ...], backend: str) -> None:
    w = torch.randn(20, 8, requires_grad=True)
    with use_backend(backend):
        loss = linear_kd_loss(torch.randn(*lead, 8), w, torch.randn(*lead, 8), w.detach(), torch.zeros(lead, dtype=torch.long))
    loss.backward()
    assert float(loss.detach()) == 0
    assert (w.grad == 0).all()


MEMORY_SCRIPT = """
import torch
from kdfast import linear_kd_loss
h, w = torch.randn(6144, 8), torch.randn(4000, 8).requires_grad_()
linear_kd_loss(h[:8], w, h[:8], w.detach()).backward()

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
before = peak()
linear_kd_loss(h, w, h, w.detach(), workspace_mb=%g).backward()
print((peak() - before) / 1024)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to reset the peak of memory")
def test_workspace_bounds_the_logits() -> None:
    """Peak memory stays near workspace_mb; the logits of both sides together are 188 MiB."""
    grown = {}
    for mb in (16, 400):
        result = subprocess.run([sys.executable, "-c", MEMORY_SCRIPT % mb], capture_output=True, check=True)
        grown[mb] = float(result.stdout)
    assert grown[16] < 30, grown
    assert grown[400] > 150, grown  # the measurement can see logits


@pytest.mark.parametrize(
    ("n", "bytes_per_row", "workspace_mb", "expected"),
    [
        (100, 4096, 256, 100),  # everything fits
        (4096, 256_000, 256, 1024),  # even chunks, multiples of 256
        (1100, 256_000, 256, 768),  # even chunks rather than 1024 and a sliver
        (1000, 4 << 20, 64, 16),  # fewer than 256 rows fit
        (10, 1 << 30, 1, 1),  # not even one row fits: one at a time
    ],
)
def test_rows_per_chunk(n: int, bytes_per_row: int, workspace_mb: float, expected: int) -> None:
    assert rows_per_chunk(n, bytes_per_row, workspace_mb << 20) == expected


@pytest.mark.parametrize(
    ("n", "vocab", "budget_mb", "expected"),
    [
        (1000, 1000, 64, (1000, 1000)),  # everything fits: one chunk, one product
        (8192, 128256, 1024, (512, 2048)),  # four chunks of gradient wait for one product
        (8192, 128256, 4096, (2048, 4096)),  # a workspace large enough for products of twice as many rows
        (8192, 151936, 256, (110, 440)),  # not even 256 rows fit: waiting gradients take half
        (10, 1 << 28, 1, (1, 1)),
    ],
    ids=["all", "batches", "large", "narrow", "one-row"],
)
def test_gradients_of_several_chunks_wait(n: int, vocab: int, budget_mb: int, expected: tuple[int, int]) -> None:
    rows, waiting = cut(n, 8 * vocab, 2 * vocab, budget_mb << 20)
    assert (rows, waiting) == expected
    assert waiting % rows == 0
    assert rows == 1 or rows * 8 * vocab + waiting * 2 * vocab <= budget_mb << 20


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_and_func(reduction: str) -> None:
    (h, w, _), (ht, wt, _), labels = heads(torch.float32, bias=False)

    def loss(x: Tensor) -> Tensor:
        return (linear_kd_loss(h, x, ht, wt, labels, reduction=reduction, **OPTIONS) * 1.5).sum()

    _, expected = plain.gradient(loss, w, torch.float32)
    _, compiled = plain.gradient(torch.compile(loss, fullgraph=True, backend="aot_eager"), w, torch.float32)
    functional = torch.func.grad(loss)(w)
    assert torch.allclose(compiled, expected, rtol=1e-5, atol=1e-8)
    assert torch.allclose(functional.double(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", [None, torch.arange(4, 111)], ids=["all-rows", "row-index"])
def test_opcheck(index: Tensor | None, backend: str) -> None:
    (h, w, b), (ht, wt, bt), labels = heads(torch.float32, bias=True)
    labels[0, :4] = -100
    options = RowOptions(temperature=2.0, soft_weight=0.7, hard_weight=0.3)
    rows = [h.flatten(0, 1), w, b, [ht.flatten(0, 1)], [wt], [bt], labels.flatten(), (labels != -100).float().flatten(), index]
    scalars = ([], *options.values, 0.1, torch.float32, None, "", False, 0, False, backend, True, True, True, True, True)
    torch.library.opcheck(torch.ops.kdfast.linear.default, (*rows, *scalars))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_hidden": torch.randn(4, 9)}, r"student_hidden: expected shape \[..., 8\] to match student_weight \[20, 8\]"),
        ({"teacher_hidden": torch.randn(5, 8)}, r"teacher_hidden: expected leading dimensions \[4\] .* got \[5\]"),
        ({"student_weight": torch.randn(8)}, r"student_weight: expected shape \[V, D\]"),
        ({"teacher_bias": torch.randn(19)}, r"teacher_bias: expected shape \[20\]"),
        ({"student_bias": torch.randn(20, device="meta")}, r"student_bias: expected device cpu like student_hidden, got meta"),
        ({"teacher_bias": torch.ones(20, dtype=torch.int64)}, r"teacher_bias: expected dtype float32.* got torch\.int64"),
        ({"workspace_mb": 0}, "workspace_mb: expected a finite number above 0, got 0"),
        ({"labels": torch.full((4,), 20)}, "labels: row 0 has label 20, expected 0 <= label < 20"),
        ({"student_hidden": torch.full((4, 8), torch.nan)}, "row 0 has loss NaN"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input(change: dict[str, object], message: str, backend: str) -> None:
    arguments = {
        "student_hidden": torch.randn(4, 8), "student_weight": torch.randn(20, 8), "teacher_hidden": torch.randn(4, 8),
        "teacher_weight": torch.randn(20, 8), "labels": torch.zeros(4, dtype=torch.int64),
    }  # fmt: skip
    with use_backend(backend), pytest.raises(ValueError, match=message):
        linear_kd_loss(**(arguments | change))
