"""Models beside student and teachers that read the run's rows: another stage's teacher, an encoder, a masked language model."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from torch import nn

from kdfast.models.load import check_ids, load_folder
from kdfast.text.tokenizers import check_same_tokens, load_tokenizer


def load_reader(folder: Path, key: str, tokenizer: Path | Tokenizer | None, kind: str, *, head: bool = False) -> nn.Module:
    """The model in `folder`.

    Args:
        key: what an error calls it. tokenizer: of the rows; None where they are no texts. kind: of model.
        head: whether its head has to be there; otherwise a missing one is random, and not asked.

    Raises:
        ValueError: its tokens are not those of the rows, or it has fewer ids.
    """
    words = load_tokenizer(tokenizer)[0] if isinstance(tokenizer, Path) else tokenizer
    if words is not None:
        check_same_tokens(folder, words, key)
    model = load_folder(folder, key, kind=kind, dtype="auto", **({} if head else {"missing": []}))
    if words is not None:
        check_ids(model, words.get_vocab_size(), key)
    return model
