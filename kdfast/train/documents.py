"""`Documents`: a corpus as token ids on disk, mapped into memory, so that data larger than memory have random access."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kdfast import files
from kdfast.text import IGNORE
from kdfast.text.files import list_files
from kdfast.train.batch import Batch

#: What may be kept of a document: file -> dtype.
_PARTS = {
    "input_ids": np.int32, "labels": np.int32, "loss_mask": np.uint8, "context_ids": np.int32, "reference": np.uint8,
}  # fmt: skip
#: What else in a tokenizer's folder decides how documents are written.
_SETTINGS = ("tokenizer_config.json", "chat_template.jinja", "config.json", "generation_config.json")


class Documents:
    """Rows of a corpus by number, padded in a batch to the longest.

    Causal: labels are the next ids where the loss mask says so. Otherwise the labels are the documents' own, and an encoder's
    ids are the inputs with the document's as `decoder_input_ids`.
    """

    def __init__(self, folder: Path) -> None:
        about = files.read_json(folder / "documents.json")
        self.digest: str = about["digest"]
        self.tokens: int = about["tokens"]
        #: Whether batches have targets as they are, beside those that are learned.
        self.references = False
        #: Of documents that are not whole, empty when all are.
        self.report: str = about.get("report", "")
        self._parts = {name: np.memmap(folder / f"{name}.bin", dtype=_PARTS[name], mode="r") for name in about["parts"]}
        self._ends = {name: np.load(folder / f"{name}.ends.npy", mmap_mode="r") for name in about["parts"]}

    @classmethod
    def of(cls, corpus: Any, folder: Path) -> Documents:
        """The documents of `corpus`, from `folder` where the same corpus was read before."""
        return cls.kept(corpus, {"corpus": corpus.describe(), "read_from": _read_from(corpus)}, folder, corpus.report)

    @classmethod
    def kept(
        cls, examples: Iterable[Any], described: dict[str, Any], folder: Path, report: Callable[[], str] = str
    ) -> Documents:
        """`examples` in `folder`; from there where what they are `described` by was written before. `report`: what is to be
        said of them when all are read."""
        about, described = folder / "documents.json", files.json_value(described)
        if about.is_file():
            before = files.read_json(about)
            if {name: before.get(name) for name in described} == described:
                return cls(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with files.written_folder(folder) as part:
            values = _write(examples, part)
            files.write_json(part / "documents.json", {**values, "report": report(), **described})
        return cls(folder)

    def __len__(self) -> int:
        return len(self._ends["input_ids"])

    def lengths(self) -> np.ndarray:
        """Tokens of each row, an encoder's and a decoder's added up."""
        return np.asarray(sum(self.sizes()))

    def sizes(self) -> list[np.ndarray]:
        """Tokens of each row: the document's and, of an encoder-decoder, its source's."""
        return [np.diff(self._ends[name], prepend=0) for name in ("input_ids", "context_ids") if name in self._ends]

    def batch(self, indices: Sequence[int]) -> Batch:
        ids = [self._part("input_ids", i) for i in indices]
        mask = _mask([len(x) for x in ids])
        if "context_ids" in self._parts:
            sources = [self._part("context_ids", i) for i in indices]
            inputs = {"input_ids": _padded(sources, 0), "decoder_input_ids": _padded(ids, 0)}
            batch = Batch(inputs, self._labels(indices), _mask([len(x) for x in sources]))
            if not self.references or "reference" not in self._parts:
                return batch
            return replace(batch, extra={"reference": _padded([self._part("reference", i) for i in indices], 0)})
        if "labels" in self._parts:
            return Batch(_padded(ids, 0), self._labels(indices), mask)
        following = [torch.cat([x[1:], x.new_full((1,), IGNORE)]) for x in ids]
        if "loss_mask" in self._parts:
            rows = [self._part("loss_mask", i).bool() for i in indices]
            following = [label.masked_fill(~row, IGNORE) for label, row in zip(following, rows, strict=True)]
        return Batch(_padded(ids, 0), _padded(following, IGNORE), mask)

    def _labels(self, indices: Sequence[int]) -> Tensor:
        return _padded([self._part("labels", i) for i in indices], IGNORE)

    def _part(self, name: str, i: int) -> Tensor:
        ends = self._ends[name]
        begin = int(ends[i - 1]) if i else 0
        return torch.from_numpy(self._parts[name][begin : int(ends[i])].astype(np.int64))


def _read_from(corpus: Any) -> dict[str, Any]:
    """What the documents are made from, so that a change shows: each file's size and time, and the tokenizer's content."""
    data = corpus.data
    named = [file for _, file in list_files(data.paths, data.glob, data.exclude)] if data.paths else []
    if data.dataset and Path(data.dataset).is_dir():
        named += sorted(file for file in Path(data.dataset).rglob("*") if file.is_file())
    stamps = [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in ((file, file.stat()) for file in named)]
    digest = hashlib.blake2b(corpus.tokenizer.to_str().encode(), digest_size=16)
    for name in _SETTINGS:
        file = None if corpus._folder is None else corpus._folder / name
        digest.update(file.read_bytes() if file is not None and file.is_file() else b"|")
    return {
        "files": hashlib.blake2b(files.json_text(stamps).encode(), digest_size=16).hexdigest(),
        "tokenizer": digest.hexdigest(),
    }


def _padded(rows: list[Tensor], fill: int) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=fill)


def _mask(lengths: list[int]) -> Tensor | None:
    """Without padding a mask says nothing, and models are faster without one."""
    if min(lengths) == max(lengths):
        return None
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def _write(corpus: Iterable[Any], folder: Path) -> dict[str, Any]:
    digest = hashlib.blake2b(digest_size=16)
    ends = {name: array("q") for name in _PARTS}
    handles = {name: open(folder / f"{name}.bin", "wb") for name in _PARTS}  # noqa: SIM115
    try:
        for example in corpus:
            for name, dtype in _PARTS.items():
                value = getattr(example, name)
                whole = torch.ones(len(example.input_ids), dtype=torch.uint8) if name == "loss_mask" else None
                value = whole if value is None else value
                if value is None:
                    continue
                data = np.ascontiguousarray(value.numpy().astype(dtype)).tobytes()
                if name != "reference":
                    digest.update(data)
                handles[name].write(data)
                ends[name].append((ends[name][-1] if ends[name] else 0) + len(value))
            digest.update(b"|")
    finally:
        for handle in handles.values():
            handle.close()
    kept = [name for name, found in ends.items() if found and found[-1]]
    for name in _PARTS:
        if name in kept:
            np.save(folder / f"{name}.ends.npy", np.asarray(ends[name], dtype=np.int64))
        else:
            (folder / f"{name}.bin").unlink()
    tokens = ends["input_ids"][-1] if ends["input_ids"] else 0
    return {"digest": digest.hexdigest(), "tokens": tokens, "parts": kept}
