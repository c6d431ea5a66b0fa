"""Sparse targets in Triton, capture and loss, against the float64 reference. Run by `test_triton_interpreted`."""

from __future__ import annotations

import plain
import pytest
import torch
from against_reference import DTYPES, DTYPES_AND_T, SCALE, WEIGHTS
from topk_plain import COMBINATIONS
from torch import Tensor

from kdfast import Head, TopKTargets
from kdfast.backends.reference import topk as reference
from kdfast.backends.triton import selection, topk
from kdfast.ops import tails
from kdfast.options import PARTS, RowOptions

COMBINED = pytest.mark.parametrize("how", COMBINATIONS.values(), ids=COMBINATIONS)


def captured(teacher: Tensor, k: int, temperature: float) -> TopKTargets:
    """Targets as a float64 teacher gives them, rounded to float32."""
    ids, *values = reference.capture(teacher.double(), k, (temperature,))
    return TopKTargets(ids, *(v.float() for v in values[:3]), (temperature,), teacher.shape[1])


def tables(targets: TopKTargets | list[TopKTargets], options: RowOptions, tail: str = "ghost") -> tuple[Tensor, ...]:
    return tails.kernel_rows(tails.as_list(targets), tail, options)


def batch(width: int, vocab: int, dtype: torch.dtype, device: str, spread: float = 3.0) -> tuple[Tensor, ...]:
    student = torch.randn(4, width, device=device).mul(spread).to(dtype)
    teacher = torch.randn(4, vocab, device=device).mul(spread)
    return student, teacher, torch.randint(0, width, (4,), device=device), torch.tensor(SCALE, device=device)


def compare(
    student: Tensor, targets: tuple[Tensor, ...], labels: Tensor | None, scale: Tensor, options: RowOptions, vocab: int,
    spread: bool = False,
) -> None:  # fmt: skip
    """Loss, gradient in forward, gradient in backward, against the reference on the same targets."""
    exact_grad = torch.empty_like(student, dtype=torch.float64)
    wide = (targets[0], *(x.double() for x in targets[1:]))
    exact, _, _ = reference.forward(student.double(), wide, labels, scale.double(), options, vocab, spread, False, exact_grad)
    out, again = torch.full_like(student, torch.nan), torch.full_like(student, torch.nan)
    loss, stats, _ = topk.forward(student, targets, labels, scale, options, vocab, spread, False, out)
    topk.backward(student, targets, labels, scale, stats, options, vocab, spread, again)
    for result in (out, again):
        plain.assert_as_good(result, exact_grad.to(student.dtype), exact_grad, student.dtype, "gradient")
        assert (result[scale == 0] == 0).all()
    assert torch.allclose(loss.double(), exact, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize(("vocab", "k"), [(1, 1), (17, 5), (17, 17), (1008, 64), (5003, 100), (9000, 3)])
def test_capture(vocab: int, k: int, ties: bool, dtype: torch.dtype, device: str) -> None:
    logits = torch.randn(3, vocab, device=device).mul(3).to(dtype)
    if ties:
        logits = logits.round()  # zeros of both signs among them
    temperatures = (2.0, 1.0, 0.5)
    ids, *values, _ = topk.capture(logits, k, temperatures)
    exact_ids, *exact, _ = reference.capture(logits.double(), k, temperatures)
    assert torch.equal(ids, exact_ids)
    for got, expected, name in zip(values, exact, ("logprobs", "log_z", "log_tail"), strict=True):
        assert torch.allclose(got.double(), expected, rtol=1e-6, atol=2e-6), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_capture_of_rows_that_one_pass_cannot_do(dtype: torch.dtype, device: str) -> None:
    """More ties than there is room for, the k largest in one lane, and a k beyond the pass; beside a row that it does."""
    logits = torch.randn(4, 2064, device=device).to(dtype)
    logits[0] = 1.5
    logits[1, :] = logits[1].clamp(max=0.5)
    logits[2, 8:16] = torch.arange(8, 16, device=device).to(dtype)  # a lane's columns
    for k in (6, selection.MOST + 1):
        ids, *values, _ = topk.capture(logits, k, (2.0, 1.0))
        exact_ids, *exact, _ = reference.capture(logits.double(), k, (2.0, 1.0))
        assert torch.equal(ids, exact_ids)
        for got, expected, name in zip(values, exact, ("logprobs", "log_z", "log_tail"), strict=True):
            assert torch.allclose(got.double(), expected, rtol=1e-6, atol=2e-6), name


def test_capture_of_a_tail_far_below(device: str) -> None:
    """The tail is no difference of sums: it keeps its digits where it is 1e-30 of the whole."""
    logits = torch.randn(2, 3000, device=device) - 70
    logits[:, 100:104] += 70
    got = topk.capture(logits, 4, (1.0, 2.0))[3]
    exact = reference.capture(logits.double(), 4, (1.0, 2.0))[3]
    assert (exact[:, 0] < -50).all()
    assert torch.allclose(got.double(), exact, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("level", [640.0, -640.0])
def test_capture_of_saturated_rows(level: float, device: str) -> None:
    logits = torch.randn(3, 1000, device=device)
    logits[0] += level
    logits[1, 7] = 640.0
    logits[2, ::2] = -torch.inf
    ids, *values, _ = topk.capture(logits, 8, (1.0, 2.0))
    exact_ids, *exact, _ = reference.capture(logits.double(), 8, (1.0, 2.0))
    assert torch.equal(ids, exact_ids)
    for got, expected in zip(values, exact, strict=True):
        assert torch.allclose(got.double(), expected, rtol=1e-6, atol=2e-6)


def test_capture_of_minus_infinity_among_the_selected(device: str) -> None:
    logits = torch.full((1, 40), -torch.inf, device=device)
    logits[0, 5], logits[0, 30] = 1.0, 2.0
    ids, logprobs, log_z, log_tail, _ = topk.capture(logits, 4, (1.0,))
    assert ids.tolist() == [[30, 5, 0, 1]]
    assert logprobs[0, 2:].tolist() == [-torch.inf, -torch.inf]
    assert log_tail.tolist() == [[-torch.inf]]
    assert abs(float(log_z)) < 1e-6


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_capture_of_bad_rows(value: float, device: str) -> None:
    logits = torch.randn(2, 3000, device=device)
    logits[1, 2500] = value
    ids, logprobs, *_ = topk.capture(logits, 8, (1.0,))
    assert logprobs[0].isfinite().all()
    assert logprobs[1].isnan().all()
    assert ((ids >= 0) & (ids < 3000)).all()


@pytest.mark.parametrize("head", [Head(softcap=4.0), Head(5.0, 2.0), Head(scale=0.3)], ids=["cap", "both", "scale"])
def test_capture_through_a_head(head: Head, device: str) -> None:
    logits = torch.randn(3, 1003, device=device).mul(3).bfloat16()
    ids, *values, _ = topk.capture(logits, 9, (1.0, 2.0), None, 1.0, head)
    _, *exact, _ = reference.capture(logits.double(), 9, (1.0, 2.0), None, 1.0, head)
    z = logits.double() * head.scale
    z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    assert torch.allclose(z.gather(1, ids.long()), z.topk(9).values, atol=1e-6)  # saturated logits tie in float32
    for got, expected in zip(values, exact, strict=True):
        assert torch.allclose(got.double(), expected, rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("k", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocab", [3, 17, 5003])
def test_draws(vocab: int, dtype: torch.dtype, k: int, device: str) -> None:
    """The same numbers draw the same ids as in the reference, but for draws within rounding of a border."""
    logits = torch.randn(6, vocab, device=device).mul(3).to(dtype)
    draws, k, head = torch.rand(6, 12, dtype=torch.float64, device=device), min(k, vocab), Head(softcap=20.0)
    ids, *values = topk.capture(logits, k, (1.0, 2.0), draws, 1.5, head)
    exact_ids, *exact = reference.capture(logits.double(), k, (1.0, 2.0), draws, 1.5, head)
    same = (ids == exact_ids).all(-1)
    assert same.sum() >= 5
    for got, expected, name in zip(values, exact, ("logprobs", "log_z", "log_tail", "weights"), strict=True):
        assert torch.allclose(got.double()[same], expected[same], rtol=2e-5, atol=4e-6), name


def test_nothing_is_left_to_draw(device: str) -> None:
    logits = torch.randn(2, 6, device=device)
    ids, logprobs, _, log_tail, weights = topk.capture(logits, 6, (1.0,), torch.rand(2, 3, dtype=torch.float64, device=device))
    assert (ids[:, 6:] == -1).all()
    assert (logprobs[:, 6:] == -torch.inf).all()
    assert (weights[:, 6:] == 0).all()
    assert (log_tail == -torch.inf).all()
    assert torch.allclose(weights[:, :6].sum(-1), torch.ones(2, device=device))


@COMBINED
@pytest.mark.parametrize(("dtype", "temperature"), DTYPES_AND_T.values(), ids=DTYPES_AND_T)
@pytest.mark.parametrize(
    ("width", "vocab", "k"), [(1, 1, 1), (17, 17, 17), (1008, 1008, 64), (1100, 1003, 7), (1104, 1008, 7)],
    ids=["V1-no-rest", "V17-no-rest", "V1008", "student-larger-ragged", "student-larger-aligned"],
)  # fmt: skip
def test_value_and_gradient(
    how: dict[str, object], width: int, vocab: int, k: int, temperature: float, dtype: torch.dtype, device: str
) -> None:
    if dtype != torch.float32 and how["divergence"] != "forward_kl" and vocab != 1008:
        pytest.skip("one shape shows how the dtypes of the other divergences are read")
    student, teacher, labels, scale = batch(width, vocab, dtype, device)
    how = dict(how)
    tail = how.pop("tail")
    options = RowOptions(temperature=temperature, **WEIGHTS, **how)
    compare(student, tables(captured(teacher, k, temperature), options, tail), labels, scale, options, vocab, tail == "uniform")


@COMBINED
def test_every_row_option_at_once(how: dict[str, object], device: str) -> None:
    student, teacher, labels, scale = batch(1100, 1003, torch.float32, device)
    how = dict(how)
    tail = how.pop("tail")
    options = RowOptions(
        temperature=2.0, label_smoothing=0.1, z_loss=0.01, student_softcap=6.0, student_scale=0.8, **WEIGHTS, **how
    )
    targets = captured(teacher, 30, 2.0)
    labels[0] = targets.ids[0, 3]
    compare(student, tables(targets, options, tail), labels, scale, options, 1003, tail == "uniform")


@COMBINED
def test_several_targets(how: dict[str, object], device: str) -> None:
    student, teacher, labels, scale = batch(300, 300, torch.float32, device)
    how = dict(how)
    tail = how.pop("tail")
    options = RowOptions(temperature=2.0, teacher_weights=(0.2, 0.3, 0.5), **WEIGHTS, **how)
    near = teacher + torch.randn_like(teacher)
    targets = [captured(teacher, 5, 2.0), captured(near, 40, 2.0), captured(torch.randn_like(teacher), 9, 2.0)]
    compare(student, tables(targets, options, tail), labels, scale, options, 300, tail == "uniform")


@COMBINED
def test_repeated_ids_add_up(how: dict[str, object], device: str) -> None:
    student, teacher, labels, scale = batch(100, 100, torch.float32, device)
    how = dict(how)
    tail = how.pop("tail")
    options = RowOptions(temperature=1.0, **WEIGHTS, **how)
    targets = captured(teacher, 8, 1.0)
    targets.ids[:, 1] = targets.ids[:, 5] = targets.ids[:, 0]
    compare(student, tables(targets, options, tail), labels, scale, options, 100, tail == "uniform")


@pytest.mark.parametrize("level", [30.0, 640.0])
def test_saturated_rows(level: float, device: str) -> None:
    student, teacher, labels, scale = batch(1003, 1003, torch.float32, device)
    student = student.sign().mul(level)
    student[0, 0] += 1
    options = RowOptions(temperature=2.0, **WEIGHTS)
    compare(student, tables(captured(teacher, 16, 2.0), options), labels, scale, options, 1003)


def test_all_mass_on_the_entries(device: str) -> None:
    student, _, labels, scale = batch(1000, 1000, torch.float32, device)
    ids = student.topk(4).indices
    student.scatter_(1, ids, 60.0)  # the rest weighs e^-50 or less: 1 - sum would say 0
    options = RowOptions(temperature=1.0, **WEIGHTS)
    compare(student, tables(captured(student + torch.randn_like(student), 4, 1.0), options), labels, scale, options, 1000)


@COMBINED
def test_near_agreement(how: dict[str, object], device: str) -> None:
    if how["tail"] in ("renormalize", "none"):
        pytest.skip("no student agrees with a teacher that leaves most ids out")
    _, teacher, _, _ = batch(5003, 5003, torch.float32, device)
    targets, ones = captured(teacher, 64, 1.0), torch.ones(4, device=device)
    how = dict(how)
    spread, options = how.pop("tail") == "uniform", RowOptions(**how)
    if spread:
        even = targets.log_tail - torch.tensor(4939.0, device=device).log()
        teacher = even.expand(4, 5003).scatter(1, targets.ids.long(), targets.logprobs)
    student = teacher + 1e-3 * torch.randn_like(teacher)
    rows = tables(targets, options, "uniform" if spread else "ghost")
    wide = (rows[0], *(x.double() for x in rows[1:]))
    exact, _, _ = reference.forward(student.double(), wide, None, ones.double(), options, 5003, spread, False, None)
    loss, _, _ = topk.forward(student, rows, None, ones, options, 5003, spread, False, None)
    assert ((loss.double() - exact).abs() <= 2e-3 * exact + 1e-12).all()


def test_empty_slots_do_not_count(device: str) -> None:
    student, teacher, labels, scale = batch(500, 500, torch.float32, device)
    options = RowOptions(temperature=2.0, **WEIGHTS)
    ids, log_p, *more = tables(captured(teacher, 5, 2.0), options)
    more_ids = torch.cat([torch.full_like(ids, -1), ids], 1)
    more_log_p = torch.cat([torch.full_like(log_p, -torch.inf), log_p], 2)
    few, many = torch.empty_like(student), torch.empty_like(student)
    loss, _, _ = topk.forward(student, (ids, log_p, *more), labels, scale, options, 500, False, False, few)
    again, _, _ = topk.forward(student, (more_ids, more_log_p, *more), labels, scale, options, 500, False, False, many)
    assert torch.allclose(loss, again, rtol=1e-6)
    assert torch.allclose(few, many, atol=1e-7)


def test_parts(device: str) -> None:
    student, teacher, labels, scale = batch(1100, 1003, torch.float32, device)
    student[:2, :1003] = teacher[:2] + 1e-3
    for temperature in (1.0, 2.0):
        options = RowOptions(temperature=temperature, hard_weight=0.5)
        rows = tables(captured(teacher, 16, temperature), options)
        wide = (rows[0], *(x.double() for x in rows[1:]))
        _, _, expected = reference.forward(student.double(), wide, labels, scale.double(), options, 1003, False, True, None)
        _, _, parts = topk.forward(student, rows, labels, scale, options, 1003, False, True, None)
        for i, name in enumerate(PARTS):
            assert torch.allclose(parts[:, i].double(), expected[:, i], rtol=2e-5, atol=1e-6, equal_nan=True), name


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("width", [1003, 1100, 20000])
def test_student_entropy(width: int, temperature: float, device: str) -> None:
    """Wherever the largest logits stand; no NaN from excluded ids."""
    vocab = min(width, 19000)
    student, teacher = torch.randn(6, width, device=device) * 2, torch.randn(6, vocab, device=device)
    student[1] += torch.linspace(-300, 300, width, device=device)  # the maximum rises tile by tile
    student[2] += torch.linspace(300, -300, width, device=device)
    student[4, : vocab - 1], student[5, 9 : vocab - 9] = -torch.inf, -torch.inf  # one id is left; most are excluded
    options = RowOptions(temperature=temperature, student_softcap=50.0 if width == 1100 else 0.0)
    rows = tables(captured(teacher, 16, temperature), options)
    _, _, parts = topk.forward(student, rows, None, torch.ones(6, device=device), options, vocab, False, True, None)
    z = student.double()
    z = 50 * torch.tanh(z / 50) if width == 1100 else z
    truth = torch.special.entr(z[:, :vocab].softmax(-1)).sum(-1)
    torch.testing.assert_close(parts[:, PARTS.index("student_entropy")].double(), truth, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("spread", [False, True], ids=["ghost", "uniform"])
def test_gradient_in_the_place_of_the_student(spread: bool, device: str) -> None:
    student, teacher, labels, scale = batch(5100, 5003, torch.bfloat16, device)
    options = RowOptions(temperature=2.0, divergence="jsd", **WEIGHTS)
    rows = tables(captured(teacher, 64, 2.0), options, "uniform" if spread else "ghost")
    apart, inside = torch.empty_like(student), student.clone()
    topk.forward(student, rows, labels, scale, options, 5003, spread, False, apart)
    topk.forward(inside, rows, labels, scale, options, 5003, spread, False, inside)
    assert torch.equal(inside, apart)


def test_bad_rows_are_nan(device: str) -> None:
    student, teacher, labels, _ = batch(100, 100, torch.float32, device)
    scale, targets, options = torch.ones(4, device=device), captured(teacher, 8, 1.0), RowOptions(**WEIGHTS)
    targets.ids[0, 3] = 10**6  # an id that the student does not have
    student[1, 50] = torch.inf
    student[2, int(targets.ids[2, 0])] = torch.nan
    for grad in (None, torch.empty_like(student)):
        loss, _, _ = topk.forward(student, tables(targets, options), labels, scale, options, 100, False, False, grad)
        assert loss.isnan().tolist() == [True, True, True, False]
    targets.logprobs[3, 2] = torch.nan
    loss, _, _ = topk.forward(student, tables(targets, options), labels, scale, options, 100, False, False, None)
    assert loss.isnan().all()


def test_rows_that_do_not_count_are_not_read(device: str) -> None:
    student, teacher, labels, scale = batch(100, 100, torch.float32, device)
    targets, options = captured(teacher, 8, 1.0), RowOptions(**WEIGHTS)
    student[2], targets.ids[2], labels[2] = torch.nan, 10**6, 10**6
    grad = torch.empty_like(student)
    loss, _, parts = topk.forward(student, tables(targets, options), labels, scale, options, 100, False, True, grad)
    assert loss.isfinite().all()
    assert grad.isfinite().all()
    assert (parts[2] == 0).all()


def test_repeated_id_stays_inside(device: str) -> None:
    student, teacher, labels, scale = batch(100, 100, torch.float32, device)
    targets, options = captured(teacher, 8, 1.0), RowOptions(**WEIGHTS)
    targets.ids[:, 1] = targets.ids[:, 0]
    guarded = torch.full((4, 140), 7.0, device=device)
    topk.forward(student, tables(targets, options), labels, scale, options, 100, False, False, guarded[:, 20:120])
    assert (guarded[:, :20] == 7).all()
    assert (guarded[:, 120:] == 7).all()
