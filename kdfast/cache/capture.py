"""`capture`: a teacher over documents, to a cache."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from kdfast.cache.format import IGNORE, CacheError, CacheFull, Settings
from kdfast.cache.windows import Window, groups, windows
from kdfast.cache.writer import CacheWriter
from kdfast.models.positions import positions_of
from kdfast.ops.codec import EncodedTargets
from kdfast.ops.linear_topk import linear_topk_targets
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
    documents: Iterable[Tensor | Example],
    writer: CacheWriter,
    *,
    batch_size: int,
    window: int = 1,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    top_p: float | None = None,
    seed: int = 0,
    pad_id: int = 0,
    drop_masked: bool = False,
    head: Any = None,
    turns: list[int] | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> None:
    """Runs a teacher over the documents that the writer does not have yet and adds their targets. Equals

        for document in documents[len(writer) :]:
            logits = teacher(document[None]).logits[0]
            writer.add(document, topk_targets(logits, writer.settings.k, temperatures=writer.settings.temperatures))

    in groups of `batch_size` documents, padded at the end to the longest of the group. Padding after a document cannot change
    what a causal teacher says of it; a teacher that takes `attention_mask` is given it. Ends early, without an error, when the
    writer's `max_bytes` is reached (`writer.full`).

    Args:
        teacher: called as teacher(input_ids) or teacher(input_ids, attention_mask=mask); for documents with a context as
            teacher(context_ids, attention_mask=mask, decoder_input_ids=input_ids). Returns logits `[B, L, V]` or an output
            with `.logits`. A module is put on `device` and in evaluation mode, and back in its mode afterwards.
        documents: 1-D int64 tensors, or `Example`s, read once, a window of them in memory; the same, in the same order, when
            a capture is resumed.
        writer: killed and resumed with the same batch size and window, a capture gives the same records bit for bit. With
            alignment `same`, rows without a label are left empty.
        window: batches of documents that are grouped by length; the records keep the order of the documents.
        rank, world: captures the windows whose turn it is; the parts of all ranks merge to the records of one process.
        top_p: kind `topp`: the fewest of the k likeliest ids whose probabilities sum to at least this at T = 1.
        seed: of the draws of the kinds `sampled` and `mixed`; the same document gets the same draws on every rank.
        pad_id: id that fills shorter documents and contexts.
        drop_masked: rows that a document's `loss_mask` leaves out are stored without entries, as rows without a label are
            with alignment `same`.
        head: the teacher's linear head (`kdfast.models.heads.find_head`): its logits are then formed a chunk of rows at a
            time, `[B, L, V]` never.
        turns: a list that is filled with the number of records of each turn of this rank, for `merge`.
        progress: called as progress(tokens_done, tokens_total), resumed tokens included; the total is None for documents
            that are no sequence.

    Raises:
        CacheError: the writer has more records than there are documents, records of other documents, another batch size,
            labels are missing, or the teacher's vocabulary is not the cache's.
    """
    settings = writer.settings
    for name, number in (("batch_size", batch_size), ("window", window)):
        if number < 1:
            raise CacheError(f"{name}: expected 1 or more, got {number}")
    if (top_p is not None) != (settings.kind == "topp") or (top_p is not None and not 0 < top_p <= 1):
        raise CacheError(
            f"top_p: expected a share in (0, 1] with kind 'topp' and None with others, got {top_p} with {settings.kind!r}"
        )
    writer.begin_groups(batch_size)
    total = sum(len(_ids(d)) for d in documents) if isinstance(documents, Sequence) else None
    run = _Teacher(teacher, device, pad_id, head)
    work = _Work(writer, run, batch_size, top_p, seed, drop_masked, turns if turns is not None else [])
    try:
        turn = -1
        for found in windows(documents, batch_size, window):
            if found.turn % world != rank:
                continue
            if found.turn != turn and turn >= 0 and world > 1:
                writer.flush()
            if found.turn != turn:
                turn = found.turn
                work.turns.append(0)
            for done in work.window(found):
                if progress is not None:
                    progress(done, total)
        work.check_end()
    except CacheFull:
        return
    finally:
        run.restore()


class _Work:
    """A capture under way: which records there are, and what to do with the next window."""

    def __init__(
        self, writer: CacheWriter, run: _Teacher, batch_size: int, top_p: float | None, seed: int, drop_masked: bool,
        turns: list[int],
    ) -> None:  # fmt: skip
        self._writer, self._run, self._batch_size = writer, run, batch_size
        self._top_p, self._seed, self._drop_masked = top_p, seed, drop_masked
        self._held, self._last = len(writer), writer.last_input_ids()
        self.turns, self._before, self._tokens = turns, 0, 0

    def window(self, window: Window) -> Iterator[int]:
        """Adds what is missing of a window in its order; yields the tokens that are done after each call of the teacher."""
        examples, first = window.examples, self._before
        self._before += len(examples)
        self.turns[-1] += len(examples)
        missing = max(self._held - first, 0)  # a shard may have ended amid a window
        self._check_resumed(examples, first)
        self._tokens += sum(len(e.input_ids) for e in examples[:missing])
        if missing >= len(examples):
            return
        waiting: dict[int, TopKTargets] = {}
        for group in groups(examples, self._batch_size):
            if group[-1] < missing:
                continue
            found = self._targets([examples[place] for place in group])
            waiting.update((place, targets) for place, targets in zip(group, found, strict=True) if place >= missing)
            while missing in waiting:
                example = examples[missing]
                targets = waiting.pop(missing)
                self._writer.add(example.input_ids, targets, example.loss_mask, example.labels, example.context_ids)
                self._tokens += len(example.input_ids)
                missing += 1
            yield self._tokens

    def check_end(self) -> None:
        if self._held > self._before:
            raise CacheError(f"documents: the cache holds {self._held} records already, got only {self._before} documents")

    def _check_resumed(self, examples: list[Example], first: int) -> None:
        """Raises unless what the writer holds can be the beginning of the documents; the last record speaks for the others."""
        place = self._held - 1 - first
        if not 0 <= place < len(examples) or self._last is None:
            return
        if not np.array_equal(self._last, examples[place].input_ids.cpu().numpy()):
            raise CacheError(
                f"documents: document {self._held - 1} is not the one that {self._writer.path} holds as its record"
                f" {self._held - 1}; go on with the same documents in the same order, or capture to another path"
            )

    def _targets(self, group: list[Example]) -> list[TopKTargets]:
        settings = self._writer.settings
        kept = settings.k - settings.samples if settings.kind == "mixed" else 0 if settings.samples else settings.k

        def sampling(example: Example) -> dict[str, Any]:
            return _sampling(settings, self._seed, example, self._run.device)

        found = self._run(group, settings.vocab_size, kept, settings.temperatures, sampling if settings.samples else None)
        return [self._as_stored(example, targets).to("cpu") for example, targets in zip(group, found, strict=True)]

    def _as_stored(self, example: Example, targets: TopKTargets) -> TopKTargets:
        if self._top_p is not None:
            targets = nucleus(targets, self._top_p)
        if self._writer.settings.alignment == "same" and example.labels is not None:
            targets = _only(targets, example.labels != IGNORE)
        if self._drop_masked and example.loss_mask is not None:
            targets = _only(targets, example.loss_mask)
        return targets


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

    def __init__(self, teacher: nn.Module | Callable[..., Any], device: torch.device | str, pad_id: int, head: Any) -> None:
        self._call, self.device, self._pad_id, self._head = teacher, device, pad_id, head
        self._modes: list[tuple[nn.Module, bool]] = []
        self._positions: int | None = None
        target: Any = teacher
        if isinstance(teacher, nn.Module):
            self._positions = positions_of(teacher)
            self._modes = [(m, m.training) for m in teacher.modules()]
            teacher.to(device).eval()
            target = teacher.forward
        takes = inspect.signature(target).parameters
        self._takes_mask = "attention_mask" in takes
        # Keys and values are of use to a text that goes on; here each is seen once.
        self._extra = {"use_cache": False} if "use_cache" in takes else {}

    def __call__(
        self, group: list[Example], vocab_size: int, k: int, temperatures: Sequence[float],
        sampling: Callable[[Example], dict[str, Any]] | None,
    ) -> list[TopKTargets]:  # fmt: skip
        """Targets of every document, `[L, k]`."""
        lengths = [len(e.input_ids) for e in group]
        if self._head is None:
            logits = self._logits(group, vocab_size)
            return [
                topk_targets(row[:n], k, temperatures=temperatures, **(sampling(e) if sampling else {}))
                for e, n, row in zip(group, lengths, logits, strict=True)
            ]
        hidden, weight = self._hidden(group), self._head.weight
        if weight.shape[0] != vocab_size:
            raise CacheError(f"teacher: expected a head of the cache's {vocab_size} ids, got {weight.shape[0]}")
        options = {"bias": self._head.bias, "head": self._head.form, "temperatures": temperatures}
        rows = [row[:n] for n, row in zip(lengths, hidden, strict=True)]
        if sampling is not None:  # every document has draws of its own
            return [linear_topk_targets(r, weight, k, **options, **sampling(e)) for e, r in zip(group, rows, strict=True)]
        whole = linear_topk_targets(torch.cat(rows), weight, k, **options)
        ends = np.cumsum([0, *lengths]).tolist()
        return [whole[start:end] for start, end in itertools.pairwise(ends)]

    def _hidden(self, group: list[Example]) -> Tensor:
        """`[B, L, D]`: what enters the head."""
        with self._head.entered() as entrance:
            self._run(group)
        hidden: Tensor = entrance.hidden
        return hidden

    def _logits(self, group: list[Example], vocab_size: int) -> Tensor:
        out = self._run(group)
        logits = getattr(out, "logits", out)
        expected = (len(group), max(len(e.input_ids) for e in group), vocab_size)
        if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise CacheError(f"teacher: expected logits of shape {list(expected)} (the cache's vocabulary last), got {got}")
        return logits

    def _run(self, group: list[Example]) -> Any:
        ids, mask = self._padded([e.input_ids for e in group])
        if group[0].context_ids is None:
            return self._call(ids, **mask, **self._extra)
        contexts = [e.context_ids for e in group if e.context_ids is not None]
        if len(contexts) < len(group):
            raise CacheError("documents: expected a context in every one of a group or in none")
        sources, mask = self._padded(contexts)
        return self._call(sources, **mask, decoder_input_ids=ids, **self._extra)

    def _padded(self, documents: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        lengths = torch.tensor([len(d) for d in documents])
        if self._positions is not None and int(lengths.max()) > self._positions:
            raise CacheError(
                f"documents: one has {int(lengths.max())} tokens, expected at most the {self._positions} positions of the"
                " teacher; lower sequence_length (--sequence-length)"
            )
        ids = pad_sequence(documents, batch_first=True, padding_value=self._pad_id).to(self.device)
        # Without padding a mask says nothing, and teachers are faster without one.
        if not self._takes_mask or int(lengths.min()) == ids.shape[1]:
            return ids, {}
        return ids, {"attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(self.device)}

    def restore(self) -> None:
        for module, mode in self._modes:
            module.training = mode


def _ids(document: Tensor | Example) -> Tensor:
    return document.input_ids if isinstance(document, Example) else document
