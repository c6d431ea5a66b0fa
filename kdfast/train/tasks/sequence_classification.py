"""A class for each text or pair of texts."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kdfast.models.view import View
from kdfast.strict import ranged, refuse_unused
from kdfast.tensors import digest_of_tensors
from kdfast.text.files import share_of
from kdfast.text.rows import TABLES, Row, delimited_rows, open_source
from kdfast.text.spec import TextData
from kdfast.text.specials import padding_id
from kdfast.train.batch import IGNORE, Batch, likeliest
from kdfast.train.tasks.classes import ClassTask, check_share, label_name
from kdfast.train.tasks.task import Evaluation, Splits

#: Rows that are tokenised together.
_ROWS = 1024


@dataclass(frozen=True)
class Data:
    """Texts with labels: `.tsv`, `.csv`, `.jsonl` and `.parquet` files, or a dataset.

    Args:
        train: files or folders. validation: the same; empty: a seeded share of the training rows is held out.
        validation_share: that share.
        glob: which files of a folder.
        columns: names of the columns of `.tsv` and `.csv` files that have no header line.
        text: column with the text. text_pair: with the second text of a pair.
        label: with the class. A row without one (an empty field, or no such column in a file) gets a teacher's word only.
        dataset: instead of `train` a folder written by `save_to_disk`, or a name for `load_dataset`.
        dataset_config, split: of the dataset (default split: train). validation_split: the split to evaluate on.
        max_length: most tokens of a row, special ones included; the longer text of a pair is cut first.
        group_by_length: batches of rows of like length, which have less padding.
        domain: column with the domain of a training row, for methods that ask for it; where rows are scored it may be missing.
        domain_shares: share of a domain's training rows that is used, such as {books: 0.05} (few-shot; 0 leaves the domain
            out); a smaller share is a part of a larger one. Domains that are not named are used whole.
    """

    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    validation_share: float = ranged(0.05, low=0.0, high=0.5)
    glob: str = "**/*"
    columns: tuple[str, ...] = ()
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    dataset: str | None = None
    dataset_config: str | None = None
    split: str | None = None
    validation_split: str | None = None
    max_length: int = ranged(128, low=4)
    group_by_length: bool = False
    domain: str | None = None
    domain_shares: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.domain_shares and self.domain is None:
            raise ValueError("domain_shares: expected data.domain, the column with a row's domain, got none")
        for name, share in self.domain_shares.items():
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
                raise ValueError(f"domain_shares.{name}: expected a share from 0 to 1, got {share!r}")
        check_share(self)
        if not self.dataset:
            names = ("dataset_config", "split", "validation_split")
            refuse_unused(self, names, "without dataset expected none")
        if self.validation:
            refuse_unused(self, ("validation_split",), "beside validation expected none")
        if not self.train and not self.validation:
            refuse_unused(self, ("glob", "columns"), "without files in train or validation expected none")

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.text,) if self.text_pair is None else (self.text, self.text_pair)


class SequenceClassification(ClassTask[Data]):
    """With `data.domain` a batch has `extra["domain"]`, numbers in `domains`, `IGNORE` for one that training does not show."""

    Data = Data
    kind = "sequence_classification"

    def __init__(self, options: Any, data: Any) -> None:
        super().__init__(options, data)
        #: Names of the domains in the training data, once they are open.
        self.domains: list[str] = []

    def open(self, tokenizer: Any, tokenizer_file: Path | None, folder: Path, needs_train: bool) -> Splits:
        data = self.data
        home = None if tokenizer_file is None else tokenizer_file.parent
        self.pad_id = padding_id(tokenizer, home)
        train = validation = None
        if needs_train:
            if not data.train and not data.dataset:
                raise ValueError("data.train: expected files or folders, got none; add data.train to the recipe")
            train = self._read(data.train, data.dataset, data.split, tokenizer, "data.train")
        if data.validation:
            validation = self._read(data.validation, None, None, tokenizer, "data.validation")
        elif data.validation_split:
            validation = self._read((), data.dataset, data.validation_split, tokenizer, "data.validation_split")
        return self.splits(train, validation)

    def _read(self, paths: Sequence[str], dataset: str | None, which: str | None, tokenizer: Tokenizer, key: str) -> Texts:
        data, cutting = self.data, Tokenizer.from_str(tokenizer.to_str())
        cutting.enable_truncation(data.max_length, strategy="longest_first")
        config = data.dataset_config if dataset else None
        spec = TextData(tuple(paths), data.glob, dataset=dataset, dataset_config=config, split=which)
        training = key == "data.train"
        required = (*data.texts, data.domain) if training and data.domain is not None else data.texts
        optional = [column for column in (data.domain, data.label) if column is not None and column not in required]
        rows = table_rows(spec, required, optional, data.columns, key)
        if data.domain_shares and training:
            rows = _shared(rows, data)
        empty, cut, columns = 0, 0, dict[str, None]()
        ids: list[Tensor] = []
        types: list[Tensor] = []
        labels: list[str | None] = []
        domains: list[str | None] = []
        for some in _windows(rows, _ROWS):
            texts = [row.texts(data.texts) for row in some]
            encodings = cutting.encode_batch([t if len(t) == 2 else t[0] for t in texts])
            for row, encoding in zip(some, encodings, strict=True):
                columns.update(dict.fromkeys(row.values))
                if not encoding.ids:  # without special tokens a text may have none
                    empty += 1
                    continue
                cut += bool(encoding.overflowing)  # what the cut left over
                ids.append(torch.tensor(encoding.ids, dtype=torch.int32))
                types.append(torch.tensor(encoding.type_ids, dtype=torch.uint8))
                labels.append(_label(row, data.label))
                if data.domain is not None:
                    domains.append(_domain(row, data.domain, needed=training))
        if not ids:
            raise ValueError(f"{key}: expected at least one row with a token, got none")
        if empty:
            self.notes.append(f"{key}: {empty} rows have no token and are left out")
        if cut:
            self.notes.append(f"{key}: {cut} of {len(ids)} rows are longer than data.max_length {data.max_length} and are cut")
        # A model may be trained without labels, by its teacher; nothing is scored without.
        if data.label not in columns and (data.label != "label" if training else self.scored):
            raise ValueError(
                f"{key}: expected a column {data.label!r} with the class, got {', '.join(columns)}; name it in data.label"
                f"{'' if training else ', or write down what is said with --predictions'}"
            )
        if not self.domains:
            self.domains = sorted(name for name in set(domains) if name is not None)
        numbers = {name: i for i, name in enumerate(self.domains)}
        known = None if data.domain is None else torch.tensor([numbers.get(name or "", IGNORE) for name in domains])
        return Texts(ids, types, self.ids_of(labels, key), self.pad_id or 0, known)

    def score(self, view: View, batch: Batch) -> dict[str, Tensor]:
        found = super().score(view, batch)
        domain = batch.extra.get("domain")
        if domain is None or batch.labels is None or len(self.domains) < 2:
            return found
        counted = (batch.labels != IGNORE) & (domain != IGNORE)
        right = (likeliest(view.logits) == batch.labels) & counted
        n = len(self.domains)
        of = [torch.bincount(domain[some], minlength=n).double() for some in (right, counted)]
        return {**found, "domains": torch.stack(of)}

    def summary(self, scores: Sequence[Mapping[str, Tensor]]) -> Evaluation:
        """The classes' scores, and `accuracy_NAME` of each domain where there are several."""
        whole = super().summary(scores)
        if not scores or "domains" not in scores[0]:
            return whole
        right, rows = torch.stack([s["domains"] for s in scores]).sum(0).tolist()
        each = {f"accuracy_{name}": right[i] / rows[i] for i, name in enumerate(self.domains) if rows[i]}
        return Evaluation(**whole, **(each if len(each) > 1 else {}))

    def headline(self, evaluation: Evaluation) -> str:
        whole, names = super().headline(evaluation), [name for name in self.domains if f"accuracy_{name}" in evaluation]
        each = ", ".join(f"{name} {evaluation[f'accuracy_{name}']:.1%}" for name in names)
        accuracy, comma, rest = whole.partition(",")
        return f"{accuracy} ({each}){comma}{rest}" if each else whole


class Texts:
    """Tokens of rows with a class each, and perhaps a domain; a row without a class is marked for the teacher only."""

    def __init__(
        self, ids: list[Tensor], types: list[Tensor], labels: Tensor, pad_id: int, domains: Tensor | None = None
    ) -> None:  # fmt: skip
        self.ends = torch.tensor([0, *itertools.accumulate(map(len, ids))])
        self.ids, self.types, self.labels, self.pad_id = torch.cat(ids), torch.cat(types), labels, pad_id
        self.labelled, self.domains = labels != IGNORE, domains
        self.unlabelled = not bool(self.labelled.all())

    def __len__(self) -> int:
        return len(self.labels)

    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return self.ends.diff().numpy()

    def sizes(self) -> list[np.ndarray]:
        """The same, of the one input of a model."""
        return [self.lengths()]

    def batch(self, indices: Sequence[int]) -> Batch:
        spans = [slice(int(self.ends[i]), int(self.ends[i + 1])) for i in indices]
        inputs = {"input_ids": pad_sequence([self.ids[s].long() for s in spans], True, self.pad_id)}
        types = pad_sequence([self.types[s].long() for s in spans], True)
        if bool(types.any()):
            inputs["token_type_ids"] = types
        lengths = torch.tensor([s.stop - s.start for s in spans])
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        rows = torch.as_tensor(indices)
        labels = self.labels[rows]
        heard = torch.ones_like(labels, dtype=torch.bool) if self.unlabelled else None
        extra = {} if self.domains is None else {"domain": self.domains[rows]}
        return Batch(inputs, labels, None if bool(mask.all()) else mask, extra=extra, soft_mask=heard)

    @property
    def digest(self) -> str:
        """Hash of the tokens, labels and domains."""
        domains = () if self.domains is None else (self.domains,)
        return digest_of_tensors(self.ends, self.ids, self.types, self.labels, *domains)


def table_rows(
    spec: TextData, required: Sequence[str], optional: Sequence[str], columns: Sequence[str], key: str
) -> Iterator[Row]:  # fmt: skip
    """The rows of delimited files, which have the columns `required`, and all that `open_source` reads."""
    source = open_source(
        spec, (*required, *optional), lambda option: key if option in ("paths", "dataset") else f"data.{option}"
    )
    for file in source.texts:
        if file.suffix not in TABLES:
            raise ValueError(
                f"{key}: expected .tsv, .csv, .jsonl or .parquet files, got {str(file)!r}; of a folder set data.glob,"
                " of texts make a .tsv whose first line is text"
            )
        for i, row in enumerate(delimited_rows(file, key, columns)):
            if columns and i == 0 and any(name == value for name, value in row.values.items()):
                raise ValueError(
                    f"{key}: {file}: its first line is a header ({', '.join(row.values.values())}); leave data.columns out"
                )
            # A header that is none would be missed silently: the first text would name a column.
            if not all(column in row.values for column in required):
                raise ValueError(
                    f"{key}: {file}: expected columns {', '.join(required)}, got {', '.join(row.values)}; name them in"
                    " data.text, data.text_pair or data.domain, or in data.columns where the file has no header line"
                )
            yield row
    yield from source.rows()


def _shared(rows: Iterator[Row], data: Data) -> Iterator[Row]:
    """The rows that `data.domain_shares` leaves, drawn by their number within the domain."""
    seen: Counter[str] = Counter()
    shares = {str(name): share for name, share in data.domain_shares.items()}
    for row in rows:
        name = str(_domain(row, data.domain or ""))
        if share_of(f"{name}:{seen[name]}", 0) < shares.get(name, 1):
            yield row
        seen[name] += 1
    missing = [name for name in shares if name not in seen]
    if missing:
        raise ValueError(f"data.domain_shares: expected domains of data.train ({', '.join(sorted(seen))}), got {missing[0]!r}")


def _domain(row: Row, column: str, needed: bool = True) -> str | None:
    try:
        name = label_name(row.values.get(column))
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from None
    if name is None and needed:
        raise ValueError(f"{row.where}: expected a domain in {column}, got none")
    return name


def _label(row: Row, column: str) -> str | None:
    try:
        return label_name(row.values.get(column))
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from None


def _windows(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    while some := list(itertools.islice(rows, size)):
        yield some
