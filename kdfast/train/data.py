"""Text files to packed sequences, and the order in which a run visits them.

The order is a function of (seed, position) alone, so a resumed run needs no iterator state.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from kdfast import EncodedTargets, TopKTargets

IGNORE = -100
SEPARATOR = "<|endoftext|>"


class Batch(NamedTuple):
    """What one step trains on: all `[B, L]`, labels aligned with the logits, `IGNORE` where a position does not count."""

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None = None
    targets: TopKTargets | EncodedTargets | None = None

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.input_ids.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            None if self.attention_mask is None else self.attention_mask.to(device, non_blocking=True),
            None if self.targets is None else self.targets.to(device, non_blocking=True),
        )


class Source(Protocol):
    """Training or evaluation data: a number of sequences, and any of them as a batch."""

    def __len__(self) -> int: ...
    def batch(self, indices: Sequence[int]) -> Batch: ...


class Sequences:
    """Packed sequences `[n, L]`; position t is labelled with token t + 1, the last one with nothing."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return self.ids.shape[0]

    def batch(self, indices: Sequence[int]) -> Batch:
        ids = self.ids[torch.as_tensor(indices)].long()
        return Batch(ids, next_labels(ids))

    @property
    def digest(self) -> str:
        """Hash of the token ids and their packing."""
        return hashlib.blake2b(str(tuple(self.ids.shape)).encode() + self.ids.numpy().tobytes(), digest_size=16).hexdigest()


def next_labels(ids: Tensor) -> Tensor:
    """Labels of a causal language model: the next id, `IGNORE` at the end."""
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORE)], 1)


class Order:
    """An endless seeded walk over `n` items: every epoch is its own permutation."""

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed = n, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def take(self, start: int, count: int) -> list[int]:
        """The items at positions start .. start + count - 1 of the walk."""
        out: list[int] = []
        while len(out) < count:
            epoch, offset = divmod(start + len(out), self.n)
            if epoch != self._epoch:
                generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
                self._epoch, self._permutation = epoch, torch.randperm(self.n, generator=generator)
            out += self._permutation[offset : offset + count - len(out)].tolist()
        return out


def list_files(
    paths: Iterable[str | Path], glob: str, exclude: Iterable[str] = (), key: str = "data"
) -> list[tuple[str, Path]]:
    """(name, file) of every file, sorted by name: the path inside the folder it was found under.

    Raises:
        ValueError: a path does not exist, or nothing is found; names `key`.
    """
    banned, found = set(exclude), {}
    for path in map(Path, paths):
        if path.is_file():
            found[path.name if path.name not in found else str(path)] = path
        elif path.is_dir():
            for file in path.glob(glob):
                name = file.relative_to(path)
                if file.is_file() and not banned.intersection(name.parts):
                    found[name.as_posix()] = file
        else:
            raise ValueError(f"{key}: expected a file or a folder, got {str(path)!r}, which does not exist")
    if not found:
        raise ValueError(f"{key}: no file matches {glob!r} in {', '.join(map(str, paths))}; set data.glob or another folder")
    return sorted(found.items())


def share_of(name: str, seed: int) -> float:
    """A number in [0, 1) drawn from a seeded hash of a file's name: the same on every machine, whatever else is there."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def split_files(files: list[tuple[str, Path]], shares: Sequence[float], seed: int) -> list[list[Path]]:
    """The files drawn into each of `shares`, then the rest."""
    parts: list[list[Path]] = [[] for _ in range(len(shares) + 1)]
    edges = np.cumsum(shares)
    for name, file in files:
        parts[int(np.searchsorted(edges, share_of(name, seed), side="right"))].append(file)
    return parts


def load_tokenizer(path: str | Path | None) -> tuple[Tokenizer, Path]:
    """The tokenizer in a `tokenizer.json` or the folder that holds it, and the file.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    if path is None:
        raise ValueError("tokenizer: expected a tokenizer.json or its folder, got nothing; add tokenizer: PATH to the recipe")
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(f"tokenizer: expected a tokenizer.json or its folder, got {str(path)!r}, where there is none")
    # `Tokenizer.from_file` raises a bare Exception for anything malformed, so what can be checked is checked here.
    try:
        whole = isinstance(json.loads(file.read_text(encoding="utf-8")).get("model"), dict)
    except (ValueError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"tokenizer: expected a tokenizer.json written by the tokenizers library, got {str(file)!r}")
    tokenizer = Tokenizer.from_file(str(file))
    # A file may tell to cut or to fill every text to some length; texts are cut here, by the caller.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, file


def read_text(file: Path) -> str:
    """A file as UTF-8 text; bytes that are none become replacement characters."""
    return file.read_text(encoding="utf-8", errors="replace")


def tokenize(tokenizer: Tokenizer, files: Sequence[Path], length: int, separator: str, key: str = "data") -> Sequences:
    """The files end to end, a separator after each, cut into sequences of `length` tokens; the rest is dropped.

    Raises:
        ValueError: not even one sequence comes out.
    """
    end = tokenizer.token_to_id(separator)
    pieces: list[np.ndarray] = []
    for start in range(0, len(files), 64):
        texts = [read_text(file) for file in files[start : start + 64]]
        for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
            pieces.append(np.asarray(encoding.ids, dtype=np.int32))
            if end is not None:
                pieces.append(np.asarray([end], dtype=np.int32))
    ids = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int32)
    if len(ids) < length:
        raise ValueError(f"{key}: expected at least one sequence of {length} tokens, got {len(ids)} in {len(files)} files")
    return Sequences(torch.from_numpy(ids[: len(ids) // length * length].reshape(-1, length).copy()))


def train_tokenizer(files: Sequence[Path], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer with `SEPARATOR` as its only special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[SEPARATOR], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator((read_text(file) for file in files), trainer)
    return tokenizer
