"""Copies of training rows with other words in the place of some: what TinyBERT shows its student beside the rows themselves.

Source: Jiao et al. 2020 (TinyBERT), arXiv 1909.10351, algorithm 1. There a word of several tokens is replaced by a neighbour
among word vectors; here it stays.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from kdfast import files
from kdfast.models.heads import call, find_head, logits_in
from kdfast.models.load import resolve_folder, weights_hash
from kdfast.models.view import look
from kdfast.strict import one_of, ranged, refuse_unused
from kdfast.tensors import digest_of_tensors, load_tensors, save_tensors, seed_of
from kdfast.text.tokenizers import load_tokenizer
from kdfast.train.batch import IGNORE, Batch
from kdfast.train.data import SEEDS, Source, lengths_of
from kdfast.train.positions import check_positions
from kdfast.train.readers import load_reader

#: Rows that are kept together: what a killed stage does again.
_WINDOW = 256
#: Tokens that a masked language model sees at a time.
_TOKENS = 4096
#: Marks a token that begins a word in byte-level and SentencePiece vocabularies.
_BEGINS = ("\u0120", "\u2581")


@dataclass(frozen=True)
class Augment:
    """How words are replaced.

    Args:
        copies: of each row. share: chance of a word to be replaced.
        candidates: how many replacements of a word one is drawn from.
        by: `embeddings`: the words nearest by cosine among the teacher's input embeddings; `masked_lm`: the likeliest where
            the word is masked.
        path: folder of the masked language model. mask_token: what its tokenizer calls its mask.
        seed: of what is drawn.
    """

    copies: int = ranged(10, low=1)
    share: float = ranged(0.4, above=0.0, high=1.0)
    candidates: int = ranged(15, low=1)
    by: str = one_of("embeddings", "embeddings", "masked_lm")
    path: str | None = None
    mask_token: str = "[MASK]"
    seed: int = ranged(0, low=0, high=SEEDS - 1)

    def __post_init__(self) -> None:
        if (self.by == "masked_lm") != (self.path is not None):
            raise ValueError("path: expected the folder of a masked language model with by: masked_lm, and only with it")
        if self.by != "masked_lm":
            refuse_unused(self, ("mask_token",), f"with by: {self.by} expected none")


def augmented(
    rows: Source, tokenizer: Path, options: Augment, folder: Path, embeddings: Tensor, say: Callable[[str], None],
    bar: Any = None,
) -> Augmented:  # fmt: skip
    """`rows` and their copies, kept in `folder`; killed and run again it goes on after the last whole window of rows.

    Args:
        tokenizer: its file. embeddings: `[V, D]` the teacher's input embeddings. bar: makes a progress bar, or None.

    Raises:
        ValueError: a masked language model that does not fit.
    """
    words = load_tokenizer(tokenizer)[0]
    said = digest_of_tensors(embeddings)
    if options.path is not None:
        said = weights_hash(resolve_folder(options.path, "method.augment.path"))
    about = files.json_value(
        {**dataclasses.asdict(options), "rows": len(rows), "data": getattr(rows, "digest", ""), "words": said}
    )
    marker = folder / "augment.json"
    with files.locked(folder):
        if not marker.is_file() or files.read_json(marker) != about:
            for file in folder.glob("*.safetensors"):
                file.unlink()
            files.write_json(marker, about)
        starts = range(0, len(rows), _WINDOW)
        kept = [folder / f"rows-{start:09d}.safetensors" for start in starts]
        if not all(file.is_file() for file in kept):
            with torch.no_grad():
                stage = _Stage(rows, words, options, embeddings)
                with contextlib.nullcontext() if bar is None else bar("other words", len(rows), "rows") as shown:
                    for start, file in zip(starts, kept, strict=True):
                        if not file.is_file():
                            stage.write(range(start, min(start + _WINDOW, len(rows))), file)
                        if shown is not None:
                            shown.update(min(start + _WINDOW, len(rows)))
        parts = [load_tensors(file) for file in kept]
    found = Augmented(rows, *(torch.cat([part[name] for part in parts]) for name in ("origin", "length", "ids")))
    say(f"{folder}: {len(found) - len(rows)} copies of {len(rows)} rows with other words")
    return found


class Augmented:
    """Rows, then copies of them whose token ids are others; a copy has no label, and counts where its row does."""

    def __init__(self, rows: Source, origin: Tensor, length: Tensor, ids: Tensor) -> None:
        self._rows, self._origin, self._ids = rows, origin, ids
        self._ends = torch.cat([torch.zeros(1, dtype=torch.int64), length.cumsum(0)])
        self.digest = f"{getattr(rows, 'digest', '')}+{digest_of_tensors(origin, length, ids)}"

    def __len__(self) -> int:
        return len(self._rows) + len(self._origin)

    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        own = lengths_of(self._rows)
        return np.concatenate([own, own[self._origin.numpy()]])

    def batch(self, indices: Sequence[int]) -> Batch:
        n = len(self._rows)
        batch = self._rows.batch([i if i < n else int(self._origin[i - n]) for i in indices])
        if batch.labels is None or all(i < n for i in indices):
            return batch
        ids, labels = batch.input_ids.clone(), batch.labels.clone()
        counted = batch.labels != IGNORE if batch.soft_mask is None else batch.soft_mask
        for row, i in enumerate(indices):
            if i >= n:
                mine = self._ids[self._ends[i - n] : self._ends[i - n + 1]]
                ids[row, : len(mine)] = mine
                labels[row] = IGNORE
        return dataclasses.replace(batch, inputs={**batch.by_name, "input_ids": ids}, labels=labels, soft_mask=counted)


class _Stage:
    """Copies being made."""

    def __init__(self, rows: Source, tokenizer: Tokenizer, options: Augment, embeddings: Tensor) -> None:
        self._rows, self._options = rows, options
        self._begins, self._continues = word_tokens(tokenizer, embeddings.shape[0])
        words = int(self._begins.sum())
        if words < 2:
            raise ValueError(
                f"method.augment: expected a tokenizer with two words of one token or more, got {words}; leave it out"
            )
        self._model: nn.Module | None = None
        if options.by == "masked_lm":
            self._model, self._mask_id = _masked_lm(options, tokenizer, rows)
            example = torch.full((1, 2), self._mask_id, device=next(self._model.parameters()).device)
            self._head = find_head(self._model, {"input_ids": example})
        else:
            unit = nn.functional.normalize(embeddings.detach().float().cpu(), dim=-1)
            self._unit, self._known = unit, dict[int, Tensor]()

    def write(self, numbers: range, file: Path) -> None:
        """The copies of these rows, as one file: their rows, lengths and ids."""
        origin, found = [], []
        for i in numbers:
            ids, types = self._tokens(i)
            places = self.places(ids)
            if not len(places):
                continue
            candidates = self._candidates(ids, types, places)  # [places, K]
            generator = torch.Generator().manual_seed(seed_of((self._options.seed << 32) + i))
            for _ in range(self._options.copies):
                chosen = torch.rand(len(places), generator=generator) < self._options.share
                drawn = torch.randint(candidates.shape[1], (len(places),), generator=generator)
                if bool(chosen.any()):
                    copy = ids.clone()
                    copy[places[chosen]] = candidates[torch.arange(len(places)), drawn][chosen]
                    origin.append(i)
                    found.append(copy)
        with files.written(file) as part:
            save_tensors({
                "origin": torch.tensor(origin, dtype=torch.int64), "length": torch.tensor([len(x) for x in found]).long(),
                "ids": torch.cat([torch.empty(0, dtype=torch.int64), *found]),
            }, part)  # fmt: skip

    def _tokens(self, i: int) -> tuple[Tensor, Tensor | None]:
        """A row's ids, and which text of a pair they are of."""
        batch = self._rows.batch([i])
        types = batch.by_name.get("token_type_ids")
        counted = slice(None) if batch.attention_mask is None else batch.attention_mask[0].bool()
        return batch.input_ids[0][counted], None if types is None else types[0][counted]

    def places(self, ids: Tensor) -> Tensor:
        """Positions of words of one token."""
        after = torch.cat([self._continues[ids[1:]], torch.zeros(1, dtype=torch.bool)])
        return (self._begins[ids] & ~after).nonzero()[:, 0]

    def _candidates(self, ids: Tensor, types: Tensor | None, places: Tensor) -> Tensor:
        """`[places, K]` words that could stand at each place."""
        k = min(self._options.candidates, int(self._begins.sum()) - 1)
        if self._model is None:
            return torch.stack([self._nearest(int(i), k) for i in ids[places]])
        device = next(self._model.parameters()).device
        found = []
        for some in places.split(max(_TOKENS // len(ids), 1)):
            n = torch.arange(len(some))
            masked = ids.repeat(len(some), 1)
            masked[n, some] = self._mask_id
            inputs = {"input_ids": masked.to(device)}
            if types is not None:
                inputs["token_type_ids"] = types.repeat(len(some), 1).to(device)
            found.append(self._best(self._logits(inputs, n, some).float().cpu(), ids[some], k))
        return torch.cat(found)

    def _logits(self, inputs: dict[str, Tensor], rows: Tensor, places: Tensor) -> Tensor:
        """`[n, V]`: at one place of each row; through the head where it can be named, so that no others are formed."""
        assert self._model is not None
        if self._head is None:
            return logits_in(call(self._model, inputs))[rows, places]
        hidden = look(self._model, inputs, head=self._head).hidden
        assert hidden is not None
        return self._head.logits(hidden[rows, places])

    def _nearest(self, i: int, k: int) -> Tensor:
        if i not in self._known:
            self._known[i] = self._best((self._unit @ self._unit[i])[None], torch.tensor([i]), k)[0]
        return self._known[i]

    def _best(self, scores: Tensor, own: Tensor, k: int) -> Tensor:
        """The k best words that are not the word itself."""
        # Either may be padded beyond the tokenizer's ids.
        scores = scores[:, : len(self._begins)]
        scores = scores.masked_fill(~self._begins[: scores.shape[1]], -torch.inf)
        return scores.scatter(1, own[:, None], -torch.inf).topk(k, -1).indices


def _masked_lm(options: Augment, tokenizer: Tokenizer, rows: Source) -> tuple[nn.Module, int]:
    key = "method.augment.path"
    folder = resolve_folder(options.path or "", key)
    mask_id = tokenizer.token_to_id(options.mask_token)
    if mask_id is None:
        raise ValueError(f"method.augment.mask_token: expected a token of the tokenizer, got {options.mask_token!r}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_reader(folder, key, tokenizer, "masked_lm", head=True)
    check_positions([(key, model)], rows)
    return model.eval().to(device), mask_id


def word_tokens(tokenizer: Tokenizer, size: int) -> tuple[Tensor, Tensor]:
    """`[size]` each: tokens that begin a word, and tokens that go on with one; special tokens and signs are neither."""
    prefix: Any = None
    with contextlib.suppress(AttributeError):  # of WordPiece
        prefix = tokenizer.model.continuing_subword_prefix
    begins, continues = torch.zeros(size, dtype=torch.bool), torch.zeros(size, dtype=torch.bool)
    special = set(tokenizer.get_added_tokens_decoder())
    for token, i in tokenizer.get_vocab().items():
        if i in special or i >= size:
            continue
        begin = not token.startswith(prefix) if prefix else token.startswith(_BEGINS)
        letters = any(c.isalnum() for c in token.removeprefix(prefix or "").lstrip("".join(_BEGINS)))
        begins[i], continues[i] = begin and letters, not begin and letters
    return begins, continues
