"""An encoder-decoder: rows with a source and a target, the target predicted token by token."""

from __future__ import annotations

from torch import Tensor, nn

from kdfast.train.tasks.language import LanguageTask


class Seq2Seq(LanguageTask):
    kind = "seq2seq"
    corpus_task = "seq2seq"

    def example(self, model: nn.Module) -> dict[str, Tensor]:
        inputs = super().example(model)
        return {**inputs, "decoder_input_ids": inputs["input_ids"]}
