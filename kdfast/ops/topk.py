"""Sparse teacher targets: `topk_targets` captures them in one pass, `topk_kd_loss` learns from them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from kdfast import dispatch
from kdfast.ops import parallel, parallel_topk, ranges, rows, tails
from kdfast.ops.codec import EncodedTargets
from kdfast.ops.row_op import RowCall, RowOp
from kdfast.ops.row_options import head_fields, row_options
from kdfast.ops.shards import Shards
from kdfast.ops.tails import label_logprobs
from kdfast.ops.targets import TopKTargets
from kdfast.options import Head, RowOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from kdfast.ops.row_keywords import TopKKDKeywords

__all__ = ["label_logprobs", "topk_kd_loss", "topk_targets"]

_lib = torch.library.Library("kdfast", "FRAGMENT")
_lib.define(
    "topk_capture(Tensor logits, int k, float[] temperatures, Tensor? draws, float sample_temperature, float softcap,"
    " float scale, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_op = RowOp(
    "topk", extra="int vocab_size, bool spread", stats=lambda _: 4,
    check_targets=lambda targets, row, extra: tails.check_ids(targets, row, extra[0]),
)  # fmt: skip


_parallel_op = RowOp(
    "topk_parallel", extra="int vocab_size, bool spread, str group", stats=lambda _: 4, kernel=parallel_topk.slices,
    vocab=lambda student, extra: student.shape[1] * parallel.size(extra[2]),
    check_targets=lambda targets, row, extra: tails.check_ids(targets, row, extra[0]),
)  # fmt: skip


@torch.library.impl(_lib, "topk_capture", "CompositeExplicitAutograd")
def _capture(
    logits: Tensor, k: int, temperatures: Sequence[float], draws: Tensor | None, sample_temperature: float, softcap: float,
    scale: float, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    head = Head(softcap or None, scale)
    outputs = dispatch.kernel("topk", backend).capture(logits, k, tuple(temperatures), draws, sample_temperature, head)
    rows.check_rows(outputs[2].sum(-1), None, [logits], None, logits.shape[1], RowOptions())
    return tuple(outputs)


def capture_outputs(n: int, like: Tensor, k: int, n_temperatures: int, draws: Tensor | None) -> tuple[Tensor, ...]:
    """Empty ids, logprobs, log_z, log_tail and weights of a capture of n rows, on the device of `like`."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    slots = k + (0 if draws is None else draws.shape[1])
    new = functools.partial(torch.empty, device=like.device)
    sizes = [(n, slots), (n, n_temperatures), (n, n_temperatures), (0,) if draws is None else (n, slots)]
    return new(n, slots, dtype=torch.int32), *(new(size, dtype=dtype) for size in sizes)


@torch.library.register_fake("kdfast::topk_capture", lib=_lib)
def _capture_fake(
    logits: Tensor, k: int, temperatures: Sequence[float], draws: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:  # fmt: skip
    return capture_outputs(logits.shape[0], logits, k, len(temperatures), draws)


def check_capture(
    vocab: int, k: int, temperatures: Sequence[float], samples: int, sample_temperature: float
) -> tuple[float, ...]:
    """The temperatures as floats; raises when an option of a capture is out of range."""
    if samples < 0:
        raise ValueError(f"samples: expected a number >= 0, got {samples}")
    if not (0 if samples else 1) <= k <= vocab:
        least = "0 <=" if samples else "0 <"
        raise ValueError(f"k: expected {least} k <= {vocab} (the vocabulary), got {k}")
    at = tuple(float(t) for t in temperatures)
    if not at or not all(0 < t < math.inf for t in at):
        raise ValueError(f"temperatures: expected one or more finite numbers above 0, got {at}")
    ranges.check_positive("sample_temperature", sample_temperature)
    return at


def uniform_draws(n: int, samples: int, generator: torch.Generator | None, device: torch.device) -> Tensor | None:
    """`[n, samples]` numbers in [0, 1) that decide which ids are drawn, ascending; None without samples.

    One from each of `samples` equal parts: an id's draws have the mean of independent ones, any sum over ids a variance that is
    no larger, and fewer draws meet in the same id.
    """
    if samples == 0:
        return None
    if generator is not None and generator.device.type != device.type:
        raise ValueError(f"generator: expected one on {device.type} like the logits, got {generator.device}")
    within = torch.rand(n, samples, dtype=torch.float64, device=device, generator=generator)
    parts = torch.arange(samples, dtype=torch.float64, device=device)
    return ((parts + within) / samples).clamp_(max=1 - 2.0**-53)


def as_targets(outputs: Sequence[Tensor], lead: torch.Size, temperatures: tuple[float, ...], vocab: int) -> TopKTargets:
    """What a capture returns on N rows, with leading dimensions."""
    ids, logprobs, log_z, log_tail, weights = outputs
    slots = ids.shape[1]
    return TopKTargets(
        ids.view(*lead, slots),
        logprobs.view(*lead, slots),
        log_z.view(*lead, len(temperatures)),
        log_tail.view(*lead, len(temperatures)),
        temperatures,
        vocab,
        weights.view(*lead, slots) if weights.ndim > 1 else None,
    )


@torch.no_grad()
def topk_targets(
    logits: Tensor,
    k: int,
    *,
    temperatures: Sequence[float] = (1.0,),
    samples: int = 0,
    sample_temperature: float = 1.0,
    generator: torch.Generator | None = None,
    head: Head = Head(),
    tp_group: Any = None,
) -> TopKTargets:
    """A teacher's logits as their k most likely ids, ids drawn from the others, and one bucket for the rest, in one pass.

    Equals, for every T in temperatures and S the ids selected:

        logp = logits.float().log_softmax(-1)
        logprobs, ids = logp.topk(k)                    # ties go to the lower id
        log_z = (logp / T).logsumexp(-1)
        log_tail = (logp / T).masked_fill(S, -inf).logsumexp(-1) - log_z

    and with samples = n > 0, of the distribution r that is 0 on the k and softmax(logits / sample_temperature) on the others:

        u = (torch.arange(n) + torch.rand(n)) / n           # one draw from each n-th of r: less noise than n independent ones
        drawn = torch.searchsorted(r.cumsum(-1), u, right=True)
        ids += drawn.unique(), weights = count / n * p / r; weights of the k are p, their probability

    so that the targets weights * p_T / p (`topk_kd_loss(..., tail="none")`) have the teacher's tempered distribution as their
    mean, at every T that was captured.

    Args:
        logits: `[..., V]` float32, bfloat16, float16 (or float64, on the reference backend).
        k: entries to keep, 0 < k <= V; 0 is allowed where ids are drawn.
        temperatures: at which log_z and log_tail are captured; a loss can only use these.
        samples: draws with replacement, stratified over r in id order. Distinct ids take a slot each, in id order after the k;
            of the k + samples slots those left over are empty (id -1).
        sample_temperature: above 1 draws reach further into the tail, each with a smaller weight.
        generator: of the draws, on the device of `logits`; the same state gives the same ids with any number of threads.
        head: what lies between the logits given and the softmax.
        tp_group: `logits` are a slice of the vocabulary, as in `kd_loss`; every rank gets the targets of the whole one. Draws
            are those of the group's first rank.

    Returns:
        `TopKTargets` with float32 values and leading dimensions as `logits`, the k entries sorted from likely to unlikely;
        `weights` is None without samples.

    Raises:
        ValueError: a shape, dtype or scalar is wrong, or (on a CPU, or under `debug_checks()`) a row holds NaN or +inf.

    Source: random-sampling knowledge distillation, arXiv 2503.16870; its draws are independent.
    """
    shards = Shards(tp_group)
    logits = shards.slice("logits", logits, -1)
    rows.check_float("logits", logits)
    rows.check_vocab("logits", logits)
    vocab, lead = logits.shape[-1], logits.shape[:-1]
    at = check_capture(max(k, vocab) if shards.group else vocab, k, temperatures, samples, sample_temperature)
    softcap, scale = head_fields("", head).values()
    backend = dispatch.choose("topk", logits.device, logits.dtype)
    flat = rows.as_rows(logits)
    draws = uniform_draws(flat.shape[0], samples, generator, logits.device)

    def capture(entries: int, draws: Tensor | None) -> tuple[Tensor, ...]:
        options = float(sample_temperature), softcap, scale, backend
        return torch.ops.kdfast.topk_capture(flat, entries, at, draws, *options)

    if not shards.group:
        return as_targets(capture(k, draws), lead, at, vocab)
    most = max(k, 1)  # a rank's merged with the others', before anything is drawn
    outputs, vocab = parallel_topk.merged_capture(flat, capture(min(most, vocab), None), most, at, head, shards.group)
    if draws is not None:
        outputs = parallel_topk.with_draws(flat, outputs, k, at, draws, float(sample_temperature), head, shards.group)
    return as_targets(outputs, lead, at, vocab)


@overload
def topk_kd_loss(
    student_logits: Tensor, targets: TopKTargets | EncodedTargets | Sequence[TopKTargets | EncodedTargets],
    labels: Tensor | None = None, *, return_parts: Literal[False] = False, **options: Unpack[TopKKDKeywords],
) -> Tensor: ...  # fmt: skip


@overload
def topk_kd_loss(
    student_logits: Tensor, targets: TopKTargets | EncodedTargets | Sequence[TopKTargets | EncodedTargets],
    labels: Tensor | None = None, *, return_parts: Literal[True], **options: Unpack[TopKKDKeywords],
) -> tuple[Tensor, rows.Parts]: ...  # fmt: skip


@overload
def topk_kd_loss(
    student_logits: Tensor, targets: TopKTargets | EncodedTargets | Sequence[TopKTargets | EncodedTargets],
    labels: Tensor | None = None, *, return_parts: bool, **options: Unpack[TopKKDKeywords],
) -> Tensor | tuple[Tensor, rows.Parts]: ...  # fmt: skip


def topk_kd_loss(
    student_logits: Tensor,
    targets: TopKTargets | EncodedTargets | Sequence[TopKTargets | EncodedTargets],
    labels: Tensor | None = None,
    *,
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
    overwrite_logits: bool = False,
    return_parts: bool = False,
) -> Tensor | tuple[Tensor, rows.Parts]:
    """Knowledge distillation from a teacher's entries and what is known of all other ids; no dense teacher is formed.

    Equals, with T = temperature, S the entries, p_S = exp(logprobs / T - log_z), p_tail = exp(log_tail) and
    q = softmax(student_logits / T),

        kd_loss(student_logits, T * p.log(), labels, ...)

    with p the dense teacher that `tail` makes of the targets:

        ghost        p_S on S; on the others p_tail * q / q[not S].sum(), no gradient through it. The same as one bucket for all
                     others on both sides: sum over S of f(p_S, q), plus f(p_tail, q_tail)
        renormalize  p_S / p_S.sum() on S, 0 on the others
        uniform      p_S on S, p_tail / (V - k) on the others
        none         t = p_S, with drawn entries weights * p_S / exp(logprobs); the soft term is (t * (t / q[S]).log()).sum()
                     and its gradient q * t.sum() - t. t need not sum to 1: drawn targets are then unbiased

    q_tail is a sum over the unselected ids, never 1 - sum, and the gradient is dense.

    Args:
        student_logits: `[..., Vs]`, Vs >= targets.vocab_size; ids beyond the teacher's vocabulary take no part in the
            soft term.
        targets: `TopKTargets` with the same leading dimensions and device, or `EncodedTargets`, decoded here; or a sequence of
            them (several teachers, whose losses are summed with `teacher_weights` in one read of the student). An id that
            is listed twice counts with the sum of its probabilities; empty slots (id -1) are skipped.
        tail: as above. Drawn entries (`targets.weights`) take "none", or "renormalize", which is not unbiased.
        divergence: "forward_kl", "reverse_kl" (not with "renormalize": infinite) or "jsd"; with "none" only "forward_kl".
        temperature: one of `targets.temperatures`.
        tp_group: as in `kd_loss`, the targets being whole on all ranks; a rank forms its slice of the dense teacher.
        labels, soft_weight, hard_weight, beta, scale_by_t2, ignore_index, shift_labels, token_weight, label_smoothing,
            z_loss, student_head, teacher_weights, reduction, num_items, overwrite_logits, return_parts: as in `kd_loss`. Of the
            parts, `teacher_nll` and `teacher_entropy` spread the tail evenly over the unselected ids (several teachers: means
            of each one's), `student_entropy` is over the targets' vocabulary, `top1_agreement` is with the largest entry, and
            `kl_at_1` is NaN unless it is the soft term.

    Raises:
        ValueError: as `kd_loss`; a temperature that was not captured; a student smaller than `targets.vocab_size`; an
            entry's id outside the vocabulary, logits in the place of log-probabilities, or a row that counts whose entries
            and tail do not sum to 1 (on a CPU, or under `debug_checks()`; else the row's loss is NaN); a divergence that the
            tail does not have.

    Source: sparse logit sampling, arXiv 2503.16870 (ghost token, unbiased sampled targets); Kim & Rush 2016, arXiv
    1606.07947, for the word-level loss they approximate; GKD, arXiv 2306.13649 (jsd).
    """
    several = tails.as_list(targets)
    options = row_options(
        divergence=divergence, temperature=temperature, soft_weight=soft_weight, hard_weight=hard_weight, beta=beta,
        scale_by_t2=scale_by_t2, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss,
        student_head=student_head, teachers=len(several), teacher_weights=teacher_weights,
    )  # fmt: skip
    tails.check(several, tail, options)
    shards = Shards(tp_group)
    student_logits = shards.slice("student_logits", student_logits, -1)
    labels, token_weight = shards.whole("labels", labels), shards.whole("token_weight", token_weight)
    rows.check_float("student_logits", student_logits)
    rows.check_vocab("student_logits", student_logits)
    lead = student_logits.shape[:-1]
    # Whether all slices together hold the targets' vocabulary shows when the ranks talk.
    vocab = several[0].vocab_size if shards.group else student_logits.shape[-1]
    tails.check_row_inputs(several, lead, student_logits.device, "student_logits", vocab)
    if shift_labels:
        labels = ranges.shifted_labels(labels, lead, ignore_index)
    labels = rows.check_labels(labels, lead, student_logits.device, options)
    scale = rows.row_scale(student_logits, lead, labels, token_weight, reduction, num_items, options)
    if overwrite_logits:
        rows.check_overwrite(student_logits, reduction)
    student = rows.as_rows(student_logits)
    backend = dispatch.choose("parallel" if shards.group else "topk", student.device, student.dtype)
    group = [shards.group] if shards.group else []
    call = RowCall(
        student,
        targets=tails.kernel_rows(several, tail, options, student.dtype),
        labels=labels,
        scale=scale,
        scalars=(*options.values, several[0].vocab_size, tail == "uniform", *group, backend, return_parts),
        lead=lead,
        reduction=reduction,
        needs_grad=student_logits.requires_grad and torch.is_grad_enabled(),
        overwrite=overwrite_logits,
    )
    loss, parts = (_parallel_op if group else _op)(call)
    if not return_parts:
        return loss
    parts = tails.with_teacher_metrics(parts, several, labels, scale, options.teacher_weights)
    return loss, rows.make_parts(parts, scale, labels is not None)
