"""A causal language model: each row predicts the next token."""

from __future__ import annotations

from kdfast.train.tasks.language import LanguageTask


class CausalLM(LanguageTask):
    kind = "causal_lm"
    corpus_task = "causal"
