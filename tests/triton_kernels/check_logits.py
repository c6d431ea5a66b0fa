"""The logits and scale kernels in Triton against the float64 reference. Run by `test_triton_interpreted`."""

from __future__ import annotations

import plain
import pytest
import torch
from against_reference import DTYPES, DTYPES_AND_T, WEIGHTS, batch, compare, truth

import kdfast
from kdfast.backends.triton import logits, scale, tiles
from kdfast.options import PARTS, RowOptions


@pytest.mark.parametrize(("dtype", "temperature"), DTYPES_AND_T.values(), ids=DTYPES_AND_T)
@pytest.mark.parametrize(
    ("vs", "vt"),
    [(1, 1), (2, 2), (17, 17), (1008, 1008), (5003, 5003), (5008, 5008), (1100, 1003), (1003, 1100), (1104, 1008)],
    ids=["V1", "V2", "V17", "V1008-one-tile", "V5003-ragged", "V5008-aligned-tiles", "student-larger-ragged",
         "teacher-larger-ragged", "student-larger-aligned"],
)  # fmt: skip
def test_value_and_gradient(vs: int, vt: int, temperature: float, dtype: torch.dtype, device: str) -> None:
    student, teacher, labels, scale = batch(vs, vt, dtype, device)
    compare(student, [teacher], labels, scale, RowOptions(temperature=temperature, **WEIGHTS))


@pytest.mark.parametrize(
    ("vocab", "dtype"),
    [(40000, torch.float32), (70016, torch.bfloat16), (70001, torch.float16)],
    ids=["8-warps", "16-warps", "ragged"],
)
def test_wide_launches(vocab: int, dtype: torch.dtype, device: str) -> None:
    student, teacher, labels, scale = batch(vocab, vocab, dtype, device)
    compare(student[1:3], [teacher[1:3]], labels[1:3], scale[1:3], RowOptions(temperature=2.5, **WEIGHTS))


def lying(how: str, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Student and teacher of rows that lie as `tiles` calls it, and how it does."""
    width = {"aligned": 5008, "phased": 5003, "scattered": 5003, "short": 5}[how]
    student, teacher = batch(width, width, dtype, device)[:2]
    if how == "scattered":  # out of step with the student's
        wider = torch.full((4, width + 3), torch.nan, device=device, dtype=dtype)
        wider[:, :width] = teacher
        teacher = wider[:, :width]
    found = tiles.launch_for(width, student, teacher, phased=True).ragged
    return student, teacher, found


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0], ids=["T1", "T2-squares", "T3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("how", ["aligned", "phased", "scattered", "short"])
def test_how_rows_lie(how: str, dtype: torch.dtype, temperature: float, device: str) -> None:
    """Labels on the first and last columns, which in phased rows belong to no whole load."""
    student, teacher, found = lying(how, dtype, device)
    assert found == {"aligned": tiles.ALIGNED, "scattered": tiles.SCATTERED}.get(how, tiles.PHASED).value
    labels = torch.tensor([0, student.shape[1] - 1, 3, 4], device=device)
    scale = torch.tensor([1.0, 0.5, 0.0, 2.0], device=device)
    options = RowOptions(temperature=temperature, label_smoothing=0.1, z_loss=1e-3, **WEIGHTS)
    compare(student, [teacher], labels, scale, options)
    _, _, parts = logits.forward(student, [teacher], labels, scale, options, True, None)
    exact = truth(student, [teacher], labels, scale, options, True)[1]
    assert torch.allclose(parts.double(), exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("level", [640.0, -640.0])
def test_a_saturated_row_in_step_with_nothing(level: float, device: str) -> None:
    """At T = 2 the softmax at 1 is the square of that at 2: one logit far above the others, in a row of phased halves."""
    student, teacher, _ = lying("phased", torch.bfloat16, device)
    student[0, 4999] += level
    student[1] += level
    teacher[3, 1] += level
    labels = torch.tensor([4999, 7, 8, 1], device=device)
    compare(student, [teacher], labels, torch.ones(4, device=device), RowOptions(temperature=2.0, **WEIGHTS))


@pytest.mark.parametrize("labelled", [False, True], ids=["no-labels", "labels-without-weight"])
def test_soft_loss_alone(labelled: bool, device: str) -> None:
    student, teacher, labels, scale = batch(333, 333, torch.float32, device)
    compare(student, [teacher], labels if labelled else None, scale, RowOptions(temperature=2.0))


@pytest.mark.parametrize(("dtype", "temperature"), DTYPES_AND_T.values(), ids=DTYPES_AND_T)
@pytest.mark.parametrize("level", [30.0, 640.0])
def test_saturated_rows(level: float, temperature: float, dtype: torch.dtype, device: str) -> None:
    student, teacher, labels, scale = batch(1003, 1003, dtype, device)
    student, teacher = student.sign().mul(level), teacher.sign().mul(level)
    student[0, 0] += 8  # one clear winner, also in bfloat16
    compare(student, [teacher], labels, scale, RowOptions(temperature=temperature, **WEIGHTS))


def test_extra_columns_that_dwarf_the_common_ones(device: str) -> None:
    student, teacher, labels, scale = batch(1100, 1000, torch.float32, device)
    student[:, 1050] = 640.0
    compare(student, [teacher], labels, scale, RowOptions(temperature=2.0, **WEIGHTS))


@pytest.mark.parametrize("overlap", [0.95, 0.999, 0.9999])
def test_value_near_agreement(overlap: float, device: str) -> None:
    teacher = torch.randn(4, 5003, device=device) * 3
    noise = torch.randn_like(teacher)
    lo, hi = 0.0, 10.0
    for _ in range(40):  # the noise at which sum_v min(p, q) is the overlap asked for
        size = (lo + hi) / 2
        shared = torch.minimum((teacher + size * noise).softmax(-1), teacher.softmax(-1)).sum(-1).mean()
        lo, hi = (size, hi) if shared > overlap else (lo, size)
    ones = torch.ones(4, device=device)
    student = teacher + size * noise
    exact, _, grad = truth(student, [teacher], None, ones, RowOptions())
    out = torch.empty_like(student)
    loss, _, _ = logits.forward(student, [teacher], None, ones, RowOptions(), False, out)
    assert ((loss.double() - exact).abs() <= 1e-3 * exact).all()
    assert plain.error(out, grad) <= 1e-3


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("vs", "vt"), [(300, 257), (257, 300), (2008, 2008)])
def test_parts(vs: int, vt: int, temperature: float, device: str) -> None:
    student, teacher, labels, scale = batch(vs, vt, torch.float32, device)
    labels = labels.clamp(max=min(vs, vt) - 1)
    student[:2, : min(vs, vt)] = teacher[:2, : min(vs, vt)] + 1e-3  # these rows agree on the top
    options = RowOptions(temperature=temperature, hard_weight=0.5)
    _, expected, _ = truth(student, [teacher], labels, scale, options, parts=True)
    loss, _, parts = logits.forward(student, [teacher], labels, scale, options, True, None)
    alone, _, none = logits.forward(student, [teacher], labels, scale, options, False, None)
    assert none.shape == (0,)
    assert torch.allclose(loss, alone, rtol=1e-6)
    for i, name in enumerate(PARTS):
        assert torch.allclose(parts[:, i].double(), expected[:, i], rtol=2e-5, atol=1e-6), name


def test_parts_of_a_label_that_the_teacher_lacks(device: str) -> None:
    student, teacher, labels, scale = batch(40, 30, torch.float32, device)
    labels[:] = 35
    _, _, parts = logits.forward(student, [teacher], labels, scale, RowOptions(hard_weight=0.5), True, None)
    assert parts[:, PARTS.index("teacher_nll")].tolist() == [torch.inf, torch.inf, 0.0, torch.inf]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradient_in_the_place_of_the_student(dtype: torch.dtype, device: str) -> None:
    student, teacher, labels, scale = batch(5100, 5003, dtype, device)
    options = RowOptions(temperature=2.0, **WEIGHTS)
    apart = torch.empty_like(student)
    loss, _, _ = logits.forward(student, [teacher], labels, scale, options, False, apart)
    inside = student.clone()
    again, _, _ = logits.forward(inside, [teacher], labels, scale, options, False, inside)
    assert torch.equal(inside, apart)
    assert torch.equal(loss, again)


def test_rows_with_any_stride(device: str) -> None:
    student, teacher, labels, scale = batch(1000, 1000, torch.float32, device)
    wide = torch.full((4, 3000), torch.nan, device=device)
    s, t, g = wide[:, :1000], wide[:, 1001:2001], wide[:, 2000:]
    s.copy_(student), t.copy_(teacher)
    expected = torch.empty_like(student)
    loss, _, _ = logits.forward(student, [teacher], labels, scale, RowOptions(temperature=2.0, **WEIGHTS), False, expected)
    strided, _, _ = logits.forward(s, [t], labels, scale, RowOptions(temperature=2.0, **WEIGHTS), False, g[:, :1000])
    assert torch.equal(loss, strided)
    assert torch.equal(g[:, :1000], expected)


def test_mixed_dtypes(device: str) -> None:
    student, teacher, labels, scale = batch(1000, 1000, torch.float32, device)
    compare(student, [teacher.bfloat16().float()], labels, scale, RowOptions(temperature=2.0, **WEIGHTS))
    expected, _, _ = logits.forward(student, [teacher.bfloat16().float()], None, scale, RowOptions(), False, None)
    loss, _, _ = logits.forward(student, [teacher.bfloat16()], None, scale, RowOptions(), False, None)
    assert torch.allclose(loss, expected, rtol=1e-5)


def test_minus_infinity(device: str) -> None:
    student, teacher, _, _ = batch(100, 100, torch.float32, device)
    scale = torch.ones(4, device=device)
    teacher[:, ::3] = -torch.inf
    student[0, ::3] = -torch.inf  # both exclude the same ids
    student[2, 1] = -torch.inf  # the teacher allows this one
    exact, _, exact_grad = truth(student, [teacher], None, scale, RowOptions())
    grad = torch.empty_like(student)
    loss, _, _ = logits.forward(student, [teacher], None, scale, RowOptions(), False, grad)
    assert torch.isinf(loss).tolist() == [False, False, True, False]
    assert torch.allclose(loss.double(), exact, rtol=1e-5)
    assert torch.allclose(grad.double(), exact_grad, atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
def test_bad_rows_are_nan(side: int, value: float, device: str) -> None:
    inputs = batch(2500, 2500, torch.float32, device)
    inputs[side][1, 2400] = value
    student, teacher, labels, scale = inputs
    loss, _, _ = logits.forward(student, [teacher], labels, scale, RowOptions(temperature=2.0, **WEIGHTS), False, None)
    assert loss.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
def test_row_without_a_distribution_is_nan(side: int, device: str) -> None:
    inputs = batch(100, 100, torch.float32, device)
    inputs[side][1] = -torch.inf
    student, teacher, labels, scale = inputs
    loss, _, _ = logits.forward(student, [teacher], labels, scale, RowOptions(temperature=2.0, **WEIGHTS), False, None)
    assert loss.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("hard", [0.0, 0.3])
def test_labels_out_of_range_are_nan(hard: float, device: str) -> None:
    student, teacher, labels, scale = batch(20, 20, torch.float32, device)
    labels[0], labels[1] = 20, -7
    loss, _, _ = logits.forward(
        student, [teacher], labels, scale, RowOptions(soft_weight=0.7, hard_weight=hard), False, torch.empty_like(student)
    )
    assert loss.isnan().tolist() == [True, True, False, False]


def test_rows_that_do_not_count_are_not_read(device: str) -> None:
    student, teacher, labels, scale = batch(333, 333, torch.float32, device)
    student[2], teacher[2], labels[2] = torch.nan, torch.nan, 10**6
    grad = torch.empty_like(student)
    loss, stats, parts = logits.forward(student, [teacher], labels, scale, RowOptions(temperature=2.0, **WEIGHTS), True, grad)
    for result in (loss, parts, grad, stats):
        assert result.isfinite().all()
        assert (result[2] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("factor", [1.0, 0.37])
def test_scale(factor: float, dtype: torch.dtype, device: str) -> None:
    grad = torch.randn(7, 999, device=device).to(dtype)
    before, upstream = grad.clone(), torch.tensor(factor, device=device)
    scale.scale_(grad, upstream)
    # The interpreter cuts float32 to bfloat16 where a GPU rounds: one unit in the last place.
    assert torch.allclose(grad, (before.float() * upstream).to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)
    if factor == 1:
        assert torch.equal(grad, before)


def test_scale_of_a_strided_gradient(device: str) -> None:
    wide = torch.randn(4, 20, device=device)
    expected = wide[:, :7] * 3
    scale.scale_(wide[:, :7], torch.tensor(3.0, device=device))
    assert torch.equal(wide[:, :7], expected)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_third_of_a_strided_gradient_is_rounded_once(dtype: torch.dtype, device: str) -> None:
    wide, third = torch.randn(4, 20, device=device).to(dtype), torch.tensor(1 / 3, device=device)
    expected = (wide[:, :7].float() * third).to(dtype)
    scale.scale_(wide[:, :7], third)
    assert torch.equal(wide[:, :7], expected)


def test_a_bad_row_is_named_when_values_are_checked(device: str) -> None:
    student, teacher, labels, _ = batch(50, 50, torch.float32, device)
    out_of_range, nan = labels.clone(), student.clone()
    out_of_range[2], nan[1, 7] = 60, torch.nan
    with kdfast.use_backend("triton"), kdfast.debug_checks():
        with pytest.raises(ValueError, match="labels: row 2 has label 60, expected 0 <= label < 50"):
            kdfast.kd_loss(student, teacher, out_of_range, hard_weight=0.5)
        with pytest.raises(ValueError, match="student logits: row 1 holds NaN"):
            kdfast.kd_loss(nan, teacher)
