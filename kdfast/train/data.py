"""What a run reads, and the order in which it visits the rows.

The order is a function of (seed, position) alone, so a resumed run needs no iterator state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from kdfast.cache.dataset import pack_rows
from kdfast.tensors import digest_of_tensors, seed_of
from kdfast.text.files import share_of
from kdfast.text.packing import pack
from kdfast.text.specials import Specials
from kdfast.text.tokenizers import load_tokenizer as load_tokenizer  # found here by earlier callers
from kdfast.text.tokenizers import train_tokenizer as train_tokenizer
from kdfast.train.batch import IGNORE, Batch

#: A held-out part depends on this alone, so that runs with different seeds see the same validation data.
SPLIT_SEED = 0
#: Rows by which a source without a digest is known.
_LOOKED_AT = 64
#: Seeds are below it: numpy takes no others.
SEEDS = 2**32


class Source(Protocol):
    """Training or evaluation data: a number of rows, and any of them as a batch."""

    def __len__(self) -> int: ...
    def batch(self, indices: Sequence[Any]) -> Batch: ...


def batches(source: Source, size: int, limit: int = 0) -> Iterator[Batch]:
    """All rows in their order, or the first `limit`, `size` at a time."""
    n = min(limit, len(source)) if limit else len(source)
    return (source.batch(range(start, min(start + size, n))) for start in range(0, n, size))


class Sequences:
    """Packed sequences `[n, L]`; position t is labelled with token t + 1, the last one with nothing."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return self.ids.shape[0]

    def sizes(self) -> list[np.ndarray]:
        """Tokens of each row."""
        return [np.full(len(self), self.ids.shape[1])]

    def batch(self, indices: Sequence[int]) -> Batch:
        ids = self.ids[torch.as_tensor(indices)].long()
        return Batch(ids, next_labels(ids))

    @property
    def digest(self) -> str:
        """Hash of the token ids and their packing."""
        return hashlib.blake2b(str(tuple(self.ids.shape)).encode() + self.ids.numpy().tobytes(), digest_size=16).hexdigest()


class Subset:
    """Some rows of a source, each a number or a list of them (packed)."""

    def __init__(self, source: Source, rows: Sequence[int]) -> None:
        self.source, self.rows = source, list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Sequence[Any]) -> Any:
        return self.source.batch([self._row(i) for i in indices])

    def lengths(self) -> np.ndarray:
        """Of a source whose rows have lengths."""
        return lengths_of(self.source)[self.rows]

    def sizes(self) -> list[np.ndarray]:
        return [size[self.rows] for size in sizes_of(self.source)]

    def _row(self, i: Any) -> Any:
        return [self.rows[j] for j in i] if isinstance(i, list) else self.rows[i]

    @property
    def digest(self) -> str:
        """Of the source, and which rows."""
        return digest_of(self)


class RowsOf:
    """The rows of another source; the `batch` of a subclass adds something to each."""

    def __init__(self, rows: Source) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def lengths(self) -> np.ndarray:
        return lengths_of(self.rows)

    def sizes(self) -> list[np.ndarray]:
        return sizes_of(self.rows)

    @property
    def digest(self) -> str:
        return digest_of(self.rows)


def digest_of(source: Source, whole: bool = False) -> str:
    """A hash of rows: their own, else of some of them, or of the `whole`, where some are the same when read twice."""
    if isinstance(source, Subset):
        rows = hashlib.blake2b(torch.tensor(source.rows).numpy().tobytes(), digest_size=8).hexdigest()
        return f"{digest_of(source.source, whole)}:{rows}"
    own: str | None = getattr(source, "digest", None)
    if own is not None:
        return own
    name, n = f"{type(source).__name__} of {len(source)} rows", len(source)
    looked_at = np.linspace(0, n - 1, min(n, _LOOKED_AT)).astype(int).tolist()
    found = _digest(source, looked_at)
    if found != _digest(source, looked_at):
        return name
    return f"{name}, {_digest(source, range(n)) if whole else found}"


def _digest(source: Source, rows: Iterable[int]) -> str:
    state = hashlib.blake2b(digest_size=16)
    for i in rows:
        batch = source.batch([i])
        labels = {} if batch.labels is None else {"labels": batch.labels}
        tensors = dict(sorted({**batch.by_name, **labels, **batch.extra}.items()))
        state.update(str([(name, x.dtype, tuple(x.shape)) for name, x in tensors.items()]).encode())
        state.update(digest_of_tensors(*tensors.values()).encode())
    return state.hexdigest()


def lengths_of(source: Source) -> np.ndarray:
    """Tokens of each row.

    Raises:
        ValueError: the source does not say.
    """
    if not hasattr(source, "lengths"):
        raise ValueError(f"data.group_by_length: expected rows with lengths, got {type(source).__name__}; leave it out")
    found: np.ndarray = source.lengths()
    return found


def sizes_of(source: Source) -> list[np.ndarray]:
    """Tokens of each row in each of the models' inputs; nothing of a source that does not say."""
    found: list[np.ndarray] = source.sizes() if hasattr(source, "sizes") else []
    return found


def hold_out(train: Source, share: float, among: Sequence[bool] | None = None) -> tuple[Source, Source]:
    """A source without a share of its rows, and these, which of a few rows may be none; `among`: of each row whether it may be
    held out."""
    held = [(among is None or among[i]) and share_of(str(i), SPLIT_SEED) < share for i in range(len(train))]
    kept, out = ([i for i, drawn in enumerate(held) if drawn is which] for which in (False, True))
    return Subset(train, kept), Subset(train, out)


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
                generator = torch.Generator().manual_seed(seed_of((self.seed << 20) + epoch))
                self._epoch, self._permutation = epoch, self._draw(generator)
            out += self._permutation[offset : offset + count - len(out)].tolist()
        return out

    def _draw(self, generator: torch.Generator) -> Tensor:
        return torch.randperm(self.n, generator=generator)


class LengthOrder(Order):
    """The same with batches of rows of like length: of every `WINDOW` batches drawn, the rows are sorted, then the batches
    shuffled. What is left of an epoch after its last whole batch is dropped, other rows each time.
    """

    WINDOW = 64

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size = torch.from_numpy(np.asarray(lengths, dtype=np.int64)), min(batch_size, len(lengths))
        super().__init__(len(lengths) // self.batch_size * self.batch_size, seed)

    def _draw(self, generator: torch.Generator) -> Tensor:
        batches: list[Tensor] = []
        drawn = torch.randperm(len(self.lengths), generator=generator)[: self.n]
        for window in drawn.split(self.WINDOW * self.batch_size):
            found = window[self.lengths[window].argsort(stable=True)].split(self.batch_size)
            batches += [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]
        return torch.cat(batches)


class PackedOrder:
    """The same over whole documents packed into rows of `length` tokens: `take` gives lists of documents."""

    def __init__(self, lengths: np.ndarray, length: int, seed: int) -> None:
        self.lengths, self.length, self.seed = lengths, length, seed
        self._rows: dict[int, list[list[int]]] = {}
        self._counts: list[int] = []  # rows of each epoch so far

    def take(self, start: int, count: int) -> list[list[int]]:
        """The packed rows at positions start .. start + count - 1 of the walk."""
        return [self._row(position) for position in range(start, start + count)]

    def _row(self, position: int) -> list[int]:
        epoch = 0
        while True:
            if epoch == len(self._counts):
                self._counts.append(len(self._epoch(epoch)))
            if position < self._counts[epoch]:
                return self._epoch(epoch)[position]
            position -= self._counts[epoch]
            epoch += 1

    def _epoch(self, epoch: int) -> list[list[int]]:
        if epoch not in self._rows:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.lengths))
            self._rows = {epoch: pack_rows(self.lengths, order, self.length)}
        return self._rows[epoch]


def tokenize(tokenizer: Tokenizer, files: Sequence[Path], length: int, separator: str, key: str = "data") -> Sequences:
    """The files end to end, a separator after each, cut into sequences of `length` tokens; the rest is dropped.

    Raises:
        ValueError: not even one sequence comes out.
    """
    end = tokenizer.token_to_id(separator)
    return Sequences(pack(tokenizer, files, length, Specials(separator=() if end is None else (end,)), key))
