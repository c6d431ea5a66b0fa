"""A masked language model: rows with a mask predict what was there."""

from __future__ import annotations

from kdfast.train.tasks.language import LanguageTask


class MaskedLM(LanguageTask):
    kind = "masked_lm"
    corpus_task = "masked"
