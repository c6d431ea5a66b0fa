"""Text, JSON lines and folders of them as documents for a capture: causal, masked and encoder-decoder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from kdfast.cache import Example
from kdfast.train.data import tokenize

IGNORE = -100


def json_lines(files: Sequence[Path], fields: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The text of the named fields of every line of JSON.

    Raises:
        ValueError: a line is no object with these fields as text; names file and line.
    """
    for file in files:
        with open(file, encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    texts = tuple(json.loads(line)[field] for field in fields)
                except (json.JSONDecodeError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"--data: {file}, line {number}: expected an object with {', '.join(fields)}: {error!r}"
                    ) from None
                if not all(isinstance(text, str) for text in texts):
                    raise ValueError(f"--data: {file}, line {number}: expected text in {', '.join(fields)}")
                yield texts


def causal(tokenizer: Tokenizer, files: Sequence[Path], length: int, separator: str, field: str) -> list[torch.Tensor]:
    """Text files end to end in sequences of `length`; every line of JSON a document of its own, cut to sequences."""
    lines = [file for file in files if file.suffix == ".jsonl"]
    rest = [file for file in files if file.suffix != ".jsonl"]
    documents = list(tokenize(tokenizer, rest, length, separator, "--data").ids.long()) if rest else []
    for (text,) in json_lines(lines, [field]):
        ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
        documents += [part for part in ids.split(length) if len(part) > 1]
    return _some(documents)


def masked(documents: list[torch.Tensor], mask_id: int, share: float, seed: int) -> list[Example]:
    """Documents with a share of their ids masked, the same for the same seed; the labels are what was there."""
    generator, out = torch.Generator().manual_seed(seed), []
    for ids in documents:
        chosen = torch.rand(len(ids), generator=generator) < share
        chosen[int(torch.randint(len(ids), (), generator=generator))] = True
        out.append(Example(ids.masked_fill(chosen, mask_id), ids.masked_fill(~chosen, IGNORE)))
    return out


def pairs(
    tokenizer: Tokenizer, files: Sequence[Path], length: int, fields: tuple[str, str], start_id: int, end_id: int | None
) -> list[Example]:
    """Lines of JSON with a source and a target, each cut to `length`; the decoder starts from `start_id`."""
    out = []
    for source, target in json_lines(files, fields):
        context = torch.tensor(tokenizer.encode(source).ids[:length])
        said = tokenizer.encode(target, add_special_tokens=False).ids
        labels = torch.tensor((said if end_id is None else [*said, end_id])[:length])
        if len(context) and len(labels):
            out.append(Example(torch.cat([torch.tensor([start_id]), labels[:-1]]), labels, context))
    return _some(out)


def _some(documents: list[Any]) -> list[Any]:
    if not documents:
        raise ValueError("--data: expected at least one document with two tokens, found none")
    return documents
