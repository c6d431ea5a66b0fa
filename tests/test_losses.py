"""The loss modules: options held once, the function's value, and what is given at the call wins."""

from __future__ import annotations

import inspect
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import torch

import kdfast
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
from kdfast.ops import row_keywords

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


@pytest.mark.parametrize(
    ("function", "keywords"),
    [
        (kdfast.kd_loss, row_keywords.KDKeywords),
        (kdfast.linear_kd_loss, row_keywords.LinearKDKeywords),
        (kdfast.topk_kd_loss, row_keywords.TopKKDKeywords),
        (kdfast.linear_topk_kd_loss, row_keywords.LinearTopKKDKeywords),
    ],
    ids=lambda x: x.__name__,
)
def test_keywords_for_type_checkers_are_those_of_the_function(function: Any, keywords: Any) -> None:
    hints = typing.get_type_hints(function)
    spelt = {name for name, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert typing.get_type_hints(keywords) == {name: hints[name] for name in spelt - {"return_parts"}}


def test_type_checkers_know_what_a_loss_returns(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is not installed")
    (tmp_path / "user.py").write_text(
        "import torch\n"
        "from kdfast import Parts, kd_loss\n"
        "x = torch.zeros(2, 3)\n"
        "loss: torch.Tensor = kd_loss(x, x, temperature=2.0)\n"
        "both: tuple[torch.Tensor, Parts] = kd_loss(x, x, return_parts=True)\n"
        "wrong: torch.Tensor = kd_loss(x, x, return_parts=True)\n"
        "misspelt = kd_loss(x, x, temprature=2.0)\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file=", "--ignore-missing-imports", str(tmp_path / "user.py")]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent).stdout
    assert sorted({line.split(":")[1] for line in found.splitlines() if " error: " in line and "user.py" in line}) == ["6", "7"]
