"""Text, rows and conversations as documents for a capture: causal, masked and encoder-decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tokenizers import Tokenizer

from kdfast.cache import Example
from kdfast.cli.cache_rows import Row, Source
from kdfast.train.data import tokenize

if TYPE_CHECKING:
    from kdfast.cli.cache_chat import Chat

IGNORE = -100


class Said(NamedTuple):
    """Token ids, and for each whether it is to be learned: a completion, or an assistant's turn."""

    ids: list[int]
    said: list[bool]


@dataclass
class Reading:
    """How rows become documents, and what became of them.

    forms: the ways to read a row with their fields, in the order they are tried: `chat`, `prompt` (and completion), `text`.
    chat: makes the chat template when the first conversation is met.
    prompt_loss: prompts count too.
    """

    tokenizer: Tokenizer
    length: int
    separator: str
    forms: dict[str, tuple[str, ...]]
    chat: Callable[[], Chat]
    prompt_loss: bool = False
    taught: int = 0
    cut: int = 0
    dropped: int = 0

    def documents(self, source: Source) -> list[Any]:
        """Text files end to end in sequences; rows of text each by itself, cut to sequences; instruction data cut once.

        Raises:
            ValueError: a row has none of the forms, or nothing is left.
        """
        documents: list[Any] = []
        if source.texts:
            documents += tokenize(self.tokenizer, source.texts, self.length, self.separator, source.option).ids.long()
        for row in source.rows:
            documents += self._documents(row)
        if self.taught and not documents:
            raise ValueError(
                f"{source.option}: expected a completion within --sequence-length {self.length}, found none in {self.taught}"
                " documents; allow more tokens"
            )
        return _some(documents, source.option)

    def _documents(self, row: Row) -> list[Any]:
        form = next((form for form, fields in self.forms.items() if row.has(fields)), None)
        if form is None:
            wanted = ", or ".join(" and ".join(fields) for fields in self.forms.values())
            raise ValueError(f"{row.where}: expected an object with {wanted}, got {', '.join(row.values) or 'nothing'}")
        fields = self.forms[form]
        if form == "text":
            ids = torch.tensor(self._ids(*row.texts(fields)))
            return [part for part in ids.split(self.length) if len(part) > 1]
        if form == "chat":
            return self._taught(self.chat().tokens(row.values[fields[0]], row.where))
        prompt, completion = map(self._ids, row.texts(fields))
        end = self.tokenizer.token_to_id(self.separator)
        completion += [] if end is None else [end]
        return self._taught(Said(prompt + completion, [False] * len(prompt) + [True] * len(completion)))

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _taught(self, document: Said) -> list[Any]:
        self.taught += 1
        self.cut += len(document.ids) > self.length
        ids, said = torch.tensor(document.ids[: self.length]), torch.tensor(document.said[: self.length], dtype=torch.bool)
        # Row t says what follows token t, so it counts when token t + 1 is to be learned; nothing follows the last.
        rows = torch.cat([said[1:], torch.zeros(1, dtype=torch.bool)])
        if len(ids) > 1 and self.prompt_loss:
            return [ids]
        if len(ids) > 1 and bool(rows.any()):
            return [Example(ids, loss_mask=rows)]
        self.dropped += 1
        return []

    def report(self) -> str:
        """One line about documents that are not whole, empty when all are."""
        if not self.cut:
            return "" if not self.dropped else f"{self.dropped} of {self.taught} documents dropped: nothing to learn in them"
        dropped = f", {self.dropped} dropped: nothing to learn within it" if self.dropped else ""
        return f"{self.cut} of {self.taught} documents cut to --sequence-length {self.length}{dropped}"


def masked(documents: list[torch.Tensor], mask_id: int, share: float, seed: int) -> list[Example]:
    """Documents with a share of their ids masked, the same for the same seed; the labels are what was there."""
    generator, out = torch.Generator().manual_seed(seed), []
    for ids in documents:
        chosen = torch.rand(len(ids), generator=generator) < share
        chosen[int(torch.randint(len(ids), (), generator=generator))] = True
        out.append(Example(ids.masked_fill(chosen, mask_id), ids.masked_fill(~chosen, IGNORE)))
    return out


def pairs(
    tokenizer: Tokenizer, source: Source, length: int, fields: tuple[str, str], start_id: int, end_id: int | None
) -> list[Example]:
    """Rows with a source and a target, each cut to `length`; the decoder starts from `start_id`."""
    out = []
    for row in source.rows:
        asked, answer = row.texts(fields)
        context = torch.tensor(tokenizer.encode(asked).ids[:length])
        said = tokenizer.encode(answer, add_special_tokens=False).ids
        labels = torch.tensor((said if end_id is None else [*said, end_id])[:length])
        if len(context) and len(labels):
            out.append(Example(torch.cat([torch.tensor([start_id]), labels[:-1]]), labels, context))
    return _some(out, source.option)


def _some(documents: list[Any], option: str) -> list[Any]:
    if not documents:
        raise ValueError(f"{option}: expected at least one document with two tokens, found none")
    return documents
