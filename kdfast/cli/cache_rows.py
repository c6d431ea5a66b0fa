"""Rows of named values for a capture: lines of JSON, or the rows of a `datasets` dataset."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kdfast.train.data import list_files

#: Builders of `datasets` that read files given with --data.
BUILDERS = ("arrow", "csv", "json", "parquet", "text")


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


class Source(NamedTuple):
    """What is captured: files of running text, and rows. `option` is the argument that an error names."""

    option: str
    texts: list[Path]
    rows: Iterator[Row]


def open_source(args: argparse.Namespace, fields: Sequence[str]) -> Source:
    """The source that --data or --dataset names; only the columns `fields` of a dataset are read.

    Raises:
        ValueError: neither or both are given, or what they name is not there.
    """
    if not args.dataset:
        for option in ("dataset_config", "split"):
            if getattr(args, option) is not None:
                raise ValueError(f"--{option.replace('_', '-')}: expected it with --dataset, got it without")
        if not args.data:
            raise ValueError("--data: expected text files, .jsonl files or folders, or --dataset, got neither")
    elif bool(args.data) != (args.dataset in BUILDERS):
        wanted = "--data with its files" if args.dataset in BUILDERS else "it without --data"
        raise ValueError(
            f"--dataset: expected {wanted} (builders that read files: {', '.join(BUILDERS)}), got {args.dataset!r}"
        )
    files = [file for _, file in list_files(args.data, args.glob, key="--data")] if args.data else []
    if args.dataset:
        return Source("--dataset", [], dataset_rows(args.dataset, args.dataset_config, args.split, files, fields))
    lines = [file for file in files if file.suffix == ".jsonl"]
    return Source("--data", [file for file in files if file.suffix != ".jsonl"], json_rows(lines))


def json_rows(files: Sequence[Path]) -> Iterator[Row]:
    """Every line of JSON; blank lines are passed over.

    Raises:
        ValueError: a line is no object; names file and line.
    """
    for file in files:
        with open(file, encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"--data: {file}, line {number}"
                try:
                    values = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{where}: expected an object of JSON: {error}") from None
                if not isinstance(values, dict):
                    raise ValueError(f"{where}: expected an object of JSON, got {type(values).__name__}")
                yield Row(where, values)


def dataset_rows(
    name: str, config: str | None, split: str | None, files: Sequence[Path], fields: Sequence[str]
) -> Iterator[Row]:
    """The rows of a dataset in its order: of a folder that `save_to_disk` wrote, else of what `load_dataset` finds.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: no such dataset or split.
    """
    try:
        import datasets
    except ImportError:
        raise ImportError("--dataset: expected the package 'datasets', which is missing: pip install 'kdfast[data]'") from None
    datasets.disable_progress_bars()
    try:
        if any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json")):
            found = _saved(name, config, split)
        else:
            found = load(name, config, split or "train", files)
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"--dataset: expected a folder written by save_to_disk, or a name that load_dataset finds, got {name!r}: {reason}"
        ) from None
    # A column that nobody asked for may hold pictures or sound, which would be decoded.
    columns = [column for column in found.column_names if column in fields]
    if not columns:
        raise ValueError(
            f"--dataset: expected a column {' or '.join(fields)} in {name!r}, got {', '.join(found.column_names)};"
            " name one with --field, --messages-field, or --prompt-field and --completion-field"
        )
    found = found.select_columns(columns)
    return (Row(f"--dataset: {name}, row {number}", values) for number, values in enumerate(found))


def load(name: str, config: str | None, split: str, files: Sequence[Path]) -> Any:
    import datasets

    return datasets.load_dataset(name, config, split=split, data_files=[str(file) for file in files] or None)


def _saved(folder: str, config: str | None, split: str | None) -> Any:
    import datasets

    if config is not None:
        raise ValueError(f"a saved folder has no configuration {config!r}; leave --dataset-config out")
    found = datasets.load_from_disk(folder)
    if isinstance(found, datasets.DatasetDict):
        if (split or "train") not in found:
            raise ValueError(f"it has the splits {', '.join(found)}, not {split or 'train'!r}; choose one with --split")
        return found[split or "train"]
    if split is not None and split != str(found.split):
        raise ValueError(f"it is one dataset with the split {str(found.split)!r}, not {split!r}; leave --split out")
    return found


def _shown(values: Mapping[str, Any]) -> str:
    return ", ".join(map(str, values)) or "none"
