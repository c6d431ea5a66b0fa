"""An encoder-decoder: rows with a source and a target, the target predicted token by token; BLEU of what it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.extras import need
from kdfast.models.generate import Decoding, write
from kdfast.models.settings import end_ids
from kdfast.strict import ranged, refuse_unused
from kdfast.text.tokenizers import SEPARATOR
from kdfast.train.batch import IGNORE, Batch
from kdfast.train.data import Source
from kdfast.train.tasks.language import LanguageTask
from kdfast.train.tasks.task import Evaluation


@dataclass(frozen=True)
class Seq2SeqOptions:
    """BLEU at every evaluation (`pip install 'kdfast[bleu]'`).

    Args:
        beams: widths of beam that validation sources are decoded with, 1 is greedy; none: no BLEU.
        max_tokens: most tokens of a hypothesis; null: `data.sequence_length`.
        length_penalty: a beam's score is log P / length ** length_penalty.
    """

    beams: tuple[int, ...] = ()
    max_tokens: int | None = ranged(None, low=1)
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        if any(beam < 1 for beam in self.beams):
            raise ValueError(f"beams: expected widths >= 1, got {min(self.beams)}")
        if not self.beams:
            refuse_unused(self, ("max_tokens", "length_penalty"), "without beams expected none, nothing is written")


class Seq2Seq(LanguageTask):
    Options = Seq2SeqOptions
    kind = "seq2seq"
    corpus_task = "seq2seq"

    def __init__(self, options: Any, data: Any) -> None:
        super().__init__(Seq2SeqOptions() if options is None else options, data)
        self.writes = bool(self.options.beams)
        if self.writes:
            need("sacrebleu", extra="bleu", what="task.beams")

    def check_model(self, model: nn.Module, train: Source, key: str) -> None:
        super().check_model(model, train, key)
        if not self.writes or key != "student":
            return
        self._check_tokenizer()
        if not hasattr(model, "generate"):
            kind = type(model).__name__
            raise ValueError(f"task.beams: expected a transformers model, which can write text, got {kind}; leave them out")

    def _check_tokenizer(self) -> None:
        if self.tokenizer is None:
            raise ValueError("task.beams: expected a tokenizer, to write text with; add tokenizer: PATH to the recipe")

    def example(self, model: nn.Module) -> dict[str, Tensor]:
        inputs = super().example(model)
        return {**inputs, "decoder_input_ids": inputs["input_ids"]}

    def score_written(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """For each width the sums of corpus BLEU: matches and n-grams of 1 to 4 tokens, both lengths."""
        if not self.writes or batch.labels is None:
            return {}
        self._check_tokenizer()
        rows = [i for i, row in enumerate(batch.labels) if bool((row != IGNORE).any())]
        if not rows:
            return {}
        whole = batch.extra.get("reference")
        if whole is None:
            gold = [self._text(batch.labels[i][batch.labels[i] != IGNORE]) for i in rows]
        else:
            gold = [bytes(whole[i][whole[i] != 0].to(torch.uint8).tolist()).decode() for i in rows]
        inputs = {name: batch.by_name[name][rows] for name in ("input_ids", "attention_mask") if name in batch.by_name}
        end = end_ids(model, self.tokenizer.token_to_id(SEPARATOR))
        most = self.options.max_tokens or self.data.sequence_length
        found = {}
        for beam in self.options.beams:
            decoding = Decoding(beam, 1, most, self.options.length_penalty)
            said = [self._text(group[0].ids) for group in write(model, inputs, decoding, end, scores=False)]
            bleu = _sacrebleu().corpus_bleu(said, [gold])
            sums = [*bleu.counts, *bleu.totals, bleu.sys_len, bleu.ref_len]
            found[_name(beam)] = torch.tensor(sums, dtype=torch.float64)
        return found

    def _text(self, ids: Tensor) -> str:
        return str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=True))

    def summary(self, scores: Sequence[Mapping[str, Tensor]]) -> Evaluation:
        evaluation = super().summary(scores)
        for name in map(_name, self.options.beams):
            sums = [int(x) for x in sum(torch.as_tensor(s[name]) for s in scores if name in s).tolist()]  # type: ignore[union-attr]
            bleu = _sacrebleu().BLEU.compute_bleu(sums[:4], sums[4:8], sums[8], sums[9], smooth_method="exp")
            evaluation[name] = float(bleu.score)
        return evaluation

    def chosen_by(self, evaluation: Evaluation) -> tuple[str, int]:
        written = [name for name in map(_name, self.options.beams) if name in evaluation]
        return (written[0], 1) if written else super().chosen_by(evaluation)

    def headline(self, evaluation: Evaluation) -> str:
        bleu = [
            f"{name.replace('_', ' ').replace('bleu', 'BLEU')} {evaluation[name]:.2f}"
            for name in map(_name, self.options.beams)
        ]
        return ", ".join([super().headline(evaluation), *bleu])


def _name(beam: int) -> str:
    return "bleu_greedy" if beam == 1 else f"bleu_beam{beam}"


def _sacrebleu() -> Any:
    return need("sacrebleu", extra="bleu", what="task.beams")
