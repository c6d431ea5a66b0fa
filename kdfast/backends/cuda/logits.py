"""Knowledge distillation on logits, each read once (`csrc/cuda/logits.cu`). Contract: `kdfast.backends`.

Bytes a row of V columns: student and teacher read, gradient written. The kernel knows forward KL, cross-entropy and z-loss, one
teacher, plain heads; by `refusal` everything else goes to Triton. So does the gradient from row statistics, a single pass that
has nothing to keep; the statistics are Triton's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from kdfast import _cuda, dispatch
from kdfast.options import PARTS, RowOptions

#: Options the kernel takes, whatever they are. Any other that is not at its default goes to Triton, a new one too.
_TAKEN = {"temperature", "soft_weight", "hard_weight", "scale_by_t2", "z_loss"}
#: `kind` and the number of teachers answer for these; rows of `ignore_index` have scale 0.
_ASKED_ELSEWHERE = {"divergence", "beta", "skew", "ab_alpha", "ab_beta", "teacher_weights", "teacher_mix", "ignore_index"}
_DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def refusal(student: Tensor, teachers: Sequence[Tensor], options: RowOptions, grad: Tensor | None) -> str | None:
    """Why the cluster kernel cannot run these inputs, or None; nothing on the device is asked."""
    if options.kind != "forward_kl":
        return f"it has forward_kl only, not {options.kind}"
    if len(teachers) != 1:
        return f"it takes one teacher, not {len(teachers)}"
    known = _TAKEN | _ASKED_ELSEWHERE
    unknown = [f.name for f in fields(options) if f.name not in known and getattr(options, f.name) != f.default]
    if unknown:
        return f"it has plain heads and labels only, and does not know {', '.join(unknown)}"
    tensors = (student, teachers[0], student if grad is None else grad)
    if tensors[2].dtype != student.dtype:
        return "it writes gradients in the student's dtype only"
    if any(_apart(a, b) for a, b in combinations(tensors, 2)):
        return "rows of student, teacher and gradient are not aligned alike: their 16-byte boundaries are at different columns"
    if _blocks(student, teachers[0]) == 0:
        return f"no cluster holds a row of {student.dtype} and {teachers[0].dtype} in shared memory at this vocabulary"
    return None


def _apart(a: Tensor, b: Tensor) -> bool:
    """Whether some row's 16-byte boundaries are at different columns in two `[N, V]` tensors."""
    period = 16 // max(a.itemsize, b.itemsize)
    phases = [(x.data_ptr() // x.itemsize % period, x.stride(0) % period) for x in (a, b)]
    return phases[0] != phases[1]


def _blocks(student: Tensor, teacher: Tensor) -> int:
    common = min(student.shape[1], teacher.shape[1])
    return _cuda.blocks_for(common, _DTYPE_CODE[student.dtype], _DTYPE_CODE[teacher.dtype])


def _matrix(tensor: Tensor | None) -> tuple[int, int, int, int]:
    if tensor is None:
        return 0, 0, 0, 0
    return tensor.data_ptr(), tensor.stride(0), tensor.shape[1], _DTYPE_CODE[tensor.dtype]


def _instead() -> Any:
    return dispatch.kernel("logits", "triton")


def forward(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    scale: Tensor,
    options: RowOptions,
    need_parts: bool,
    grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    given = student, teachers, labels, scale, options, need_parts, grad
    outputs = _on_clusters(*given) if refusal(student, teachers, options, grad) is None else None
    return outputs or _instead().forward(*given)


def _on_clusters(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    scale: Tensor,
    options: RowOptions,
    need_parts: bool,
    grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """None where the device has no room for such a cluster."""
    rows, device = student.shape[0], student.device
    loss = torch.empty(rows, dtype=torch.float32, device=device)
    stats = torch.empty(rows, 4, dtype=torch.float64, device=device)
    parts = torch.empty((rows, len(PARTS)) if need_parts else 0, dtype=torch.float32, device=device)
    labels, scale = None if labels is None else labels.contiguous(), scale.contiguous()
    with torch.cuda.device(device):
        done = _cuda.logits(
            rows, _matrix(student), _matrix(teachers[0]), _matrix(grad), 0 if labels is None else labels.data_ptr(),
            scale.data_ptr(), loss.data_ptr(), stats.data_ptr(), parts.data_ptr() if need_parts else 0, options.temperature,
            options.soft_scale, options.hard_weight, options.z_loss, _blocks(student, teachers[0]), device.index,
            torch.cuda.current_stream(device).cuda_stream,
        )  # fmt: skip
    return (loss, stats, parts) if done else None


def backward(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    scale: Tensor,
    stats: Tensor,
    options: RowOptions,
    grad: Tensor,
) -> None:
    _instead().backward(student, teachers, labels, scale, stats, options, grad)
