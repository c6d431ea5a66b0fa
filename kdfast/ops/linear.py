"""Knowledge distillation from hidden states through linear heads: `linear_kd_loss` never holds N x V logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from kdfast import dispatch
from kdfast.ops import ranges, rows
from kdfast.ops.linear_op import LinearCall
from kdfast.ops.main_grad import apart, main_grad_of
from kdfast.ops.row_options import row_options
from kdfast.ops.shards import Shards
from kdfast.options import Head

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from kdfast.ops.row_keywords import LinearKDKeywords


def check_side(
    side: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, like: Tensor, like_name: str = "student_hidden"
) -> None:
    """Raises unless hidden, weight and bias fit each other and the device of `like`; `side` is what precedes their names."""
    rows.check_float(f"{side}hidden", hidden, like=like, like_name=like_name)
    rows.check_float(f"{side}weight", weight, like=like, like_name=like_name)
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"{side}weight: expected shape [V, D] with V, D >= 1, got {list(weight.shape)}")
    if hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{side}hidden: expected shape [..., {weight.shape[1]}] to match {side}weight {list(weight.shape)},"
            f" got {list(hidden.shape)}"
        )
    if bias is None:
        return
    rows.check_float(f"{side}bias", bias, like=like, like_name=like_name)
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"{side}bias: expected shape [{weight.shape[0]}] to match {side}weight, got {list(bias.shape)}")


def check_row_index(row_index: Tensor | None, like: Tensor, n: int) -> None:
    """Raises unless it is a list of row positions."""
    if row_index is None:
        return
    if row_index.ndim != 1 or row_index.dtype != torch.int64 or row_index.device != like.device or row_index.numel() > n:
        raise ValueError(
            f"row_index: expected at most {n} int64 positions [M] on {like.device},"
            f" got {row_index.dtype} {list(row_index.shape)} on {row_index.device}"
        )


def check_chunking(workspace_mb: float | None, logits_dtype: torch.dtype) -> None:
    """Raises when the workspace is no workspace."""
    if workspace_mb is not None:
        ranges.check_positive("workspace_mb", workspace_mb)
    if logits_dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"logits_dtype: expected torch.float32 or torch.bfloat16, got {logits_dtype}")


def autocast_dtype(weight: Tensor) -> torch.dtype | None:
    """The dtype in which autocast wants products, or None: every head in its own."""
    device = weight.device.type
    if weight.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _as_list(argument: Any) -> list[Any]:
    return list(argument) if isinstance(argument, Sequence) else [argument]


@overload
def linear_kd_loss(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor | Sequence[Tensor],
    teacher_weight: Tensor | Sequence[Tensor],
    labels: Tensor | None = None, *, return_parts: Literal[False] = False, **options: Unpack[LinearKDKeywords],
) -> Tensor: ...  # fmt: skip


@overload
def linear_kd_loss(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor | Sequence[Tensor],
    teacher_weight: Tensor | Sequence[Tensor],
    labels: Tensor | None = None, *, return_parts: Literal[True], **options: Unpack[LinearKDKeywords],
) -> tuple[Tensor, rows.Parts]: ...  # fmt: skip


@overload
def linear_kd_loss(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor | Sequence[Tensor],
    teacher_weight: Tensor | Sequence[Tensor],
    labels: Tensor | None = None, *, return_parts: bool, **options: Unpack[LinearKDKeywords],
) -> Tensor | tuple[Tensor, rows.Parts]: ...  # fmt: skip


def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | Sequence[Tensor],
    teacher_weight: Tensor | Sequence[Tensor],
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | Sequence[Tensor | None] | None = None,
    logits_dtype: torch.dtype = torch.float32,
    workspace_mb: float | None = None,
    row_index: Tensor | None = None,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    beta: float = 0.5,
    skew: float = 0.1,
    ab_alpha: float = 1.0,
    ab_beta: float = 0.0,
    scale_by_t2: bool = True,
    ignore_index: int = -100,
    shift_labels: bool = False,
    token_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    student_head: Head = Head(),
    teacher_head: Head = Head(),
    teacher_weights: Sequence[float] | None = None,
    teacher_mix: str = "probs",
    reduction: str = "mean",
    num_items: int | float | Tensor | None = None,
    tp_group: Any = None,
    reduce_hidden_grad: bool = True,
    return_parts: bool = False,
) -> Tensor | tuple[Tensor, rows.Parts]:
    """Knowledge distillation from the two models' last hidden states and their heads.

    Equals

        kd_loss(F.linear(student_hidden, student_weight, student_bias).float(),
                F.linear(teacher_hidden, teacher_weight, teacher_bias).float(), labels, ...)

    but the logits exist for a chunk of rows at a time, and the heads' gradients are formed with them. Without
    gradients (evaluation) it takes the workspace and nothing else.

    Args:
        student_hidden: `[..., Ds]`. teacher_hidden: `[..., Dt]`, same leading dimensions; no gradient. Several teachers:
            sequences of hidden states, weights and (if any) biases.
        student_weight: `[Vs, Ds]`, hidden is taken in its dtype, both in autocast's where that is on; teacher_weight:
            `[Vt, Dt]`, no gradient. A frozen head or hidden (requires_grad False) skips its GEMM. The head's gradient is
            accumulated in float32; where `student_weight.main_grad` is a float32 tensor, backward adds it there and
            `student_weight.grad` stays as it was. Of a DTensor head it is a DTensor placed like it, or this rank's part of
            one, and gets the gradient reduced over the ranks as `grad` would.
            Of a head with a LoRA adapter, `lm_head.weight` is the frozen base alone, which a tensor does not tell: merge the
            adapter, or pass `base + scaling * lora_B.weight @ lora_A.weight`, through which both get their gradients.
        student_bias, teacher_bias: `[Vs]`, `[Vt]`.
        logits_dtype: float32, or bfloat16, which halves the workspace and, where only half products are fast, the time;
            it costs 4-23% of the gradient's accuracy once the student is close to the teacher.
        workspace_mb: MiB for the logits of one chunk; None: 256 on a CPU, on a GPU a twentieth of
            its memory, from 1024 to 4096.
        row_index: `[M]` int64 ascending positions (in the flattened leading dimensions) that hold every row that counts;
            the other rows cost no GEMM. On a CPU such rows are found without it; on a GPU that would wait for the device.
        tp_group: the heads hold a slice of the vocabulary on each rank of this process group, as in `kd_loss`; hidden
            states are whole on every rank. Heads that are DTensors need no group where a mesh dimension is named "tp" (or
            contains "tensor"), or where the hidden states are DTensors on the same mesh: they are taken for such slices. Every
            other DTensor head, as under FSDP2, is gathered: each rank's loss is that of its own rows, and the head's gradient
            the ranks' mean, as FSDP2 averages the others.
        reduce_hidden_grad: all-reduce the gradient of student_hidden over tp_group, once; False leaves every rank its share.
        divergence ... return_parts: as in `kd_loss`, `shift_labels` too. With reduction "none" backward runs the chunks again.

    On a CPU bfloat16 heads give float32 logits by a product of our own (torch has none; oneDNN's would round to bfloat16), on
    tiles (AMX) or pairs of values (AVX512_BF16) where the processor has them; gradients of the logits then enter their products
    in bfloat16, as on a GPU. float16 heads are widened to float32 on the way; on a GPU the gradients of their logits enter
    products of halves in float16, each row in a unit of its own, where the loss bounds them (forward KL, JSD, skewed KL, TVD),
    and else TF32.

    Raises:
        ValueError: as `kd_loss`.
    """
    hiddens, weights = _as_list(teacher_hidden), _as_list(teacher_weight)
    biases = [None] * len(weights) if teacher_bias is None else _as_list(teacher_bias)
    if not len(hiddens) == len(weights) == len(biases):
        raise ValueError(
            f"teacher_weight: expected as many weights and biases as teacher_hidden ({len(hiddens)}),"
            f" got {len(weights)} and {len(biases)}"
        )
    options = row_options(
        divergence=divergence, temperature=temperature, soft_weight=soft_weight, hard_weight=hard_weight, beta=beta,
        skew=skew, ab_alpha=ab_alpha, ab_beta=ab_beta, scale_by_t2=scale_by_t2, ignore_index=ignore_index,
        label_smoothing=label_smoothing, z_loss=z_loss, student_head=student_head, teacher_head=teacher_head,
        teachers=len(weights), teacher_weights=teacher_weights, teacher_mix=teacher_mix,
    )  # fmt: skip
    shards = Shards(tp_group, student_hidden)
    main_grad = main_grad_of(student_weight, shards)
    student_weight = apart(shards.head("student_weight", student_weight), main_grad)
    student_bias = None if student_bias is None else shards.head("student_bias", student_bias)
    for i in range(len(weights)):
        weights[i] = shards.head(rows.member("teacher_weight", i, len(weights)), weights[i])
        biases[i] = None if biases[i] is None else shards.head(rows.member("teacher_bias", i, len(weights)), biases[i])
        hiddens[i] = shards.whole("teacher_hidden", hiddens[i])
    summed_by_dtensor = rows.is_dtensor(student_hidden) and shards.from_dtensors
    student_hidden = shards.whole("student_hidden", student_hidden, partial_grad=summed_by_dtensor)
    labels, token_weight = shards.whole("labels", labels), shards.whole("token_weight", token_weight)
    check_side("student_", student_hidden, student_weight, student_bias, student_hidden)
    lead = student_hidden.shape[:-1]
    for i, side in enumerate(zip(hiddens, weights, biases, strict=True)):
        check_side(rows.member("teacher", i, len(weights)) + "_", *side, student_hidden)
        rows.check_lead(rows.member("teacher_hidden", i, len(weights)), side[0].shape[:-1], lead, "student_hidden")
    check_chunking(workspace_mb, logits_dtype)
    if shift_labels:
        labels = ranges.shifted_labels(labels, lead, ignore_index)
    labels = rows.check_labels(labels, lead, student_hidden.device, options)
    scale = rows.row_scale(student_weight, lead, labels, token_weight, reduction, num_items, options)
    student = rows.as_rows(student_hidden)
    check_row_index(row_index, student, student.shape[0])
    reduces = reduce_hidden_grad and not summed_by_dtensor
    heads_dtype = autocast_dtype(student_weight)
    backend = dispatch.choose("linear", student.device, heads_dtype or student_weight.dtype)
    call = LinearCall(
        student=(student, student_weight, student_bias),
        teachers=[
            (rows.as_rows(h.detach()), w.detach(), None if b is None else b.detach())
            for h, w, b in zip(hiddens, weights, biases, strict=True)
        ],
        labels=labels,
        scale=scale,
        row_index=row_index,
        main_grad=main_grad,
        scalars=(*options.values, workspace_mb, logits_dtype, heads_dtype, shards.group, reduces, 0, False, backend),
        need_parts=return_parts,
    )
    loss, parts = call.run(per_row=reduction == "none")
    loss = loss.view(lead) if reduction == "none" else loss
    return (loss, rows.make_parts(parts, scale, labels is not None)) if return_parts else loss
