"""The one contract for rows, masks, reductions and checks that every row-wise loss keeps.

Leading dimensions are free: `[..., V]` becomes N rows. A row counts when its label is not `ignore_index` and its
token weight is above zero. The kernels get one `scale` per row, which carries weight, mask and the mean's divisor
at once, so that none of them needs to know how the loss is reduced.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast.options import PARTS, RowOptions

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("mean", "sum", "none")

# The blocks of all threads, the last one counts; each takes out what it put in, whatever order they end in.
_debug: list[tuple[int, bool]] = [(-1, os.environ.get("KDFAST_CHECK") == "1")]
_blocks = itertools.count()


@dataclass(frozen=True)
class Part:
    """One metric: its sum over the rows that count, and how many did. Detached, on the device."""

    sum: Tensor
    count: Tensor

    @property
    def mean(self) -> Tensor:
        return self.sum / self.count.clamp(min=1)


class Parts(NamedTuple):
    """Metrics of one loss call, from the same pass: nothing here is weighted, scaled by T^2 or differentiable.

    soft: divergence at T. hard: student cross-entropy at T=1, without smoothing. z: lse(student)^2 at T=1.
    kl_at_1: KL(teacher || student) at T=1. teacher_nll: -log p(label) of the teacher at T=1. teacher_entropy,
    student_entropy: at T=1, of the distributions that kl_at_1 compares, which have the ids of all sides. top1_agreement: 1
    where both argmaxes agree. All in nats but z (nats^2) and top1_agreement. `hard` and `teacher_nll` have count 0 without
    labels.
    """

    soft: Part
    hard: Part
    z: Part
    kl_at_1: Part
    teacher_nll: Part
    teacher_entropy: Part
    top1_agreement: Part
    student_entropy: Part


@contextlib.contextmanager
def debug_checks(enabled: bool = True) -> Iterator[None]:
    """Within the block, values are checked on GPUs too: synchronises, and names the first bad row.

    On a CPU values are always checked. `KDFAST_CHECK=1` in the environment switches this on for good.
    """
    block = next(_blocks), enabled
    _debug.append(block)
    try:
        yield
    finally:
        _debug.remove(block)


def values_are_checked(device: torch.device) -> bool:
    """Whether values on this device are looked at: on a CPU always, on a GPU under `debug_checks()` only, and never while a
    graph is traced, where there are none."""
    return (device.type == "cpu" or _debug[-1][1]) and not torch.compiler.is_compiling()


def first_bad(loss: Tensor) -> int | None:
    """The first row whose loss is NaN, where values are checked: on a CPU, and on a GPU under `debug_checks()` only."""
    if not values_are_checked(loss.device):
        return None
    if not math.isnan(loss.sum().item()):
        return None
    bad = loss.isnan().nonzero()  # none where infinities cancelled
    return int(bad[0]) if len(bad) else None


def is_dtensor(x: Any) -> bool:
    """Without importing torch.distributed.tensor, which most processes never need."""
    return isinstance(x, Tensor) and hasattr(x, "to_local") and hasattr(x, "placements")


def check_float(name: str, tensor: Tensor, *, like: Tensor | None = None, like_name: str = "") -> None:
    """Raises unless `tensor` is a floating tensor, on the device of `like` when that is given."""
    if not isinstance(tensor, Tensor):
        remedy = "; pass its .weight" if isinstance(tensor, torch.nn.Module) else ""
        raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}{remedy}")
    if is_dtensor(tensor):
        raise ValueError(
            f"{name}: expected this rank's tensor, got a DTensor placed {tensor.placements};"  # type: ignore[attr-defined]
            " pass .to_local() of one that is sharded by rows, .full_tensor() of any other"
        )
    if tensor.dtype not in FLOATS:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
        raise ValueError(f"{name}: expected dtype {wanted}, got {tensor.dtype}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} like {like_name}, got {tensor.device}")


def member(name: str, index: int, of: int) -> str:
    """How messages call an argument that may be one of several."""
    return name if of == 1 else f"{name}[{index}]"


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_lead(name: str, lead: torch.Size, expected: torch.Size, like_name: str) -> None:
    """Raises unless both sides have the same leading dimensions."""
    if lead != expected:
        raise ValueError(f"{name}: expected leading dimensions {list(expected)} like {like_name}, got {list(lead)}")


def check_vocab(name: str, logits: Tensor) -> None:
    """Raises unless `logits` is [..., V] with V >= 1."""
    if logits.ndim < 1 or logits.shape[-1] == 0:
        raise ValueError(f"{name}: expected shape [..., V] with V >= 1, got {list(logits.shape)}")


def check_labels(labels: Tensor | None, lead: torch.Size, device: torch.device, options: RowOptions) -> Tensor | None:
    """Labels as N contiguous int64 values; raises when their shape, dtype or device do not fit."""
    if labels is None:
        if options.hard_weight != 0:
            raise ValueError(f"labels: expected a tensor because hard_weight is {options.hard_weight}, got None")
        return None
    if labels.shape != lead:
        raise ValueError(f"labels: expected shape {list(lead)} (the leading dimensions), got {list(labels.shape)}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels: expected dtype int64 or int32, got {labels.dtype}")
    if labels.device != device:
        raise ValueError(f"labels: expected device {device}, got {labels.device}")
    return labels.reshape(-1).long().contiguous()


def check_overwrite(student_logits: Tensor, reduction: str) -> None:
    """Raises when the gradient cannot take the place of the logits."""
    if not student_logits.is_contiguous():
        raise ValueError("overwrite_logits: expected contiguous student_logits, got a strided view; call .contiguous() first")
    if reduction == "none" or student_logits.dtype == torch.float16:
        raise ValueError(
            "overwrite_logits: expected reduction 'mean' or 'sum' and a dtype other than float16 (the gradient is formed"
            f" before the incoming gradient is known), got {reduction!r} and {student_logits.dtype}"
        )


def as_rows(tensor: Tensor) -> Tensor:
    """`[..., V]` as `[N, V]` with unit stride along V; copies only when the strides leave no other way."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def row_scale(
    like: Tensor,
    lead: torch.Size,
    labels: Tensor | None,
    token_weight: Tensor | None,
    reduction: str,
    num_items: int | float | Tensor | None,
    options: RowOptions,
) -> Tensor:
    """`[N]` factors of each row's loss, contiguous: weight, mask, 1/count of a mean. Synchronises where values are checked.

    A mean over no rows is 0, with zero gradients, and so is one whose `num_items` is 0: a batch of padding must not poison a
    training run.

    Raises:
        ValueError: `reduction`, `token_weight` or `num_items` is wrong; nothing else looks at them.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items: it divides the mean, but reduction is {reduction!r}; leave it out or use 'mean'")
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    n = math.prod(lead)
    if token_weight is not None:
        if not isinstance(token_weight, Tensor):
            raise ValueError(f"token_weight: expected a tensor or None, got {type(token_weight).__name__}")
        if token_weight.shape != lead:
            raise ValueError(
                f"token_weight: expected shape {list(lead)} (the leading dimensions), got {list(token_weight.shape)}"
            )
        if token_weight.device != like.device:
            raise ValueError(f"token_weight: expected device {like.device}, got {token_weight.device}")
        scale = token_weight.detach().reshape(-1).to(dtype).contiguous()
        if labels is not None:
            # Not a product: what stands in a row that the label leaves out may be NaN.
            scale = scale.masked_fill(labels == options.ignore_index, 0)
        _check_weights(scale)
        counted = scale.count_nonzero()
    elif labels is not None:
        scale = (labels != options.ignore_index).to(dtype)
        counted = scale.sum()
    else:
        scale = torch.ones(n, dtype=dtype, device=like.device)
        if reduction == "mean":
            return scale.fill_(1.0 / max(n, 1)) if num_items is None else _divided(scale, num_items)
        return scale
    if reduction != "mean":
        return scale
    if num_items is None:
        return scale / counted.clamp(min=1)
    return _divided(scale, num_items)


def _check_weights(weights: Tensor) -> None:
    """Raises where a weight of a row that a label does not leave out is negative, infinite or NaN."""
    if not values_are_checked(weights.device) or weights.numel() == 0:
        return
    low, high = (x.item() for x in weights.aminmax())  # both NaN where any is
    if not 0 <= low <= high < math.inf:
        got = low if not low >= 0 else high
        raise ValueError(f"token_weight: expected finite weights >= 0, got {got:g}; a row that must not count has weight 0")


def _divided(scale: Tensor, num_items: int | float | Tensor) -> Tensor:
    """scale / num_items; 0 where that is 0."""
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items: expected one number, got a tensor of shape {list(num_items.shape)}; sum it first")
        if not values_are_checked(num_items.device):
            # Dividing by infinity asks neither the host nor 0 / 0.
            return scale / num_items.detach().to(scale.dtype).masked_fill(num_items == 0, math.inf)
        num_items = num_items.item()
    if not 0 <= num_items < math.inf:
        raise ValueError(f"num_items: expected a finite number >= 0, the rows that count in the whole step, got {num_items}")
    return torch.zeros_like(scale) if num_items == 0 else scale / num_items


def folded(scale: Tensor, upstream: Tensor) -> Tensor:
    """Row scales times the incoming gradients of the row losses; a row that does not count stays out whatever comes in."""
    return torch.where(scale == 0, scale, scale * upstream)


def check_rows(
    loss: Tensor, student: Tensor | None, teachers: Sequence[Tensor], labels: Tensor | None, vocab: int, options: RowOptions
) -> None:
    """Names the first row whose loss is NaN: on a CPU always, on a GPU under `debug_checks()` only.

    Runs inside the op, on the loss the kernel wrote, so that a good batch costs one look at N numbers.
    """
    row = first_bad(loss)
    if row is None:
        return
    if labels is not None:
        label = int(labels[row])
        if label != options.ignore_index and not 0 <= label < vocab:
            raise ValueError(
                f"labels: row {row} has label {label}, expected 0 <= label < {vocab} (the student's vocabulary)"
                f" or ignore_index {options.ignore_index}"
            )
    names = ["teacher"] if len(teachers) == 1 else [f"teacher {i}" for i in range(len(teachers))]
    for name, tensor in (*zip(names, teachers, strict=True), ("student", student)):
        if tensor is not None and bool((tensor[row].isnan() | tensor[row].isposinf()).any()):
            raise ValueError(f"{name} logits: row {row} holds NaN or +inf, expected finite numbers or -inf")
        if tensor is not None and bool(tensor[row].isneginf().all()):
            raise ValueError(f"row {row} has loss NaN: the {name} logits are -inf throughout, expected a distribution")
    raise ValueError(f"row {row} has loss NaN: its logits hold NaN or +inf, or are -inf throughout")


def reduce(loss: Tensor, lead: torch.Size, reduction: str) -> Tensor:
    """Scaled row losses to what the caller asked for."""
    return loss.reshape(lead) if reduction == "none" else loss.sum()


def make_parts(parts: Tensor, scale: Tensor, labelled: bool) -> Parts:
    """Per-row metrics `[N, len(PARTS)]` (0 in rows that do not count) as sums and counts."""
    count = (scale > 0).sum()
    none = torch.zeros_like(count)
    needs_label = ("hard", "teacher_nll")
    sums = parts.sum(0).unbind(0)
    return Parts(
        *(Part(s, count if labelled or name not in needs_label else none) for name, s in zip(PARTS, sums, strict=True))
    )
