"""linear_topk_targets and linear_topk_kd_loss: the same numbers as on materialised logits, without ever holding them."""

from __future__ import annotations

import plain
import pytest
import torch
import torch.nn.functional as F
from topk_plain import COMBINATIONS, topk_rows
from torch import Tensor

from kdfast import Head, TopKTargets, linear_topk_kd_loss, linear_topk_targets, memory, topk_kd_loss, topk_targets, use_backend
from kdfast.losses import LinearTopKKDLoss
from kdfast.options import RowOptions

BACKENDS = ["cpp", "reference"]
LEAD = (3, 37)


def heads(dtype: torch.dtype, vocab: int = 301) -> tuple[list[Tensor], TopKTargets, Tensor]:
    """(student hidden, weight, bias), targets at T = 2, labels."""
    student = [x.to(dtype) for x in (torch.randn(*LEAD, 32), torch.randn(vocab, 32) / 4, torch.randn(vocab))]
    labels = torch.randint(0, vocab, LEAD)
    labels[1, :5] = -100
    return student, topk_targets(torch.randn(*LEAD, 290) * 2, 11, temperatures=(1.0, 2.0)), labels


def run(loss, student: list[Tensor], dtype: torch.dtype, upstream: Tensor) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.to(dtype).detach().requires_grad_() for x in student]
    value = loss(leaves)
    return value.detach().double(), [g.double() for g in torch.autograd.grad(value, leaves, upstream.to(value.dtype))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "reduction", "workspace_mb"),
    [
        (torch.float32, "mean", None),
        (torch.float32, "none", 0.03),
        (torch.bfloat16, "mean", 0.05),
        (torch.float16, "none", None),
    ],
    ids=["fp32-in-forward-one-chunk", "fp32-in-backward-chunks", "bf16-in-forward-chunks", "fp16-in-backward-one-chunk"],
)
@pytest.mark.parametrize("how", COMBINATIONS.values(), ids=COMBINATIONS)
def test_value_and_gradients(
    how: dict[str, object], dtype: torch.dtype, reduction: str, workspace_mb: float | None, backend: str
) -> None:
    student, targets, labels = heads(dtype)
    upstream = torch.rand(LEAD) + 0.5 if reduction == "none" else torch.tensor(1.7)
    shared = {"student_head": Head(softcap=9.0), "z_loss": 0.01}

    def dense(leaves: list[Tensor]) -> Tensor:
        row = topk_rows(F.linear(*leaves), targets, labels, temperature=2.0, hard=0.3, **shared, **how)
        return torch.where(labels != -100, row, 0) if reduction == "none" else plain.mean(row, labels)

    def ours(leaves: list[Tensor]) -> Tensor:
        hidden, weight, bias = leaves
        return linear_topk_kd_loss(
            hidden, weight, targets, labels, student_bias=bias, workspace_mb=workspace_mb, reduction=reduction,
            temperature=2.0, hard_weight=0.3, **shared, **how,
        )  # fmt: skip

    truth_value, truth_grads = run(dense, student, torch.float64, upstream)
    with use_backend(backend):
        value, grads = run(ours, student, dtype, upstream)
    room = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    assert plain.error(value, truth_value) <= room
    for grad, truth in zip(grads, truth_grads, strict=True):
        assert plain.error(grad, truth) <= room


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_targets_and_parts(backend: str) -> None:
    (hidden, weight, bias), targets, labels = heads(torch.float32)
    more = topk_targets(torch.randn(*LEAD, 290), 5, temperatures=(2.0,))
    options = {"temperature": 2.0, "hard_weight": 0.5, "teacher_weights": (1, 3), "return_parts": True}
    with use_backend(backend):
        loss, parts = linear_topk_kd_loss(
            hidden, weight, [targets, more], labels, student_bias=bias, workspace_mb=0.03, **options
        )
        truth, truth_parts = topk_kd_loss(F.linear(hidden, weight, bias), [targets, more], labels, **options)
    assert torch.allclose(loss, truth, rtol=1e-5)
    for one, other in zip(parts, truth_parts, strict=True):
        assert torch.allclose(one.sum, other.sum, rtol=1e-4, equal_nan=True)
        assert torch.equal(one.count, other.count)


def test_the_module_equals_the_function() -> None:
    (hidden, weight, _), targets, labels = heads(torch.float32)
    options = {"temperature": 2.0, "hard_weight": 0.5}
    got = LinearTopKKDLoss(**options)(hidden, weight, targets, labels)
    assert torch.equal(got, linear_topk_kd_loss(hidden, weight, targets, labels, **options))


def test_rows_that_do_not_count_and_frozen_heads() -> None:
    (hidden, weight, _), targets, labels = heads(torch.float32)
    hidden.requires_grad_()
    index = (labels.view(-1) != -100).nonzero()[:, 0]
    (whole,) = torch.autograd.grad(linear_topk_kd_loss(hidden, weight, targets, labels), hidden)
    (listed,) = torch.autograd.grad(linear_topk_kd_loss(hidden, weight, targets, labels, row_index=index), hidden)
    assert torch.equal(whole, listed)
    assert (whole[1, :5] == 0).all()
    nothing = linear_topk_kd_loss(hidden, weight, targets, torch.full(LEAD, -100))
    assert nothing == 0
    weight.requires_grad_()
    weight.main_grad = torch.zeros_like(weight)
    linear_topk_kd_loss(hidden, weight, targets, labels).backward()
    assert weight.grad is None
    assert weight.main_grad.abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("workspace_mb", [None, 0.03], ids=["one-chunk", "chunks-with-remainder"])
@pytest.mark.parametrize("samples", [0, 7])
def test_capture(samples: int, workspace_mb: float | None, dtype: torch.dtype, backend: str) -> None:
    (hidden, weight, bias), _, _ = heads(dtype)
    options = {"temperatures": (1.0, 2.0), "samples": samples, "head": Head(20.0)}
    with use_backend(backend):
        got = linear_topk_targets(
            hidden, weight, 9, bias=bias, workspace_mb=workspace_mb, generator=torch.Generator().manual_seed(1), **options
        )
        logits = F.linear(hidden.float(), weight.float(), bias.float())
        truth = topk_targets(logits, 9, generator=torch.Generator().manual_seed(1), **options)
    same = (got.ids == truth.ids).all(-1)  # but where products rounded otherwise change an order, or a draw
    assert same.float().mean() > 0.97
    assert torch.allclose(got.logprobs[same], truth.logprobs[same], atol=1e-4)
    assert torch.allclose(got.log_z[same], truth.log_z[same], atol=1e-4)
    assert torch.allclose(got.log_tail[same], truth.log_tail[same], atol=1e-3)
    assert (got.weights is None) == (samples == 0)
    if samples:
        assert torch.allclose(got.weights[same], truth.weights[same], rtol=1e-3, atol=1e-5)


def test_the_workspace_is_all_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = torch.randn(1000, 16), torch.randn(5000, 16)
    shapes: list[tuple[int, ...]] = []
    plain_empty = memory.empty

    def watched(shape: tuple[int, ...], **options: object) -> Tensor:
        shapes.append(tuple(shape))
        return plain_empty(shape, **options)

    monkeypatch.setattr(memory, "empty", watched)
    linear_topk_targets(hidden, weight, 4, workspace_mb=2)
    assert shapes == [(100, 5000)]  # 1000 rows in even chunks of at most 2 MiB


def test_compile_and_opcheck() -> None:
    (hidden, weight, bias), targets, labels = heads(torch.float32)
    hidden, targets, labels = hidden[0], targets[0], labels[0]

    def loss(x: Tensor) -> Tensor:
        captured = linear_topk_targets(x.detach() * 2, weight, 5)
        return linear_topk_kd_loss(x, weight, captured, labels, hard_weight=0.5) * 2

    _, expected = plain.gradient(loss, hidden, torch.float32)
    _, compiled = plain.gradient(torch.compile(loss, fullgraph=True, backend="aot_eager"), hidden, torch.float32)
    assert torch.allclose(compiled, expected, rtol=1e-5, atol=1e-8)
    assert torch.allclose(torch.func.grad(loss)(hidden).double(), expected, rtol=1e-5, atol=1e-8)
    ops = torch.ops.kdfast
    draws = torch.rand(37, 3, dtype=torch.float64)
    capture = (hidden, weight, bias, 4, [1.0], draws, 1.0, 0.0, 1.0, 0.03, torch.float32, None, "cpp")
    torch.library.opcheck(ops.linear_topk_capture.default, capture)
    tables = [targets.ids, targets.logprobs[:, None], targets.log_tail[:, :1].contiguous(), torch.ones(37, 1)]
    settings = (0.03, torch.float32, None, "", False, 290, False, "cpp", True, True, True, True, True)
    sides = (hidden, weight, bias, [], [], [])
    options = RowOptions(hard_weight=0.5).values
    torch.library.opcheck(ops.linear.default, (*sides, labels.clamp(min=0), torch.ones(37), None, tables, *options, *settings))


TARGETS = topk_targets(torch.randn(4, 20), 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_hidden": torch.randn(4, 7)}, r"student_hidden: expected shape \[..., 8\] to match student_weight"),
        ({"student_weight": torch.randn(19, 8)}, "student_weight: expected a vocabulary of at least 20"),
        ({"targets": TARGETS[:3]}, r"targets: expected leading dimensions \[4\] like student_hidden, got"),
        ({"workspace_mb": 0}, "workspace_mb: expected a finite number above 0"),
        ({"tail": "none", "divergence": "jsd"}, "expected forward_kl with tail 'none'"),
        ({"student_hidden": torch.full((4, 8), torch.nan)}, "row 0 has loss NaN"),
        ({"labels": torch.full((4,), 20), "hard_weight": 1.0}, "labels: row 0 has label 20"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    inputs = {"student_hidden": torch.randn(4, 8), "student_weight": torch.randn(20, 8), "targets": TARGETS}
    with pytest.raises(ValueError, match=message):
        linear_topk_kd_loss(**(inputs | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 21}, "k: expected 0 < k <= 20"),
        ({"bias": torch.randn(19)}, r"bias: expected shape \[20\] to match weight"),
        ({"hidden": torch.randn(4, 7)}, r"hidden: expected shape \[..., 8\] to match weight"),
        ({"hidden": torch.full((4, 8), torch.nan)}, "hidden: row 0 has logits that hold NaN"),
    ],
)
def test_capture_bad_input(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_topk_targets(**({"hidden": torch.randn(4, 8), "weight": torch.randn(20, 8), "k": 3} | change))
