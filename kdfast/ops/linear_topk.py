"""Sparse teacher targets from, and learnt through, linear heads: no N x V logits are ever held."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from kdfast import dispatch
from kdfast.chunks import logit_chunks
from kdfast.ops import ranges, rows, tails
from kdfast.ops.autograd import outside_autocast
from kdfast.ops.codec import EncodedTargets
from kdfast.ops.linear import autocast_dtype, check_chunking, check_row_index, check_side
from kdfast.ops.linear_op import LinearCall, side_of
from kdfast.ops.main_grad import apart, main_grad_of
from kdfast.ops.row_options import head_fields, row_options
from kdfast.ops.shards import Shards, gathered
from kdfast.ops.targets import TopKTargets
from kdfast.ops.topk import as_targets, capture_outputs, check_capture, uniform_draws
from kdfast.options import Head

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from kdfast.ops.row_keywords import LinearTopKKDKeywords

_lib = torch.library.Library("kdfast", "FRAGMENT")
_lib.define(
    "linear_topk_capture(Tensor hidden, Tensor weight, Tensor? bias, int k, float[] temperatures, Tensor? draws,"
    " float sample_temperature, float softcap, float scale, float? workspace_mb, ScalarType logits_dtype,"
    " ScalarType? heads_dtype, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.impl(_lib, "linear_topk_capture", "CompositeExplicitAutograd")
@outside_autocast
def _capture(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, k: int, temperatures: Sequence[float], draws: Tensor | None,
    sample_temperature: float, softcap: float, scale: float, workspace_mb: float | None, logits_dtype: torch.dtype,
    heads_dtype: torch.dtype | None, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    outputs = capture_outputs(hidden.shape[0], weight, k, len(temperatures), draws)
    capture, head = dispatch.kernel("topk", backend).capture, Head(softcap or None, scale)
    side = side_of(hidden, weight, bias, heads_dtype)
    dtype = torch.float64 if weight.dtype == torch.float64 else logits_dtype
    for some, logits in logit_chunks(dispatch.kernel("linear", backend).product, side, workspace_mb, dtype):
        part = None if draws is None else draws[some]
        for out, found in zip(outputs, capture(logits, k, tuple(temperatures), part, sample_temperature, head), strict=True):
            if out.ndim > 1:
                out[some] = found
    bad = rows.first_bad(outputs[2].sum(-1))
    if bad is not None:
        raise ValueError(f"hidden: row {bad} has logits that hold NaN or +inf, or are -inf throughout; expected a distribution")
    return outputs


@torch.library.register_fake("kdfast::linear_topk_capture", lib=_lib)
def _capture_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, k: int, temperatures: Sequence[float], draws: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:  # fmt: skip
    return capture_outputs(hidden.shape[0], weight, k, len(temperatures), draws)


@torch.no_grad()
def linear_topk_targets(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    logits_dtype: torch.dtype = torch.float32,
    workspace_mb: float | None = None,
    temperatures: Sequence[float] = (1.0,),
    samples: int = 0,
    sample_temperature: float = 1.0,
    generator: torch.Generator | None = None,
    head: Head = Head(),
) -> TopKTargets:
    """A teacher's last hidden states and head as sparse targets.

    Equals

        topk_targets(F.linear(hidden, weight, bias).float(), k, ...)

    but the logits exist for a chunk of rows at a time.

    Args:
        hidden: `[..., D]`, taken in the weight's dtype, both in autocast's where that is on. weight: `[V, D]`. bias: `[V]`.
            A head that is a DTensor (FSDP2) is gathered.
        logits_dtype: float32, or bfloat16, which halves the workspace and rounds the targets.
        workspace_mb: MiB for the logits of one chunk; None: 256 on a CPU, 1024 on a GPU.
        k, temperatures, samples, sample_temperature, generator, head: as in `topk_targets`.

    Raises:
        ValueError: as `topk_targets`.
    """
    weight, bias = gathered(weight), gathered(bias)
    check_side("", hidden, weight, bias, hidden, "hidden")
    check_chunking(workspace_mb, logits_dtype)
    at = check_capture(weight.shape[0], k, temperatures, samples, sample_temperature)
    softcap, scale = head_fields("", head).values()
    flat, heads_dtype = rows.as_rows(hidden), autocast_dtype(weight)
    backend = dispatch.choose("linear", hidden.device, heads_dtype or weight.dtype)
    draws = uniform_draws(flat.shape[0], samples, generator, hidden.device)
    outputs = torch.ops.kdfast.linear_topk_capture(
        flat, weight, bias, k, at, draws, float(sample_temperature), softcap, scale, workspace_mb, logits_dtype, heads_dtype,
        backend,
    )  # fmt: skip
    return as_targets(outputs, hidden.shape[:-1], at, weight.shape[0])


@overload
def linear_topk_kd_loss(
    student_hidden: Tensor, student_weight: Tensor,
    targets: TopKTargets | EncodedTargets | Sequence[TopKTargets | EncodedTargets],
    labels: Tensor | None = None, *, return_parts: Literal[False] = False, **options: Unpack[LinearTopKKDKeywords],
) -> Tensor: ...  # fmt: skip


@overload
def linear_topk_kd_loss(
    student_hidden: Tensor, student_weight: Tensor,
    targets: TopKTargets | EncodedTargets | Sequence[TopKTargets | EncodedTargets],
    labels: Tensor | None = None, *, return_parts: Literal[True], **options: Unpack[LinearTopKKDKeywords],
) -> tuple[Tensor, rows.Parts]: ...  # fmt: skip


@overload
def linear_topk_kd_loss(
    student_hidden: Tensor, student_weight: Tensor,
    targets: TopKTargets | EncodedTargets | Sequence[TopKTargets | EncodedTargets],
    labels: Tensor | None = None, *, return_parts: bool, **options: Unpack[LinearTopKKDKeywords],
) -> Tensor | tuple[Tensor, rows.Parts]: ...  # fmt: skip


def linear_topk_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    targets: TopKTargets | EncodedTargets | Sequence[TopKTargets | EncodedTargets],
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    logits_dtype: torch.dtype = torch.float32,
    workspace_mb: float | None = None,
    row_index: Tensor | None = None,
    tail: str = "ghost",
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    beta: float = 0.5,
    scale_by_t2: bool = True,
    ignore_index: int = -100,
    shift_labels: bool = False,
    token_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    student_head: Head = Head(),
    teacher_weights: Sequence[float] | None = None,
    reduction: str = "mean",
    num_items: int | float | Tensor | None = None,
    tp_group: Any = None,
    reduce_hidden_grad: bool = True,
    return_parts: bool = False,
) -> Tensor | tuple[Tensor, rows.Parts]:
    """Knowledge distillation from sparse targets to a student's last hidden states and head.

    Equals

        topk_kd_loss(F.linear(student_hidden, student_weight, student_bias).float(), targets, labels, ...)

    but the logits exist for a chunk of rows at a time, and the head's gradients are formed with them.

    Args:
        student_hidden, student_weight, student_bias, logits_dtype, workspace_mb, row_index, tp_group, reduce_hidden_grad: as
            in `linear_kd_loss`.
        targets (`EncodedTargets` too), tail ... return_parts: as in `topk_kd_loss`. With reduction "none" backward runs the
            chunks again.

    Raises:
        ValueError: as `topk_kd_loss` and `linear_kd_loss`.
    """
    several = tails.as_list(targets)
    options = row_options(
        divergence=divergence, temperature=temperature, soft_weight=soft_weight, hard_weight=hard_weight, beta=beta,
        scale_by_t2=scale_by_t2, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss,
        student_head=student_head, teachers=len(several), teacher_weights=teacher_weights,
    )  # fmt: skip
    tails.check(several, tail, options)
    shards = Shards(tp_group, student_hidden)
    main_grad = main_grad_of(student_weight, shards)
    student_weight = apart(shards.head("student_weight", student_weight), main_grad)
    student_bias = None if student_bias is None else shards.head("student_bias", student_bias)
    summed_by_dtensor = rows.is_dtensor(student_hidden) and shards.from_dtensors
    student_hidden = shards.whole("student_hidden", student_hidden, partial_grad=summed_by_dtensor)
    labels, token_weight = shards.whole("labels", labels), shards.whole("token_weight", token_weight)
    check_side("student_", student_hidden, student_weight, student_bias, student_hidden)
    check_chunking(workspace_mb, logits_dtype)
    lead = student_hidden.shape[:-1]
    # Whether all slices together hold the targets' vocabulary shows when the ranks talk.
    vocab = several[0].vocab_size if shards.group else student_weight.shape[0]
    tails.check_row_inputs(several, lead, student_hidden.device, "student_hidden", vocab, "student_weight")
    if shift_labels:
        labels = ranges.shifted_labels(labels, lead, ignore_index)
    labels = rows.check_labels(labels, lead, student_hidden.device, options)
    scale = rows.row_scale(student_weight, lead, labels, token_weight, reduction, num_items, options)
    student = rows.as_rows(student_hidden)
    check_row_index(row_index, student, student.shape[0])
    heads_dtype = autocast_dtype(student_weight)
    backend = dispatch.choose("linear", student.device, heads_dtype or student_weight.dtype)
    reduces = reduce_hidden_grad and not summed_by_dtensor
    sparse = (several[0].vocab_size, tail == "uniform")
    call = LinearCall(
        student=(student, student_weight, student_bias),
        teachers=[],
        targets=tails.kernel_rows(several, tail, options, student_weight.dtype),
        labels=labels,
        scale=scale,
        row_index=row_index,
        main_grad=main_grad,
        scalars=(*options.values, workspace_mb, logits_dtype, heads_dtype, shards.group, reduces, *sparse, backend),
        need_parts=return_parts,
    )
    loss, parts = call.run(per_row=reduction == "none")
    loss = loss.view(lead) if reduction == "none" else loss
    if not return_parts:
        return loss
    parts = tails.with_teacher_metrics(parts, several, labels, scale, options.teacher_weights)
    return loss, rows.make_parts(parts, scale, labels is not None)
