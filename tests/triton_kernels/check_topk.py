"""Top-k capture and the ghost-bucket loss in Triton against the float64 reference. Run by `test_triton_interpreted`."""

from __future__ import annotations

import plain
import pytest
import torch
from against_reference import DTYPES, DTYPES_AND_T, SCALE, WEIGHTS
from torch import Tensor

from kdfast.backends.reference import topk as reference
from kdfast.backends.triton import topk
from kdfast.options import PARTS, RowOptions


def captured(teacher: Tensor, k: int, temperature: float) -> tuple[Tensor, ...]:
    """Targets as a float64 teacher gives them, rounded to float32."""
    ids, logprobs, log_z, log_tail = reference.capture(teacher.double(), k, (temperature,))
    return ids, logprobs.float(), log_z[:, 0].float(), log_tail[:, 0].float()


def batch(width: int, vocab: int, dtype: torch.dtype, device: str, spread: float = 3.0) -> tuple[Tensor, ...]:
    student = torch.randn(4, width, device=device).mul(spread).to(dtype)
    teacher = torch.randn(4, vocab, device=device).mul(spread)
    return student, teacher, torch.randint(0, width, (4,), device=device), torch.tensor(SCALE, device=device)


def eager(
    student: Tensor, targets: tuple[Tensor, ...], labels: Tensor | None, scale: Tensor, options: RowOptions, vocab: int
) -> Tensor:
    """The ghost-bucket loss in plain PyTorch, with autograd's gradient."""
    ids, logprobs, log_z, log_tail = (x if x.dtype == torch.int32 else x.to(student.dtype) for x in targets)
    log_q = (student[:, :vocab] / options.temperature).log_softmax(-1)
    rest = log_q.scatter(1, ids.long(), -torch.inf).logsumexp(-1)
    log_p = torch.cat([logprobs / options.temperature - log_z[:, None], log_tail[:, None]], -1)
    log_q = torch.cat([log_q.gather(1, ids.long()), rest[:, None]], -1)
    loss = options.soft_scale * (log_p.exp() * (log_p - log_q)).sum(-1)
    if labels is not None and options.hard_weight:
        loss = loss + options.hard_weight * torch.nn.functional.cross_entropy(student, labels, reduction="none")
    return (loss * scale).sum()


def compare(
    student: Tensor, targets: tuple[Tensor, ...], labels: Tensor | None, scale: Tensor, options: RowOptions, vocab: int
) -> None:
    wide = tuple(x if x.dtype == torch.int32 else x.double() for x in targets)
    exact_grad = torch.empty_like(student, dtype=torch.float64)
    exact, _, _ = reference.forward(
        student.double(), wide, labels, scale.double(), options, vocab, False, exact_grad
    )  # fmt: skip
    total, plain_grad = plain.gradient(lambda x: eager(x, targets, labels, scale, options, vocab), student, student.dtype)
    out, again = torch.full_like(student, torch.nan), torch.full_like(student, torch.nan)
    loss, stats, _ = topk.forward(student, targets, labels, scale, options, vocab, False, out)
    topk.backward(student, targets, labels, scale, stats, options, vocab, again)
    for result in (out, again):
        plain.assert_as_good(result, plain_grad, exact_grad, student.dtype, "gradient")
        assert (result[scale == 0] == 0).all()
    plain.assert_as_good(loss.sum(), total, exact.sum(), torch.float32, "loss")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize(("vocab", "k"), [(1, 1), (17, 5), (17, 17), (1008, 64), (5003, 100), (9000, 3)])
def test_capture(vocab: int, k: int, ties: bool, dtype: torch.dtype, device: str) -> None:
    logits = torch.randn(3, vocab, device=device).mul(3).to(dtype)
    if ties:
        logits = logits.round()  # zeros of both signs among them
    temperatures = (2.0, 1.0, 0.5)
    ids, *values = topk.capture(logits, k, temperatures)
    exact_ids, *exact = reference.capture(logits.double(), k, temperatures)
    assert torch.equal(ids, exact_ids)
    for got, expected, name in zip(values, exact, ("logprobs", "log_z", "log_tail"), strict=True):
        assert torch.allclose(got.double(), expected, rtol=1e-6, atol=2e-6), name


@pytest.mark.parametrize("level", [640.0, -640.0])
def test_capture_of_saturated_rows(level: float, device: str) -> None:
    logits = torch.randn(3, 1000, device=device)
    logits[0] += level
    logits[1, 7] = 640.0
    logits[2, ::2] = -torch.inf
    ids, *values = topk.capture(logits, 8, (1.0, 2.0))
    exact_ids, *exact = reference.capture(logits.double(), 8, (1.0, 2.0))
    assert torch.equal(ids, exact_ids)
    for got, expected in zip(values, exact, strict=True):
        assert torch.allclose(got.double(), expected, rtol=1e-6, atol=2e-6)


def test_capture_of_minus_infinity_among_the_selected(device: str) -> None:
    logits = torch.full((1, 40), -torch.inf, device=device)
    logits[0, 5], logits[0, 30] = 1.0, 2.0
    ids, logprobs, log_z, log_tail = topk.capture(logits, 4, (1.0,))
    assert ids.tolist() == [[30, 5, 0, 1]]
    assert logprobs[0, 2:].tolist() == [-torch.inf, -torch.inf]
    assert log_tail.tolist() == [[-torch.inf]]
    assert abs(float(log_z)) < 1e-6


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_capture_of_bad_rows(value: float, device: str) -> None:
    logits = torch.randn(2, 3000, device=device)
    logits[1, 2500] = value
    ids, logprobs, _, _ = topk.capture(logits, 8, (1.0,))
    assert logprobs[0].isfinite().all()
    assert logprobs[1].isnan().all()
    assert ((ids >= 0) & (ids < 3000)).all()


@pytest.mark.parametrize(("dtype", "temperature"), DTYPES_AND_T.values(), ids=DTYPES_AND_T)
@pytest.mark.parametrize(
    ("width", "vocab", "k"),
    [(1, 1, 1), (2, 2, 1), (17, 17, 17), (1008, 1008, 64), (5003, 5003, 99), (5008, 5008, 9), (1100, 1003, 7), (1104, 1008, 7)],
    ids=["V1-no-rest", "V2", "V17-no-rest", "V1008", "V5003-ragged", "V5008-aligned", "student-larger-ragged",
         "student-larger-aligned"],
)  # fmt: skip
def test_value_and_gradient(width: int, vocab: int, k: int, temperature: float, dtype: torch.dtype, device: str) -> None:
    student, teacher, labels, scale = batch(width, vocab, dtype, device)
    options = RowOptions(temperature=temperature, **WEIGHTS)
    if k < vocab:
        compare(student, captured(teacher, k, temperature), labels, scale, options, vocab)
        return
    targets = captured(teacher, k, temperature)  # log of an empty rest: autograd gives NaN, so only the reference serves
    exact_grad, out = torch.empty_like(student, dtype=torch.float64), torch.full_like(student, torch.nan)
    wide = (targets[0], *(x.double() for x in targets[1:]))
    exact, _, _ = reference.forward(student.double(), wide, labels, scale.double(), options, vocab, False, exact_grad)
    loss, _, _ = topk.forward(student, targets, labels, scale, options, vocab, False, out)
    assert torch.allclose(loss.double(), exact, rtol=1e-5, atol=2e-6)
    assert torch.allclose(out.double(), exact_grad, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("level", [30.0, 640.0])
def test_saturated_rows(level: float, device: str) -> None:
    student, teacher, labels, scale = batch(1003, 1003, torch.float32, device)
    student = student.sign().mul(level)
    student[0, 0] += 1
    compare(student, captured(teacher, 16, 2.0), labels, scale, RowOptions(temperature=2.0, **WEIGHTS), 1003)


def test_all_mass_on_the_entries(device: str) -> None:
    student, _, labels, scale = batch(1000, 1000, torch.float32, device)
    ids = student.topk(4).indices
    student.scatter_(1, ids, 60.0)  # the rest weighs e^-50 or less: 1 - sum would say 0
    compare(
        student,
        captured(student + torch.randn_like(student), 4, 1.0),
        labels,
        scale,
        RowOptions(temperature=1.0, **WEIGHTS),
        1000,
    )


def test_near_agreement(device: str) -> None:
    _, teacher, _, _ = batch(5003, 5003, torch.float32, device)
    student, ones = teacher + 1e-3 * torch.randn_like(teacher), torch.ones(4, device=device)
    targets = captured(teacher, 64, 1.0)
    wide = (targets[0], *(x.double() for x in targets[1:]))
    exact, _, _ = reference.forward(student.double(), wide, None, ones.double(), RowOptions(), 5003, False, None)
    loss, _, _ = topk.forward(student, targets, None, ones, RowOptions(), 5003, False, None)
    assert ((loss.double() - exact).abs() <= 1e-3 * exact + 1e-12).all()


def test_empty_slots_do_not_count(device: str) -> None:
    student, teacher, labels, scale = batch(500, 500, torch.float32, device)
    options = RowOptions(temperature=2.0, **WEIGHTS)
    ids, logprobs, log_z, log_tail = captured(teacher, 5, 2.0)
    more_ids = torch.cat([torch.full_like(ids, -1), ids], 1)
    more_logprobs = torch.cat([torch.full_like(logprobs, -torch.inf), logprobs], 1)
    few, many = torch.empty_like(student), torch.empty_like(student)
    loss, _, _ = topk.forward(student, (ids, logprobs, log_z, log_tail), labels, scale, options, 500, False, few)
    again, _, _ = topk.forward(student, (more_ids, more_logprobs, log_z, log_tail), labels, scale, options, 500, False, many)
    assert torch.allclose(loss, again, rtol=1e-6)
    assert torch.allclose(few, many, atol=1e-7)


def test_parts(device: str) -> None:
    student, teacher, labels, scale = batch(1100, 1003, torch.float32, device)
    student[:2, :1003] = teacher[:2] + 1e-3
    for temperature in (1.0, 2.0):
        targets, options = captured(teacher, 16, temperature), RowOptions(temperature=temperature, hard_weight=0.5)
        wide = (targets[0], *(x.double() for x in targets[1:]))
        _, _, expected = reference.forward(student.double(), wide, labels, scale.double(), options, 1003, True, None)
        _, _, parts = topk.forward(student, targets, labels, scale, options, 1003, True, None)
        for i, name in enumerate(PARTS):
            assert torch.allclose(parts[:, i].double(), expected[:, i], rtol=2e-5, atol=1e-6, equal_nan=True), name


def test_gradient_in_the_place_of_the_student(device: str) -> None:
    student, teacher, labels, scale = batch(5100, 5003, torch.bfloat16, device)
    targets, options = captured(teacher, 64, 2.0), RowOptions(temperature=2.0, **WEIGHTS)
    apart, inside = torch.empty_like(student), student.clone()
    topk.forward(student, targets, labels, scale, options, 5003, False, apart)
    topk.forward(inside, targets, labels, scale, options, 5003, False, inside)
    assert torch.equal(inside, apart)


def test_bad_rows_are_nan(device: str) -> None:
    student, teacher, labels, _ = batch(100, 100, torch.float32, device)
    scale, targets = torch.ones(4, device=device), captured(teacher, 8, 1.0)
    targets[0][0, 3] = 10**6  # an id that the student does not have
    student[1, 50] = torch.inf
    student[2, int(targets[0][2, 0])] = torch.nan
    for grad in (None, torch.empty_like(student)):
        loss, _, _ = topk.forward(student, targets, labels, scale, RowOptions(temperature=1.0, **WEIGHTS), 100, False, grad)
        assert loss.isnan().tolist() == [True, True, True, False]


def test_rows_that_do_not_count_are_not_read(device: str) -> None:
    student, teacher, labels, scale = batch(100, 100, torch.float32, device)
    targets = captured(teacher, 8, 1.0)
    student[2], targets[0][2], labels[2] = torch.nan, 10**6, 10**6
    grad = torch.empty_like(student)
    loss, _, parts = topk.forward(student, targets, labels, scale, RowOptions(temperature=1.0, **WEIGHTS), 100, True, grad)
    assert loss.isfinite().all()
    assert grad.isfinite().all()
    assert (parts[2] == 0).all()


def test_repeated_id_stays_inside(device: str) -> None:
    student, teacher, labels, scale = batch(100, 100, torch.float32, device)
    targets = captured(teacher, 8, 1.0)
    targets[0][:, 1] = targets[0][:, 0]
    guarded = torch.full((4, 140), 7.0, device=device)
    topk.forward(student, targets, labels, scale, RowOptions(temperature=1.0, **WEIGHTS), 100, False, guarded[:, 20:120])
    assert (guarded[:, :20] == 7).all()
    assert (guarded[:, 120:] == 7).all()
