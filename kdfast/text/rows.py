"""Rows of named values: lines of JSON, Parquet or delimited files, or the rows of a `datasets` dataset, one at a time."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from kdfast.text.files import list_files
from kdfast.text.spec import Naming, TextData, python_name

#: Files that hold rows; any other is running text, but for tables, which have rows for tasks with classes alone.
ROWS = (".jsonl", ".parquet")
TABLES = (".tsv", ".csv")


class Row(NamedTuple):
    """An object with its fields; `where` opens the line of an error about it."""

    where: str
    values: Mapping[str, Any]

    def has(self, fields: Sequence[str]) -> bool:
        """A dataset gives every row every column, None where there is nothing."""
        return all(self.values.get(field) is not None for field in fields)

    def texts(self, fields: Sequence[str]) -> tuple[str, ...]:
        """The text of the named fields.

        Raises:
            ValueError: one is missing or no text.
        """
        if not self.has(fields):
            raise ValueError(f"{self.where}: expected an object with {', '.join(fields)}, got {_shown(self.values)}")
        found = tuple(self.values[field] for field in fields)
        if not all(isinstance(text, str) for text in found):
            raise ValueError(f"{self.where}: expected text in {', '.join(fields)}")
        return found


@dataclass
class Source:
    """What a `TextData` names, opened: files of running text, and rows, walked anew by every call of `rows`.

    option: the argument that an error names. size: of what is read, in units of `done`; None where nobody knows. files: names
    and sizes. done: how much was read so far.
    """

    option: str
    texts: list[Path]
    open_rows: Callable[[Source], Iterator[Row]] = field(default=lambda source: iter(()))
    size: int | None = None
    files: list[tuple[str, int]] = field(default_factory=list)
    done: int = 0

    def rows(self) -> Iterator[Row]:
        return self.open_rows(self)


def open_source(data: TextData, fields: Sequence[str], name: Naming = python_name) -> Source:
    """The source that `data` names; only the columns `fields` of a dataset or a Parquet file are read.

    Raises:
        ValueError: what it names is not there.
        ImportError: a package that reads it is missing.
    """
    data.check(name)
    option = name("paths")
    named = list_files(data.paths, data.glob, data.exclude, option, name("glob")) if data.paths else []
    files, sizes = [file for _, file in named], [(known, file.stat().st_size) for known, file in named]
    if data.dataset:
        return dataclasses.replace(_dataset(data, files, fields, name), files=sizes)
    texts, rows = [f for f in files if f.suffix not in ROWS], [f for f in files if f.suffix in ROWS]

    def open_rows(source: Source) -> Iterator[Row]:
        for file in rows:
            before = source.done
            reader = parquet_rows if file.suffix == ".parquet" else json_rows
            yield from reader(file, option, fields, source)
            source.done = before + file.stat().st_size

    return Source(option, texts, open_rows, sum(size for _, size in sizes), sizes)


def json_rows(file: Path, option: str, fields: Sequence[str] = (), source: Source | None = None) -> Iterator[Row]:
    """Every line of JSON; blank lines are passed over.

    Raises:
        ValueError: a line is no object; names file and line.
    """
    with open(file, encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if source is not None:
                source.done += len(line)
            if not line.strip():
                continue
            where = f"{option}: {file}, line {number}"
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: expected an object of JSON: {error}") from None
            if not isinstance(values, dict):
                raise ValueError(f"{where}: expected an object of JSON, got {type(values).__name__}")
            yield Row(where, values)


def delimited_rows(file: Path, option: str, columns: Sequence[str] = ()) -> Iterator[Row]:
    """Every line of a `.tsv` file, whose quotes mean nothing, or record of a `.csv` file, quoted as spreadsheets do; all values
    are text.

    Args:
        columns: names of the columns of a file without a header; empty: its first line names them.

    Raises:
        ValueError: a line has another number of columns than the first; names file and line.
    """
    quoting = {"quoting": csv.QUOTE_NONE, "delimiter": "\t"} if file.suffix == ".tsv" else {"strict": True}
    with open(file, encoding="utf-8-sig", errors="replace", newline="") as lines:
        reader = csv.reader(lines, **quoting)
        names = list(columns)
        try:
            for values in reader:
                if not values:
                    continue
                if not names:
                    names = values
                    if len(set(names)) < len(names):
                        raise ValueError(f"{option}: {file}: expected a header of different names, got {', '.join(names)}")
                    continue
                where = f"{option}: {file}, line {reader.line_num}"
                if len(values) != len(names):
                    raise ValueError(f"{where}: expected {len(names)} columns ({', '.join(names)}), got {len(values)}")
                yield Row(where, dict(zip(names, values, strict=True)))
        except csv.Error as error:
            raise ValueError(f"{option}: {file}, line {reader.line_num}: {error}") from None


def parquet_rows(file: Path, option: str, fields: Sequence[str], source: Source | None = None) -> Iterator[Row]:
    """Every row of a Parquet file, of the columns `fields` only.

    Raises:
        ValueError: the file is none, or has none of the columns.
        ImportError: `pyarrow` is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ImportError(f"{option}: {file} needs the package 'pyarrow': pip install 'kdfast[data]'") from None
    try:
        opened = parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{option}: expected a Parquet file, got {str(file)!r}: {' '.join(str(error).split())}") from None
    with opened:
        names = opened.schema_arrow.names
        columns = [column for column in names if column in fields]
        if not columns:
            raise ValueError(f"{option}: expected a column {' or '.join(fields)} in {str(file)!r}, got {', '.join(names)}")
        number, size = 0, file.stat().st_size
        for batch in opened.iter_batches(batch_size=64, columns=columns):
            for values in batch.to_pylist():
                yield Row(f"{option}: {file}, row {number}", values)
                number += 1
            if source is not None:
                source.done += size * batch.num_rows // max(opened.metadata.num_rows, 1)


def _dataset(data: TextData, files: Sequence[Path], fields: Sequence[str], name: Naming) -> Source:
    """A dataset in its order: of a folder that `save_to_disk` wrote, else of what `load_dataset` finds."""
    option, asked = name("dataset"), str(data.dataset)
    try:
        import datasets
    except ImportError:
        raise ImportError(f"{option}: expected the package 'datasets', which is missing: pip install 'kdfast[data]'") from None
    datasets.disable_progress_bars()
    try:
        if any((Path(asked) / file).is_file() for file in ("state.json", "dataset_dict.json")):
            found = _saved(data, name)
        else:
            found = datasets.load_dataset(
                asked, data.dataset_config, split=data.split or "train", streaming=data.streaming,
                data_files=[str(file) for file in files] or None,
            )  # fmt: skip
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{option}: expected a folder written by save_to_disk, or a name that load_dataset finds, got {asked!r}: {reason}"
        ) from None
    names = found.column_names  # a stream may not know them before its first row
    if names is not None:
        # A column that nobody asked for may hold pictures or sound, which would be decoded.
        columns = [column for column in names if column in fields]
        if not columns:
            raise ValueError(
                f"{option}: expected a column {' or '.join(fields)} in {asked!r}, got {', '.join(names)}; name one with"
                f" {name('field')}, {name('messages_field')}, or {name('prompt_field')} and {name('completion_field')}"
            )
        found = found.select_columns(columns)

    def rows(source: Source) -> Iterator[Row]:
        for number, values in enumerate(found):
            source.done += 1
            yield Row(f"{option}: {asked}, row {number}", values)

    return Source(option, [], rows, None if data.streaming else len(found))


def _saved(data: TextData, name: Naming) -> Any:
    import datasets

    if data.dataset_config is not None:
        raise ValueError(f"a saved folder has no configuration {data.dataset_config!r}; leave {name('dataset_config')} out")
    found, split = datasets.load_from_disk(str(data.dataset)), data.split
    if isinstance(found, datasets.DatasetDict):
        if (split or "train") not in found:
            raise ValueError(f"it has the splits {', '.join(found)}, not {split or 'train'!r}; choose one with {name('split')}")
        found = found[split or "train"]
    elif split is not None and split != str(found.split):
        raise ValueError(f"it is one dataset with the split {str(found.split)!r}, not {split!r}; leave {name('split')} out")
    return found.to_iterable_dataset() if data.streaming else found


def _shown(values: Mapping[str, Any]) -> str:
    return ", ".join(map(str, values)) or "none"
