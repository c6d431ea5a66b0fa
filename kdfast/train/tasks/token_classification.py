"""A class for each word: entities in BIO tags, parts of speech."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kdfast.models.view import View
from kdfast.strict import ranged, refuse_unused
from kdfast.tensors import digest_of_tensors
from kdfast.text.files import list_files
from kdfast.text.rows import ROWS, Row, json_rows, parquet_rows
from kdfast.text.specials import padding_id
from kdfast.train.batch import IGNORE, Batch, likeliest, token_positions
from kdfast.train.tasks.classes import (
    ClassTask,
    check_share,
    class_scores,
    class_summary,
    label_name,
)
from kdfast.train.tasks.task import Evaluation, Splits

#: Lines of a file that show whether it has tabs between columns.
_LOOKED_AT = 200


class Sentence(NamedTuple):
    """Words with their tags; None: a word without one."""

    words: list[str]
    tags: list[str | None]


@dataclass(frozen=True)
class Data:
    """Words with tags: files in CoNLL columns (a word a line, a blank line after a sentence), `.jsonl` or `.parquet` files.

    Args:
        train: files or folders. validation: the same; empty: a seeded share of the training rows is held out.
        validation_share: that share.
        glob: which files of a folder.
        word_column, tag_column: of CoNLL files, from 0; negative numbers count from the end. A line of one column has no tag.
        words, tags: fields of `.jsonl` and `.parquet` rows, each a list.
        max_length: most tokens of a row, special ones included; a longer sentence goes on in the next row.
        group_by_length: batches of rows of like length, which have less padding.
    """

    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    validation_share: float = ranged(0.05, low=0.0, high=0.5)
    glob: str = "**/*"
    word_column: int = 0
    tag_column: int = -1
    words: str = "tokens"
    tags: str = "tags"
    max_length: int = ranged(128, low=4)
    group_by_length: bool = False

    def __post_init__(self) -> None:
        check_share(self)


class TokenClassification(ClassTask[Data]):
    """The label of a word stands at its first token. A word without a tag gets a teacher's word only."""

    Data = Data
    kind = "token_classification"

    def open(self, tokenizer: Any, tokenizer_file: Path | None, folder: Path, needs_train: bool) -> Splits:
        data = self.data
        self.pad_id = padding_id(tokenizer, None if tokenizer_file is None else tokenizer_file.parent)
        train = validation = None
        self._check_columns(data.train if needs_train else (), data.validation)
        if needs_train:
            if not data.train:
                raise ValueError("data.train: expected files or folders, got none; add data.train to the recipe")
            train = self._read(data.train, tokenizer, "data.train")
        if data.validation:
            validation = self._read(data.validation, tokenizer, "data.validation")
        return self.splits(train, validation)

    def _check_columns(self, train: Sequence[str], validation: Sequence[str]) -> None:
        listed = [list_files(paths, self.data.glob, (), key) for paths, key in
                  ((train, "data.train"), (validation, "data.validation")) if paths]  # fmt: skip
        rows = {file.suffix in ROWS for files in listed for _, file in files}
        # What a run's recipe says of its own files is not said of others.
        names, places = (
            tuple(name for name in pair if name not in self.inherited)
            for pair in (("words", "tags"), ("word_column", "tag_column"))
        )
        if True not in rows and listed:
            refuse_unused(self.data, names, "without .jsonl or .parquet files expected none", "data")
        if False not in rows and listed:
            refuse_unused(self.data, places, "without files in CoNLL columns expected none", "data")

    def _read(self, paths: Sequence[str], tokenizer: Tokenizer, key: str) -> Words:
        data = self.data
        files = [file for _, file in list_files(paths, data.glob, (), key)]
        cutting = Tokenizer.from_str(tokenizer.to_str())
        cutting.enable_truncation(data.max_length)
        unknown = unknown_token(tokenizer)
        ids: list[Tensor] = []
        firsts: list[Tensor] = []
        tags: list[str | None] = []
        lost = cut = 0
        self.written: list[dict[str, Any]] = []
        number = itertools.count()
        for file in files:
            for sentence in sentences(file, data, key):
                place = next(number)
                for part in parts(seen(sentence, tokenizer, unknown), tokenizer, data.max_length):
                    encoding = cutting.encode(" ".join(part.words))
                    cut += bool(encoding.overflowing)
                    first = first_tokens(part.words, encoding)
                    ids.append(torch.tensor(encoding.ids, dtype=torch.int32))
                    firsts.append(torch.tensor([word is not None for word in first], dtype=torch.bool))
                    tags += [part.tags[word] for word in first if word is not None]
                    if not self.scored:  # what the model says of them is written down
                        words = [part.words[word] for word in first if word is not None]
                        self.written.append({"sentence": place, "words": words})
                    lost += len(part.words) - sum(word is not None for word in first)
        if not tags:
            raise ValueError(f"{key}: expected at least one word, got none")
        if lost:
            self.notes.append(f"{key}: {lost} words begin no token of their own, their tags are left out")
        if cut:
            self.notes.append(f"{key}: {cut} words have more than data.max_length {data.max_length} tokens and are cut")
        return Words(ids, firsts, self.ids_of(tags, key), self.pad_id or 0)

    def positions(self, batch: Batch) -> Tensor | None:
        return token_positions(batch)

    def shown(self, row: int) -> dict[str, Any]:
        """The number of its sentence, of which a long one has several rows, and the words that begin a token."""
        return self.written[row]

    def said(self, view: View, batch: Batch) -> list[dict[str, Any]]:
        """Of each row its tags (None: it has none) and the likeliest ones, of words that begin a token."""
        assert batch.labels is not None
        words = batch.labels != IGNORE if batch.soft_mask is None else batch.soft_mask
        return [
            {"tags": [None if tag == IGNORE else self.names[tag] for tag in gold[own].tolist()],
             "said": [None if tag < 0 else self.names[tag] for tag in found[own].tolist()]}
            for gold, found, own in zip(batch.labels, likeliest(view.logits), words, strict=True)
        ]  # fmt: skip

    def score(self, view: View, batch: Batch) -> dict[str, Tensor]:
        assert batch.labels is not None
        logits = view.logits
        scores = class_scores(logits.flatten(0, 1), batch.labels.flatten())
        if not has_entities(self.names):
            return scores
        found = torch.zeros(3, dtype=torch.float64)
        names = [*self.names, "O"]  # the last one is of -1
        for label_row, said_row in zip(batch.labels.cpu(), likeliest(logits).cpu(), strict=True):
            counted = label_row != IGNORE
            gold, said = (set(entities([names[i] for i in row[counted].tolist()])) for row in (label_row, said_row))
            found += torch.tensor([len(gold & said), len(said), len(gold)])
        return {**scores, "entities": found.to(logits.device)}

    def summary(self, scores: Sequence[Mapping[str, Tensor]]) -> Evaluation:
        """entity_f1, entity_precision, entity_recall where the tags are BIO, token accuracy, macro_f1 of tokens, nll, rows."""
        whole = class_summary(scores)
        if not scores or "entities" not in scores[0]:
            return whole
        right, said, gold = torch.stack([s["entities"] for s in scores]).sum(0).tolist()
        entity = {
            "entity_f1": 2 * right / (said + gold) if said + gold else 0.0,
            "entity_precision": right / said if said else 0.0,
            "entity_recall": right / gold if gold else 0.0,
        }
        return Evaluation(**entity, **whole)

    def chosen_by(self, evaluation: Evaluation) -> tuple[str, int]:
        return ("entity_f1" if "entity_f1" in evaluation else "accuracy"), 1

    def headline(self, evaluation: Evaluation) -> str:
        entity = f"entity F1 {evaluation['entity_f1']:.1%}, " if "entity_f1" in evaluation else ""
        return f"{entity}token accuracy {evaluation['accuracy']:.1%}"


class Words:
    """Tokens of sentences; a word's label stands at its first token, `IGNORE` at the others."""

    def __init__(self, ids: list[Tensor], firsts: list[Tensor], labels: Tensor, pad_id: int) -> None:
        self.ends = torch.tensor([0, *itertools.accumulate(map(len, ids))])
        self.ids, self.firsts, self.pad_id = torch.cat(ids), torch.cat(firsts), pad_id
        self.labels = torch.full((len(self.ids),), IGNORE)
        self.labels[self.firsts] = labels
        self.unlabelled = bool((labels == IGNORE).any())
        tagged = torch.cat([torch.zeros(1, dtype=torch.int64), (self.labels != IGNORE).cumsum(0)])
        self.labelled = tagged[self.ends].diff() > 0

    def __len__(self) -> int:
        return len(self.ends) - 1

    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return self.ends.diff().numpy()

    def sizes(self) -> list[np.ndarray]:
        """The same, of the one input of a model."""
        return [self.lengths()]

    def batch(self, indices: Sequence[int]) -> Batch:
        spans = [slice(int(self.ends[i]), int(self.ends[i + 1])) for i in indices]
        ids = pad_sequence([self.ids[s].long() for s in spans], True, self.pad_id)
        labels = pad_sequence([self.labels[s] for s in spans], True, IGNORE)
        lengths = torch.tensor([s.stop - s.start for s in spans])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        heard = pad_sequence([self.firsts[s] for s in spans], True) if self.unlabelled else None
        return Batch(ids, labels, None if bool(mask.all()) else mask, soft_mask=heard)

    @property
    def digest(self) -> str:
        """Hash of the tokens and labels."""
        return digest_of_tensors(self.ends, self.ids, self.labels, self.firsts)


#: Of CoNLL-U: the numbers of several words that are written as one, and of one that is not written at all.
_NO_WORD = re.compile(r"\d+(-\d+|\.\d+)")


def sentences(file: Path, data: Data, key: str) -> Iterator[Sentence]:
    """The sentences of a file, of whichever kind it is."""
    if file.suffix in ROWS:
        fields = (data.words, data.tags)
        yield from (_listed(row, fields) for row in (json_rows if file.suffix == ".jsonl" else parquet_rows)(file, key, fields))
        return
    words: list[str] = []
    tags: list[str | None] = []
    with open(file, encoding="utf-8-sig", errors="replace") as lines:
        tabbed = any("\t" in line for line in itertools.islice(lines, _LOOKED_AT))
        lines.seek(0)
        for number, line in enumerate(lines, 1):
            line = line.rstrip("\r\n")
            if tabbed and line.startswith("# ") and "\t" not in line:
                continue  # CoNLL-U: a comment
            columns = line.split("\t") if "\t" in line else line.split()
            if tabbed and data.word_column and _NO_WORD.fullmatch(columns[0]):
                continue
            if not line.strip() or columns[0] == "-DOCSTART-":
                if words:
                    yield Sentence(words, tags)
                words, tags = [], []
                continue
            try:
                words.append(columns[data.word_column])
                tags.append(None if len(columns) == 1 else label_name(columns[data.tag_column].strip()))
            except IndexError:
                wanted = f"{data.word_column} and {data.tag_column}"
                raise ValueError(
                    f"{key}: {file}, line {number}: expected columns {wanted}, got {len(columns)} columns"
                ) from None
    if words:
        yield Sentence(words, tags)


def _listed(row: Row, fields: tuple[str, str]) -> Sentence:
    words, tags = (row.values.get(field) for field in fields)
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{row.where}: expected a list of words in {fields[0]}")
    if tags is not None and (not isinstance(tags, list) or len(tags) != len(words)):
        raise ValueError(f"{row.where}: expected a list of {len(words)} tags in {fields[1]}, as many as words")
    try:
        return Sentence(words, [None] * len(words) if tags is None else [label_name(tag) for tag in tags])
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from None


def unknown_token(tokenizer: Tokenizer) -> str | None:
    """What the tokenizer has for text that it does not know, where that can be written."""
    token = getattr(tokenizer.model, "unk_token", None)
    able = token is not None and tokenizer.encode(token, add_special_tokens=False).tokens == [token]
    return token if able else None


def seen(sentence: Sentence, tokenizer: Tokenizer, unknown: str | None) -> Sentence:
    """The sentence with `unknown` in the place of words that are nothing to the tokenizer (invisible characters): the tag of a
    word without a token would count nowhere.
    """
    if unknown is None:
        return sentence
    encodings = tokenizer.encode_batch(sentence.words, add_special_tokens=False)
    words = [word if found.ids else unknown for word, found in zip(sentence.words, encodings, strict=True)]
    return Sentence(words, sentence.tags)


def parts(sentence: Sentence, tokenizer: Tokenizer, length: int) -> Iterator[Sentence]:
    """The sentence in as many parts as it takes for each to have at most `length` tokens, special ones included: cut between
    entities where that can be, only a word longer than that is cut itself.
    """
    words, tags = sentence
    begin = 0
    while begin < len(words):
        end = begin + _fitting(words[begin:], tokenizer, length)
        between = end
        while between > begin and end < len(words) and (tags[between] or "").startswith("I-"):
            between -= 1
        end = between if between > begin else end
        yield Sentence(words[begin:end], tags[begin:end])
        begin = end


def _fitting(words: Sequence[str], tokenizer: Tokenizer, length: int) -> int:
    """How many words, at least one, have at most `length` tokens."""
    encoding = tokenizer.encode(" ".join(words))
    n = len(words)
    while n > 1 and len(encoding.ids) > length:
        over = sum(word is not None for word in first_tokens(words[:n], encoding)[:length])
        n = min(max(over, 1), n - 1)
        encoding = tokenizer.encode(" ".join(words[:n]))
    return n


def first_tokens(words: Sequence[str], encoding: Encoding) -> list[int | None]:
    """For each token of the words, joined by spaces, the word it begins, None where it begins none.

    So a model reads what it reads of the plain text: a tokenizer that marks the space before a word knows words that are given
    to it one by one as parts of a single one.
    """
    of = [i for i, word in enumerate(words) for _ in range(len(word) + 1)]  # with the space after it
    text = " ".join(words) + " "
    found: list[int | None] = []
    begun = -1
    for start, end in encoding.offsets:  # of tokens around the text there is none
        at = next((i for i in range(start, end) if not text[i].isspace()), start)
        own = None if end <= start else of[at]
        found.append(own if own is not None and own > begun else None)
        begun = max(begun, -1 if own is None else own)
    return found


def has_entities(names: Sequence[str]) -> bool:
    """Whether tags are BIO: `O`, and each other a `B-` or `I-` with a type."""
    return "O" in names and len(names) > 1 and all(name == "O" or name.startswith(("B-", "I-")) for name in names)


def entities(tags: Sequence[str]) -> list[tuple[int, int, str]]:
    """(first word, one past the last, type) of each entity.

    As in the CoNLL evaluation one begins at a `B-`, and at an `I-` after an `O` or after another type.
    """
    found: list[tuple[int, int, str]] = []
    begin, current = 0, ""
    for i, tag in enumerate([*tags, "O"]):
        kind = "" if tag == "O" else tag[2:]
        if current and (tag.startswith("B-") or kind != current):
            found.append((begin, i, current))
            current = ""
        if kind and not current:
            begin, current = i, kind
    return found
