"""What the C++ kernels' Python side shares: addresses, dtype codes, threads."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast import _C
from kdfast.options import DIVERGENCES, RowOptions

_DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

Matrix = tuple[int, int, int, int]
ABSENT: Matrix = (0, 0, 0, 0)


def address(tensor: Tensor | None) -> int:
    """Where a tensor is that a kernel reads or writes without strides; 0 stands for no tensor."""
    if tensor is not None and not tensor.is_contiguous():
        raise ValueError(f"expected a contiguous tensor, got strides {tensor.stride()} of shape {list(tensor.shape)}")
    return 0 if tensor is None else tensor.data_ptr()


def matrix(tensor: Tensor | None) -> Matrix:
    """(address, elements between rows, columns, dtype code) of `[N, V]` with unit stride along V."""
    if tensor is None:
        return ABSENT
    return tensor.data_ptr(), tensor.stride(0), tensor.shape[1], _DTYPE_CODE[tensor.dtype]


def operand(tensor: Tensor) -> Matrix:
    """(address, elements between rows, elements between columns, dtype code) of a matrix of any strides."""
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1), _DTYPE_CODE[tensor.dtype]


def dtype_code(tensor: Tensor) -> int:
    """What the kernels call the dtype of `tensor`."""
    return _DTYPE_CODE[tensor.dtype]


def row_options(o: RowOptions) -> _C.LogitsOptions:
    """The options as the row kernels take them."""
    return _C.LogitsOptions(
        DIVERGENCES.index(o.kind), *o.coefficients, o.temperature, o.soft_scale, o.hard_weight, o.label_smoothing, o.z_loss,
        o.student_softcap, o.student_scale, o.teacher_softcap, o.teacher_scale, o.teacher_mix == "probs",
    )  # fmt: skip


def threads() -> int:
    return torch.get_num_threads()
