"""Losses between hidden states: `hidden_mse`, with or without a projection, and `hidden_cosine`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdfast import dispatch
from kdfast.chunks import Needs, grad_hidden_dtype
from kdfast.ops import rows
from kdfast.ops.autograd import outside_autocast
from kdfast.ops.formed import InBackward, InForward
from kdfast.ops.shards import gathered

NORMALIZE = ("valid", "all")

_lib = torch.library.Library("kdfast", "FRAGMENT")
_lib.define(
    "hidden_mse(Tensor student, Tensor? projection, Tensor? bias, Tensor teacher, Tensor scale, str backend,"
    " bool need_hidden, bool need_projection, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor)"
)
_lib.define("hidden_cosine(Tensor student, Tensor teacher, Tensor scale, str backend, bool need_hidden) -> (Tensor, Tensor)")


@torch.library.impl(_lib, "hidden_mse", "CompositeExplicitAutograd")
@outside_autocast
def _hidden_mse(
    student: Tensor, projection: Tensor | None, bias: Tensor | None, teacher: Tensor, scale: Tensor, backend: str, *needs: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = dispatch.kernel("hidden", backend).mse(student, projection, bias, teacher, scale, Needs(*needs))
    _check_values(outputs[0], student, teacher)
    return outputs


@torch.library.impl(_lib, "hidden_cosine", "CompositeExplicitAutograd")
@outside_autocast
def _hidden_cosine(
    student: Tensor, teacher: Tensor, scale: Tensor, backend: str, need_hidden: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    outputs = dispatch.kernel("hidden", backend).cosine(student, teacher, scale, need_hidden)
    _check_values(outputs[0], student, teacher)
    return outputs


@torch.library.register_fake("kdfast::hidden_mse", lib=_lib)
def _hidden_mse_fake(
    student: Tensor, projection: Tensor | None, bias: Tensor | None, teacher: Tensor, scale: Tensor, backend: str, *needs: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need = Needs(*needs)
    dtype = student.dtype if projection is None else grad_hidden_dtype(student)
    none = scale.new_empty(0)
    return (
        scale.new_empty(scale.shape),
        student.new_empty(student.shape if need.hidden else (0,), dtype=dtype),
        none if projection is None or not need.weight else scale.new_empty(projection.shape),
        scale.new_empty(teacher.shape[1]) if need.bias else none.clone(),
    )


@torch.library.register_fake("kdfast::hidden_cosine", lib=_lib)
def _hidden_cosine_fake(
    student: Tensor, teacher: Tensor, scale: Tensor, backend: str, need_hidden: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return scale.new_empty(scale.shape), student.new_empty(student.shape if need_hidden else (0,))


def _check_values(loss: Tensor, student: Tensor, teacher: Tensor) -> None:
    """Names the first row whose loss is NaN: on a CPU always, on a GPU under `debug_checks()` only."""
    row = rows.first_bad(loss)
    if row is None:
        return
    for name, tensor in (("h_t", teacher), ("h_s", student)):
        if not bool(tensor[row].isfinite().all()):
            raise ValueError(f"{name}: row {row} holds NaN or infinite values, expected finite numbers")
    raise ValueError(f"row {row} has loss NaN: the projection or its bias holds NaN or infinite values, or they overflow")


def check_mask(mask: Tensor | None, lead: torch.Size, device: torch.device) -> Tensor | None:
    """The mask as `[N]` booleans; raises when its shape, dtype or device do not fit."""
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise ValueError(f"mask: expected dtype bool (True = counts), got {mask.dtype}; write mask != 0")
    if mask.shape != lead:
        raise ValueError(f"mask: expected shape {list(lead)} (the leading dimensions), got {list(mask.shape)}")
    if mask.device != device:
        raise ValueError(f"mask: expected device {device}, got {mask.device}")
    return mask.reshape(-1)


def _row_scale(like: Tensor, lead: torch.Size, mask: Tensor | None, normalize: str, reduction: str) -> Tensor:
    """`[N]` factors of each row's loss: mask, and 1/count for the mean. A mean over no rows is 0."""
    rows.check_choice("normalize", normalize, NORMALIZE)
    rows.check_choice("reduction", reduction, rows.REDUCTIONS)
    dtype, n = torch.float64 if like.dtype == torch.float64 else torch.float32, math.prod(lead)
    mask = check_mask(mask, lead, like.device)
    if mask is None:
        return torch.full((n,), 1.0 / max(n, 1) if reduction == "mean" else 1.0, dtype=dtype, device=like.device)
    scale = mask.to(dtype)
    if reduction != "mean":
        return scale
    return scale / (mask.sum().clamp(min=1) if normalize == "valid" else max(n, 1))


def _check_pair(h_s: Tensor, h_t: Tensor) -> None:
    rows.check_float("h_s", h_s)
    rows.check_float("h_t", h_t, like=h_s, like_name="h_s")
    for name, tensor in (("h_s", h_s), ("h_t", h_t)):
        if tensor.ndim < 1 or tensor.shape[-1] == 0:
            raise ValueError(f"{name}: expected shape [..., D] with D >= 1, got {list(tensor.shape)}")
    rows.check_lead("h_t", h_t.shape[:-1], h_s.shape[:-1], "h_s")


def _check_projection(h_s: Tensor, h_t: Tensor, projection: Tensor | None, bias: Tensor | None) -> None:
    d_s, d_t = h_s.shape[-1], h_t.shape[-1]
    if projection is None:
        if bias is not None:
            raise ValueError("bias: expected None without a projection, got a tensor; pass projection as well")
        if d_s != d_t:
            raise ValueError(
                f"h_s: expected shape [..., {d_t}] like h_t, got {list(h_s.shape)}; or pass projection [{d_t}, {d_s}]"
            )
        return
    rows.check_float("projection", projection, like=h_s, like_name="h_s")
    if projection.shape != (d_t, d_s):
        raise ValueError(f"projection: expected shape [{d_t}, {d_s}] (h_t's and h_s's sizes), got {list(projection.shape)}")
    if bias is not None:
        rows.check_float("bias", bias, like=h_s, like_name="h_s")
        if bias.shape != (d_t,):
            raise ValueError(f"bias: expected shape [{d_t}] like the projection's output, got {list(bias.shape)}")


def hidden_mse(
    h_s: Tensor,
    h_t: Tensor,
    projection: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    normalize: str = "valid",
    reduction: str = "mean",
) -> Tensor:
    """Mean squared difference of hidden states, the student's projected to the teacher's size if asked for.

    Equals

        h = h_s if projection is None else F.linear(h_s, projection, bias)
        row = F.mse_loss(h, h_t.detach(), reduction="none").mean(-1)      # [...]
        loss = row[mask].mean()                                           # normalize="all": row[mask].sum() / row.numel()

    >>> h_s, h_t = torch.zeros(2, 3), torch.tensor([[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]])
    >>> hidden_mse(h_s, h_t)
    tensor(5.)
    >>> hidden_mse(h_s, h_t, mask=torch.tensor([True, False]))
    tensor(1.)

    Args:
        h_s: `[..., Ds]` student. h_t: `[..., Dt]` teacher, same leading dimensions; no gradient.
        projection: `[Dt, Ds]` as in `nn.Linear`; needed where the sizes differ. bias: `[Dt]`. `h_s` is taken in the
            projection's dtype; the projection's gradient is accumulated in float32.
        mask: `[...]` bool, True = counts. Rows that do not count may hold anything.
        normalize: what the mean divides by: "valid" rows that count, or "all" rows.
        reduction: "mean", "sum" (of row losses) or "none": row losses `[...]`, 0 where the mask is False.

    Arithmetic is float32 (float64 for float64 inputs), the loss too. A mean over no rows is 0 with zero gradients.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit; a row that counts and holds NaN (on a CPU, or
            under `debug_checks()`; otherwise its loss is NaN).

    Source: FitNets (Romero et al. 2015, arXiv 1412.6550); TinyBERT (Jiao et al. 2020, arXiv 1909.10351), equations 8 and 9.
    """
    _check_pair(h_s, h_t)
    projection, bias = gathered(projection), gathered(bias)
    _check_projection(h_s, h_t, projection, bias)
    lead, grad_mode = h_s.shape[:-1], torch.is_grad_enabled()
    scale = _row_scale(h_s if projection is None else projection, lead, mask, normalize, reduction)
    student = rows.as_rows(h_s if projection is None else h_s.to(projection.dtype))
    needs = [x is not None and x.requires_grad and grad_mode for x in (student, projection, bias)]
    backend = dispatch.choose("hidden", student.device, student.dtype)
    inputs = (student, projection, bias, _like_teacher(student, h_t), scale, backend, *needs)
    if reduction == "none":
        return InBackward.apply("hidden_mse", 3, 5, *inputs).view(lead)
    if projection is None and student.dtype == torch.float16:
        return InBackward.apply("hidden_mse", 3, 5, *inputs).sum()
    return InForward.apply("hidden_mse", 3, *inputs)[0]


def hidden_cosine(h_s: Tensor, h_t: Tensor, *, mask: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """Cosine distance of hidden states.

    Equals

        row = 1 - F.cosine_similarity(h_s, h_t.detach(), dim=-1)      # [...]
        loss = row[mask].mean()

    but 1 - cos is summed from the part of one vector across the other, so that it keeps its digits (and its sign) once
    student and teacher agree, where the plain form is noise below 1e-7.

    >>> hidden_cosine(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]), reduction="none")
    tensor([1., 0.])

    Args:
        h_s: `[..., D]` student. h_t: `[..., D]` teacher; no gradient. Where either is all zeros the loss is 1 and the
            gradient 0.
        mask, reduction: as in `hidden_mse`; the mean divides by the rows that count.

    Raises:
        ValueError: as `hidden_mse`; infinite rows count as NaN.

    Source: DistilBERT (Sanh et al. 2019, arXiv 1910.01108), section 3.
    """
    _check_pair(h_s, h_t)
    if h_s.shape[-1] != h_t.shape[-1]:
        raise ValueError(f"h_s: expected shape [..., {h_t.shape[-1]}] like h_t, got {list(h_s.shape)}; project it first")
    lead = h_s.shape[:-1]
    scale = _row_scale(h_s, lead, mask, "valid", reduction)
    student = rows.as_rows(h_s)
    need = student.requires_grad and torch.is_grad_enabled()
    backend = dispatch.choose("hidden", student.device, student.dtype)
    inputs = (student, _like_teacher(student, h_t), scale, backend, need)
    if reduction == "none":
        return InBackward.apply("hidden_cosine", 1, 3, *inputs).view(lead)
    if student.dtype == torch.float16:
        return InBackward.apply("hidden_cosine", 1, 3, *inputs).sum()
    return InForward.apply("hidden_cosine", 1, *inputs)[0]


def _like_teacher(student: Tensor, h_t: Tensor) -> Tensor:
    """Teacher rows; a float64 side is worked on in the student's precision."""
    teacher = rows.as_rows(h_t.detach())
    return teacher.to(student.dtype) if torch.float64 in (student.dtype, teacher.dtype) else teacher
