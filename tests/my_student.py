"""A student that does not use all its parameters, named by a recipe as `my_student:make_pooled`."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import BertConfig, BertModel


class Pooled(nn.Module):
    """BERT with the pooler that a language model has no use for, its head tied to the embedding."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.bert = BertModel(BertConfig(
            vocab_size=vocab_size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        ))  # fmt: skip
        self.head = nn.Linear(16, vocab_size, bias=False)
        self.head.weight = self.bert.embeddings.word_embeddings.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.bert(input_ids).last_hidden_state)
        return out


def make_pooled(vocab_size: int = 300) -> nn.Module:
    return Pooled(vocab_size)
