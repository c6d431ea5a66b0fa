"""Every divergence and row option of kd_loss, value and gradient, against its definition in float64."""

from __future__ import annotations

from typing import Any

import plain
import pytest
import torch
from torch import Tensor

from kdfast import Head, kd_loss, use_backend
from kdfast.options import DIVERGENCES, RowOptions

BACKENDS = ["cpp", "reference"]
#: (name, arguments of kd_loss, arguments of the definition)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "forward": ({}, {}),
    "reverse": ({"divergence": "reverse_kl"}, {"name": "reverse_kl"}),
    "jsd": ({"divergence": "jsd"}, {"name": "jsd"}),
    "jsd-0.9": ({"divergence": "jsd", "beta": 0.9}, {"name": "jsd", "beta": 0.9}),
    "jsd-0-is-forward": ({"divergence": "jsd", "beta": 0}, {}),
    "jsd-1-is-reverse": ({"divergence": "jsd", "beta": 1}, {"name": "reverse_kl"}),
    "skew-forward": ({"divergence": "skew_forward_kl"}, {"name": "skew_forward_kl"}),
    "skew-reverse": ({"divergence": "skew_reverse_kl", "skew": 0.3}, {"name": "skew_reverse_kl", "skew": 0.3}),
    "skew-0-is-reverse": ({"divergence": "skew_reverse_kl", "skew": 0}, {"name": "reverse_kl"}),
    "tvd": ({"divergence": "tvd"}, {"name": "tvd"}),
    "alpha-beta-1-0-is-forward": ({"divergence": "alpha_beta"}, {}),
    "alpha-beta-0-1-is-reverse": ({"divergence": "alpha_beta", "ab_alpha": 0, "ab_beta": 1}, {"name": "reverse_kl"}),
    **{
        f"alpha-beta-{a}-{b}": (
            {"divergence": "alpha_beta", "ab_alpha": a, "ab_beta": b},
            {"name": "alpha_beta", "a": a, "b": b},
        )
        for a, b in ((0.2, 0.7), (1.0, 1.0), (0.0, 0.6), (0.6, 0.0))
    },
}
ROW_OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "smoothing": ({"label_smoothing": 0.1}, {"smoothing": 0.1}),
    "z-loss": ({"z_loss": 1e-2}, {"z_loss": 1e-2}),
    "softcap": (
        {"student_head": Head(softcap=5.0), "teacher_head": Head(softcap=8.0, scale=0.5)},
        {"student_head": Head(softcap=5.0), "teacher_head": Head(softcap=8.0, scale=0.5)},
    ),
    "scale": (
        {"student_head": Head(scale=0.7), "teacher_head": Head(scale=1.3)},
        {"student_head": Head(scale=0.7), "teacher_head": Head(scale=1.3)},
    ),
    "everything": (
        {"label_smoothing": 0.2, "z_loss": 1e-3, "student_head": Head(softcap=6.0, scale=1.1)},
        {"smoothing": 0.2, "z_loss": 1e-3, "student_head": Head(softcap=6.0, scale=1.1)},
    ),
}


def batch(n: int, vs: int, vt: int, teachers: int = 1) -> tuple[Tensor, list[Tensor], Tensor]:
    labels = torch.randint(0, vs, (n,))
    labels[n // 2] = -100
    return torch.randn(n, vs) * 3, [torch.randn(n, vt - i) * 3 for i in range(teachers)], labels


def compare(
    student: Tensor, teachers: list[Tensor], labels: Tensor | None, temperature: float, dtype: torch.dtype, backend: str,
    ours_kw: dict[str, Any], plain_kw: dict[str, Any], reduction: str = "mean",
) -> None:  # fmt: skip
    hard = 0.0 if labels is None else 0.3
    weight = torch.linspace(0.5, 2, student.shape[0])

    def eager(x: Tensor) -> Tensor:
        cast = [t.to(dtype).to(x.dtype) for t in teachers]
        loss = plain.kd_rows(x, cast, labels, temperature=temperature, soft=0.7, hard=hard, **plain_kw)
        if reduction == "none":
            return (torch.where(labels != -100, loss, 0) * weight).sum()
        return plain.mean(loss, labels)

    def ours(x: Tensor) -> Tensor:
        given = [t.to(x.dtype) for t in teachers]
        loss = kd_loss(
            x, given[0] if len(given) == 1 else given, labels, temperature=temperature, soft_weight=0.7, hard_weight=hard,
            reduction=reduction, **ours_kw,
        )  # fmt: skip
        return (loss * weight).sum() if reduction == "none" else loss

    student = student.to(dtype)
    truth_value, truth_grad = plain.gradient(eager, student, torch.float64)
    plain_value, plain_grad = plain.gradient(eager, student, dtype)
    with use_backend(backend):
        value, grad = plain.gradient(ours, student, dtype)
    plain.assert_as_good(grad, plain_grad, truth_grad, dtype, "gradient")
    plain.assert_as_good(value, plain_value, truth_value, dtype, "value")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(
    ("vs", "vt"), [(2, 2), (17, 17), (5003, 5003), (301, 280)], ids=["V2", "V17", "V5003", "larger-student"]
)
@pytest.mark.parametrize("case", CASES)
def test_divergence(case: str, vs: int, vt: int, temperature: float, dtype: torch.dtype, backend: str) -> None:
    compare(*batch(7, vs, vt), temperature, dtype, backend, *CASES[case])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_divergence_without_labels_in_float64(case: str, backend: str) -> None:
    student, teachers, _ = batch(7, 33, 33)
    compare(student, teachers, None, 2.0, torch.float64 if backend == "reference" else torch.float32, backend, *CASES[case])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("option", ROW_OPTIONS)
@pytest.mark.parametrize("case", ["forward", "jsd", "reverse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("vs", "vt"), [(1003, 1003), (1003, 900)], ids=["same-V", "larger-student"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_row_options(reduction: str, vs: int, vt: int, dtype: torch.dtype, case: str, option: str, backend: str) -> None:
    ours_kw = CASES[case][0] | ROW_OPTIONS[option][0]
    compare(*batch(6, vs, vt), 2.0, dtype, backend, ours_kw, CASES[case][1] | ROW_OPTIONS[option][1], reduction)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mix", ["probs", "logits"])
@pytest.mark.parametrize("case", ["forward", "tvd", "skew-reverse"])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5]], ids=["even", "weighted"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_several_teachers(
    dtype: torch.dtype, reduction: str, weights: list[float] | None, case: str, mix: str, backend: str
) -> None:
    extra = {"teacher_weights": weights, "teacher_mix": mix}
    plain_kw = CASES[case][1] | {"weights": weights, "mix": mix}
    compare(*batch(5, 403, 405, teachers=3), 2.0, dtype, backend, CASES[case][0] | extra, plain_kw, reduction)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("scale", [30.0, 640.0])
def test_saturated_rows_are_finite(scale: float, divergence: str, backend: str) -> None:
    student, (teacher,), labels = batch(8, 257, 257)
    student = (student.sign() * scale).requires_grad_()
    kw = {"ab_alpha": 0.5, "ab_beta": 0.5} if divergence == "alpha_beta" else {}
    with use_backend(backend):
        loss = kd_loss(student, teacher.sign() * scale, labels, divergence=divergence, hard_weight=0.5, **kw)
        (grad,) = torch.autograd.grad(loss, student)
    assert loss.isfinite()
    assert grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_ids_excluded_by_both_sides_add_nothing(divergence: str, backend: str) -> None:
    student, (teacher,), _ = batch(4, 90, 90)
    kept = torch.arange(90) % 3 != 0
    kw = {"ab_alpha": 0.5, "ab_beta": 0.25} if divergence == "alpha_beta" else {}
    with use_backend(backend):
        plain_loss = kd_loss(student[:, kept], teacher[:, kept], divergence=divergence, reduction="none", **kw)
        student[:, ~kept] = teacher[:, ~kept] = -torch.inf
        loss = kd_loss(student.requires_grad_(), teacher, divergence=divergence, reduction="none", **kw)
        (grad,) = torch.autograd.grad(loss.sum(), student)
    assert torch.allclose(loss, plain_loss, rtol=1e-5, atol=1e-7)
    assert (grad[:, ~kept] == 0).all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", ["jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"])
def test_an_id_excluded_by_one_side_costs_a_bounded_amount(divergence: str, backend: str) -> None:
    student, (teacher,), _ = batch(4, 90, 90)
    teacher[:, 3] = -torch.inf
    student[:, 7] = -torch.inf
    truth = plain.divergence(
        divergence, teacher.double().log_softmax(-1), student.double().log_softmax(-1), beta=0.5, skew=0.1, a=1, b=0
    )
    with use_backend(backend):
        loss = kd_loss(student.requires_grad_(), teacher, divergence=divergence, reduction="none")
        (grad,) = torch.autograd.grad(loss.sum(), student)
    assert torch.allclose(loss.double(), truth, rtol=1e-5)
    assert grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_the_teacher_excludes_makes_reverse_kl_infinite(backend: str) -> None:
    student, (teacher,), _ = batch(4, 90, 90)
    teacher[1, 3] = -torch.inf
    with use_backend(backend):
        loss = kd_loss(student, teacher, divergence="reverse_kl", reduction="none")
    assert loss.isinf().tolist() == [False, True, False, False]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3])
def test_value_near_agreement(distance: float, case: str, backend: str) -> None:
    teacher = torch.randn(8, 4000) * 3
    student = teacher + distance * torch.randn_like(teacher)
    ours_kw, plain_kw = CASES[case]
    truth = plain.kd_rows(student.double(), [teacher.double()], **plain_kw).mean()
    with use_backend(backend):
        rows = kd_loss(student, teacher, reduction="none", **ours_kw)
    assert (rows >= 0).all()
    assert abs(float(rows.mean()) / float(truth) - 1) <= 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_an_ensemble(backend: str) -> None:
    student, teachers, labels = batch(6, 64, 65, teachers=2)
    with use_backend(backend):
        _, parts = kd_loss(student, teachers, labels, temperature=2.0, hard_weight=0.1, label_smoothing=0.3, return_parts=True)
    log_p = torch.stack([t[:, :64].double().log_softmax(-1) for t in teachers]).logsumexp(0) - torch.tensor(2.0).log()
    log_q = student.double().log_softmax(-1)
    counts = labels != -100
    expected = {
        "soft": plain.kd_rows(student.double(), [t.double() for t in teachers], temperature=2.0, soft=0.25),
        "hard": -log_q.gather(1, labels.clamp(0)[:, None])[:, 0],
        "z": student.double().logsumexp(-1) ** 2,
        "kl_at_1": plain.kl(log_p, log_q),
        "teacher_nll": -log_p.gather(1, labels.clamp(0)[:, None])[:, 0],
        "teacher_entropy": -(log_p.exp() * log_p).sum(-1),
        "top1_agreement": (log_p.argmax(-1) == log_q.argmax(-1)).double(),
        "student_entropy": torch.special.entr(log_q.exp()).sum(-1),
    }
    for name, rows in expected.items():
        part = getattr(parts, name)
        assert part.count == 5, name
        torch.testing.assert_close(part.sum.double(), rows[counts].sum(), rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("option", ROW_OPTIONS)
def test_gradcheck(case: str, option: str) -> None:
    student, teachers, labels = batch(3, 7, 6, teachers=2)
    kw = CASES[case][0] | ROW_OPTIONS[option][0]
    given = [t.double() for t in teachers]
    assert torch.autograd.gradcheck(
        lambda x: kd_loss(x, given, labels, hard_weight=0.4, temperature=1.5, **kw), student.double().requires_grad_()
    )


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"divergence": "kl"}, "divergence: expected one of forward_kl"),
        ({"divergence": "jsd", "beta": 1.5}, "beta: expected a number from 0 to 1, got 1.5"),
        ({"skew": 1.0}, "skew: expected a number >= 0 and below 1, got 1.0"),
        ({"ab_alpha": -0.1}, "ab_alpha: expected a finite number >= 0, got -0.1"),
        ({"label_smoothing": 1.0}, "label_smoothing: expected a number >= 0 and below 1, got 1.0"),
        ({"z_loss": float("nan")}, "z_loss: expected a finite number >= 0, got nan"),
        ({"student_head": Head(softcap=0.0)}, "student_head: expected a finite softcap above 0 or None, got 0.0"),
        ({"teacher_head": Head(scale=0.0)}, "teacher_head: expected a finite scale above 0, got 0.0"),
        ({"teacher_head": 30.0}, "teacher_head: expected kdfast.Head"),
        ({"teacher_weights": [1.0, 1.0]}, "teacher_weights: expected 1 numbers, one per teacher, got 2"),
        ({"teacher_weights": [0.0]}, "teacher_weights: expected finite numbers above 0"),
        ({"teacher_mix": "mean"}, "teacher_mix: expected one of probs, logits, got 'mean'"),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)  # fmt: skip
def test_bad_options(kw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        kd_loss(torch.randn(2, 5), torch.randn(2, 5), **kw)


def test_no_teacher() -> None:
    with pytest.raises(ValueError, match="at least one teacher"):
        kd_loss(torch.randn(2, 5), [])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"], ids=["in-forward", "in-backward"])
def test_compile_and_functional_transforms(reduction: str, backend: str) -> None:
    student, teachers, labels = batch(5, 40, 42, teachers=2)
    kw = {"divergence": "jsd", "label_smoothing": 0.1, "z_loss": 1e-3, "student_head": Head(softcap=9.0), "hard_weight": 0.5}

    def loss(x: Tensor) -> Tensor:
        return (kd_loss(x, teachers, labels, teacher_weights=[1, 3], reduction=reduction, **kw) * 1.5).sum()

    with use_backend(backend):
        _, expected = plain.gradient(loss, student, torch.float32)
        _, compiled = plain.gradient(torch.compile(loss, fullgraph=True, backend="aot_eager"), student, torch.float32)
        functional = torch.func.grad(loss)(student)
    assert torch.allclose(compiled, expected, rtol=1e-5, atol=1e-8)
    assert torch.allclose(functional.double(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_opcheck(divergence: str, backend: str) -> None:
    student, teachers, labels = batch(5, 40, 41, teachers=2)
    scale = (labels != -100).float()
    chosen = RowOptions(
        divergence=divergence, hard_weight=0.3, ab_alpha=0.5, ab_beta=0.5, z_loss=1e-3, label_smoothing=0.1,
        teacher_weights=(0.4, 0.6),
    )  # fmt: skip
    options = (*chosen.values, backend)
    ops = torch.ops.kdfast
    torch.library.opcheck(ops.logits.default, (student, teachers, labels, scale, *options, True, True))
    torch.library.opcheck(ops.logits_overwrite.default, (student.clone(), teachers, labels, scale, *options, True))
    stats = ops.logits(student, teachers, labels, scale, *options, False, False)[1]
    torch.library.opcheck(ops.logits_backward.default, (student, teachers, labels, scale, stats, *options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_overwriting_gives_the_same_gradient(divergence: str, backend: str) -> None:
    student, (teacher,), labels = batch(6, 5003, 4096)
    kw: dict[str, Any] = {"divergence": divergence, "hard_weight": 0.5, "ab_alpha": 0.5, "ab_beta": 0.5, "label_smoothing": 0.1}
    for head in (Head(), Head(softcap=7.0)):
        with use_backend(backend):
            _, expected = plain.gradient(
                lambda x, head=head: kd_loss(x, teacher, labels, student_head=head, **kw), student, torch.float32
            )
            taken = student.clone().requires_grad_()
            kd_loss(taken, teacher, labels, student_head=head, overwrite_logits=True, **kw).backward()
        assert taken.grad is not None
        assert torch.allclose(taken.grad.double(), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_float16_under_a_loss_scale(divergence: str, backend: str) -> None:
    """A gradient of about 1e-8 underflows in float16 unless the loss scale is folded in before it is rounded."""
    student, (teacher,), labels = batch(64, 4000, 4000)
    kw: dict[str, Any] = {"divergence": divergence, "hard_weight": 0.5, "ab_alpha": 0.5, "ab_beta": 0.5}
    half, target = student.half(), teacher.half()
    _, truth = plain.gradient(lambda x: kd_loss(x, target.double(), labels, **kw), half, torch.float64)
    with use_backend(backend):
        _, grad = plain.gradient(lambda x: 65536.0 * kd_loss(x, target, labels, **kw), half, torch.float16)
    assert plain.error(grad / 65536, truth) <= 2e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_runs_are_identical(divergence: str, backend: str) -> None:
    student, teachers, labels = batch(16, 9001, 9003, teachers=2)
    kw: dict[str, Any] = {"divergence": divergence, "hard_weight": 0.5, "ab_alpha": 0.5, "ab_beta": 0.5}
    with use_backend(backend):
        runs = [plain.gradient(lambda x: kd_loss(x, teachers, labels, **kw), student, torch.float32) for _ in range(3)]
    assert all(torch.equal(value, runs[0][0]) and torch.equal(grad, runs[0][1]) for value, grad in runs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_edges(backend: str) -> None:
    for divergence in DIVERGENCES:
        kw: dict[str, Any] = {"divergence": divergence, "ab_alpha": 0.5, "ab_beta": 0.5}
        with use_backend(backend):
            one = torch.zeros(3, 1, requires_grad=True)
            (grad,) = torch.autograd.grad(kd_loss(one, torch.ones(3, 1), **kw), one)
            assert (grad == 0).all(), "one id has probability 1 on both sides"
            none = torch.zeros(0, 7, requires_grad=True)
            assert kd_loss(none, torch.zeros(0, 7), **kw) == 0
            ignored = torch.randn(3, 7, requires_grad=True)
            loss = kd_loss(ignored, torch.randn(3, 7), torch.full((3,), -100), hard_weight=0.5, z_loss=0.1, **kw)
            (grad,) = torch.autograd.grad(loss, ignored)
            assert loss == 0
            assert (grad == 0).all()
            wide = torch.randn(3, 14)[:, ::2].clone()
            strided = torch.empty(3, 14)[:, ::2].copy_(wide)
            assert torch.equal(kd_loss(strided, wide.flip(0), **kw), kd_loss(wide, wide.flip(0), **kw))


def test_a_bad_row_of_one_of_several_teachers_is_named() -> None:
    student, teachers, _ = batch(4, 9, 9, teachers=2)
    teachers[1][2, 3] = torch.nan
    with pytest.raises(ValueError, match="teacher 1 logits: row 2 holds NaN"):
        kd_loss(student, teachers, divergence="tvd")
