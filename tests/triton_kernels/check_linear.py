"""Linear heads around the Triton row kernel against the float64 reference. Run by `test_triton_interpreted`."""

from __future__ import annotations

import plain
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import kd_loss, linear_kd_loss, use_backend
from kdfast.backends.reference import linear as reference
from kdfast.backends.triton import linear
from kdfast.chunks import Chunking, Needs, Side
from kdfast.options import DIVERGENCES, Head, RowOptions

OPTIONS = RowOptions(temperature=2.0, soft_weight=0.7, hard_weight=0.3)
EVERYTHING = Needs(True, True, True)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])


def side(n: int, vocab: int, width: int, dtype: torch.dtype, device: str, bias: bool) -> Side:
    make = lambda *shape: (torch.randn(*shape, device=device) / shape[-1] ** 0.5 * 3).to(dtype)  # noqa: E731
    return Side(make(n, width), make(vocab, width), make(vocab) if bias else None)


def wide(s: Side) -> Side:
    return Side(s.hidden.double(), s.weight.double(), None if s.bias is None else s.bias.double())


def compare(
    student: Side, teachers: list[Side], labels: Tensor, scale: Tensor, chunking: Chunking, options: RowOptions = OPTIONS
) -> None:
    arguments = (labels, scale.double(), options, Chunking(None, torch.float64, chunking.row_index), False, EVERYTHING)
    loss, _, *grads = reference.forward(wide(student), [wide(t) for t in teachers], *arguments)
    got, _, *got_grads = linear.forward(student, teachers, labels, scale, options, chunking, False, EVERYTHING)
    half = torch.bfloat16 if torch.bfloat16 in (student.weight.dtype, chunking.dtype) else student.weight.dtype
    assert plain.error(got, loss) <= (4e-3 if chunking.dtype == torch.bfloat16 else 2e-6)
    assert got_grads[1].dtype == torch.float32
    for name, mine, truth in zip(("hidden", "weight", "bias"), got_grads, grads, strict=True):
        if mine.numel():
            # Logits rounded to bfloat16 move the probabilities by more than a rounding of the result.
            tolerance = 2e-2 if chunking.dtype == torch.bfloat16 else plain.EPS[half]
            assert plain.error(mine, truth) <= tolerance, name


@DTYPES
@pytest.mark.parametrize("workspace_mb", [64, 0.008], ids=["one-chunk", "ragged-chunks"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_against_reference(workspace_mb: float, bias: bool, dtype: torch.dtype, device: str) -> None:
    student, teacher = side(10, 300, 32, dtype, device, bias), side(10, 310, 48, dtype, device, bias)
    if not bias:
        student = Side(student.hidden, student.weight, torch.zeros(300, device=device, dtype=dtype))
    labels, scale = torch.randint(0, 300, (10,), device=device), torch.rand(10, device=device)
    compare(student, [teacher], labels, scale, Chunking(workspace_mb, torch.float32, None))


@DTYPES
def test_bfloat16_logits(dtype: torch.dtype, device: str) -> None:
    student, teacher = side(10, 300, 32, dtype, device, True), side(10, 300, 48, dtype, device, False)
    labels, scale = torch.randint(0, 300, (10,), device=device), torch.rand(10, device=device)
    compare(student, [teacher], labels, scale, Chunking(0.005, torch.bfloat16, None))


@pytest.mark.parametrize("divergence", ["jsd", "tvd"])
def test_teachers_and_row_index(divergence: str, device: str) -> None:
    student = side(12, 200, 16, torch.bfloat16, device, True)
    teachers = [side(12, 200, 24, torch.bfloat16, device, False), side(12, 190, 16, torch.bfloat16, device, True)]
    labels, scale = torch.randint(0, 190, (12,), device=device), torch.rand(12, device=device)
    index = torch.tensor([0, 1, 3, 4, 7, 9, 10], device=device)
    options = RowOptions(divergence=divergence, temperature=2.0, hard_weight=0.3, teacher_weights=(0.25, 0.75))
    scale[[2, 5, 6, 8, 11]] = 0
    compare(student, teachers, labels, scale, Chunking(0.008, torch.float32, index), options)


def test_nothing_needed_leaves_nothing(device: str) -> None:
    student, teacher = side(4, 30, 8, torch.float32, device, False), side(4, 30, 8, torch.float32, device, False)
    scale, chunking = torch.ones(4, device=device), Chunking(None, torch.float32, None)
    kept = linear.forward(student, [teacher], None, scale, RowOptions(), chunking, False, Needs(False, False, False))
    assert [x.numel() for x in kept[2:]] == [0, 0, 0]
    assert kept[0].isfinite().all()


# float16 heads: gradients of the logits in units of their rows, or in float32 where nothing bounds them.

BOUNDED = ("forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd")
SCALES = {
    "mean-of-many": lambda n: torch.full((n,), 2.0**-26),  # 1/N beyond float16's range
    "not-a-power": lambda n: torch.rand(n) + 0.3,
    "far-apart": lambda n: 3e-5 * 10.0 ** -torch.arange(n),
    "large": lambda n: 7e5 * torch.rand(n),
    "signs-and-none": lambda n: torch.tensor([0.0, -3.0, 1e-3, 0.0, 2.0, -0.7]).repeat(n)[:n],
    "none": torch.zeros,
}


def lost(student: Side, teachers: list[Side], labels: Tensor, scale: Tensor, options: RowOptions) -> None:
    """Against float64, with what float32 heads of the same values lose: nothing but a rounding to float16, row by row."""
    chunking = Chunking(0.01, torch.float32, None)
    exact = Chunking(None, torch.float64, None)
    truth = reference.forward(
        wide(student), [wide(t) for t in teachers], labels, scale.double(), options, exact, False, EVERYTHING
    )
    floats = [
        Side(s.hidden.float(), s.weight.float(), None if s.bias is None else s.bias.float()) for s in (student, *teachers)
    ]
    single = linear.forward(floats[0], floats[1:], labels, scale, options, chunking, False, EVERYTHING)
    got = linear.forward(student, teachers, labels, scale, options, chunking, False, EVERYTHING)
    assert plain.error(got[0], truth[0]) <= 2e-6 + 2 * plain.error(single[0], truth[0])
    for mine, theirs, true in zip(got[2:], single[2:], truth[2:], strict=True):
        assert mine.dtype == torch.float32
        assert plain.error(mine, true) <= plain.EPS[torch.float16] + 2 * plain.error(theirs, true)
    for mine, theirs, true in zip(got[2], single[2], truth[2], strict=True):  # a row of little weight is as good
        assert plain.error(mine, true) <= 2 * plain.EPS[torch.float16] + 2 * plain.error(theirs, true)


@pytest.mark.parametrize("scales", SCALES)
def test_float16_rows_of_any_scale(scales: str, device: str) -> None:
    student, teacher = side(6, 300, 32, torch.float16, device, True), side(6, 310, 48, torch.float16, device, True)
    labels = torch.randint(0, 300, (6,), device=device)
    lost(student, [teacher], labels, SCALES[scales](6).to(device), OPTIONS)


@pytest.mark.parametrize("temperature", [0.5, 8.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_float16_divergences(divergence: str, temperature: float, device: str) -> None:
    student = side(4, 200, 16, torch.float16, device, True)
    teachers = [side(4, 200, 16, torch.float16, device, False), side(4, 190, 8, torch.float16, device, True)]
    options = RowOptions(
        divergence=divergence, temperature=temperature, hard_weight=1.5, z_loss=1e-4, teacher_weights=(0.3, 0.7),
        student_softcap=20.0, student_scale=1.3, label_smoothing=0.1, skew=0.01, ab_alpha=0.5,
    )  # fmt: skip
    assert (linear.largest_gradient(options) < float("inf")) == (divergence in BOUNDED)
    lost(student, teachers, torch.randint(0, 190, (4,), device=device), torch.rand(4, device=device) / 4096, options)


def test_float16_near_agreement(device: str) -> None:
    """Differences of two roundings between the sides: the gradients are small beside the largest that could be."""
    student = side(5, 3000, 32, torch.float16, device, False)
    student = Side(student.hidden / 8, student.weight, None)
    teacher = Side((student.hidden * (1 + 2.0**-9)).half(), student.weight, None)
    for options in (RowOptions(), RowOptions(divergence="jsd", temperature=2.0), RowOptions(divergence="tvd")):
        lost(
            student, [teacher], torch.zeros(5, dtype=torch.int64, device=device), torch.full((5,), 1e-4, device=device), options
        )


def test_float16_saturated_rows(device: str) -> None:
    """All of the mass on ids that the other side excludes: gradients as large as they get, none overflows."""
    student, teacher = side(4, 300, 32, torch.float16, device, False), side(4, 300, 32, torch.float16, device, False)
    student, teacher = Side(student.hidden * 40, student.weight, None), Side(teacher.hidden * 40, teacher.weight, None)
    options = RowOptions(temperature=3.0, soft_weight=15.0, hard_weight=15.0)
    assert 32 < linear.largest_gradient(options) <= 64
    lost(
        student,
        [teacher],
        torch.randint(0, 300, (4,), device=device),
        torch.tensor([1.0, 1.99, 3e4, 0.1], device=device),
        options,
    )


@pytest.mark.parametrize("loss_scale", [1.0, 2.0**16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_float16_heads_are_as_good_as_plain_ones(reduction: str, loss_scale: float, device: str) -> None:
    """Through the public function, with what a gradient scaler, or the user's own reduction, sends back."""
    student, teacher = side(6, 300, 32, torch.float16, device, True), side(6, 300, 48, torch.float16, device, False)
    labels = torch.tensor([3, -100, 0, 299, 7, 8], device=device)
    upstream = torch.tensor(1.0) if reduction == "mean" else torch.tensor([1.0, 5.0, 1e-3, 2.0, 0.3, 1e-5])
    upstream = loss_scale * upstream.to(device) / 8

    def run(dtype: torch.dtype, ours: bool) -> list[Tensor]:
        hidden, weight, bias = (x.to(dtype).requires_grad_() for x in (student.hidden, student.weight, student.bias))
        h_t, w_t = teacher.hidden.to(dtype), teacher.weight.to(dtype)
        options = {"temperature": 2.0, "hard_weight": 0.3, "soft_weight": 0.7, "reduction": reduction}
        if ours:
            with use_backend("triton"):
                loss = linear_kd_loss(hidden, weight, h_t, w_t, labels, student_bias=bias, workspace_mb=0.01, **options)
        else:
            with use_backend("reference"):
                loss = kd_loss(F.linear(hidden, weight, bias), F.linear(h_t, w_t), labels, **options)
        return list(torch.autograd.grad(loss, (hidden, weight, bias), upstream.to(loss.dtype)))

    truth, eager = run(torch.float64, False), run(torch.float16, False)
    for name, mine, theirs, true in zip(("hidden", "weight", "bias"), run(torch.float16, True), eager, truth, strict=True):
        plain.assert_as_good(mine, theirs, true, torch.float16, name)


@pytest.mark.parametrize("divergence", BOUNDED)
def test_no_gradient_is_above_the_largest(divergence: str) -> None:
    found = []
    for spread in (1e-2, 1.0, 10.0, 100.0):
        for temperature, share in ((1.0, 0.1), (0.5, 0.9), (4.0, 1e-3)):
            options = {"divergence": divergence, "temperature": temperature, "skew": share, "beta": share}
            x, t = (spread * torch.randn(20, 7, dtype=torch.float64) for _ in range(2))
            x.requires_grad_()
            with use_backend("reference"):
                kd_loss(x, t, torch.zeros(20, dtype=torch.int64), hard_weight=0.4, reduction="none", **options,
                        student_head=Head(scale=1.7)).sum().backward()  # fmt: skip
            largest = linear.largest_gradient(RowOptions(hard_weight=0.4, student_scale=1.7, **options))
            found.append(float(x.grad.abs().max()) / largest)
    assert max(found) <= 1
    assert max(found) > 0.1  # and it is not far above them


def test_float16_products_by_hand(device: str) -> None:
    """Gradients leave in the heads' dtype where they are bounded, and in the logits' place where those are as wide."""
    student = side(6, 30, 8, torch.float16, device, False)
    assert linear._Gemms(True).grad_dtype(student, torch.float32) == torch.float16
    assert linear._Gemms(False).grad_dtype(student, torch.float32) == torch.float32
    units = linear._units(torch.tensor([1.0, 1.5, -0.25, 0.0, 3e-9], device=device), 1.0)
    assert (units > 0).all()
    assert (units.log2() == units.log2().round()).all()
    assert torch.equal(units[:3] * linear._TOP, torch.tensor([2.0, 2.0, 0.5], device=device))
