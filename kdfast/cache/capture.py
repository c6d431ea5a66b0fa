"""`capture`: a teacher over documents, to a cache."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from kdfast.cache.format import IGNORE, CacheError, CacheFull, Settings
from kdfast.cache.writer import CacheWriter
from kdfast.ops.codec import EncodedTargets
from kdfast.ops.targets import TopKTargets
from kdfast.ops.topk import topk_targets
from kdfast.text import Example

_T = TypeVar("_T")


def share_of(documents: Sequence[_T], batch_size: int, rank: int, world: int) -> Sequence[_T]:
    """The documents that a rank captures: whole groups, side by side, so that the parts in the order of their ranks are the
    documents in theirs, and every group is the one that a single process would form."""
    groups = -(-len(documents) // batch_size)
    return documents[groups * rank // world * batch_size : groups * (rank + 1) // world * batch_size]


@torch.no_grad()
def capture(
    teacher: nn.Module | Callable[..., Any],
    documents: Sequence[Tensor | Example],
    writer: CacheWriter,
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    top_p: float | None = None,
    seed: int = 0,
    pad_id: int = 0,
    drop_masked: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Runs a teacher over the documents that the writer does not have yet and adds their targets. Equals

        for document in documents[len(writer) :]:
            logits = teacher(document[None]).logits[0]
            writer.add(document, topk_targets(logits, writer.settings.k, temperatures=writer.settings.temperatures))

    in fixed groups of `batch_size` documents in their order, padded at the end to the longest of the group. Padding after
    a document cannot change what a causal teacher says of it; a teacher that takes `attention_mask` is given it. Ends early,
    without an error, when the writer's `max_bytes` is reached (`writer.full`).

    Args:
        teacher: called as teacher(input_ids) or teacher(input_ids, attention_mask=mask); for documents with a context as
            teacher(context_ids, attention_mask=mask, decoder_input_ids=input_ids). Returns logits `[B, L, V]` or an output
            with `.logits`. A module is put on `device` and in evaluation mode, and back in its mode afterwards.
        documents: 1-D int64 tensors, or `Example`s; the same, in the same order, when a capture is resumed.
        writer: killed and resumed with the same batch size, a capture gives the same records bit for bit. With alignment
            `same`, rows without a label are left empty.
        top_p: kind `topp`: the fewest of the k likeliest ids whose probabilities sum to at least this at T = 1.
        seed: of the draws of the kinds `sampled` and `mixed`; the same document gets the same draws on every rank.
        pad_id: id that fills shorter documents and contexts.
        drop_masked: rows that a document's `loss_mask` leaves out are stored without entries, as rows without a label are
            with alignment `same`.
        progress: called as progress(tokens_done, tokens_total), resumed tokens included.

    Raises:
        CacheError: the writer has more records than there are documents, records of other documents, another batch size,
            labels are missing, or the teacher's vocabulary is not the cache's.
    """
    settings = writer.settings
    if batch_size < 1:
        raise CacheError(f"batch_size: expected 1 or more, got {batch_size}")
    if (top_p is not None) != (settings.kind == "topp") or (top_p is not None and not 0 < top_p <= 1):
        raise CacheError(
            f"top_p: expected a share in (0, 1] with kind 'topp' and None with others, got {top_p} with {settings.kind!r}"
        )
    examples = [d if isinstance(d, Example) else Example(d) for d in documents]
    _check_resumed(writer, examples)
    writer.begin_groups(batch_size)
    total = sum(len(e.input_ids) for e in examples)
    done = sum(len(e.input_ids) for e in examples[: len(writer)])
    run = _Teacher(teacher, device, pad_id)
    try:
        for start in range(len(writer), len(examples), batch_size):
            group = examples[start : start + batch_size]
            for example, logits in zip(group, run(group, settings.vocab_size), strict=True):
                kept = settings.k - settings.samples if settings.kind == "mixed" else 0 if settings.samples else settings.k
                sampling = _sampling(settings, seed, example, device)
                targets = topk_targets(logits[: len(example.input_ids)], kept, temperatures=settings.temperatures, **sampling)
                if top_p is not None:
                    targets = nucleus(targets, top_p)
                if settings.alignment == "same" and example.labels is not None:
                    targets = _only(targets, example.labels != IGNORE)
                if drop_masked and example.loss_mask is not None:
                    targets = _only(targets, example.loss_mask)
                writer.add(example.input_ids, targets, example.loss_mask, example.labels, example.context_ids)
                done += len(example.input_ids)
            if progress is not None:
                progress(done, total)
    except CacheFull:
        return
    finally:
        run.restore()


def _check_resumed(writer: CacheWriter, examples: Sequence[Example]) -> None:
    """Raises unless what the writer holds can be the beginning of the examples; the last record speaks for those before it."""
    held, last = len(writer), writer.last_input_ids()
    if held > len(examples):
        raise CacheError(f"documents: the cache holds {held} records already, got only {len(examples)} documents")
    if last is not None and not np.array_equal(last, examples[held - 1].input_ids.cpu().numpy()):
        raise CacheError(
            f"documents: document {held - 1} is not the one that {writer.path} holds as its record {held - 1}; go on with the"
            " same documents in the same order, or capture to another path"
        )


def nucleus(targets: TopKTargets | EncodedTargets, top_p: float) -> TopKTargets:
    """The fewest entries, likeliest first, whose probabilities at T = 1 sum to at least `top_p`; the others join the tail."""
    targets = targets.decode()
    if targets.weights is not None:
        raise CacheError("targets.weights: expected exact entries, got drawn ones")
    order = targets.logprobs.argsort(-1, descending=True)
    logp, ids = targets.logprobs.gather(-1, order), targets.ids.gather(-1, order)
    p = logp.double().exp()
    cut = (p.cumsum(-1) - p >= top_p) | (ids < 0)
    temperatures = torch.tensor(targets.temperatures, device=logp.device)
    dropped = torch.where(cut & (ids >= 0), logp, -torch.inf)[..., None, :] / temperatures[:, None]
    log_tail = torch.logaddexp(targets.log_tail, dropped.logsumexp(-1) - targets.log_z)
    return dataclasses.replace(
        targets, ids=ids.masked_fill(cut, -1), logprobs=logp.masked_fill(cut, -torch.inf), log_tail=log_tail.clamp(max=0)
    )


def _only(targets: TopKTargets, rows: Tensor) -> TopKTargets:
    """Empty rows but for those asked for."""
    rows = rows.to(targets.ids.device)
    weights = None if targets.weights is None else targets.weights * rows[:, None]
    return dataclasses.replace(
        targets,
        ids=targets.ids.masked_fill(~rows[:, None], -1),
        logprobs=targets.logprobs.masked_fill(~rows[:, None], -torch.inf),
        log_z=targets.log_z.masked_fill(~rows[:, None], 0.0),
        log_tail=targets.log_tail.masked_fill(~rows[:, None], 0.0),
        weights=weights,
    )


def _sampling(settings: Settings, seed: int, example: Example, device: torch.device | str) -> dict[str, Any]:
    if not settings.samples:
        return {}
    # Seeded by what the document says: the same draws in one process, on any rank of several, and when resumed.
    text = hashlib.blake2b(
        example.input_ids.cpu().numpy().tobytes(), digest_size=7, salt=seed.to_bytes(8, "little", signed=True)
    )
    generator = torch.Generator(device).manual_seed(int.from_bytes(text.digest(), "little"))
    return {"samples": settings.samples, "sample_temperature": settings.sample_temperature, "generator": generator}


class _Teacher:
    """A teacher ready to run: in evaluation mode on the device, given a mask when it takes one."""

    def __init__(self, teacher: nn.Module | Callable[..., Any], device: torch.device | str, pad_id: int) -> None:
        self._call, self._device, self._pad_id = teacher, device, pad_id
        self._modes: list[tuple[nn.Module, bool]] = []
        target: Any = teacher
        if isinstance(teacher, nn.Module):
            self._modes = [(m, m.training) for m in teacher.modules()]
            teacher.to(device).eval()
            target = teacher.forward
        self._takes_mask = "attention_mask" in inspect.signature(target).parameters

    def __call__(self, group: Sequence[Example], vocab_size: int) -> Tensor:
        ids, extra = self._padded([e.input_ids for e in group])
        if group[0].context_ids is not None:
            contexts = [e.context_ids for e in group if e.context_ids is not None]
            if len(contexts) < len(group):
                raise CacheError("documents: expected a context in every one of a group or in none")
            sources, extra = self._padded(contexts)
            out = self._call(sources, **extra, decoder_input_ids=ids)
        else:
            out = self._call(ids, **extra)
        logits = getattr(out, "logits", out)
        expected = (*ids.shape, vocab_size)
        if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise CacheError(f"teacher: expected logits of shape {list(expected)} (the cache's vocabulary last), got {got}")
        return logits

    def _padded(self, documents: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        lengths = torch.tensor([len(d) for d in documents])
        ids = pad_sequence(documents, batch_first=True, padding_value=self._pad_id).to(self._device)
        # Without padding a mask says nothing, and teachers are faster without one.
        if not self._takes_mask or int(lengths.min()) == ids.shape[1]:
            return ids, {}
        return ids, {"attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(self._device)}

    def restore(self) -> None:
        for module, mode in self._modes:
            module.training = mode
