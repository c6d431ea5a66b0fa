"""`Corpus`: what a `TextData` names as documents, streamed: causal, masked and encoder-decoder."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from kdfast.text.chat import Chat, Written, learned
from kdfast.text.example import IGNORE, Example
from kdfast.text.packing import long_text, packed, token_ids
from kdfast.text.rows import TABLES, Row, open_source
from kdfast.text.spec import Naming, TextData, python_name
from kdfast.text.specials import Specials, around, read_json, special_tokens, surrounded
from kdfast.text.tokenizers import without_post_processor

#: Options that only some tasks read.
_TASKS = {
    **dict.fromkeys(("messages_field", "prompt_field", "completion_field", "chat_template", "prompt_loss"), ("causal",)),
    **dict.fromkeys(("source_field", "target_field"), ("seq2seq",)),
    **dict.fromkeys(("mask_token", "mask_share"), ("masked",)),
    "field": ("causal", "masked"),
    "end": ("causal", "seq2seq"),
}
#: Options that name a row's fields.
_FIELDS = {
    "causal": ("messages_field", "prompt_field", "completion_field", "field"),
    "masked": ("field",),
    "seq2seq": ("source_field", "target_field"),
}
#: Rows, and characters of them, that are tokenised together.
_ROWS, _CHARACTERS = 256, 1 << 18


class Draft(NamedTuple):
    """A row as the texts that its document is made of."""

    row: Row
    form: str
    texts: tuple[str, ...]
    written: Written | None = None


class Corpus:
    """The documents that `data` names, in a fixed order; walked anew by every `iter`, a window of them in memory.

    Text files end to end in sequences; rows of text each by itself, cut to sequences; instruction data cut once.

    Args:
        tokenizer, folder: `load_tokenizer`'s, and the model's folder where there is one, which says what stands around
            documents (`special_tokens`) and holds the chat template.
        task: causal, masked or seq2seq.
        seed: of the masks of a masked language model.
        name: how an error calls an option.
        otherwise: fields of a model's configuration that count where `folder` has none: `decoder_start_token_id`,
            `eos_token_id`, `forced_bos_token_id`.

    Raises:
        ValueError: what is named is not there, or options do not go together.
        ImportError: a package that reads it is missing.
    """

    def __init__(
        self,
        data: TextData,
        tokenizer: Tokenizer,
        folder: str | Path | None = None,
        *,
        task: str = "causal",
        seed: int = 0,
        name: Naming = python_name,
        otherwise: Mapping[str, Any] | None = None,
    ) -> None:
        self.data, self.tokenizer, self.task = data, tokenizer, task
        self._otherwise = dict(otherwise or {})
        self._folder = None if folder is None else Path(folder)
        self._seed, self._name = seed, name
        for f in dataclasses.fields(data):
            able = _TASKS.get(f.name, (task,))
            if task not in able and getattr(data, f.name) != f.default:
                raise ValueError(f"{name(f.name)}: expected a {' or '.join(able)} teacher, got a {task} one; leave it out")
        self._forms = data.forms(task)
        if data.unlabelled and not {"pair", "prompt"} & self._forms.keys():
            raise ValueError(f"{name('unlabelled')}: expected rows with a source or a prompt, got {', '.join(self._forms)}")
        self._source = open_source(data, [field for fields in self._forms.values() for field in fields], name)
        if task == "seq2seq" and self._source.texts:
            raise ValueError(
                f"{name('paths')}: expected .jsonl files for an encoder-decoder, got {self._source.texts[0]}; set"
                f" {name('glob')} '**/*.jsonl'"
            )
        table = next((file for file in self._source.texts if file.suffix in TABLES), None)
        if table is not None:  # whose header, separators and other columns would be learned as text
            raise ValueError(
                f"{name('paths')}: expected running text or rows, got the table {table}; write its texts as rows of .jsonl,"
                ' {"text": ...}'
            )
        self._plain = without_post_processor(tokenizer)
        self.specials = self._special_tokens()
        if task == "masked":
            mask_id = tokenizer.token_to_id(data.mask_token)
            if mask_id is None:
                raise ValueError(f"{name('mask_token')}: expected a token of the tokenizer, got {data.mask_token!r}")
            self._mask_id: int = mask_id
        self._forget()

    def __iter__(self) -> Iterator[Example]:
        """Raises:
        ValueError: a row has none of the forms, or nothing is left.
        """
        self._forget()
        found = self._documents()
        for number, example in enumerate(found):
            yield self._masked(example.input_ids, number) if self.task == "masked" else example
            self.documents = number + 1
        if self.documents:
            return
        option, length = self._source.option, self.data.sequence_length
        if self.taught and self.task == "causal":
            raise ValueError(
                f"{option}: expected a completion within {self._name('sequence_length')} {length}, found none in"
                f" {self.taught} documents; allow more tokens"
            )
        raise ValueError(f"{option}: expected at least one document with two tokens, found none")

    def count(self) -> tuple[int, int]:
        """Documents and tokens, by walking through them."""
        documents = tokens = 0
        for example in self:
            documents, tokens = documents + 1, tokens + len(example.input_ids)
        return documents, tokens

    @property
    def share_read(self) -> float | None:
        """How much of the corpus the current walk has read; None where its size is unknown, as of a streamed dataset."""
        size = self._source.size
        return None if not size else min(self._source.done / size, 1.0)

    def report(self) -> str:
        """One line about documents of the last walk that are not whole, empty when all are."""
        if self._left * 100 > self._packed:
            return (
                f"the last {self._left} of {self._packed + self._left} tokens left out, which fill no sequence of"
                f" {self._name('sequence_length')} {self.data.sequence_length}"
            )
        if not self.cut:
            return "" if not self.dropped else f"{self.dropped} of {self.taught} documents dropped: nothing to learn in them"
        dropped = f", {self.dropped} dropped: nothing to learn within it" if self.dropped else ""
        length = f"{self._name('sequence_length')} {self.data.sequence_length}"
        return f"{self.cut} of {self.taught} documents cut to {length}{dropped}"

    def describe(self) -> dict[str, Any]:
        """What the documents depend on, as JSON values: options, special tokens by name, and a digest of the files' names
        and sizes."""
        state = hashlib.blake2b(digest_size=16)
        for name, size in self._source.files:
            state.update(f"{name}\0{size}\0".encode())
        chosen = self.specials.describe(self.tokenizer)
        if self.task == "seq2seq" and self._otherwise:
            start, end = self._decoder
            chosen |= {
                "decoder_start": self.tokenizer.id_to_token(start),
                "decoder_end": [*map(self.tokenizer.id_to_token, end)],
            }
        return {**self.data.as_json(), "task": self.task, "files": state.hexdigest(), "chosen_tokens": chosen}

    @property
    def ids(self) -> dict[str, int]:
        """What a model of these documents is told: `decoder_start_token_id`, `eos_token_id`, as far as there are any."""
        if self.task != "seq2seq":
            return {"eos_token_id": self.specials.end[0]} if self.task == "causal" and self.specials.end else {}
        start, end = self._decoder
        return {"decoder_start_token_id": start, **({"eos_token_id": end[0]} if end else {})}

    def _forget(self) -> None:
        self.documents = self.taught = self.cut = self.dropped = self._packed = self._left = 0
        self._source.done = 0

    def _count_left(self, tokens: int) -> None:
        self._left = tokens

    @functools.cached_property
    def _chat(self) -> Chat:
        return Chat(self._folder, self.data.chat_template, self._name)

    def _special_tokens(self) -> Specials:
        def turn_end() -> int | None:
            try:
                return self._chat.turn_end(self.tokenizer)
            except ValueError:  # no template, which only conversations need
                return None

        return special_tokens(self.tokenizer, self._folder, self.data, turn_end, self._name, self._otherwise)

    def _documents(self) -> Iterator[Example]:
        length, source = self.data.sequence_length, self._source
        if source.texts:

            def done(characters: int) -> None:
                source.done += characters

            pieces = token_ids(self.tokenizer, source.texts, self.specials, done)
            found = False
            for ids in packed(pieces, length, self._count_left):
                found = True
                self._packed += length
                yield Example(ids)
            if not found:
                raise ValueError(
                    f"{source.option}: expected at least one sequence of {length} tokens, found less in"
                    f" {len(source.texts)} files"
                )
        for drafts in self._batches(source.rows()):
            texts = [text for draft in drafts if draft.form != "long" for text in draft.texts]
            encodings = iter(self._plain.encode_batch(texts, add_special_tokens=False))
            for draft in drafts:
                if draft.form == "long":
                    parts = long_text(self._plain, *_in_pieces(draft.texts[0]))
                    yield from self._text(np.concatenate([np.asarray(ids, np.int64) for ids in parts]))
                else:
                    yield from self._finish(draft, [next(encodings) for _ in draft.texts])

    def _batches(self, rows: Iterable[Row]) -> Iterator[list[Draft]]:
        waiting: list[Draft] = []
        held = 0
        for draft in map(self._draft, rows):
            size = sum(map(len, draft.texts))
            if waiting and (held + size > _CHARACTERS or len(waiting) == _ROWS):
                yield waiting
                waiting, held = [], 0
            waiting.append(draft)
            held += size
        if waiting:
            yield waiting

    def _draft(self, row: Row) -> Draft:
        form = next((form for form, fields in self._forms.items() if row.has(fields)), None)
        if form is None and self.data.unlabelled:
            asked = [(form, fields) for form, fields in self._forms.items() if form in ("pair", "prompt")]
            form, fields = next(((form, fields) for form, fields in asked if row.has(fields[:1])), (None, ()))
            if form is not None:
                return Draft(row, form, row.texts(fields[:1]))
        if form is None:
            wanted = ", or ".join(" and ".join(fields) for fields in self._forms.values())
            named = "/".join(self._name(option) for option in _FIELDS[self.task])
            remedy, bare = f"name its fields in {named}", self._name("unlabelled")
            if bare and self.task == "seq2seq" and row.has(self._forms["pair"][:1]):
                remedy = f"or set {bare}: true for sources that a teacher translates"
            elif bare and "prompt" in self._forms and row.has(self._forms["prompt"][:1]):
                remedy = f"or set {bare}: true for prompts that a teacher goes on with"
            elif self.task == "causal" and row.has(("source", "target")):
                remedy += ", or set task: seq2seq"
            raise ValueError(
                f"{row.where}: expected an object with {wanted}, got {', '.join(row.values) or 'nothing'}; {remedy}"
            )
        fields = self._forms[form]
        if form == "chat":
            written = self._chat.write(row.values[fields[0]], row.where)
            return Draft(row, form, (written.text,), written)
        texts = row.texts(fields)
        return Draft(row, "long" if form == "text" and len(texts[0]) > 2 * _CHARACTERS else form, texts)

    def _finish(self, draft: Draft, encodings: list[Encoding]) -> Iterator[Example]:
        begin, _, end, known = self.specials
        first = encodings[0]
        if draft.form == "text":
            yield from self._text(first.ids)
        elif draft.form == "pair":
            yield from self._pair(draft.texts, encodings[1].ids if len(encodings) > 1 else None)
        elif draft.written is not None:
            yield from self._taught(first.ids, learned(first.ids, first.offsets, draft.written, known))
        else:
            before, asked, _ = surrounded(begin, first.ids)
            _, said, after = surrounded((), encodings[1].ids, end) if len(encodings) > 1 else ((), (), ())
            prompt, completion = [*before, *asked], [*said, *after]
            yield from self._taught(prompt + completion, [False] * len(prompt) + [True] * len(completion))

    def _text(self, ids: Any) -> Iterator[Example]:
        """A text by itself, in as many sequences as it takes."""
        if len(ids):
            parts = surrounded(self.specials.begin, ids, self.specials.separator)
            whole = torch.from_numpy(np.concatenate(parts).astype(np.int64))
            yield from (Example(part) for part in whole.split(self.data.sequence_length) if len(part) > 1)

    def _taught(self, ids: list[int], said: list[bool]) -> Iterator[Example]:
        self.taught += 1
        length = self.data.sequence_length
        self.cut += len(ids) > length
        kept, counts = torch.tensor(ids[:length], dtype=torch.int64), torch.tensor(said[:length], dtype=torch.bool)
        # Row t says what follows token t, so it counts when token t + 1 is to be learned; nothing follows the last.
        rows = torch.cat([counts[1:], torch.zeros(1, dtype=torch.bool)])
        if len(kept) > 1 and self.data.prompt_loss:
            yield Example(kept)
        elif len(kept) > 1 and (bool(rows.any()) or (self.data.unlabelled and not any(said))):
            yield Example(kept, loss_mask=rows)
        else:
            self.dropped += 1

    def _pair(self, texts: Sequence[str], answer: list[int] | None) -> Iterator[Example]:
        """A source and a target, each cut to the length; the decoder starts from the model's own start. Without a target the
        decoder has its start, and nothing counts."""
        length = self.data.sequence_length
        start, end = self._decoder
        source, target = self._asked(texts[0]), [IGNORE]
        if answer is not None:
            target = [
                i for ids in surrounded(self._target_begin, answer[1:] if answer[:1] == [start] else answer, end) for i in ids
            ]
        self.taught += 1
        self.cut += max(len(source), len(target)) > length
        after = self._around[1] if self.data.special_tokens == "auto" else ()
        if len(after) < length < len(source) and source[len(source) - len(after) :] == [*after]:
            source = [*source[: length - len(after)], *after]  # an encoder's ids end as they do uncut
        context, labels = (torch.tensor(ids[:length], dtype=torch.int64) for ids in (source, target))
        if len(context) and len(labels):
            whole = np.frombuffer("".join(texts[1:]).encode(errors="replace"), np.uint8)
            inputs = torch.cat([torch.tensor([start]), labels[:-1]])
            yield Example(inputs, labels, context, reference=torch.from_numpy(whole.copy()))
        else:
            self.dropped += 1

    def _asked(self, text: str) -> list[int]:
        """An encoder's ids, as the tokenizer makes them; what its post-processor adds is not added where the text has it."""
        if self.data.special_tokens != "auto":
            return list(self.tokenizer.encode(text, add_special_tokens=False).ids)
        ids, (begin, end) = self.tokenizer.encode(text, add_special_tokens=True).ids, self._around
        if begin and ids[: 2 * len(begin)] == [*begin, *begin]:
            ids = ids[len(begin) :]
        return ids[: len(ids) - len(end)] if end and ids[len(ids) - 2 * len(end) :] == [*end, *end] else ids

    @functools.cached_property
    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return around(self.tokenizer)

    @functools.cached_property
    def _said(self) -> dict[str, Any]:
        """The model's configuration, what is said otherwise where it has nothing."""
        files = [read_json(self._folder, name) for name in ("config.json", "generation_config.json")]
        return {k: v for of in (self._otherwise, *reversed(files)) for k, v in of.items() if v is not None}

    @functools.cached_property
    def _decoder(self) -> tuple[int, tuple[int, ...]]:
        """The id a decoder starts from, and those that end it, as the model's configuration has them."""
        start, end = self._said.get("decoder_start_token_id"), self._said.get("eos_token_id")
        if not isinstance(start, int):
            where = "" if self._folder is None else f" in {self._folder}"
            raise ValueError(
                "decoder_start_token_id: expected the id that a decoder starts from in config.json or generation_config.json"
                f" beside the tokenizer{where}, or in student.config, found none"
            )
        if self.data.end is not None or self.data.separator is not None:
            return start, self.specials.end
        first = end[0] if isinstance(end, list) and end else end
        return start, (first,) if isinstance(first, int) and self.data.special_tokens == "auto" else ()

    @functools.cached_property
    def _target_begin(self) -> tuple[int, ...]:
        """What targets begin with behind the decoder's start: the id that the model is made to begin with (a language's), else
        what the tokenizer begins a text with, as its `text_target` has it."""
        if self.data.special_tokens != "auto":
            return ()
        forced = self._said.get("forced_bos_token_id")
        begin = (forced,) if isinstance(forced, int) else self._around[0]
        return () if begin == (self._decoder[0],) else begin

    def _masked(self, ids: Tensor, number: int) -> Example:
        """The document with a share of its ids masked, the same for the same seed and place; the labels are what was there."""
        drawn = hashlib.blake2b(f"{self._seed}:{number}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(drawn, "big"))
        free = ~torch.isin(ids, torch.tensor(sorted(self.specials.known), dtype=torch.int64))
        chosen = (torch.rand(len(ids), generator=generator) < self.data.mask_share) & free
        places = free.nonzero().flatten()
        if len(places):
            chosen[places[int(torch.randint(len(places), (), generator=generator))]] = True
        return Example(ids.masked_fill(chosen, self._mask_id), ids.masked_fill(~chosen, IGNORE))


def _in_pieces(text: str) -> tuple[str, Callable[[], str]]:
    """The beginning of a text, and what gives the next piece of it."""
    pieces = (text[at : at + _CHARACTERS] for at in range(_CHARACTERS, len(text), _CHARACTERS))
    return text[:_CHARACTERS], lambda: next(pieces, "")
