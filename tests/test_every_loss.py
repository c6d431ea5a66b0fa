"""What every public loss owes: exact scalars in its gradients, options that change under `torch.compile`, any teacher."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import kdfast
from kdfast import Head, TopKTargets

N, V, D = 24, 64, 16
LABELS = torch.arange(N) % V


def targets_of(logits: Tensor) -> TopKTargets:
    return kdfast.topk_targets(logits.float(), 8, temperatures=(1.0, 1.5, 2.0, 2.5))


def topk(x: Tensor, teacher: Tensor, **options: Any) -> Any:
    return kdfast.topk_kd_loss(x, targets_of(teacher), LABELS, **options)


def linear_topk(hidden: Tensor, weight: Tensor, teacher: Tensor, **options: Any) -> Any:
    return kdfast.linear_topk_kd_loss(hidden, weight, targets_of(teacher), LABELS, **options)


def kd(x: Tensor, teacher: Tensor, **options: Any) -> Any:
    return kdfast.kd_loss(x, teacher, LABELS, **options)


def linear(hidden: Tensor, weight: Tensor, t_hidden: Tensor, t_weight: Tensor, **options: Any) -> Any:
    return kdfast.linear_kd_loss(hidden, weight, t_hidden, t_weight, LABELS, **options)


@dataclass(frozen=True)
class Case:
    """A loss on student tensors, then teacher tensors; `numbers`: two values of each option that is a number."""

    loss: Callable[..., Any]
    student: tuple[tuple[int, ...], ...]
    teacher: tuple[tuple[int, ...], ...]
    numbers: dict[str, tuple[float, float]] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    per_row: bool = True

    def tensors(self, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        student = [torch.randn(size).to(dtype).requires_grad_() for size in self.student]
        return student, [torch.randn(size).to(dtype) for size in self.teacher]


ROWS = {
    "temperature": (1.5, 2.5), "soft_weight": (0.5, 0.7), "hard_weight": (0.3, 0.6), "label_smoothing": (0.1, 0.2),
    "z_loss": (1e-3, 2e-3), "num_items": (7, 11),
}  # fmt: skip
FAMILY = {
    "skew_forward_kl": {"skew": (0.2, 0.3)}, "jsd": {"beta": (0.4, 0.6)},
    "alpha_beta": {"ab_alpha": (0.5, 0.7), "ab_beta": (0.4, 0.3)},
}  # fmt: skip
MAPS = ((2, 2, 12, 8),) * 2
CASES = {
    "kd": Case(kd, ((N, V),), ((N, V),), ROWS),
    "linear": Case(linear, ((N, D), (V, D)), ((N, D), (V, D)), ROWS | {"workspace_mb": (1.0, 2.5)}),
    "topk": Case(topk, ((N, V),), ((N, V),), ROWS),
    "linear_topk": Case(linear_topk, ((N, D), (V, D)), ((N, V),), ROWS),
    "attention_mse": Case(kdfast.attention_mse, MAPS, MAPS, {"scale_s": (0.3, 0.5), "scale_t": (0.3, 0.5)}),
    "attention_kl": Case(kdfast.attention_kl, MAPS, MAPS, {"scale_s": (0.3, 0.5), "scale_t": (0.3, 0.5)}),
    "attention_map": Case(kdfast.attention_map_mse, MAPS[:1], MAPS[:1]),
    "hidden_mse": Case(kdfast.hidden_mse, ((N, D),), ((N, D),)),
    "hidden_cosine": Case(kdfast.hidden_cosine, ((N, D),), ((N, D),)),
    "linear_logit_mse": Case(
        kdfast.linear_logit_mse, ((N, D), (V, D)), ((N, D), (V, D)), fixed={"method": "gram"}, per_row=False
    ),
}


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()


every = pytest.mark.parametrize("name", CASES)


def gradients(loss: Callable[..., Any], student: list[Tensor], teacher: list[Tensor], by: float = 1.0, **options: Any) -> Any:
    value = loss(*student, *teacher, **options)
    return value.detach(), torch.autograd.grad(value.sum() * by, student)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["once", "graph kept", "compiled"])
def test_the_incoming_gradient_is_not_rounded_to_half(name: str, dtype: torch.dtype, how: str) -> None:
    """1/3 in bfloat16 is 2e-3 too large; what rounding each element leaves averages out."""
    case = CASES[name]
    student, teacher = case.tensors(dtype)
    loss = functools.partial(case.loss, **case.fixed)
    _, ones = gradients(loss, student, teacher)
    if how == "compiled":
        loss = torch.compile(loss, backend="aot_eager", fullgraph=True)
    value = loss(*student, *teacher)
    thirds = torch.autograd.grad(value / 3, student, retain_graph=how == "graph kept")
    for one, third in zip(ones, thirds, strict=True):
        one, third = one.double(), third.double()
        assert abs(float((3 * third * one).sum() / one.square().sum()) - 1) < 7e-4


def projected(h_s: Tensor, projection: Tensor, bias: Tensor, h_t: Tensor) -> Tensor:
    return kdfast.hidden_mse(h_s, h_t, projection, bias)


#: Losses that multiply, and do so in float32 whatever surrounds them; the linear ones have autocast's dtype for their heads.
MULTIPLYING = {
    **{name: CASES[name] for name in ("attention_mse", "attention_kl", "linear_logit_mse")},
    "attention_mse causal": Case(kdfast.attention_mse, MAPS, MAPS, fixed={"causal": True, "method": "gram"}),
    "attention_mse probs": Case(kdfast.attention_mse, MAPS, MAPS, fixed={"on": "probs"}),
    "linear_logit_mse logits": Case(
        kdfast.linear_logit_mse, ((N, D), (V, D)), ((N, D), (V, D)), fixed={"method": "logits"}, per_row=False
    ),
    "hidden_mse projected": Case(projected, ((N, D), (D + 3, D), (D + 3,)), ((N, D + 3),)),
}


@pytest.mark.parametrize("name", MULTIPLYING)
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("whole", [False, True], ids=["forward", "backward too"])
def test_autocast_rounds_nothing(name: str, backend: str | None, whole: bool) -> None:
    """The same bits within it, and after it: what is kept of a head was not formed there in halves."""
    case = MULTIPLYING[name]
    student, teacher = case.tensors(torch.float32)
    loss = functools.partial(case.loss, **case.fixed)
    found = []
    with kdfast.use_backend(backend) if backend else contextlib.nullcontext():
        for autocast in (True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                value = loss(*student, *teacher)
                inside = torch.autograd.grad(value, student, retain_graph=True) if whole else ()
            found.append([value.detach(), *(inside or torch.autograd.grad(value, student))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@every
def test_shapes_that_are_symbols(name: str) -> None:
    case = CASES[name]
    student, teacher = case.tensors(torch.float32)
    loss = functools.partial(case.loss, **case.fixed)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    wanted, found = gradients(loss, student, teacher), gradients(compiled, student, teacher)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.numbers])
@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_numbers_that_change(name: str, dynamic: bool | None) -> None:
    check_numbers(CASES[name], CASES[name].numbers, dynamic)


@pytest.mark.parametrize("divergence", FAMILY)
@pytest.mark.parametrize("name", ["kd", "linear"])
def test_numbers_of_divergences_that_change(name: str, divergence: str) -> None:
    check_numbers(CASES[name], FAMILY[divergence], None, divergence=divergence)


def check_numbers(case: Case, numbers: dict[str, tuple[float, float]], dynamic: bool | None, **fixed: Any) -> None:
    student, teacher = case.tensors(torch.float32)

    def loss(*tensors: Tensor, **options: float) -> Tensor:
        return case.loss(*tensors, **fixed, **options)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for value in (0, 1, 0):
        options = {name: values[value] for name, values in numbers.items()}
        wanted = gradients(loss, student, teacher, **options)
        torch.testing.assert_close(gradients(compiled, student, teacher, **options), wanted)


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_capture_at_temperatures_that_change(dynamic: bool | None) -> None:
    logits, hidden, weight = torch.randn(N, V), torch.randn(N, D), torch.randn(V, D)

    def capture(t: float) -> list[Tensor]:
        plain = kdfast.topk_targets(logits, 4, temperatures=(1.0, t))
        heads = kdfast.linear_topk_targets(hidden, weight, 4, temperatures=(1.0, t), head=Head(scale=t))
        return [plain.log_z, plain.log_tail, heads.log_z, heads.log_tail]

    compiled = torch.compile(capture, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for t in (1.5, 2.5, 1.5):
        torch.testing.assert_close(compiled(t), capture(t))


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_teachers_weights_and_heads_that_change(dynamic: bool | None) -> None:
    student, teachers = torch.randn(N, V, requires_grad=True), [torch.randn(N, V) for _ in range(2)]

    def loss(x: Tensor, number: float) -> Tensor:
        heads = {"student_head": Head(softcap=20 * number), "teacher_head": Head(scale=number)}
        return kdfast.kd_loss(x, teachers, teacher_weights=[number, 1.0], **heads)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for number in (0.5, 0.7, 0.5):
        torch.testing.assert_close(
            gradients(compiled, [student], [], number=number), gradients(loss, [student], [], number=number)
        )


@every
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_teachers_made_in_inference_mode(name: str, reduction: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    options = {**case.fixed, "reduction": reduction} if case.per_row else case.fixed
    student, teacher = case.tensors(dtype)
    with torch.inference_mode():
        inferred = [t.clone() for t in teacher]
    wanted = gradients(case.loss, student, teacher, 0.7, **options)
    torch.testing.assert_close(gradients(case.loss, student, inferred, 0.7, **options), wanted)


def test_everything_but_the_student_made_in_inference_mode() -> None:
    x = torch.randn(N, V, requires_grad=True)
    with torch.inference_mode():
        teacher, labels, weight = torch.randn(N, V), LABELS.clone(), torch.rand(N)
        targets = targets_of(teacher)
    for loss, other in ((kdfast.kd_loss, teacher), (kdfast.topk_kd_loss, targets)):
        for reduction in ("mean", "none"):
            value = loss(x, other, labels, hard_weight=0.5, token_weight=weight, reduction=reduction)
            (grad,) = torch.autograd.grad(value.sum(), x)
            assert bool(grad.isfinite().all())
