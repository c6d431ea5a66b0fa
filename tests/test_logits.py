"""kd_loss: values and gradients in every backend that runs on a CPU, and every promise of its contract."""

from __future__ import annotations

import plain
import pytest
import torch
from torch import Tensor

import kdfast
from kdfast import kd_loss, use_backend
from kdfast.options import RowOptions

BACKENDS = ["cpp", "reference"]
OPTIONS = {"temperature": 2.0, "soft_weight": 0.7, "hard_weight": 0.3}


def batch(n: int, vs: int, vt: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = (torch.randn(n, v).mul(scale).to(dtype) for v in (vs, vt))
    labels = torch.randint(0, vs, (n,))
    labels[n // 2] = -100
    return student, teacher, labels


def compare(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, dtype: torch.dtype, backend: str) -> None:
    def eager(x: Tensor) -> Tensor:
        loss = plain.rows(x, teacher.to(x.dtype), labels, temperature=temperature, soft=0.7, hard=0.3)
        return plain.mean(loss, labels)

    def ours(x: Tensor) -> Tensor:
        return kd_loss(x, teacher.to(x.dtype), labels, temperature=temperature, soft_weight=0.7, hard_weight=0.3)

    truth_value, truth_grad = plain.gradient(eager, student, torch.float64)
    plain_value, plain_grad = plain.gradient(eager, student, dtype)
    with use_backend(backend):
        value, grad = plain.gradient(ours, student, dtype)
    plain.assert_as_good(grad, plain_grad, truth_grad, dtype, "gradient")
    plain.assert_as_good(value, plain_value, truth_value, dtype, "value")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.5], ids=["T1-same-exp", "T2-squared-exp", "T3.5-own-exp"])
@pytest.mark.parametrize(
    ("vs", "vt"),
    [(1, 1), (2, 2), (17, 17), (1000, 1000), (32000, 32000), (5003, 4000), (4000, 5003)],
    ids=["V1", "V2", "V17-ragged-vector", "V1000", "V32000-many-blocks", "student-larger", "teacher-larger"],
)
def test_value_and_gradient(vs: int, vt: int, temperature: float, dtype: torch.dtype, backend: str) -> None:
    student, teacher, labels = batch(9, vs, vt, dtype)
    compare(student, teacher, labels, temperature, dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocab", [50257, 151936, 262144])
def test_large_vocabularies(vocab: int, backend: str) -> None:
    student, teacher, labels = batch(3, vocab, vocab)
    compare(student, teacher, labels, 2.0, torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("scale", [30.0, 640.0])
def test_saturated_rows(scale: float, dtype: torch.dtype, backend: str) -> None:
    student, teacher, labels = batch(8, 1003, 1003, dtype)
    student, teacher = student.sign().mul(scale).to(dtype), teacher.sign().mul(scale).to(dtype)
    student[0, 0] += 1  # one clear winner
    compare(student, teacher, labels, 2.0, dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("overlap", [0.88, 0.95, 0.98, 0.999, 0.9999])
def test_value_near_agreement(overlap: float, backend: str) -> None:
    teacher = torch.randn(16, 8000) * 3
    lo, hi = 0.0, 10.0
    noise = torch.randn_like(teacher)
    for _ in range(40):  # the noise at which sum_v min(p, q) is the overlap asked for
        size = (lo + hi) / 2
        shared = torch.minimum((teacher + size * noise).softmax(-1), teacher.softmax(-1)).sum(-1).mean()
        lo, hi = (size, hi) if shared > overlap else (lo, size)
    student = teacher + size * noise
    truth = plain.rows(student.double(), teacher.double(), None, temperature=1.0, soft=1.0, hard=0.0).mean()
    with use_backend(backend):
        value = kd_loss(student, teacher)
    assert abs(float(value) / float(truth) - 1) <= 1e-3
    assert (kd_loss(student, teacher, reduction="none") >= 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_models_have_no_loss(backend: str) -> None:
    logits = torch.randn(5, 777, requires_grad=True)
    with use_backend(backend):
        loss = kd_loss(logits, logits.detach(), temperature=3.0)
    (grad,) = torch.autograd.grad(loss, logits)
    assert abs(float(loss.detach())) < 1e-10
    assert grad.abs().max() < 1e-8


@pytest.mark.parametrize("backend", BACKENDS)
def test_minus_infinity(backend: str) -> None:
    student, teacher, _ = batch(4, 100, 100)
    teacher[:, ::3] = -torch.inf
    student[0, ::3] = -torch.inf  # both exclude the same ids
    student[2, 1] = -torch.inf  # the teacher allows this one
    with use_backend(backend):
        loss = kd_loss(student.requires_grad_(), teacher, reduction="none")
        (grad,) = torch.autograd.grad(loss.sum(), student)
    assert loss.isfinite().tolist() == [True, True, False, True]
    assert loss[2] == torch.inf
    assert grad.isfinite().all()
    kept = torch.arange(100) % 3 != 0
    truth = plain.rows(student[:1, kept].double(), teacher[:1, kept].double(), None, temperature=1.0, soft=1.0, hard=0.0)
    assert torch.allclose(loss[:1].double(), truth, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "token-weight"])
def test_reductions(reduction: str, weighted: bool, backend: str) -> None:
    student, teacher, labels = (x.view(3, 4, *x.shape[1:]) for x in batch(12, 50, 50, torch.float64))
    weight = torch.rand(3, 4, dtype=torch.float64) if weighted else None
    if weight is not None:
        weight[0, 0] = 0
    per_row = plain.rows(student, teacher, labels, temperature=2.0, soft=0.7, hard=0.3)
    counts = labels != -100
    if weight is not None:
        counts = counts & (weight > 0)
        per_row = per_row * weight
    per_row = torch.where(counts, per_row, 0)
    expected = {"none": per_row, "sum": per_row.sum(), "mean": per_row.sum() / counts.sum()}[reduction]
    dtype = torch.float64 if backend == "reference" else torch.float32
    with use_backend(backend):
        got = kd_loss(student.to(dtype), teacher.to(dtype), labels, token_weight=weight, reduction=reduction, **OPTIONS)
        halved = kd_loss(student.to(dtype), teacher.to(dtype), labels, token_weight=weight, num_items=7, **OPTIONS)
    assert torch.allclose(got.double(), expected, rtol=1e-5)
    assert torch.allclose(halved.double(), per_row.sum() / 7, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["in-forward", "in-backward"])
def test_rows_that_do_not_count_are_not_read(dtype: torch.dtype, backend: str) -> None:
    student, teacher, labels = batch(6, 333, 333, dtype)
    student[3], teacher[3] = torch.nan, torch.nan  # batch() ignores row 3
    student.requires_grad_()
    with use_backend(backend):
        loss = kd_loss(student, teacher, labels, **OPTIONS)
        (grad,) = torch.autograd.grad(loss, student)
    assert loss.isfinite()
    assert (grad[3] == 0).all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (4, 5)], ids=["no-rows", "empty-batch", "all-ignored"])
def test_nothing_to_learn_is_zero(shape: tuple[int, ...], backend: str) -> None:
    student = torch.randn(shape, requires_grad=True)
    labels = torch.full(shape[:-1], -100)
    with use_backend(backend):
        loss, parts = kd_loss(student, torch.randn(shape), labels, hard_weight=1.0, return_parts=True)
    (grad,) = torch.autograd.grad(loss, student)
    assert float(loss.detach()) == 0
    assert (grad == 0).all()
    assert parts.soft.count == 0
    assert parts.soft.mean == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend: str) -> None:
    wide = torch.randn(3, 5, 200)
    student, teacher = wide[:, 1:, :150], torch.randn(5, 3, 150).transpose(0, 1)[:, 1:]
    with use_backend(backend):
        got = kd_loss(student, teacher, temperature=2.0)
        expected = kd_loss(student.contiguous(), teacher.contiguous(), temperature=2.0)
    assert got == expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["in-forward", "in-backward"])
def test_backward_twice(dtype: torch.dtype, backend: str) -> None:
    student, teacher, labels = batch(6, 333, 333, dtype)
    student.requires_grad_()
    with use_backend(backend):
        loss = kd_loss(student, teacher, labels, **OPTIONS)
        (first,) = torch.autograd.grad(loss, student, torch.tensor(3.0), retain_graph=True)
        kept = first.clone()
        (second,) = torch.autograd.grad(loss, student, torch.tensor(0.5))
    assert torch.equal(first, kept)
    assert torch.allclose(first.float(), 6 * second.float(), rtol=1e-2 if dtype == torch.float16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_scaling_rescues_float16(backend: str) -> None:
    student, teacher, _ = batch(4096, 33, 33, torch.float16)
    truth_loss = lambda x: plain.rows(x, teacher.double(), None, temperature=1.0, soft=1.0, hard=0.0).mean()  # noqa: E731
    _, truth = plain.gradient(truth_loss, student, torch.float64)
    student.requires_grad_()
    with use_backend(backend):
        (grad,) = torch.autograd.grad(kd_loss(student, teacher), student, torch.tensor(65536.0))
    assert plain.error(grad.double() / 65536, truth) < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_overwrite_logits(dtype: torch.dtype, backend: str) -> None:
    source, teacher, labels = batch(6, 1003, 1003, dtype)
    source.requires_grad_()
    with use_backend(backend):
        (expected,) = torch.autograd.grad(kd_loss(source * 1, teacher, labels, **OPTIONS), source)
        logits = source * 1
        loss = kd_loss(logits, teacher, labels, overwrite_logits=True, **OPTIONS)
        (grad,) = torch.autograd.grad(loss, source)
    assert torch.equal(grad, expected)
    assert torch.equal(logits.detach(), expected)


def test_reading_overwritten_logits_is_noticed() -> None:
    source, teacher, _ = batch(4, 64, 64)
    source.requires_grad_()
    logits = source * 1
    squared = (logits * logits).sum()  # saves the logits for its backward
    loss = kd_loss(logits, teacher, overwrite_logits=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + squared).backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("vs", "vt"), [(300, 300), (300, 257), (257, 300)])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_parts(vs: int, vt: int, temperature: float, backend: str) -> None:
    student, teacher, labels = batch(10, vs, vt)
    labels = labels.clamp(max=vt - 1)
    common = min(vs, vt)
    student[:5, :common] = teacher[:5, :common] + torch.randn(5, common) * 1e-2  # half the rows agree on the top
    with use_backend(backend):
        _, parts = kd_loss(student, teacher, labels, temperature=temperature, hard_weight=0.5, return_parts=True)
    counts = labels != -100
    s, t, y = student.double()[counts], teacher.double()[counts], labels[counts]
    log_p1 = t[:, :common].log_softmax(-1)
    expected = {
        "soft": plain.rows(s, t, None, temperature=temperature, soft=temperature**-2, hard=0.0).sum(),
        "hard": torch.nn.functional.cross_entropy(s, y, reduction="sum"),
        "kl_at_1": plain.rows(s, t, None, temperature=1.0, soft=1.0, hard=0.0).sum(),
        "teacher_nll": torch.nn.functional.nll_loss(log_p1, y, reduction="sum"),
        "teacher_entropy": -(log_p1.exp() * log_p1).sum(),
        "top1_agreement": (s[:, :common].argmax(-1) == t[:, :common].argmax(-1)).sum().double(),
        "student_entropy": torch.special.entr(s[:, :common].softmax(-1)).sum(),
    }
    for name, value in expected.items():
        part = getattr(parts, name)
        assert part.count == counts.sum()
        assert torch.allclose(part.sum.double(), value, rtol=2e-5), name


def test_teacher_gets_no_gradient() -> None:
    student, teacher, labels = batch(4, 20, 20)
    teacher.requires_grad_()
    student.requires_grad_()
    kd_loss(student, teacher, labels, **OPTIONS).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_same_bits_every_run_and_thread_count() -> None:
    student, teacher, labels = batch(33, 5003, 5003)
    student.requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        loss = kd_loss(student, teacher, labels, **OPTIONS)
        return loss.detach(), torch.autograd.grad(loss, student)[0]

    first = run()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run()
    finally:
        torch.set_num_threads(before)
    for again in (run(), alone):
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_and_func(reduction: str, backend: str) -> None:
    student, teacher, labels = batch(6, 129, 129)

    def loss(x: Tensor) -> Tensor:
        return (kd_loss(x, teacher, labels, reduction=reduction, **OPTIONS) * 1.5).sum()

    with use_backend(backend):
        _, expected = plain.gradient(loss, student, torch.float32)
        _, compiled = plain.gradient(torch.compile(loss, fullgraph=True, backend="aot_eager"), student, torch.float32)
        functional = torch.func.grad(loss)(student)
    assert torch.allclose(compiled, expected, rtol=1e-5, atol=1e-8)
    assert torch.allclose(functional.double(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    student, teacher, labels = batch(5, 40, 40)
    scale = (labels != -100).float()
    options = (*RowOptions(temperature=2.0, soft_weight=0.7, hard_weight=0.3).values, backend)
    ops = torch.ops.kdfast
    torch.library.opcheck(ops.logits.default, (student, [teacher], labels, scale, *options, True, True))
    torch.library.opcheck(ops.logits_overwrite.default, (student.clone(), [teacher], labels, scale, *options, True))
    stats = ops.logits(student, [teacher], labels, scale, *options, False, False)[1]
    torch.library.opcheck(ops.logits_backward.default, (student, [teacher], labels, scale, stats, *options))


def bad(**change: object) -> dict[str, object]:
    student, teacher, labels = batch(6, 20, 20)
    return {"student_logits": student, "teacher_logits": teacher, "labels": labels, "hard_weight": 0.5} | change


def spoiled(value: float) -> Tensor:
    logits = torch.randn(6, 20)
    logits[4, 7] = value
    return logits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_logits": torch.zeros(6, 20, dtype=torch.int64)}, r"student_logits: expected dtype .* got torch.int64"),
        ({"student_logits": [1.0]}, "student_logits: expected a tensor, got list"),
        ({"teacher_logits": torch.randn(5, 20)}, r"teacher_logits: expected leading dimensions \[6\] .* got \[5\]"),
        ({"teacher_logits": torch.randn(6, 0)}, r"teacher_logits: expected shape \[..., V\] with V >= 1"),
        ({"labels": torch.zeros(7, dtype=torch.int64)}, r"labels: expected shape \[6\] .* got \[7\]"),
        ({"labels": torch.zeros(6)}, "labels: expected dtype int64 or int32, got torch.float32"),
        ({"labels": None}, "labels: expected a tensor because hard_weight is 0.5, got None"),
        ({"labels": torch.full((6,), 20)}, r"labels: row 0 has label 20, expected 0 <= label < 20"),
        ({"labels": torch.full((6,), -1)}, r"labels: row 0 has label -1, expected 0 <= label < 20"),
        ({"student_logits": spoiled(torch.nan)}, "student logits: row 4 holds NaN or"),
        ({"teacher_logits": spoiled(torch.inf)}, "teacher logits: row 4 holds NaN or"),
        ({"student_logits": torch.full((6, 20), -torch.inf)}, "row 0 has loss NaN"),
        ({"temperature": 0.0}, "temperature: expected a finite number above 0, got 0.0"),
        ({"soft_weight": -1.0}, "soft_weight: expected a finite number >= 0, got -1.0"),
        ({"reduction": "batchmean"}, "reduction: expected one of mean, sum, none, got 'batchmean'"),
        ({"reduction": "sum", "num_items": 3}, "num_items: it divides the mean"),
        ({"token_weight": torch.ones(5)}, r"token_weight: expected shape \[6\]"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input(change: dict[str, object], message: str, backend: str) -> None:
    with use_backend(backend), pytest.raises(ValueError, match=message) as caught:
        kd_loss(**bad(**change))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_overwrite_refuses_what_it_cannot_do() -> None:
    student = torch.randn(6, 20, requires_grad=True)
    with pytest.raises(ValueError, match="expected contiguous student_logits"):
        kd_loss((student * 1)[:, ::2], torch.randn(6, 10), overwrite_logits=True)
    with pytest.raises(ValueError, match="expected reduction 'mean' or 'sum'"):
        kd_loss(student * 1, torch.randn(6, 20), overwrite_logits=True, reduction="none")


def test_use_backend_names_what_there_is() -> None:
    with pytest.raises(ValueError, match="name must be one of"), use_backend("cudnn"):
        pass
    with use_backend("cpp"), pytest.raises(RuntimeError, match=r"takes float32, .* there is: .*reference"):
        kdfast.kd_loss(torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64))
