"""Sequence-level distillation: the student learns what its teachers write; labels are their hypotheses.

loss = hard_weight * -sum_y w_y log p_student(y | x) + soft_weight * T^2 * KL along y, with y the n best hypotheses of a beam
(or samples) and w_y their probabilities, which sum to 1; n = 1 is the line of the paper. With `interpolation` y is the
hypothesis that is most like the gold target. They are found before the first step (`kdfast.train.decode`).
Source: Kim and Rush 2016, arXiv 1606.07947, sections 3.2 and 3.3.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdfast import files
from kdfast.extras import need
from kdfast.models.generate import Decoding
from kdfast.models.load import resolve_folder, weights_hash
from kdfast.models.positions import positions_of
from kdfast.models.view import Needs, View
from kdfast.strict import ranged, refuse_unused
from kdfast.tensors import digest_of_tensors
from kdfast.text import Example
from kdfast.text.tokenizers import load_tokenizer
from kdfast.train.batch import Batch
from kdfast.train.data import RowsOf, Source
from kdfast.train.decode import asked_in, decode
from kdfast.train.documents import Documents
from kdfast.train.kd import hard
from kdfast.train.objective import Metrics, Prepared, Setting
from kdfast.train.recipes.word_kd import WordKD, WordKDOptions
from kdfast.train.schedule import Scheduled, scheduled
from kdfast.train.tasks.language import LanguageTask
from kdfast.train.teachers import LiveTeacher

#: Rows that are decoded for `check: true`, and rows of which it is looked whether they have prompts.
_TRIED, _LOOKED_AT = 16, 64


@dataclass(frozen=True)
class SequenceKDOptions(WordKDOptions):
    """How the teachers write, and what is learned of it; the soft term is that of `word_kd`, along the hypotheses.

    Args:
        soft_weight: of the soft term, for which the teachers run in every step; 0: they write once and are done.
        hard_weight: of the hypotheses' likelihood.
        beam: hypotheses that are kept for every source, the width of the search.
        nbest: how many of them are learned, weighted by their probabilities.
        interpolation: learn the one with the highest smoothed sentence BLEU against the gold target, where there is one.
        sample: draw `nbest` of them instead, all of one weight.
        sample_temperature, sample_top_k, sample_top_p: of the draws.
        max_tokens: most tokens of a hypothesis; null: `data.sequence_length`.
        length_penalty: the beam's order is that of log P / length ** length_penalty.
        decode_batch_size: sources at a time.
        prompt_tokens: of running text without prompts: so many tokens of a row are one.
        decoded: folder for the hypotheses, where other runs find them; null: in the run's own.
    """

    soft_weight: Scheduled = scheduled(0.0, low=0.0)
    hard_weight: Scheduled = scheduled(1.0, low=0.0)
    beam: int = ranged(5, low=1)
    nbest: int = ranged(1, low=1)
    interpolation: bool = False
    sample: bool = False
    sample_temperature: float = ranged(1.0, above=0.0)
    sample_top_k: int = ranged(0, low=0)
    sample_top_p: float = ranged(1.0, above=0.0, high=1.0)
    max_tokens: int | None = ranged(None, low=1)
    length_penalty: float = 1.0
    decode_batch_size: int = ranged(32, low=1)
    prompt_tokens: int | None = ranged(None, low=1)
    decoded: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nbest > self.beam and not self.sample:
            raise ValueError(f"nbest: expected at most beam {self.beam}, got {self.nbest}; raise beam")
        if self.interpolation and (self.nbest > 1 or self.sample):
            raise ValueError(
                "interpolation: expected it with nbest: 1 and without sample: it learns one hypothesis of the beam"
            )
        if self.sample:
            refuse_unused(self, ("beam", "length_penalty"), "with sample expected none, they are a beam's")
        else:
            names = ("sample_temperature", "sample_top_k", "sample_top_p")
            refuse_unused(self, names, "without sample expected none, it is of draws")


class SequenceKD(WordKD):
    Options = SequenceKDOptions
    writes = True

    def __init__(self, options: SequenceKDOptions, setting: Setting) -> None:
        super().__init__(options, setting)
        self._recipe, self._bar, self._task = setting.recipe, setting.bar, setting.task
        self._positions = positions_of(setting.student)
        if not isinstance(setting.task, LanguageTask) or setting.task.kind not in ("seq2seq", "causal_lm"):
            raise ValueError("method: sequence_kd expects task seq2seq or causal_lm, whose models write text")
        if any(teacher.info is not None for teacher in setting.teachers):
            raise ValueError("teacher.cache: method sequence_kd has its teachers write, expected path or function")
        for teacher in setting.teachers:
            if not hasattr(teacher.model, "generate"):
                kind = type(teacher.model).__name__
                raise ValueError(f"teacher: method sequence_kd expects a transformers model, which can write text, got {kind}")
        if options.prompt_tokens and setting.task.kind == "seq2seq":
            raise ValueError("method.prompt_tokens: expected task causal_lm, whose rows are running text; leave it out")
        if not options.prompt_tokens and getattr(setting.task.data, "prompt_loss", False):
            raise ValueError(
                "data.prompt_loss: expected false with method sequence_kd, whose teachers are asked with the prompt, which ends"
                " where the loss begins; leave it out, or set method.prompt_tokens"
            )
        most = self._positions
        if most is not None and options.max_tokens is not None and options.max_tokens > most:
            raise ValueError(
                f"method.max_tokens: expected at most the {most} positions of the student, got {options.max_tokens}; lower it"
            )
        if options.interpolation:
            need("sacrebleu", extra="bleu", what="method.interpolation")

    def needs_of_teacher(self) -> Needs | None:
        return None if self.options.soft_weight == 0 else Needs()

    def prepare(self, inputs: Any, folder: Path, say: Any) -> Prepared:
        options, longest = self.options, getattr(self._task.data, "sequence_length", None)
        # Rows of the caller were cut by nothing.
        most = self._positions if "train_data" in inputs.brought else longest
        if self._task.kind == "causal_lm":
            _check_prompts(inputs.train, options.prompt_tokens)
        tokenizer = None if inputs.tokenizer is None else load_tokenizer(inputs.tokenizer)[0]
        if options.interpolation and tokenizer is None:
            raise ValueError("method.interpolation: expected a tokenizer, to compare text with; add tokenizer: PATH")
        decoding = Decoding(
            options.beam, options.nbest if options.sample else options.beam, options.max_tokens or longest or 64,
            options.length_penalty, options.sample, options.sample_temperature, options.sample_top_k, options.sample_top_p,
        )  # fmt: skip
        checked = self._recipe is not None and self._recipe.check
        home = folder / "decoded" if options.decoded is None or checked else Path(options.decoded)
        whole = decode(
            inputs.teachers, inputs.train, decoding, home, tokenizer=tokenizer, identity=self._identity(inputs.teachers),
            say=say, bar=self._bar, batch_size=options.decode_batch_size, prompt_tokens=options.prompt_tokens,
            most=most if self._task.kind == "causal_lm" else None, limit=_TRIED if checked else 0,
            seed=1 if self._recipe is None else self._recipe.seed,
        )  # fmt: skip
        if checked:
            seconds = files.read_json(whole.parent / "decoding.json")["seconds"]
            tried = min(_TRIED, len(inputs.train))
            say(f"decoding all {len(inputs.train)} sources: about {seconds / tried * len(inputs.train) / 60:.1f} minutes")
        rows = self._rows(whole, inputs, folder, tokenizer, most)
        return Prepared(rows, whole=len(inputs.train) * options.nbest if checked else None)

    def _identity(self, opened: Sequence[LiveTeacher]) -> list[str]:
        """The teachers' weights; of one that a function makes its name and arguments too."""
        if self._recipe is None:
            return []
        return [
            weights_hash(resolve_folder(spec.path, "teacher.path")) if spec.path
            else f"{spec.function} {files.json_text(spec.arguments)} "
            + (weights_hash(spec.weights) if spec.weights else digest_of_tensors(*teacher.model.state_dict().values()))
            for spec, teacher in zip(self._recipe.all_teachers, opened, strict=True)
        ]  # fmt: skip

    def _rows(self, whole: Path, inputs: Any, folder: Path, tokenizer: Any, most: int | None) -> Source:
        """The hypotheses that are learned, as `targets.jsonl` and as rows to train on."""
        chosen = folder / "targets.jsonl"
        about = {"hypotheses": str(whole), "of": files.read_json(whole.parent / "decoding.json")["of"],
                 "nbest": self.options.nbest, "interpolation": self.options.interpolation}  # fmt: skip
        marker = folder / "targets.json"
        if not (marker.is_file() and files.read_json(marker) == files.json_value(about)):
            with files.written(chosen) as part, open(part, "w", encoding="utf-8") as file:
                for line in self._chosen(whole, inputs.train, tokenizer):
                    file.write(files.json_line(line))
            files.write_json(marker, about)
        lines = files.read_lines(chosen)
        if not lines:
            raise ValueError(
                f"method: {whole} holds no hypothesis; raise data.sequence_length, which prompts fill, or take a teacher with"
                " more positions"
            )
        prompt = self.options.prompt_tokens
        examples = (_example(asked_in(inputs.train, line["row"], prompt), line["ids"], most) for line in lines)
        weights = None if self.options.nbest == 1 else torch.tensor([line["weight"] for line in lines])
        return Hypotheses(Documents.kept(examples, about, folder / "rows"), weights)

    def _chosen(self, whole: Path, rows: Source, tokenizer: Any) -> Iterator[dict[str, Any]]:
        options = self.options
        for row, found in itertools.groupby(files.read_lines(whole), key=lambda line: line["row"]):
            group = list(found)
            if options.interpolation:
                group = [_most_like(group, asked_in(rows, row).gold, tokenizer)]
            if not options.sample:  # an earlier version kept copies where a beam was wider than what can be written
                group = [line for i, line in enumerate(group) if line["ids"] not in [other["ids"] for other in group[:i]]]
            group = group[: options.nbest]
            scores = [-math.inf if line["score"] is None else line["score"] for line in group]  # JSON has no infinity
            best = max(scores)
            alike = options.sample or best == -math.inf
            mass = [1.0 if alike else math.exp(score - best) for score in scores]
            for line, share in zip(group, mass, strict=True):
                yield {**line, "weight": share / sum(mass)}

    def forward(self, student: View, teachers: Sequence[View], batch: Batch, num_items: int | Tensor) -> tuple[Tensor, Metrics]:
        assert batch.labels is not None
        # Weights have a mean of 1 over rows, so that a step counts what one of unweighted rows would.
        weight = batch.extra.get("weight")
        spread: dict[str, Any] = (
            {} if weight is None else {"token_weight": weight[:, None].expand(batch.labels.shape).contiguous()}
        )
        options = self.row_options()
        if self.needs_of_teacher() is None:
            own = {name: options[name] for name in ("hard_weight", "label_smoothing", "z_loss", "workspace_mb")}
            return hard(student, batch.labels, num_items, **own, **spread)
        return self.distilled(student, teachers, batch, num_items, {**options, **spread})


def _check_prompts(rows: Source, prompt_tokens: int | None) -> None:
    """Raises where running text would be asked with its first token alone, or prompts be cut to a length of running text."""
    some = range(0, len(rows), max(len(rows) // _LOOKED_AT, 1))
    lengths = [len(row.source) for row in (asked_in(rows, i) for i in some) if len(row.gold)]
    if prompt_tokens is None and lengths and max(lengths) == 1:
        raise ValueError(
            "method.prompt_tokens: expected how many tokens of a row are a prompt, as the loss begins at its second token, got"
            " none; set it, or name prompts and completions in the data"
        )
    if prompt_tokens is not None and lengths and max(lengths) > 1:
        raise ValueError(
            f"method.prompt_tokens: expected none for rows with prompts of their own (one of {max(lengths)} tokens), got"
            f" {prompt_tokens}; leave it out"
        )


def _most_like(group: list[dict[str, Any]], gold: Tensor, tokenizer: Any) -> dict[str, Any]:
    """The hypothesis with the highest smoothed sentence BLEU; the likeliest where there is no gold target."""
    if not len(gold):
        return group[0]
    text = tokenizer.decode(gold.tolist(), skip_special_tokens=True)
    sacrebleu = need("sacrebleu", extra="bleu", what="method.interpolation")
    likeness = [sacrebleu.sentence_bleu(line["target"], [text]).score for line in group]
    best = likeness.index(max(likeness))
    return {**group[best], "bleu": round(likeness[best], 2)}


def _example(asked: Any, ids: list[int], most: int | None) -> Example:
    target = torch.tensor(ids, dtype=torch.int64)
    if asked.start is not None:
        return Example(torch.cat([target.new_tensor([asked.start]), target[:-1]]), target, asked.source)
    whole = torch.cat([asked.source, target])[:most]
    # Row t says what follows token t; nothing follows the last.
    rows = torch.arange(len(whole)) >= len(asked.source) - 1
    rows[-1] = False
    return Example(whole, loss_mask=rows)


class Hypotheses(RowsOf):
    """Rows with a weight each, where there are several of a source: `batch.extra["weight"]`, 1 on average."""

    def __init__(self, documents: Documents, weights: Tensor | None) -> None:
        super().__init__(documents)
        self._weights = None if weights is None else weights / weights.mean()

    def batch(self, indices: Sequence[int]) -> Batch:
        batch = self.rows.batch(indices)
        if self._weights is None:
            return batch
        return dataclasses.replace(batch, extra={"weight": self._weights[torch.as_tensor(list(indices))]})
