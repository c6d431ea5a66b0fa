"""A model's tokenizer: loaded, trained, and known by its hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from kdfast.text.files import read_text

try:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
except ImportError as error:
    raise ImportError("text needs the package 'tokenizers', which is missing: pip install 'kdfast[train]'") from error

#: The only special token of the tokenizers that `train_tokenizer` makes.
SEPARATOR = "<|endoftext|>"


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
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library has no other for a file that it cannot read
        raise ValueError(
            f"tokenizer: expected a tokenizer.json written by the tokenizers library, got {str(file)!r} ({error})"
        ) from None
    # A file may tell to cut or to fill every text to some length; texts are cut here, by the caller.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, file


def check_same_tokens(folder: Path, tokenizer: Tokenizer, key: str) -> None:
    """Raises where the folder of a model has a tokenizer with other tokens than the data's; names `key`."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    theirs, ours = load_tokenizer(file)[0].get_vocab(), tokenizer.get_vocab()
    if theirs != ours:
        raise ValueError(
            f"{key}: expected the data's tokenizer, got one with other tokens in {file} ({len(theirs)} ids, the data's"
            f" {len(ours)}); the same ids must mean the same tokens"
        )


def without_post_processor(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer without what it does to finished encodings.

    A post-processor may move a token's first character over its leading blanks, into a span the token does not begin in;
    what else it does, special tokens around the text, is the part of `Specials` or of a chat template.
    """
    whole = json.loads(tokenizer.to_str())
    return Tokenizer.from_str(json.dumps({**whole, "post_processor": None}, allow_nan=False))


def file_hash(path: Path) -> str:
    """sha256 of a file, in hexadecimal: a tokenizer's identity."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
