"""What language models share: a corpus as documents, perplexity and top-1 accuracy through the head."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdfast import linear_topk_targets
from kdfast.models.heads import LinearHead
from kdfast.models.view import View
from kdfast.strict import ranged, refuse_unused
from kdfast.text.documents import Corpus
from kdfast.text.files import list_files, split_files
from kdfast.text.spec import TextData
from kdfast.train.batch import IGNORE, Batch, check_classes, likeliest, token_positions
from kdfast.train.data import SPLIT_SEED, Source, batches, hold_out
from kdfast.train.documents import Documents
from kdfast.train.tasks.task import Evaluation, Splits, Task


@dataclass(frozen=True)
class Data(TextData):
    """A corpus (`kdfast.text.TextData` has its options), split.

    Args:
        train: files or folders, or with `dataset` a builder's files; with a cached teacher the cache is the training data.
        validation: files or folders; empty: a seeded share of the training data is held out.
        validation_share: that share, by file where there are several, else by document; null: 0.05, or 0 with a cached teacher.
        pack: with a cached teacher: tokens of a row that holds several whole documents.
        group_by_length: batches of rows of like length, which need less padding; they are still drawn at random.
    """

    paths: tuple[str, ...] = dataclasses.field(default=(), init=False)
    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    validation_share: float | None = ranged(None, low=0.0, high=0.5)
    sequence_length: int = ranged(128, low=2)
    pack: int | None = ranged(None, low=2)
    group_by_length: bool = False

    def __post_init__(self) -> None:
        if self.validation and self.validation_share:
            refuse_unused(self, ("validation_share",), "beside validation expected none")
        if self.dataset and not self.train and not self.validation:
            refuse_unused(self, ("glob", "exclude"), "beside dataset, which has no folders, expected none")

    def corpus(self, paths: Sequence[str | Path]) -> TextData:
        """`paths` read as these options say."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(TextData) if f.name != "paths"}
        return TextData(paths=tuple(map(str, paths)), **own)


class LanguageTask(Task[Data]):
    Data = Data
    through_head = True
    #: What `Corpus` makes of a row.
    corpus_task: ClassVar[str]

    def __init__(self, options: Any, data: Any) -> None:
        super().__init__(options, data)
        #: Ids that rows start from and end with, by what a model's configuration calls them.
        self.ids: dict[str, int] = {}
        self._said: dict[str, Any] = {}
        #: Whether what a model writes is scored.
        self.writes = False
        #: Of the rows, to write text with; `open` and whoever brings rows of his own set it.
        self.tokenizer: Any = None

    def take_ids(self, configs: Iterable[Mapping[str, Any]]) -> None:
        """What the first of these configurations says that says anything, for a tokenizer that lies by itself."""
        for config in configs:
            for name in ("decoder_start_token_id", "eos_token_id", "forced_bos_token_id"):
                if config.get(name) is not None:
                    self._said.setdefault(name, config[name])

    def take_start(self, rows: Source) -> None:
        """What decoders start from, of rows that may be a cache's or the caller's."""
        decoder = rows.batch([0]).by_name.get("decoder_input_ids")
        if decoder is not None:
            self.ids["decoder_start_token_id"] = int(decoder[0, 0])

    def check_model(self, model: nn.Module, train: Source, key: str) -> None:
        start, its = self.ids.get("decoder_start_token_id"), getattr(model, "config", None)
        said = getattr(its, "decoder_start_token_id", None)
        if start is not None and said is not None and said != start:
            remedy = "; leave it out" if key == "student" else "; are both of one tokenizer?"
            raise ValueError(
                f"{key}: its decoder starts from id {said} (decoder_start_token_id), expected {start} like the rows{remedy}"
            )

    def open(self, tokenizer: Any, tokenizer_file: Path | None, folder: Path, needs_train: bool) -> Splits:
        self.tokenizer = tokenizer
        data, train, validation = self.data, None, None
        files = list(data.train)
        held_out: list[str] = list(data.validation)
        share = 0.05 if data.validation_share is None else data.validation_share
        if needs_train and not data.train and not data.dataset:
            raise ValueError("data.train: expected files or folders, got none; add data.train to the recipe")
        if data.train and not data.dataset and not held_out and share:
            listed = list_files(data.train, data.glob, data.exclude, "data.train")
            if len(listed) > 1:
                drawn, kept = split_files(listed, [share], SPLIT_SEED)
                files, held_out, share = [str(f) for f in kept], [str(f) for f in drawn], 0.0
            elif not needs_train:
                raise ValueError("data.validation_share: expected several files in data.train to hold some out, got one")
        if needs_train:
            train = self._read(files, tokenizer, tokenizer_file, folder / "train", "data.train")
        if held_out:
            validation = self._read(held_out, tokenizer, tokenizer_file, folder / "validation", "data.validation", text=True)
        elif train is not None and share and not data.validation:
            among = [batch.labelled for batch in batches(train, 1)] if self.data.unlabelled else None
            if among is None or any(among):
                train, validation = hold_out(train, share, among)
        return Splits(train, validation)

    def _read(
        self, paths: Sequence[str], tokenizer: Any, file: Path | None, folder: Path, key: str, text: bool = False
    ) -> Source:
        spec = self.data.corpus(paths)
        if text:
            spec = dataclasses.replace(spec, dataset=None, dataset_config=None, split=None, streaming=False)

        def name(option: str) -> str:
            if option == "unlabelled" and text:  # nothing of such rows can be scored
                return ""
            return key if option == "paths" else f"data.{option}"

        home = None if file is None else file.parent
        corpus = Corpus(spec, tokenizer, home, task=self.corpus_task, name=name, otherwise=self._said)
        self.ids |= corpus.ids
        rows = Documents.of(corpus, folder)
        rows.references = self.writes
        self.notes += [f"{key}: {rows.report}"] if rows.report else []
        return rows

    def model_fields(self, vocab_size: int | None) -> dict[str, Any]:
        return {"vocab_size": vocab_size, **self.ids}

    def example(self, model: nn.Module) -> dict[str, Tensor]:
        device = next(model.parameters()).device
        return {"input_ids": torch.tensor([[1, 2, 1, 2]], device=device)}

    def positions(self, batch: Batch) -> Tensor | None:
        return token_positions(batch)

    def score(self, view: View, batch: Batch) -> dict[str, Tensor]:
        if batch.labels is None:
            return dict.fromkeys(("nll", "hits", "tokens"), torch.zeros((), dtype=torch.float64))
        counted = batch.labels != IGNORE
        labels = batch.labels[counted]
        check_classes(labels, view.logits.shape[-1] if view.head is None else view.head.weight.shape[0])
        if view.head is None or view.hidden is None:
            logits = view.logits[counted].float()
            nll = F.cross_entropy(logits, labels, reduction="sum") if len(labels) else logits.sum() * 0
            hits = (likeliest(logits) == labels).sum()
        else:
            nll, hits = _through_head(view.head, view.hidden[counted], labels)
        return {"nll": nll.double(), "hits": hits.double(), "tokens": counted.sum().double()}

    def summary(self, scores: Sequence[Mapping[str, Tensor]]) -> Evaluation:
        nll, hits, tokens = (float(sum(float(s[name]) for s in scores)) for name in ("nll", "hits", "tokens"))
        if not tokens:
            raise ValueError("data.validation: expected at least one labelled position, got none; add files")
        mean = nll / tokens
        return Evaluation(ppl=math.exp(min(mean, 700.0)), nll=mean, top1=hits / tokens, tokens=int(tokens))

    def chosen_by(self, evaluation: Evaluation) -> tuple[str, int]:
        return "nll", -1

    def headline(self, evaluation: Evaluation) -> str:
        return f"perplexity {evaluation['ppl']:.2f}, top-1 {evaluation['top1']:.1%}"


def _through_head(head: LinearHead, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of -log p(label), how often the label is likeliest); log p(label) = log p(best) + z(label) - z(best)."""
    if not len(labels):
        return hidden.sum().double() * 0, torch.zeros((), device=hidden.device)
    best = linear_topk_targets(hidden, head.weight, 1, bias=head.bias, head=head.form)
    ids = best.ids[:, 0].long()

    def logit(of: Tensor) -> Tensor:
        z = (hidden.float() * head.weight[of].float()).sum(-1)
        z = z if head.bias is None else z + head.bias[of].float()
        z = z * head.form.scale
        return z if head.form.softcap is None else head.form.softcap * torch.tanh(z / head.form.softcap)

    nll = -(best.logprobs[:, 0] + logit(labels) - logit(ids))
    return nll.sum(), ((ids == labels) & ~nll.isnan()).sum()
