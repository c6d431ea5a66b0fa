"""A plain LSTM language model: no `transformers` class, named in a recipe as `lstm:make`."""

from __future__ import annotations

from torch import Tensor, nn


class LSTMLanguageModel(nn.Module):
    """Logits `[B, L, V]` of the next id after each."""

    def __init__(self, vocab_size: int, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.lstm = nn.LSTM(width, width, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """What follows a token never changes what is said of it, so padding at the end needs no mask."""
        states, _ = self.lstm(self.dropout(self.embedding(input_ids)))
        return self.head(self.dropout(states))


def make(vocab_size: int = 4096, width: int = 128, layers: int = 1, dropout: float = 0.0) -> LSTMLanguageModel:
    return LSTMLanguageModel(vocab_size, width, layers, dropout)
