"""`Example`: one document, and what is to be learned in it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

#: Label of a row that does not count.
IGNORE = -100


class Example(NamedTuple):
    """A document that is more than text to predict.

    Masked language model: input_ids with masks in, labels (-100 where nothing is asked). Encoder-decoder: input_ids are the
    decoder's inputs, labels what it should say, context_ids the encoder's inputs, reference the whole target as bytes of UTF-8
    (uint8), of which labels may be a part. 1-D int64 tensors. Instruction data: loss_mask, bool `[L]`, True where row t counts;
    with alignment `next` that row predicts input_ids[t + 1].
    """

    input_ids: Tensor
    labels: Tensor | None = None
    context_ids: Tensor | None = None
    loss_mask: Tensor | None = None
    reference: Tensor | None = None
