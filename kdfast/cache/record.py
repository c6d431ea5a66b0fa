"""One record as bytes: input ids, masks, labels and the coded targets of one document."""

from __future__ import annotations

import itertools
import struct
from typing import NamedTuple

import numpy as np

from kdfast.cache.format import IGNORE, CorruptCache

# flags, bytes an input id, bytes a label, bytes a context id, tokens, context ids
_HEADER = struct.Struct("<BBBBII")
_MASK, _LABELS, _CONTEXT, _COUNTS = 1, 2, 4, 8


class Parts(NamedTuple):
    """A record taken apart; `targets` still in code. Labels hold -100 where there is none."""

    input_ids: np.ndarray
    loss_mask: np.ndarray | None
    labels: np.ndarray | None
    context_ids: np.ndarray | None
    targets: np.ndarray
    has_counts: bool


def _width(values: np.ndarray) -> int:
    return max(1, (int(values.max(initial=0)).bit_length() + 7) // 8)


def _pack(values: np.ndarray, width: int) -> bytes:
    return np.ascontiguousarray(values.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :width]).tobytes()


def _unpack(data: np.ndarray, count: int, width: int) -> np.ndarray:
    wide = np.zeros((count, 4), np.uint8)
    wide[:, :width] = data.reshape(count, width)
    return wide.view("<u4")[:, 0].astype(np.int64)


def pack(
    input_ids: np.ndarray,
    targets: bytes,
    has_counts: bool,
    loss_mask: np.ndarray | None,
    labels: np.ndarray | None,
    context_ids: np.ndarray | None,
) -> bytes:
    """The record's payload; labels are kept as label + 1, with 0 for none."""
    flags = _COUNTS * has_counts
    sections, widths = [_pack(input_ids, _width(input_ids))], [_width(input_ids), 0, 0]
    if loss_mask is not None:
        flags |= _MASK
        sections.append(np.packbits(loss_mask, bitorder="little").tobytes())
    if labels is not None:
        flags |= _LABELS
        shifted = np.where(labels == IGNORE, 0, labels + 1)
        widths[1] = _width(shifted)
        sections.append(_pack(shifted, widths[1]))
    if context_ids is not None:
        flags |= _CONTEXT
        widths[2] = _width(context_ids)
        sections.append(_pack(context_ids, widths[2]))
    n_context = 0 if context_ids is None else len(context_ids)
    header = _HEADER.pack(flags, *widths, len(input_ids), n_context)
    return b"".join([header, *sections, targets])


class _Sections(NamedTuple):
    """Flags, bytes per value (ids, labels, context) and the sections of a payload, which are still bytes."""

    flags: int
    widths: list[int]
    ids: np.ndarray
    mask: np.ndarray
    labels: np.ndarray
    context: np.ndarray
    targets: np.ndarray


def _sections(payload: np.ndarray, tokens: int, contexts: int) -> _Sections:
    """Takes a payload apart after checking that every section lies inside it. Raises as `unpack`."""
    if payload.size < _HEADER.size:
        raise CorruptCache(f"a record has {payload.size} bytes, fewer than its header")
    flags, *widths, n_tokens, n_context = _HEADER.unpack_from(payload.data)
    if (n_tokens, n_context) != (tokens, contexts):
        raise CorruptCache(
            f"a record claims {n_tokens} tokens and {n_context} context ids, the shard's index says {tokens} and {contexts}"
        )
    there = (True, flags & _LABELS, flags & _CONTEXT)
    if flags > 15 or any(not (1 <= w <= 4 if t else w == 0) for w, t in zip(widths, there, strict=True)):
        raise CorruptCache("a record's header holds flags or widths that no writer produces")
    if contexts and not flags & _CONTEXT:
        raise CorruptCache(f"a record's header holds {contexts} context ids and no flag for them")
    sizes = [
        tokens * widths[0],
        (tokens + 7) // 8 if flags & _MASK else 0,
        tokens * widths[1] if flags & _LABELS else 0,
        n_context * widths[2] if flags & _CONTEXT else 0,
    ]
    ends = np.cumsum([_HEADER.size, *sizes]).tolist()
    if ends[-1] > payload.size:
        raise CorruptCache(f"a record has {payload.size} bytes, but its sections need {ends[-1]} and more")
    ids, mask, labels, context = (payload[a:b] for a, b in itertools.pairwise(ends))
    return _Sections(flags, widths, ids, mask, labels, context, payload[ends[-1] :])


def unpack(payload: np.ndarray, tokens: int, contexts: int) -> Parts:
    """A payload's parts.

    Raises:
        CorruptCache: a section does not lie inside it, or the record does not hold `tokens` tokens and `contexts` context ids.
    """
    found = _sections(payload, tokens, contexts)
    labels, context_ids = _given(found, tokens, contexts)
    return Parts(
        input_ids=_unpack(found.ids, tokens, found.widths[0]),
        loss_mask=np.unpackbits(found.mask, count=tokens, bitorder="little").astype(bool) if found.flags & _MASK else None,
        labels=labels,
        context_ids=context_ids,
        targets=found.targets,
        has_counts=bool(found.flags & _COUNTS),
    )


def given(payload: np.ndarray, tokens: int, contexts: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Labels and context ids as they were given, which a batch of the record does not tell. Raises as `unpack`."""
    return _given(_sections(payload, tokens, contexts), tokens, contexts)


def _given(found: _Sections, tokens: int, contexts: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    labels, context = found.flags & _LABELS, found.flags & _CONTEXT
    return (
        _labels(_unpack(found.labels, tokens, found.widths[1])) if labels else None,
        _unpack(found.context, contexts, found.widths[2]) if context else None,
    )


def _labels(shifted: np.ndarray) -> np.ndarray:
    return np.where(shifted == 0, IGNORE, shifted - 1)


def counted(input_ids: np.ndarray, loss_mask: np.ndarray | None, labels: np.ndarray | None, next_label: bool) -> np.ndarray:
    """Which rows of a record to be count: `supervision` before it is packed."""
    return supervision(Parts(input_ids, loss_mask, labels, None, np.zeros(0, np.uint8), False), next_label)[0]


def supervision(parts: Parts, next_label: bool) -> tuple[np.ndarray, np.ndarray]:
    """Which rows count, and the label of each row, -100 where it does not count."""
    if parts.labels is not None:
        labels = parts.labels
    elif next_label:
        # The label of a document's last row lies outside the document.
        labels = np.append(parts.input_ids[1:], IGNORE)
    else:
        labels = np.full(len(parts.input_ids), IGNORE, np.int64)
    if parts.loss_mask is None:
        mask = labels != IGNORE
    else:
        mask = parts.loss_mask if parts.labels is not None else parts.loss_mask & (labels != IGNORE)
    return mask, np.where(mask, labels, IGNORE)
