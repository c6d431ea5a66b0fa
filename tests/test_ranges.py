"""The ranges in public docstrings hold: one line names the argument, what was expected and what was got."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kdfast
import kdfast.losses
from kdfast import Head, TopKTargets

B, L, V, D, K = 2, 5, 12, 6, 3
LOGITS = torch.randn(B, L, V, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(B * L).view(B, L) % V
TARGETS = kdfast.topk_targets(LOGITS, K, temperatures=(1.0, 2.0))
RAW = LOGITS.topk(K)


def kd(x: Tensor, hidden: Tensor, weight: Tensor, **options: Any) -> Any:
    return kdfast.kd_loss(x, LOGITS, **options)


def linear(x: Tensor, hidden: Tensor, weight: Tensor, **options: Any) -> Any:
    return kdfast.linear_kd_loss(hidden, weight, torch.ones(B, L, D), torch.ones(V, D), **options)


def topk(x: Tensor, hidden: Tensor, weight: Tensor, targets: TopKTargets = TARGETS, **options: Any) -> Any:
    return kdfast.topk_kd_loss(x, targets, **options)


def linear_topk(x: Tensor, hidden: Tensor, weight: Tensor, targets: TopKTargets = TARGETS, **options: Any) -> Any:
    return kdfast.linear_topk_kd_loss(hidden, weight, targets, **options)


LOSSES = {"kd": kd, "linear": linear, "topk": topk, "linear_topk": linear_topk}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def students() -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(size, requires_grad=True) for size in ((B, L, V), (B, L, D), (V, D)))  # type: ignore[return-value]


@each_loss
@pytest.mark.parametrize("bad", [-0.5, math.nan, math.inf])
@pytest.mark.parametrize("option", ["temperature", "soft_weight", "hard_weight", "z_loss", "label_smoothing", "beta"])
def test_numbers(loss: Any, option: str, bad: float) -> None:
    with pytest.raises(ValueError, match=rf"^{option}: expected .*, got {bad}$"):
        loss(*students(), labels=LABELS, **{option: bad})


@pytest.mark.parametrize("option", ["skew", "ab_alpha", "ab_beta"])
@pytest.mark.parametrize("bad", [-0.5, math.nan, math.inf])
@pytest.mark.parametrize("loss", [kd, linear])
def test_numbers_of_divergences(loss: Any, option: str, bad: float) -> None:
    with pytest.raises(ValueError, match=rf"^{option}: expected .*, got {bad}$"):
        loss(*students(), **{option: bad})


@each_loss
@pytest.mark.parametrize("bad", [-1, -0.5, math.nan, math.inf, torch.tensor(-3), torch.tensor(math.nan)], ids=str)
def test_num_items(loss: Any, bad: Any) -> None:
    with pytest.raises(ValueError, match=r"^num_items: expected a finite number >= 0"):
        loss(*students(), num_items=bad)


@each_loss
def test_num_items_is_one_number(loss: Any) -> None:
    with pytest.raises(ValueError, match=r"^num_items: expected one number, got a tensor of shape \[2\]"):
        loss(*students(), num_items=torch.tensor([3, 4]))


@each_loss
@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_token_weight(loss: Any, bad: float) -> None:
    weight = torch.ones(B, L)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match=f"^token_weight: expected finite weights >= 0, got {bad:g}"):
        loss(*students(), token_weight=weight)
    with pytest.raises(ValueError, match=r"^token_weight: expected a tensor or None, got list"):
        loss(*students(), token_weight=[1.0])
    # A row that its label leaves out may have any weight.
    labels = LABELS.clone()
    labels[1, 2] = -100
    assert bool(loss(*students(), labels=labels, token_weight=weight).isfinite())


@pytest.mark.parametrize("bad", [(1.0, -1.0), (0.0, 1.0), (math.nan, 1.0), (math.inf, 1.0)])
def test_teacher_weights(bad: tuple[float, float]) -> None:
    x, _, _ = students()
    with pytest.raises(ValueError, match=r"^teacher_weights: expected finite numbers above 0"):
        kdfast.kd_loss(x, [LOGITS, LOGITS], teacher_weights=bad)
    with pytest.raises(ValueError, match=r"^teacher_weights: expected finite numbers above 0"):
        kdfast.topk_kd_loss(x, [TARGETS, TARGETS], teacher_weights=bad)


@pytest.mark.parametrize("bad", [-1.0, 0.0, math.nan, math.inf])
def test_temperatures_scales_and_workspace(bad: float) -> None:
    x, hidden, weight = students()
    for options in ({"temperatures": (1.0, bad)}, {"sample_temperature": bad, "samples": 2}):
        with pytest.raises(ValueError, match=r"^(sample_)?temperatures?: expected .*finite number"):
            kdfast.topk_targets(LOGITS, K, **options)
        with pytest.raises(ValueError, match=r"^(sample_)?temperatures?: expected .*finite number"):
            kdfast.linear_topk_targets(hidden, weight, K, **options)
    with pytest.raises(ValueError, match=r"^workspace_mb: expected a finite number above 0"):
        linear(x, hidden, weight, workspace_mb=bad)
    with pytest.raises(ValueError, match=r"^student_head: expected a finite scale above 0"):
        kd(x, hidden, weight, student_head=Head(scale=bad))
    maps = [torch.randn(1, 2, 4, 8) for _ in range(4)]
    for loss in (kdfast.attention_mse, kdfast.attention_kl):
        with pytest.raises(ValueError, match=r"^scale_t: expected a finite number above 0"):
            loss(*maps, scale_t=bad)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", ["ghost", "uniform", "renormalize", "none", "none-drawn", "renormalize-drawn"])
@pytest.mark.parametrize("loss", [topk, linear_topk])
def test_logits_are_no_log_probabilities(loss: Any, tail: str, temperature: float) -> None:
    options = {"tail": tail.removesuffix("-drawn"), "temperature": temperature}
    raw = dataclasses.replace(TARGETS, ids=RAW.indices.int(), logprobs=RAW.values + 4)
    rounded = dataclasses.replace(TARGETS, logprobs=TARGETS.logprobs.bfloat16().float())
    if "drawn" in tail:
        raw, rounded = (dataclasses.replace(t, weights=TARGETS.logprobs.exp()) for t in (raw, rounded))
    with pytest.raises(ValueError, match=r"^targets: row \d has probabilities that sum to .* expected 1; logprobs are logits"):
        loss(*students(), raw, **options)
    # Rows that do not count may hold anything, and rounding to bfloat16 is no fault.
    assert float(loss(*students(), raw, labels=torch.full((B, L), -100), **options)) == 0
    assert bool(loss(*students(), rounded, **options).isfinite())


@pytest.mark.parametrize("loss", [topk, linear_topk])
def test_a_tail_is_the_rest(loss: Any) -> None:
    heavy = dataclasses.replace(TARGETS, log_tail=torch.zeros_like(TARGETS.log_tail))
    with pytest.raises(ValueError, match=r"^targets: row 0 has probabilities that sum to 1\.\d+ with the tail, expected 1"):
        loss(*students(), heavy)
    light = dataclasses.replace(TARGETS, log_tail=torch.full_like(TARGETS.log_tail, -math.inf))
    with pytest.raises(ValueError, match=r"^targets: row 0 has probabilities that sum to 0\.\d+ .* tail .renormalize. does"):
        loss(*students(), light)


@pytest.mark.parametrize("loss", [topk, linear_topk])
def test_targets_of_no_vocabulary_temperature_or_weight(loss: Any) -> None:
    with pytest.raises(ValueError, match=r"^targets.vocab_size: expected a number above 0, got 0"):
        dataclasses.replace(TARGETS, vocab_size=0)
    with pytest.raises(ValueError, match=r"^targets.temperatures: expected finite numbers above 0"):
        dataclasses.replace(TARGETS, temperatures=(1.0, -2.0))
    for tail in ("none", "renormalize"):
        with pytest.raises(ValueError, match=r"^targets: row 0 holds NaN, expected log-probabilities <= 0 and weights >= 0"):
            loss(*students(), dataclasses.replace(TARGETS, weights=torch.full((B, L, K), -0.5)), tail=tail)


@each_loss
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_shifted_labels_are_labels_shifted(loss: Any, dtype: torch.dtype) -> None:
    student, ids = students(), LABELS.to(dtype, copy=True)
    ids[0, 3] = -100
    options = {"hard_weight": 0.7, "token_weight": torch.rand(B, L), "reduction": "none"}
    by_hand = loss(*student, labels=F.pad(ids[:, 1:], (0, 1), value=-100), **options)
    found = loss(*student, labels=ids, shift_labels=True, **options)
    assert torch.equal(found, by_hand)
    assert bool((found[:, -1] == 0).all())
    assert bool(found[0, 2] == 0)
    used = [x for x in student if torch.autograd.grad(by_hand.sum(), x, retain_graph=True, allow_unused=True)[0] is not None]
    for x in used:
        assert torch.equal(*(torch.autograd.grad(out.sum(), x, retain_graph=True)[0] for out in (found, by_hand)))
    mean = loss(*student, labels=ids, shift_labels=True)
    assert torch.equal(mean, loss(*student, labels=F.pad(ids[:, 1:], (0, 1), value=-100)))


@each_loss
def test_shifted_labels_with_another_ignore_index(loss: Any) -> None:
    student = students()
    found = loss(*student, labels=LABELS, shift_labels=True, ignore_index=0, reduction="none")
    assert torch.equal(found != 0, F.pad(LABELS[:, 1:] != 0, (0, 1)))


@each_loss
def test_labels_that_cannot_be_shifted(loss: Any) -> None:
    with pytest.raises(ValueError, match=r"^shift_labels: expected labels to shift, got labels None"):
        loss(*students(), shift_labels=True)
    with pytest.raises(ValueError, match=r"^labels: expected shape \[2, 5\]"):
        loss(*students(), labels=LABELS[:, 1:], shift_labels=True)
    if loss is kd:
        with pytest.raises(ValueError, match=r"^shift_labels: expected rows \[B, L, \.\.\.\]"):
            kdfast.kd_loss(LOGITS[0], LOGITS[0], LABELS[0], shift_labels=True)


def test_shifted_labels_in_modules_and_of_length_zero() -> None:
    x, _, _ = students()
    module = kdfast.losses.KDLoss(shift_labels=True)
    assert torch.equal(module(x, LOGITS, LABELS), kd(x, x, x, labels=LABELS, shift_labels=True))
    empty = torch.zeros(B, 0, V)
    assert float(kdfast.kd_loss(empty, empty, LABELS[:, :0], shift_labels=True)) == 0


def test_a_head_with_an_adapter() -> None:
    """The remedy of `linear_kd_loss`'s docstring: base + scaling * B @ A gives both their gradients."""
    base, a, b = torch.randn(V, D), torch.randn(2, D, requires_grad=True), torch.randn(V, 2, requires_grad=True)
    hidden = torch.randn(B, L, D, requires_grad=True)
    teacher = torch.randn(B, L, D), torch.randn(V, D)
    found = torch.autograd.grad(kdfast.linear_kd_loss(hidden, base + 2.0 * b @ a, *teacher), (hidden, a, b))
    logits = F.linear(hidden, base) + 2.0 * F.linear(F.linear(hidden, a), b)
    wanted = torch.autograd.grad(kdfast.kd_loss(logits, F.linear(*teacher)), (hidden, a, b))
    torch.testing.assert_close(found, wanted)
