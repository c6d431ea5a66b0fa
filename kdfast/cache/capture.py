"""`capture`: a teacher over documents, to a cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.cache.format import CacheError
from kdfast.cache.writer import CacheWriter
from kdfast.ops.topk import topk_targets


@torch.no_grad()
def capture(
    teacher: nn.Module | Callable[..., Any],
    documents: Sequence[Tensor],
    writer: CacheWriter,
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Runs a teacher over the documents that the writer does not have yet and adds their targets. Equals

        for document in documents[len(writer) :]:
            logits = teacher(document[None]).logits[0]
            writer.add(document, topk_targets(logits, writer.settings.k, temperatures=writer.settings.temperatures))

    in fixed groups of `batch_size` documents in their order, padded at the end to the longest of the group. Padding after
    a document cannot change what a causal teacher says of it; a teacher that takes `attention_mask` is given it.

    Args:
        teacher: called as teacher(input_ids) or teacher(input_ids, attention_mask=mask), returns logits `[B, L, V]` or
            an output with `.logits`. A module is put on `device` and in evaluation mode, and back in its mode afterwards.
        documents: 1-D int64 tensors; the same, in the same order, when a capture is resumed.
        writer: alignment `next`. Killed and resumed with the same batch size, a capture gives the same records bit for bit.
        progress: called as progress(tokens_done, tokens_total), resumed tokens included.

    Raises:
        CacheError: the writer has more records than there are documents, another alignment or batch size, or the
            teacher's vocabulary is not the cache's.
    """
    settings = writer.settings
    if batch_size < 1:
        raise CacheError(f"batch_size: expected 1 or more, got {batch_size}")
    if settings.alignment != "next":
        raise CacheError(f"alignment: capture writes 'next', the cache has {settings.alignment!r}; add masked records yourself")
    if len(writer) > len(documents):
        raise CacheError(f"documents: the cache holds {len(writer)} records already, got only {len(documents)} documents")
    writer.begin_groups(batch_size)
    total = sum(len(d) for d in documents)
    done = sum(len(d) for d in documents[: len(writer)])
    run = _Teacher(teacher, device)
    try:
        for start in range(len(writer), len(documents), batch_size):
            group = documents[start : start + batch_size]
            for document, logits in zip(group, run(group, settings.vocab_size), strict=True):
                targets = topk_targets(logits[: len(document)], settings.k, temperatures=settings.temperatures)
                writer.add(document, targets)
                done += len(document)
            if progress is not None:
                progress(done, total)
    finally:
        run.restore()


class _Teacher:
    """A teacher ready to run: in evaluation mode on the device, given a mask when it takes one."""

    def __init__(self, teacher: nn.Module | Callable[..., Any], device: torch.device | str) -> None:
        self._call, self._device = teacher, device
        self._modes: list[tuple[nn.Module, bool]] = []
        target: Any = teacher
        if isinstance(teacher, nn.Module):
            self._modes = [(m, m.training) for m in teacher.modules()]
            teacher.to(device).eval()
            target = teacher.forward
        self._takes_mask = "attention_mask" in inspect.signature(target).parameters

    def __call__(self, group: Sequence[Tensor], vocab_size: int) -> Tensor:
        lengths = torch.tensor([len(d) for d in group])
        ids = torch.nn.utils.rnn.pad_sequence(list(group), batch_first=True).to(self._device)
        extra = {}
        # Without padding a mask says nothing, and teachers are faster without one.
        if self._takes_mask and int(lengths.min()) < ids.shape[1]:
            extra["attention_mask"] = (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(self._device)
        out = self._call(ids, **extra)
        logits = getattr(out, "logits", out)
        expected = (*ids.shape, vocab_size)
        if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise CacheError(f"teacher: expected logits of shape {list(expected)} (the cache's vocabulary last), got {got}")
        return logits

    def restore(self) -> None:
        for module, mode in self._modes:
            module.training = mode
