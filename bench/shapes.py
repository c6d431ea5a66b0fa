"""Hidden size and vocabulary of models people distil, from their published configurations."""

from __future__ import annotations

from typing import NamedTuple


class ModelShape(NamedTuple):
    """What a distillation loss sees of a model: its head's input and output (`vocab_size` of the config, padding included)."""

    name: str
    hidden: int
    vocab: int


LLAMA2 = ModelShape("Llama-2-7B", 4096, 32000)
LLAMA3 = ModelShape("Llama-3-8B", 4096, 128256)
LLAMA3_1B = ModelShape("Llama-3.2-1B", 2048, 128256)
QWEN3 = ModelShape("Qwen3-8B", 4096, 151936)
QWEN3_SMALL = ModelShape("Qwen3-0.6B", 1024, 151936)
GEMMA3 = ModelShape("Gemma-3-4B", 2560, 262208)
GPT2 = ModelShape("GPT-2", 768, 50257)
BERT = ModelShape("BERT-base-uncased", 768, 30522)
OPUS_MT = ModelShape("opus-mt-en-de", 512, 58101)

ALL = (LLAMA2, LLAMA3, LLAMA3_1B, QWEN3, QWEN3_SMALL, GEMMA3, GPT2, BERT, OPUS_MT)
