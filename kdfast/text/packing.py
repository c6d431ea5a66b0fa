"""Text files end to end in sequences of one length, a piece of a file in memory at a time."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from kdfast.text.specials import Specials, surrounded
from kdfast.text.tokenizers import without_post_processor

#: Characters that are tokenised at once, and how far the next piece of a longer file reaches back into the last one.
_PIECE, _OVERLAP = 1 << 18, 1 << 12
#: No special tokens.
_NONE = Specials()
#: Tokens that both pieces must agree on around the place where they are joined.
_AGREE = 8


def pack(tokenizer: Tokenizer, files: Sequence[Path], length: int, specials: Specials = _NONE, key: str = "data") -> Tensor:
    """The files end to end as sequences, int32 `[n, length]`, held in memory; what is left over is dropped.

    Raises:
        ValueError: not even one sequence comes out.
    """
    pieces = list(token_ids(tokenizer, files, specials))
    ids = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int32)
    if len(ids) < length:
        raise ValueError(f"{key}: expected at least one sequence of {length} tokens, got {len(ids)} in {len(files)} files")
    return torch.from_numpy(ids[: len(ids) // length * length].reshape(-1, length).copy())


def packed(pieces: Iterable[np.ndarray], length: int, over: Callable[[int], None] = lambda n: None) -> Iterator[Tensor]:
    """Pieces of ids end to end as sequences, int64 `[length]`, one at a time; what is left over is dropped, and `over` told how
    many ids that are."""
    left: list[np.ndarray] = []
    held = 0
    for piece in pieces:
        left.append(piece)
        held += len(piece)
        if held < length:
            continue
        ids, at = np.concatenate(left), 0
        for at in range(length, held + 1, length):
            yield torch.from_numpy(ids[at - length : at].astype(np.int64))
        left, held = [ids[at:]], held - at
    over(held)


def token_ids(
    tokenizer: Tokenizer, files: Sequence[Path], specials: Specials, done: Callable[[int], None] | None = None
) -> Iterator[np.ndarray]:
    """The ids of the files in their order, int32, the special tokens around each.

    Args:
        done: called with the number of characters that were read.
    """
    plain = without_post_processor(tokenizer)
    waiting: list[str] = []  # whole files that are tokenised together

    def whole() -> Iterator[np.ndarray]:
        for encoding in plain.encode_batch(waiting, add_special_tokens=False):
            parts = surrounded(specials.begin, encoding.ids, specials.separator)
            yield from (np.asarray(ids, np.int32) for ids in parts)
        waiting.clear()

    for file in files:
        with open(file, encoding="utf-8", errors="replace") as text:
            first = text.read(_PIECE)
            if done is not None:
                done(len(first))
            if len(first) < _PIECE:
                if sum(map(len, waiting)) + len(first) > _PIECE:
                    yield from whole()
                waiting.append(first)
                continue
            yield from whole()
            yield from _surrounded_pieces(specials, long_text(plain, first, lambda: text.read(_PIECE), done))
    yield from whole()


def _surrounded_pieces(specials: Specials, pieces: Iterable[list[int]]) -> Iterator[np.ndarray]:
    """The ids of a long text, piece by piece, with special tokens around it as `surrounded` puts them."""
    begin, end = specials.begin, specials.separator
    begun, held = False, list[int]()  # `held` may be the text's end
    for piece in pieces:
        held += piece
        if len(held) <= len(begin) + len(end):
            continue
        if not begun:
            yield np.asarray(surrounded(begin, held)[0], np.int32)
        begun, ready = True, len(held) - len(end)
        yield np.asarray(held[:ready], np.int32)
        held = held[ready:]
    yield from (np.asarray(ids, np.int32) for ids in surrounded(() if begun else begin, held, end))


def long_text(
    plain: Tokenizer, piece: str, more: Callable[[], str], done: Callable[[int], None] | None = None
) -> Iterator[list[int]]:
    """The ids of a text that is read piece by piece: those of the whole, joined where two overlapping pieces agree.

    How a text is cut into tokens depends on what stands near by: a piece's own beginning and end are not trusted, only tokens
    inside that the next piece, which begins before them, finds again.
    """
    encoding, start = plain.encode(piece, add_special_tokens=False), 0
    while new := more():
        if done is not None:
            done(len(new))
        back = max(len(piece) - _OVERLAP, 0)
        longer = plain.encode(piece[back:] + new, add_special_tokens=False)
        joint = _joint(encoding, longer, back, len(piece) - back)
        if joint is None:  # no place to join them, as in one endless token: take both together
            piece += new
            encoding = plain.encode(piece, add_special_tokens=False)
            continue
        yield encoding.ids[start : joint[0]]
        encoding, start, piece = longer, joint[1], piece[back:] + new
    yield encoding.ids[start:]


def _joint(before: Encoding, after: Encoding, back: int, overlap: int) -> tuple[int, int] | None:
    """Numbers of the tokens at which the second of two encodings takes over: amid the last run that both have alike.

    The second one's text begins `back` characters after the first one's and shares `overlap` characters with it.
    """
    first = bisect_left(before.offsets, (back, 0))
    ours = [(i, s - back, e - back) for i, (s, e) in zip(before.ids[first:], before.offsets[first:], strict=True)]
    theirs = [(i, s, e) for i, (s, e) in zip(after.ids, after.offsets, strict=True) if e <= overlap]
    starts = [start for _, start, _ in ours]
    for there in range(len(theirs) - 2 * _AGREE, -1, -1):
        here = bisect_left(starts, theirs[there][1])
        if ours[here : here + 2 * _AGREE] == theirs[there : there + 2 * _AGREE]:
            return first + here + _AGREE, there + _AGREE
    return None
