"""How a capture takes its documents: in windows of the stream, each in groups of like length, shared out over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor

from kdfast.text import Example

#: A window ends at the batch that brings it to this many tokens: what a teacher said of it waits in memory.
_WINDOW_TOKENS = 1 << 17
#: Windows that a rank takes in turn; its shards end with them, so that those of all ranks can be put in the stream's order.
TURN = 8


class Window(NamedTuple):
    """Documents that follow each other in the stream; `turn` counts the turns of all ranks."""

    turn: int
    examples: list[Example]


def windows(documents: Iterable[Tensor | Example], batch_size: int, batches: int) -> Iterator[Window]:
    """The documents in their order, `batches` batches or `_WINDOW_TOKENS` tokens at a time.

    Where a window ends depends on nothing but the documents before, so that every rank and every resumed run sees the same.
    """
    held: list[Example] = []
    tokens = number = 0
    for document in documents:
        example = document if isinstance(document, Example) else Example(document)
        held.append(example)
        tokens += len(example.input_ids)
        if len(held) % batch_size == 0 and (len(held) == batches * batch_size or tokens >= _WINDOW_TOKENS):
            yield Window(number // TURN, held)
            held, tokens, number = [], 0, number + 1
    if held:
        yield Window(number // TURN, held)


def groups(examples: list[Example], batch_size: int) -> list[list[int]]:
    """Places of the examples that go through the teacher together: those of like length, so that padding costs little."""

    def length(place: int) -> tuple[int, int]:
        example = examples[place]
        return 0 if example.context_ids is None else len(example.context_ids), len(example.input_ids)

    order = sorted(range(len(examples)), key=length)
    return [sorted(order[start : start + batch_size]) for start in range(0, len(order), batch_size)]
