"""`Task`: what the data are. One file of this folder holds one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from torch import Tensor, nn

from kdfast.models.view import View
from kdfast.train.batch import Batch
from kdfast.train.data import Source
from kdfast.train.objective import NoOptions

D = TypeVar("D")


class Splits(NamedTuple):
    train: Source | None
    validation: Source | None


class Evaluation(dict[str, Any]):
    """Scores by name, which are attributes too; what they are is the task's affair (`ppl`, `nll`, `top1`, `tokens`)."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"evaluation: expected one of {', '.join(self)}, got {name!r}") from None


class Task(Generic[D]):
    """Rows of data to batches, the class of model, the score.

    A subclass names its data options (a frozen dataclass, the keys under `data:`) and its own (under `task:`).
    """

    Data: ClassVar[type]
    Options: ClassVar[type] = NoOptions
    #: Kind of model, of `kdfast.models.load.AUTO_CLASSES`.
    kind: ClassVar[str]
    #: Whether losses go through a head that is named: worth it where the last dimension is a vocabulary.
    through_head: ClassVar[bool] = False
    needs_tokenizer: ClassVar[bool] = True
    #: Whether a teacher's cache is the training data; otherwise it says something about each row of `data.train`.
    cache_is_data: ClassVar[bool] = True

    def __init__(self, options: Any, data: D) -> None:
        self.options, self.data = options, data
        #: What a person is told of the rows that were opened.
        self.notes: list[str] = []

    def open(self, tokenizer: Any, tokenizer_file: Path | None, folder: Path, needs_train: bool) -> Splits:
        """The data, checked. `tokenizer` is None for a task without; what is made of the data may be kept in `folder`.

        Raises:
            ValueError: something is missing or empty; one line with the key under `data`.
        """
        raise NotImplementedError

    def model_fields(self, vocab_size: int | None) -> dict[str, Any]:
        """Defaults for the configuration of a model with random weights, and settings of one from a folder."""
        return {}

    def example(self, model: nn.Module) -> dict[str, Tensor]:
        """A tiny batch of a model's inputs, to try its head on."""
        raise NotImplementedError

    def check_model(self, model: nn.Module, train: Source, key: str) -> None:
        """Tries a model on a row of the data, where nothing else tells whether it fits.

        Raises:
            ValueError: it does not; one line with `key`, what the recipe calls the model.
        """

    def positions(self, batch: Batch) -> Tensor | None:
        """bool, the rows of a batch without labels on which a teacher is heard, aligned with the logits; None: the batch's own,
        each of which is one."""
        return None

    def score(self, view: View, batch: Batch) -> dict[str, Tensor]:
        """Sums over a batch, on the device; runs inside the wrapped module."""
        raise NotImplementedError

    def score_written(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Sums over what the model writes by itself for a batch; none unless a task has such scores."""
        return {}

    def summary(self, scores: Sequence[Mapping[str, Tensor]]) -> Evaluation:
        """What the sums of all batches come to."""
        raise NotImplementedError

    def chosen_by(self, evaluation: Evaluation) -> tuple[str, int]:
        """The score by which a model is better than another, and 1 where more of it is better, else -1."""
        return next(iter(evaluation)), 1

    def headline(self, evaluation: Evaluation) -> str:
        """The evaluation in a few words."""
        return ", ".join(f"{name} {value:.4g}" for name, value in evaluation.items())
