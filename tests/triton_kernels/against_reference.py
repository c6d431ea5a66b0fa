"""A batch, and the comparison every case of the logits kernels goes through."""

from __future__ import annotations

from collections.abc import Sequence

import plain
import torch
from torch import Tensor

from kdfast import Head
from kdfast.backends.reference import logits as reference
from kdfast.backends.triton import logits
from kdfast.options import RowOptions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Each dtype, and each way to come by the sums at T = 1, without their product: the interpreter is slow.
DTYPES_AND_T = {"fp32-T2.5": (torch.float32, 2.5), "bf16-T1": (torch.bfloat16, 1.0), "fp16-T2.5": (torch.float16, 2.5)}
SCALE = [1.0, 0.5, 0.0, 2.0]
WEIGHTS = {"soft_weight": 0.7, "hard_weight": 0.3}


def batch(vs: int, vt: int, dtype: torch.dtype, device: str, spread: float = 3.0, rows: int = 4) -> tuple[Tensor, ...]:
    """Student, teacher, labels and scale."""
    student, teacher = (torch.randn(rows, v, device=device).mul(spread).to(dtype) for v in (vs, vt))
    return student, teacher, torch.randint(0, vs, (rows,), device=device), torch.tensor(SCALE[:rows], device=device)


def truth(
    student: Tensor, teachers: Sequence[Tensor], labels: Tensor | None, scale: Tensor, options: RowOptions, parts: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, parts and gradient of the reference in float64."""
    grad = torch.empty_like(student, dtype=torch.float64)
    wide = [t.double() for t in teachers]
    loss, _, columns = reference.forward(student.double(), wide, labels, scale.double(), options, parts, grad)
    return loss, columns, grad


def eager(x: Tensor, teachers: Sequence[Tensor], labels: Tensor | None, scale: Tensor, options: RowOptions) -> Tensor:
    """The loss as its definition reads, in the dtype of x."""
    rows = plain.kd_rows(
        x, [t.to(x.dtype) for t in teachers], labels, name=options.kind, temperature=options.temperature,
        soft=options.soft_weight, hard=0.0 if labels is None else options.hard_weight, beta=options.beta, skew=options.skew,
        a=options.ab_alpha, b=options.ab_beta, smoothing=options.label_smoothing, z_loss=options.z_loss,
        student_head=Head(options.student_softcap or None, options.student_scale),
        teacher_head=Head(options.teacher_softcap or None, options.teacher_scale),
        weights=list(options.teacher_weights), mix=options.teacher_mix,
    )  # fmt: skip
    return (rows * scale).sum()


def compare(student: Tensor, teachers: Sequence[Tensor], labels: Tensor | None, scale: Tensor, options: RowOptions) -> None:
    """Loss, gradient in forward, gradient in backward: at most twice the error of plain PyTorch in the same dtype."""
    loss, _, grad = truth(student, teachers, labels, scale, options)
    rows = scale != 0
    count = [t[rows] for t in teachers], None if labels is None else labels[rows], scale[rows]
    total, plain_grad = plain.gradient(lambda x: eager(x, *count, options), student[rows], student.dtype)
    out, again = torch.full_like(student, torch.nan), torch.full_like(student, torch.nan)
    got, stats, _ = logits.forward(student, teachers, labels, scale, options, False, out)
    logits.backward(student, teachers, labels, scale, stats, options, again)
    for result in (out, again):
        plain.assert_as_good(result[rows], plain_grad, grad[rows], student.dtype, "gradient")
        assert (result[~rows] == 0).all()
    plain.assert_as_good(got.sum(), total, loss.sum(), torch.float32, "loss")
    assert (got[~rows] == 0).all()
