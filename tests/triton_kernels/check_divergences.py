"""Every divergence and row option of the logits kernels against the float64 reference. Run by `test_triton_interpreted`."""

from __future__ import annotations

import dataclasses
from typing import Any

import plain
import pytest
import torch
from against_reference import WEIGHTS, batch, compare, eager, truth
from torch import Tensor

from kdfast.backends.triton import logits
from kdfast.options import DIVERGENCES, PARTS, RowOptions

KINDS: dict[str, dict[str, Any]] = {
    "reverse": {"divergence": "reverse_kl"},
    "jsd": {"divergence": "jsd"},
    "jsd-0.9": {"divergence": "jsd", "beta": 0.9},
    "jsd-1-is-reverse": {"divergence": "jsd", "beta": 1.0},
    "skew-forward": {"divergence": "skew_forward_kl"},
    "skew-reverse": {"divergence": "skew_reverse_kl", "skew": 0.3},
    "tvd": {"divergence": "tvd"},
    "alpha-beta": {"divergence": "alpha_beta", "ab_alpha": 0.2, "ab_beta": 0.7},
    "alpha-beta-squares": {"divergence": "alpha_beta", "ab_alpha": 1.0, "ab_beta": 1.0},
    "alpha-0": {"divergence": "alpha_beta", "ab_alpha": 0.0, "ab_beta": 0.6},
    "beta-0": {"divergence": "alpha_beta", "ab_alpha": 0.6, "ab_beta": 0.0},
    "both-0": {"divergence": "alpha_beta", "ab_alpha": 0.0, "ab_beta": 0.0},
}
ROW_OPTIONS: dict[str, dict[str, Any]] = {
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "softcap": {"student_softcap": 5.0, "teacher_softcap": 8.0, "teacher_scale": 0.5},
    "scale": {"student_scale": 0.7, "teacher_scale": 1.3},
    "everything": {"label_smoothing": 0.2, "z_loss": 1e-3, "student_softcap": 6.0, "student_scale": 1.1},
}
SHARES = (0.5, 0.2, 0.3)


def each_divergence(name: str) -> RowOptions:
    return RowOptions(divergence=name, ab_alpha=0.5, ab_beta=0.25)


def ensemble(widths: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: str) -> list[Tensor]:
    return [torch.randn(2, v, device=device).mul(3).to(d) for v, d in zip(widths, dtypes, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient(kind: str, device: str) -> None:
    """Rows of uneven width in float32 beside the hard loss, aligned rows of bfloat16 at T = 1 alone."""
    student, teacher, labels, scale = batch(301, 280, torch.float32, device, rows=2)
    compare(student, [teacher], labels, scale, RowOptions(temperature=2.5, **WEIGHTS, **KINDS[kind]))
    student, teacher, _, scale = batch(208, 208, torch.bfloat16, device, rows=2)
    compare(student, [teacher], None, scale, RowOptions(**KINDS[kind]))


def test_several_tiles_and_a_row_that_does_not_count(device: str) -> None:
    student, teacher, labels, scale = batch(5003, 5008, torch.float32, device)
    compare(student, [teacher], labels, scale, RowOptions(divergence="jsd", temperature=2.0, **WEIGHTS))


@pytest.mark.parametrize("option", ROW_OPTIONS)
@pytest.mark.parametrize("kind", ["forward", "jsd"])
def test_row_options(kind: str, option: str, device: str) -> None:
    student, teacher, labels, scale = batch(303, 290, torch.float32, device, rows=2)
    options = RowOptions(temperature=2.0, **WEIGHTS, **KINDS.get(kind, {}), **ROW_OPTIONS[option])
    compare(student, [teacher], labels, scale, options)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_unlabelled_rows_with_z_loss(temperature: float, device: str) -> None:
    student, teacher, _, scale = batch(303, 290, torch.float32, device, rows=2)
    compare(student, [teacher], None, scale, RowOptions(temperature=temperature, z_loss=1e-2))


@pytest.mark.parametrize("mix", ["probs", "logits"])
@pytest.mark.parametrize("kind", ["forward", "tvd", "skew-reverse"])
def test_several_teachers(kind: str, mix: str, device: str) -> None:
    """Of different widths and dtypes, in rows of any stride."""
    teachers = ensemble((297, 320, 300), (torch.float32, torch.bfloat16, torch.float16), device)
    teachers[1] = torch.cat([teachers[1], teachers[1]], 1)[:, :310]
    student, _, labels, scale = batch(300, 1, torch.float32, device, rows=2)
    options = RowOptions(temperature=2.0, teacher_weights=SHARES, teacher_mix=mix, **WEIGHTS, **KINDS.get(kind, {}))
    compare(student, teachers, labels, scale, options)


@pytest.mark.parametrize("mix", ["probs", "logits"])
def test_an_id_that_some_teachers_exclude(mix: str, device: str) -> None:
    teachers = ensemble((64, 64), (torch.float32, torch.float32), device)
    student, _, _, scale = batch(64, 1, torch.float32, device, rows=2)
    teachers[0][:, 5] = teachers[1][0, 9] = teachers[0][0, 9] = -torch.inf
    student[0, 9] = student[1, 11] = -torch.inf
    options = RowOptions(divergence="jsd", teacher_weights=(0.25, 0.75), teacher_mix=mix)
    loss, _, wanted = truth(student, teachers, None, scale, options)
    grad = torch.empty_like(student)
    got, _, _ = logits.forward(student, teachers, None, scale, options, False, grad)
    assert torch.allclose(got.double(), loss, rtol=1e-5)
    assert torch.allclose(grad.double(), wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("mix", "kw"),
    [
        ("probs", {"temperature": 2.0}),
        ("probs", {"divergence": "jsd", "teacher_softcap": 7.0}),
        ("logits", {"temperature": 2.0, "student_softcap": 9.0}),
        ("logits", {"divergence": "reverse_kl", "label_smoothing": 0.2}),
    ],
    ids=["probs-T2", "probs-jsd-T1-softcap", "logits-T2-softcap", "logits-reverse-T1-smoothing"],
)
def test_parts_of_an_ensemble(mix: str, kw: dict[str, Any], device: str) -> None:
    student, _, labels, scale = batch(300, 1, torch.float32, device, rows=2)
    teachers = ensemble((280, 310), (torch.float32, torch.float32), device)
    student[0, :280] = teachers[1][0, :280] + 1e-3
    labels.clamp_(max=279)
    options = RowOptions(teacher_weights=(0.25, 0.75), teacher_mix=mix, hard_weight=0.3, **kw)
    _, expected, _ = truth(student, teachers, labels, scale, options, parts=True)
    _, _, parts = logits.forward(student, teachers, labels, scale, options, True, None)
    for i, name in enumerate(PARTS):
        assert torch.allclose(parts[:, i].double(), expected[:, i], rtol=2e-5, atol=1e-6), name


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_saturated_rows_are_finite(divergence: str, device: str) -> None:
    student, teacher, labels, _ = batch(257, 257, torch.float32, device)
    student, teacher = student.sign(), teacher.sign()
    student[:2].mul_(30), teacher[:2].mul_(30)
    student[2:].mul_(640), teacher[2:].mul_(640)
    options = dataclasses.replace(each_divergence(divergence), hard_weight=0.5)
    grad = torch.empty_like(student)
    loss, _, _ = logits.forward(student, [teacher], labels, torch.ones(4, device=device), options, False, grad)
    assert loss.isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_excluded_ids(divergence: str, device: str) -> None:
    """What both sides exclude adds nothing; what one side excludes costs what the reference says, without a NaN."""
    student, teacher, _, _ = batch(90, 90, torch.float32, device)
    student[:, ::3] = teacher[:, ::3] = -torch.inf
    if divergence in ("jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"):
        teacher[0, 4] = student[1, 7] = -torch.inf
    scale, options = torch.ones(4, device=device), each_divergence(divergence)
    loss, _, wanted = truth(student, [teacher], None, scale, options)
    grad = torch.empty_like(student)
    got, _, _ = logits.forward(student, [teacher], None, scale, options, False, grad)
    assert torch.allclose(got.double(), loss, rtol=1e-5)
    assert torch.allclose(grad.double(), wanted, atol=1e-6)
    assert (grad[:, ::3] == 0).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_one_column(divergence: str, device: str) -> None:
    student, teacher, labels, scale = batch(1, 1, torch.float32, device)
    grad = torch.empty_like(student)
    options = dataclasses.replace(each_divergence(divergence), hard_weight=0.5)
    loss, _, _ = logits.forward(student, [teacher], labels, scale, options, False, grad)
    assert loss.tolist() == [0.0] * 4
    assert grad.tolist() == [[0.0]] * 4


def test_what_the_teacher_excludes_makes_reverse_kl_infinite(device: str) -> None:
    student, teacher, _, _ = batch(90, 90, torch.float32, device)
    teacher[1, 3] = -torch.inf
    options = RowOptions(divergence="reverse_kl")
    loss, _, _ = logits.forward(student, [teacher], None, torch.ones(4, device=device), options, False, None)
    assert loss.isinf().tolist() == [False, True, False, False]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("jsd-1-is-reverse", "jsd-0.9")])
def test_value_near_agreement(kind: str, device: str) -> None:
    """Row 0 at distance 0.1, the others at 1e-3: the value to 1e-3, never negative; plain PyTorch is off by tens of percent."""
    teacher = torch.randn(6, 1000, device=device) * 3
    distance = torch.tensor([0.1] + [1e-3] * 5, device=device)[:, None]
    student = teacher + distance * torch.randn_like(teacher)
    scale, options = torch.ones(6, device=device), RowOptions(**KINDS[kind])
    exact, _, wanted = truth(student, [teacher], None, scale, options)
    grad = torch.empty_like(student)
    loss, _, _ = logits.forward(student, [teacher], None, scale, options, False, grad)
    assert (loss >= 0).all()
    for rows in (slice(0, 1), slice(1, 6)):
        assert abs(loss[rows].double().mean() / exact[rows].mean() - 1) <= 1e-3
    _, same = plain.gradient(lambda x: eager(x, [teacher], None, scale, options), student, torch.float32)
    plain.assert_as_good(grad, same, wanted, torch.float32, "gradient")


@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
def test_a_cap_does_not_hide_infinity(side: int, device: str) -> None:
    inputs = batch(250, 250, torch.float32, device)
    inputs[side][1, 200] = torch.inf
    student, teacher, labels, scale = inputs
    options = RowOptions(student_softcap=5.0, teacher_softcap=5.0, **WEIGHTS)
    loss, _, _ = logits.forward(student, [teacher], labels, scale, options, False, None)
    assert loss.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("which", [0, 1])
def test_a_bad_row_of_one_teacher_is_nan(which: int, device: str) -> None:
    teachers = ensemble((64, 64), (torch.float32, torch.float32), device)
    student, _, _, scale = batch(64, 1, torch.float32, device, rows=2)
    teachers[which][1, 50] = torch.nan
    for mix in ("probs", "logits"):
        options = RowOptions(divergence="tvd", teacher_weights=(0.5, 0.5), teacher_mix=mix)
        loss, _, _ = logits.forward(student, teachers, None, scale, options, False, None)
        assert loss.isnan().tolist() == [False, True]


def test_gradient_in_the_place_of_the_student(device: str) -> None:
    student, teacher, labels, scale = batch(1100, 1003, torch.bfloat16, device)
    options = RowOptions(divergence="skew_reverse_kl", temperature=2.0, student_softcap=9.0, **WEIGHTS)
    apart, inside = torch.empty_like(student), student.clone()
    loss, _, _ = logits.forward(student, [teacher], labels, scale, options, False, apart)
    again, _, _ = logits.forward(inside, [teacher], labels, scale, options, False, inside)
    assert torch.equal(inside, apart)
    assert torch.equal(loss, again)
