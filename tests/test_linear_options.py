"""linear_kd_loss: divergences, teachers, frozen sides, row_index, main_grad, precision of the logits, memory."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any

import plain
import pytest
import torch
import torch.nn.functional as F
from test_divergences import CASES, ROW_OPTIONS
from torch import Tensor

from kdfast import linear_kd_loss, use_backend

BACKENDS = ["cpp", "reference"]
N, VOCAB, DS, DT = 23, 101, 16, 24
TINY = 0.01  # MiB: a few rows a chunk


def batch(teachers: int = 1, vocab: int = VOCAB) -> tuple[list[Tensor], list[list[Tensor]], Tensor]:
    """Student's hidden, weight, bias; the same of each teacher, of different widths and vocabularies; labels."""
    student = [torch.randn(N, DS), torch.randn(vocab, DS) / 2, torch.randn(vocab) / 2]
    sides = [
        [torch.randn(N, DT + i), torch.randn(vocab - 3 * i, DT + i) / 2, torch.randn(vocab - 3 * i) / 2]
        for i in range(teachers)
    ]
    labels = torch.randint(0, vocab - 10, (N,))
    labels[4:7] = -100
    return student, sides, labels


def compare(
    dtype: torch.dtype, backend: str, ours_kw: dict[str, Any], plain_kw: dict[str, Any], teachers: int = 1,
    reduction: str = "mean", workspace_mb: float | None = TINY,
) -> None:  # fmt: skip
    """Value and gradients of hidden, weight and bias against the definition in float64."""
    student, sides, labels = batch(teachers)
    stored = [[x.to(dtype) for x in side] for side in sides]

    def theirs(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        logits = [F.linear(*(x.to(h.dtype) for x in side)) for side in stored]
        loss = plain.kd_rows(F.linear(h, w, b), logits, labels, temperature=2.0, soft=0.7, hard=0.3, **plain_kw)
        return plain.mean(loss, labels) if reduction == "mean" else torch.where(labels != -100, loss, 0)

    def ours(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        hiddens, weights, biases = ([side[i] for side in stored] for i in range(3))
        return linear_kd_loss(
            h, w, hiddens, weights, labels, student_bias=b, teacher_bias=biases, temperature=2.0, soft_weight=0.7,
            hard_weight=0.3, workspace_mb=workspace_mb, reduction=reduction, **ours_kw,
        )  # fmt: skip

    def run(loss: Any, at: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        leaves = [x.to(dtype).to(at).requires_grad_() for x in student]
        value = loss(*leaves)
        return value.detach(), torch.autograd.grad(value, leaves, torch.linspace(0.5, 2, value.numel()).view_as(value))

    truth, eager = run(theirs, torch.float64), run(theirs, dtype)
    with use_backend(backend):
        value, grads = run(ours, dtype)
    plain.assert_as_good(value.double(), eager[0].double(), truth[0], dtype, "value")
    for name, a, b, c in zip(("hidden", "weight", "bias"), grads, eager[1], truth[1], strict=True):
        plain.assert_as_good(a.double(), b.double(), c, dtype, f"gradient of {name}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", CASES)
def test_divergence(case: str, dtype: torch.dtype, backend: str) -> None:
    compare(dtype, backend, *CASES[case])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"], ids=["in-forward", "in-backward"])
@pytest.mark.parametrize("option", ROW_OPTIONS)
def test_row_options(option: str, reduction: str, backend: str) -> None:
    ours_kw, plain_kw = ROW_OPTIONS[option]
    compare(torch.float32, backend, ours_kw | {"divergence": "jsd"}, plain_kw | {"name": "jsd"}, reduction=reduction)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mix", ["probs", "logits"])
@pytest.mark.parametrize("workspace_mb", [None, TINY, 1e-4], ids=["one-chunk", "chunks", "row-by-row"])
def test_several_teachers(workspace_mb: float | None, mix: str, backend: str) -> None:
    weights = [1.0, 2.0, 0.5]
    compare(
        torch.float32, backend, {"teacher_weights": weights, "teacher_mix": mix}, {"weights": weights, "mix": mix}, teachers=3,
        workspace_mb=workspace_mb,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"], ids=["in-forward", "in-backward"])
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=lambda w: "".join("-x"[i] for i in w))
def test_frozen_sides(wanted: tuple[bool, ...], reduction: str, backend: str) -> None:
    """Any of hidden, weight and bias may be frozen; the others get what they get when none is."""
    student, ((h_t, w_t, _),), labels = batch()

    def grads(needed: tuple[bool, ...]) -> list[Tensor | None]:
        h, w, b = (x.clone().requires_grad_(need) for x, need in zip(student, needed, strict=True))
        with use_backend(backend):
            loss = linear_kd_loss(
                h, w, h_t, w_t, labels, student_bias=b, workspace_mb=TINY, hard_weight=0.5, reduction=reduction
            )
        assert loss.requires_grad == any(needed)
        if any(needed):
            loss.sum().backward()
        return [x.grad for x in (h, w, b)]

    for got, all_of_them, need in zip(grads(wanted), grads((True, True, True)), wanted, strict=True):
        assert (got is not None) == need
        assert got is None or torch.equal(got, all_of_them)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"], ids=["in-forward", "in-backward"])
def test_row_index_changes_nothing(reduction: str, backend: str) -> None:
    student, ((h_t, w_t, _),), labels = batch()
    results = []
    for index in (None, (labels != -100).nonzero()[:, 0], torch.arange(N)):
        leaves = [x.clone().requires_grad_() for x in student]
        with use_backend(backend):
            loss, parts = linear_kd_loss(
                *leaves[:2], h_t, w_t, labels, student_bias=leaves[2], row_index=index, workspace_mb=TINY, hard_weight=0.5,
                reduction=reduction, return_parts=True,
            )  # fmt: skip
            results.append((loss, parts.soft.sum, *torch.autograd.grad(loss.sum(), leaves)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_row_index_is_checked() -> None:
    student, ((h_t, w_t, _),), labels = batch()
    for index, message in (
        (torch.arange(1, N), "row_index: row 0 counts but is not listed"),
        (torch.arange(1, N + 1), f"row_index: expected positions from 0 to {N - 1}"),
        (torch.arange(N).int(), f"row_index: expected at most {N} int64 positions"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_kd_loss(*student[:2], h_t, w_t, labels, row_index=index)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"], ids=["in-forward", "in-backward"])
def test_all_rows_ignored(reduction: str, backend: str) -> None:
    student, ((h_t, w_t, _),), labels = batch()
    leaves = [x.requires_grad_() for x in student]
    with use_backend(backend):
        loss = linear_kd_loss(
            *leaves[:2], h_t, w_t, torch.full_like(labels, -100), student_bias=leaves[2], hard_weight=1.0, reduction=reduction
        )
        grads = torch.autograd.grad(loss.sum(), leaves)
    assert (loss == 0).all()
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend: str) -> None:
    """Hidden states transposed from [L, B], every other column, and a head kept as [D, V]."""
    hidden, weight = torch.randn(5, 4, 2 * DS)[..., ::2].transpose(0, 1), torch.randn(DS, VOCAB).t()
    teacher = torch.randn(4, 5, DT), torch.randn(DT, VOCAB).t()
    results = []
    for contiguous in (False, True):
        h, w = (x.contiguous() if contiguous else x for x in (hidden, weight))
        h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
        with use_backend(backend):
            loss = linear_kd_loss(h, w, *teacher, workspace_mb=TINY)
        results.append((loss, *torch.autograd.grad(loss, (h, w))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["mean", "none"], ids=["in-forward", "in-backward"])
def test_main_grad(reduction: str) -> None:
    student, ((h_t, w_t, _),), labels = batch()

    def backward(weight: Tensor, upstream: float) -> None:
        loss = linear_kd_loss(student[0], weight, h_t, w_t, labels, hard_weight=0.5, reduction=reduction)
        (loss.sum() * upstream).backward()

    for dtype in (torch.float32, torch.bfloat16):
        plain_weight, weight = (student[1].to(dtype).clone().requires_grad_() for _ in range(2))
        weight.main_grad = torch.ones(weight.shape)
        backward(weight, 0.5), backward(weight, 3.0)
        backward(plain_weight, 3.5)
        assert weight.grad is None
        assert plain.error(weight.main_grad - 1, plain_weight.grad.double()) <= plain.EPS[dtype]


def test_main_grad_of_another_shape_is_refused() -> None:
    student, ((h_t, w_t, _),), _ = batch()
    student[1].requires_grad_().main_grad = torch.zeros(3)
    with pytest.raises(ValueError, match=r"student_weight.main_grad: expected float32 \[101, 16\]"):
        linear_kd_loss(*student[:2], h_t, w_t)


def test_autocast_multiplies_in_its_dtype_and_keeps_float32_logits() -> None:
    student, ((h_t, w_t, _),), labels = batch()
    half = [x.bfloat16() for x in (student[0], student[1], h_t, w_t)]
    results = []
    for autocast in (True, False):
        sides = [student[0], student[1], h_t, w_t] if autocast else half
        leaves = [x.detach().clone().requires_grad_() for x in sides[:2]]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = linear_kd_loss(*leaves, *sides[2:], labels, hard_weight=0.5)
            grads = torch.autograd.grad(loss, leaves)
        assert loss.dtype == torch.float32
        assert [g.dtype for g in grads] == [x.dtype for x in leaves]
        results.append((loss, *grads))
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(results[0][1:], results[1][1:], strict=True):
        assert torch.equal(a.bfloat16(), b)


@pytest.mark.parametrize("workspace_mb", [None, TINY], ids=["one-chunk", "chunks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_bfloat16_logits(dtype: torch.dtype, workspace_mb: float | None) -> None:
    """No worse than twice what plain PyTorch loses when it rounds its logits and their gradient to bfloat16."""
    student, ((h_t, w_t, _),), labels = batch()
    stored = [x.to(dtype) for x in (student[0], student[1], h_t, w_t)]

    def run(loss: Any, at: torch.dtype) -> tuple[Tensor, ...]:
        h, w = (x.to(at).requires_grad_() for x in stored[:2])
        value = loss(h, w, *(x.to(at) for x in stored[2:]))
        return value.detach().double(), *(g.double() for g in torch.autograd.grad(value, (h, w)))

    def rounded(h: Tensor, w: Tensor, *teacher: Tensor) -> Tensor:
        logits = [F.linear(*pair) for pair in ((h, w), teacher)]
        if h.dtype != torch.float64:
            logits = [z.bfloat16().float() for z in logits]
        return plain.mean(plain.kd_rows(logits[0], logits[1:], labels, temperature=2.0), labels)

    def ours(h: Tensor, w: Tensor, *teacher: Tensor) -> Tensor:
        return linear_kd_loss(
            h, w, *teacher, labels, temperature=2.0, logits_dtype=torch.bfloat16, workspace_mb=workspace_mb
        )  # fmt: skip

    truth, eager, got = run(rounded, torch.float64), run(rounded, dtype), run(ours, dtype)
    for name, a, b, c in zip(("value", "gradient of hidden", "gradient of weight"), got, eager, truth, strict=True):
        plain.assert_as_good(a, b, c, torch.bfloat16, name)


@pytest.mark.parametrize("reduction", ["mean", "none"], ids=["in-forward", "in-backward"])
def test_float16_under_loss_scaling(reduction: str) -> None:
    """At scale 1 the gradient of hidden is below what float16 can hold; times 2^16 it must be right."""
    h, w, scale = torch.randn(4096, 8).half(), torch.randn(64, 8).half() / 8, 2.0**16
    h_t, w_t = torch.randn(4096, 8).half(), torch.randn(64, 8).half() / 8

    def grad(at: torch.dtype, factor: float) -> Tensor:
        x = h.to(at).requires_grad_()
        loss = linear_kd_loss(x, w.to(at), h_t.to(at), w_t.to(at), reduction=reduction, soft_weight=1e-3)
        (loss.mean() * factor).backward()
        return x.grad.double()

    truth = grad(torch.float64, 1.0)
    assert truth.abs().max() < 2.0**-24
    assert plain.error(grad(torch.float16, scale) / scale, truth) < 2e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_run_to_run(backend: str) -> None:
    student, ((h_t, w_t, _),), labels = batch()
    results = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in student[:2]]
        with use_backend(backend):
            loss = linear_kd_loss(*leaves, h_t, w_t, labels, hard_weight=0.5, workspace_mb=TINY)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_infinite_incoming_gradient_reaches_the_scaler() -> None:
    """A loss scale that overflowed must come out as inf or NaN gradients, not as an error about the logits."""
    student, ((h_t, w_t, _),), labels = batch()
    h = student[0].requires_grad_()
    loss = linear_kd_loss(h, student[1], h_t, w_t, labels, reduction="none")
    (grad,) = torch.autograd.grad(loss, h, torch.full_like(loss, torch.nan))
    counts = labels != -100
    assert not grad[counts].isfinite().any()
    assert (grad[~counts] == 0).all()


SCRIPT = """
import torch
from kdfast import linear_kd_loss
make = lambda n: (torch.randn(n, 16), torch.randn(20000, 16))
(h, w), (h_t, w_t) = make(3000), make(3000)

def evaluate(h, h_t, mb):
    with torch.no_grad():
        return linear_kd_loss(h, w.requires_grad_(), h_t, w_t, workspace_mb=mb, divergence=%r)

evaluate(h[:4], h_t[:4], 1)

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

open("/proc/self/clear_refs", "w").write("5")
before = peak()
evaluate(h, h_t, 24)
print((peak() - before) / 1024)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to reset the peak of memory")
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_evaluation_takes_the_workspace_and_nothing_else(divergence: str) -> None:
    """The logits of both sides together are 458 MiB."""
    done = subprocess.run([sys.executable, "-c", SCRIPT % divergence], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 24 * 1.1 + 4, done.stdout
