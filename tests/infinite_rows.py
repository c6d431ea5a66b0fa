"""Rows of infinite loss: an id that one side excludes and the other does not. Their gradient is what the definition's float64
derivative is: finite, and right, where that is (forward KL), and not finite where that is not (reverse KL), whichever the
backend. The modules that import these tests say on which backend and device they run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast
from kdfast import Head, kd_loss, linear_kd_loss, topk_kd_loss, topk_targets

INF = float("inf")
DENSE: dict[str, dict[str, Any]] = {
    **{kind: {"divergence": kind} for kind in ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "tvd")},
    "jsd-1": {"divergence": "jsd", "beta": 1.0},
    **{
        f"alpha-{a}-beta-{b}": {"divergence": "alpha_beta", "ab_alpha": a, "ab_beta": b}
        for a, b in ((0.0, 0.5), (0.5, 0.0), (0.0, 0.0), (0.7, 0.5))
    },
}
SPARSE = [
    ("ghost", "forward_kl"), ("ghost", "reverse_kl"), ("uniform", "forward_kl"), ("uniform", "reverse_kl"), ("uniform", "jsd"),
    ("renormalize", "forward_kl"), ("none", "forward_kl"),
]  # fmt: skip
HOW: dict[str, dict[str, Any]] = {
    "mean": {},
    "none-T2": {"reduction": "none", "temperature": 2.0},
    "hard": {"hard_weight": 0.5, "temperature": 2.0},
    "scaled": {"student_head": Head(scale=0.7)},
}


def rows(vocab: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher, labels: the student excludes a likely id, the teacher one, both the same, and one that is fine."""
    student, teacher = torch.randn(5, vocab) * 2, torch.randn(5, vocab) * 2
    teacher[:, 4:7] += 3
    student[0, 4] = student[1, 4:7] = -INF
    teacher[2, 1] = teacher[2, 2] = student[2, 2] = -INF
    teacher[3, 8] = student[3, 4] = -INF
    return student, teacher, torch.tensor([0, 1, 5, 6, 3])


def differentiated(loss: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient, with an incoming gradient of 1.5."""
    x = x.detach().clone().requires_grad_()
    value = loss(x)
    (grad,) = torch.autograd.grad(value.sum() * 1.5, x)
    return value.detach(), grad


def assert_agrees(loss: Callable[[Tensor], Tensor], x: Tensor, backend: str, device: str) -> Tensor:
    """Value and gradient of a backend against float64 of the reference, whose gradient is returned."""
    with kdfast.use_backend("reference"):
        truth, truth_grad = differentiated(loss, x.double())
    with kdfast.use_backend(backend):
        value, grad = differentiated(loss, x.to(device))
    torch.testing.assert_close(value.cpu().double(), truth, rtol=1e-5, atol=1e-6)
    assert torch.equal(grad.cpu().isfinite(), truth_grad.isfinite())
    torch.testing.assert_close(grad.cpu().double().nan_to_num(0, 0, 0), truth_grad.nan_to_num(0, 0, 0), rtol=1e-4, atol=1e-6)
    return truth_grad


@pytest.mark.thinned(2)
@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("kind", DENSE.values(), ids=DENSE)
def test_dense(kind: Any, how: Any, backend: str, device: str) -> None:
    student, teacher, labels = rows()
    assert_agrees(lambda x: kd_loss(x, teacher.to(x), labels.to(x.device), **kind, **how), student, backend, device)


def test_forward_kl_is_what_autograd_says(backend: str, device: str) -> None:
    student, teacher, _ = rows()
    got = assert_agrees(lambda x: kd_loss(x, teacher.to(x)), student, backend, device)
    x = student.double().requires_grad_()
    plain = F.kl_div(x.log_softmax(-1), teacher.double().softmax(-1), reduction="batchmean")
    (truth,) = torch.autograd.grad(plain * 1.5, x)
    torch.testing.assert_close(got, truth)
    assert got.isfinite().all()
    assert not plain.isfinite()


@pytest.mark.thinned(2)
@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("left", [False, True], ids=["tail", "nothing-left"])
@pytest.mark.parametrize(("tail", "divergence"), SPARSE)
def test_sparse(tail: str, divergence: str, left: bool, how: Any, backend: str, device: str) -> None:
    student, teacher, labels = rows()
    if left:
        teacher[:, 8:] = teacher[:, 3] = -INF
    with kdfast.use_backend("reference"):
        targets = topk_targets(teacher, 8 if left else 3, temperatures=(1.0, 2.0))
    outside = torch.randn(5, 12).index_fill(1, torch.tensor([3, 8, 9, 10, 11]), -INF)
    for x in (student, torch.randn(5, 12), outside):
        assert_agrees(
            lambda x: topk_kd_loss(x, targets.to(x.device), labels.to(x.device), tail=tail, divergence=divergence, **how),
            x, backend, device,
        )  # fmt: skip


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_through_a_head(divergence: str, backend: str, device: str) -> None:
    hidden, weight, bias = torch.randn(5, 8), torch.randn(12, 8), torch.randn(12)
    bias[4] = -INF
    h_t, w_t = torch.randn(5, 6), torch.randn(12, 6)

    def loss(h: Tensor) -> Tensor:
        sides = (x.to(h) for x in (weight, h_t, w_t))
        return linear_kd_loss(h, *sides, student_bias=bias.to(h), divergence=divergence, reduction="none")

    assert_agrees(loss, hidden, backend, device)
