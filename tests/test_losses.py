"""The loss modules: options held once, the function's value, and what is given at the call wins."""

from __future__ import annotations

import pytest
import torch

from kdfast import (
    hidden_cosine,
    hidden_mse,
    kd_loss,
    linear_kd_loss,
    linear_logit_mse,
    topk_kd_loss,
    topk_targets,
)
from kdfast.losses import HiddenCosineLoss, HiddenMSELoss, KDLoss, LinearKDLoss, LinearLogitMSELoss, TopKKDLoss

OPTIONS = {"temperature": 2.0, "soft_weight": 0.7, "hard_weight": 0.3}


def test_modules_equal_their_functions() -> None:
    student, teacher, labels = torch.randn(5, 17), torch.randn(5, 17), torch.randint(17, (5,))
    targets = topk_targets(teacher, 4, temperatures=(1.0, 2.0))
    assert torch.equal(KDLoss(**OPTIONS)(student, teacher, labels), kd_loss(student, teacher, labels, **OPTIONS))
    assert torch.equal(TopKKDLoss(**OPTIONS)(student, targets, labels), topk_kd_loss(student, targets, labels, **OPTIONS))
    heads = torch.randn(5, 3), torch.randn(17, 3), torch.randn(5, 6), torch.randn(17, 6)
    assert torch.equal(LinearKDLoss(**OPTIONS)(*heads, labels), linear_kd_loss(*heads, labels, **OPTIONS))


def test_modules_of_hidden_states_equal_their_functions() -> None:
    h_s, h_t, mask = torch.randn(5, 3), torch.randn(5, 6), torch.tensor([True] * 4 + [False])
    projection = torch.randn(6, 3)
    module = HiddenMSELoss(normalize="all")
    assert torch.equal(module(h_s, h_t, projection, mask=mask), hidden_mse(h_s, h_t, projection, mask=mask, normalize="all"))
    other = torch.randn(5, 3)
    assert torch.equal(HiddenCosineLoss(reduction="none")(h_s, other), hidden_cosine(h_s, other, reduction="none"))
    heads = torch.randn(17, 3), h_t, torch.randn(17, 6)
    assert torch.equal(LinearLogitMSELoss(center=True)(h_s, *heads), linear_logit_mse(h_s, *heads, center=True))


def test_an_option_at_the_call_wins_and_a_wrong_one_is_refused() -> None:
    student, teacher = torch.randn(5, 17), torch.randn(5, 17)
    module = KDLoss(temperature=2.0)
    assert torch.equal(module(student, teacher, temperature=3.0), kd_loss(student, teacher, temperature=3.0))
    assert repr(module) == "KDLoss(temperature=2.0)"
    with pytest.raises(TypeError, match="temprature"):
        KDLoss(temprature=2.0)
