"""The alignment guard, and reading a whole cache through."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast.cache.format import IGNORE, AlignmentError, CacheError, CacheMismatch
from kdfast.cache.manifest import CacheInfo
from kdfast.cache.reader import CacheReader
from kdfast.ops.codec import EncodedTargets
from kdfast.ops.targets import TopKTargets
from kdfast.ops.topk import label_logprobs

#: Share of log V, a guess's loss, below which a teacher's loss shows that it predicts those labels.
_KNOWS_THE_TEXT = 0.75


class Alignment(NamedTuple):
    """Mean negative log-likelihood of the labels under the teacher, nats, at three shifts.

    At shift s the label of row t + s is compared with the teacher's row t; `at` is the one trained with.
    """

    before: float
    at: float
    after: float

    def __str__(self) -> str:
        said = f"teacher's loss on the labels: {self.at:.3f} (one earlier {self.before:.3f}, one later {self.after:.3f}) nats"
        fits = self.at <= min(self.before, self.after)
        return f"{said}; {'they fit as they are' if fits else 'too close to a guess to tell, or to another shift'}"


def check_alignment(
    targets: TopKTargets | EncodedTargets, labels: Tensor, *, margin: float = 0.5, min_labels: int = 32
) -> Alignment:
    """Compares the teacher's loss on the labels at shifts -1, 0 and +1 along the second last dimension of the targets.

    Args:
        targets: `[B, L, k]` (or `[L, k]`), in code or not.
        labels: `[B, L]` (or `[L]`) integers, aligned with the targets' rows, -100 where they do not count.
        margin: nats by which another shift must be better to be called a misalignment, and the loss above a guess's.
        min_labels: with fewer labels than this nothing is raised: chance could do it.

    Returns:
        The three losses, for printing; NaN where no label could be compared.

    Raises:
        AlignmentError: another shift is better by more than `margin` and below 3/4 of log V (a teacher close to a guess
            cannot tell), or the loss at 0 is above log V by more than `margin`.
        ValueError: the shapes do not fit.
    """
    targets = targets.decode()
    if labels.shape != targets.ids.shape[:-1]:
        raise ValueError(
            f"labels: expected shape {list(targets.ids.shape[:-1])} as the targets' rows, got {list(labels.shape)}"
        )
    counted = int((labels != IGNORE).sum())
    result = Alignment(*(_mean_nll(targets, labels, shift) for shift in (-1, 0, 1)))
    if counted < min_labels:
        return result
    limit = math.log(targets.vocab_size)
    for shift, nll in ((-1, result.before), (1, result.after)):
        # A barely trained teacher repeats its input, which looks like a shift by -1; only one that knows the text can tell.
        if nll < result.at - margin and nll < _KNOWS_THE_TEXT * limit:
            raise AlignmentError(
                f"targets: the teacher's rows fit the labels shifted by {shift:+d} better ({nll:.3f} nats) than as they are"
                f" ({result.at:.3f}); expected row t to predict labels[t]. Shift the labels, or capture anew; a teacher that"
                " has learnt next to nothing repeats its input, which looks the same: train it longer, or compare nothing"
                " (a recipe's alignment: false)"
            )
    if result.at > limit + margin:
        raise AlignmentError(
            f"targets: the teacher's loss on the labels is {result.at:.3f} nats, above log V = {limit:.3f} (a guess) by more"
            f" than {margin:g}; expected targets and labels of the same text and tokenizer"
        )
    return result


def _label_nll(targets: TopKTargets, labels: Tensor) -> Tensor:
    """-log p(label) of the teacher at T = 1, `[...]`; NaN where the label is -100."""
    return (-label_logprobs(targets, labels)).masked_fill(labels == IGNORE, math.nan)


def _mean_nll(targets: TopKTargets, labels: Tensor, shift: int) -> float:
    n = labels.shape[-1]
    rows, cols = slice(max(-shift, 0), n - max(shift, 0)), slice(max(shift, 0), n - max(-shift, 0))
    index = (slice(None), rows) if labels.ndim == 2 else rows
    return float(_label_nll(targets[index], labels[..., cols]).nanmean())


class TeacherCheck(NamedTuple):
    """KL(teacher || cache) over entries and tail of recomputed rows, nats: mean and largest; and how many rows."""

    kl_mean: float
    kl_max: float
    rows: int


@torch.no_grad()
def compare_with_teacher(
    reader: CacheReader, teacher: Callable[..., Any], records: Sequence[int], device: torch.device | str = "cpu"
) -> TeacherCheck:
    """Runs the teacher over some records again and compares its distributions at T = 1 with the cache's.

    Args:
        teacher: as for `capture`: called with a record's input ids, or with its context and `decoder_input_ids`.
        records: numbers of records. Rows without entries are left out.

    Raises:
        CacheMismatch: the teacher has another vocabulary.
    """
    kls = []
    for i in records:
        record = reader[i]
        ids = record.input_ids[None].to(device)
        if record.context_ids is None:
            out = teacher(ids)
        else:
            out = teacher(record.context_ids[None].to(device), decoder_input_ids=ids)
        logits = getattr(out, "logits", out)[0]
        if logits.shape[-1] != reader.settings.vocab_size:
            raise CacheMismatch(
                f"teacher: expected logits of the cache's {reader.settings.vocab_size} ids, got {logits.shape[-1]}"
            )
        logp = logits.double().log_softmax(-1).cpu()
        targets, there = record.targets, record.targets.ids >= 0
        exact = torch.where(there, logp.gather(-1, targets.ids.clamp(min=0).long()), -torch.inf)
        rest = (1 - exact.exp().sum(-1)).clamp(min=1e-12)
        cached_tail = targets.log_tail[:, targets.column(1.0)].double().clamp(min=-60)
        kl = torch.where(there & ~exact.isneginf(), exact.exp() * (exact - targets.logprobs.double()), 0).sum(-1)
        kls.append((kl + rest * (rest.log() - cached_tail))[there.any(-1)])
    found = torch.cat([torch.zeros(0, dtype=torch.float64), *kls])
    return TeacherCheck(float(found.mean()) if len(found) else 0.0, float(found.max()) if len(found) else 0.0, len(found))


def check_promise(info: CacheInfo) -> None:
    """Raises CacheError unless the recorded KL error keeps within `max_kl` (a cache of `values_bits` promises nothing)."""
    promised = info.settings.max_kl
    if info.settings.values_bits is None and not info.kl_max <= promised:
        raise CacheError(
            f"max_kl: expected at most the {promised:.2g} nats a token that the cache promises at every temperature, its"
            f" manifest records {info.kl_max:.2g}: capture it again (format version 1 broke it on peaked rows)"
        )


def verify(path: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None) -> CacheInfo:
    """Reads every record of a cache through: checksums, code, ids, content keys; and checks what its manifest says of them.

    Args:
        progress: called as progress(tokens_done, tokens_total).

    Raises:
        CacheError: the largest recorded KL error is above the `max_kl` that the cache promises.
        CorruptCache: the first fault; names the record, or the shard.
    """
    reader = CacheReader(path)
    check_promise(reader.info)
    done = 0
    for i, entry in enumerate(reader):
        reader.check_keys(i, entry.input_ids)
        done += len(entry.input_ids)
        if progress is not None:
            progress(done, reader.info.tokens)
    reader.check_exact_rows()
    return reader.info
