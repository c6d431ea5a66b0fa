"""What tasks with classes share: names of labels and their ids, a held-out part, scores from a table of counts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdfast.models.heads import call, logits_in
from kdfast.models.view import View
from kdfast.strict import refuse_unused
from kdfast.train.batch import IGNORE, Batch, check_classes
from kdfast.train.data import Source, hold_out
from kdfast.train.tasks.task import Evaluation, Splits, Task


@dataclass(frozen=True)
class ClassOptions:
    """labels: the names of the classes in the order of their ids; none: those of a model that the recipe names, else those in
    the training data, sorted.
    """

    labels: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        names = [label_name(label) for label in self.labels]
        if len(set(names)) < len(names) or None in names:
            raise ValueError(f"labels: expected different names, got {', '.join(map(str, self.labels))}")


D = TypeVar("D")


class ClassTask(Task[D]):
    """A task whose labels have names. `names` is known once the data are open."""

    Options = ClassOptions
    cache_is_data = False

    def __init__(self, options: Any, data: D) -> None:
        super().__init__(ClassOptions() if options is None else options, data)
        self.names: list[str] = [str(label_name(label)) for label in self.options.labels]
        self.pad_id: int | None = None

    def take_classes(self, configs: Iterable[Mapping[str, Any]]) -> None:
        """Where the recipe lists no classes, those of the first of these models whose config names them: a file may lack some,
        and then its first would not be the model's first.
        """
        if not self.names:
            self.names = next((names for config in configs if (names := classes_of(config))), [])

    def ids_of(self, found: Iterable[str | None], key: str) -> Tensor:
        """Ids of labels by name, `IGNORE` for None. The first data that are asked about say what labels there are.

        Raises:
            ValueError: a label that is not among them, or fewer than two of them.
        """
        found = list(found)
        if not self.names:
            self.names = sorted_names({name for name in found if name is not None})
        ids = {name: i for i, name in enumerate(self.names)}
        unknown = next((name for name in found if name is not None and name not in ids), None)
        if unknown is not None:
            raise ValueError(f"{key}: expected one of the labels {_some(self.names)}, got {unknown!r}; list all in task.labels")
        if not ids:
            remedy = "; name their column in data.label" if hasattr(self.data, "label") else ""
            raise ValueError(f"{key}: expected at least two different labels, got none: no row has one{remedy}")
        if len(ids) < 2:
            raise ValueError(f"{key}: expected at least two different labels, got {_some(self.names)}")
        return torch.tensor([IGNORE if name is None else ids[name] for name in found])

    def model_fields(self, vocab_size: int | None) -> dict[str, Any]:
        fields = {"id2label": dict(enumerate(self.names)), "label2id": {name: i for i, name in enumerate(self.names)}}
        return {"vocab_size": vocab_size, "pad_token_id": self.pad_id, **(fields if self.names else {})}

    def check_config(self, config: Mapping[str, Any], key: str) -> None:
        """Raises where the config of a model says other classes, or the same in another order."""
        said = classes_of(config)
        if self.names and said and said != self.names:
            raise ValueError(
                f"{key}: expected a model of the classes {_some(self.names)} in this order, got {_some(said)}; if they are the"
                " same, list them in its order in task.labels"
            )

    @torch.no_grad()
    def check_model(self, model: nn.Module, train: Source, key: str) -> None:
        """A module that no config describes has to take the data and give a logit for each class."""
        if getattr(model, "config", None) is not None or not self.names:
            return
        batch = train.batch([0])
        first = next(iter(model.parameters()), torch.empty(0))
        was_training = model.training
        try:
            found = logits_in(call(model.eval(), batch.to(first.device).by_name))
        except (RuntimeError, ValueError, TypeError) as error:
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in batch.by_name.items())
            raise ValueError(f"{key}: {type(model).__name__} does not take the data ({shapes}): {error}") from None
        finally:
            model.train(was_training)
        if found.shape[-1] != len(self.names):
            raise ValueError(
                f"{key}: expected {len(self.names)} logits, one for each of the classes {_some(self.names)}, got"
                f" {found.shape[-1]}"
            )

    def score(self, view: View, batch: Batch) -> dict[str, Tensor]:
        return class_scores(view.logits, batch.labels)

    def summary(self, scores: Sequence[Mapping[str, Tensor]]) -> Evaluation:
        return class_summary(scores)

    def headline(self, evaluation: Evaluation) -> str:
        mcc = f", MCC {evaluation['mcc']:.3f}" if "mcc" in evaluation else ""
        return f"accuracy {evaluation['accuracy']:.1%}, macro-F1 {evaluation['macro_f1']:.3f}{mcc}"


def classes_of(config: Mapping[str, Any]) -> list[str]:
    """The names of the classes in a model's config by their ids; none where they are the numbers that transformers gives."""
    theirs = {int(i): str(name) for i, name in (config.get("id2label") or {}).items()}
    names = [theirs[i] for i in sorted(theirs)]
    return [] if names == [f"LABEL_{i}" for i in range(len(names))] else names


def label_name(label: Any) -> str | None:
    """A label as it is called; None, and a text with nothing in it, are no label.

    Raises:
        ValueError: it is neither text nor a whole number.
    """
    if label is None or label == "":
        return None
    if not isinstance(label, str | int):
        raise ValueError(f"expected text or a whole number as label, got {type(label).__name__} {label!r}")
    return str(label)


def sorted_names(names: Iterable[str]) -> list[str]:
    """By number where all are whole numbers, else by letter."""
    names = list(names)
    numbers = all(name.removeprefix("-").isdecimal() for name in names)
    return sorted(names, key=(lambda name: (int(name), name)) if numbers else (lambda name: (0, name)))


def check_share(data: Any) -> None:
    """Raises where data options ask for a share of the training rows beside `validation` files or a split."""
    named = next((name for name in ("validation", "validation_split") if getattr(data, name, None)), None)
    if named and data.validation_share:
        refuse_unused(data, ("validation_share",), f"beside {named} expected none")


class Labelled(Source, Protocol):
    """Rows, some of which may have no label at all: `labelled` `[N]` says which have."""

    labelled: Tensor


def split(train: Labelled | None, validation: Source | None, share: float) -> Splits:
    """The same, with a seeded share of the training rows held out where there are no validation rows; those without a label,
    on which nothing can be measured, are all trained on."""
    if train is None or validation is not None or not share:
        return Splits(train, validation)
    kept, held = hold_out(train, share, train.labelled.tolist())
    return Splits(kept, held if len(held) else None)


def class_scores(logits: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
    """`confusion` `[C, C]` (rows: labels, columns: predictions) and the summed `nll` of the rows with a label."""
    classes = logits.shape[-1]
    if labels is None:
        return {"confusion": torch.zeros(classes, classes), "nll": torch.zeros(())}
    check_classes(labels, classes)
    counted = labels != IGNORE
    logits, labels = logits[counted].float(), labels[counted]
    nll = F.cross_entropy(logits, labels, reduction="sum")
    pairs = torch.bincount(labels * classes + logits.argmax(-1), minlength=classes * classes)
    return {"confusion": pairs.reshape(classes, classes).double(), "nll": nll.double()}


def class_summary(scores: Sequence[Mapping[str, Tensor]]) -> Evaluation:
    """accuracy, macro_f1 (over the classes that occur as label or prediction), mcc of two classes, nll, rows."""
    confusion = torch.stack([s["confusion"] for s in scores]).sum(0).double()
    rows = float(confusion.sum())
    if not rows:
        raise ValueError("data.validation: expected at least one row with a label, got none; add labels")
    hits, labelled, said = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    occurs = (labelled + said) > 0
    f1 = (2 * hits / (labelled + said).clamp(min=1))[occurs].mean()
    found: dict[str, Any] = {"accuracy": float(hits.sum()) / rows, "macro_f1": float(f1)}
    if len(confusion) == 2:
        (tn, fp), (fn, tp) = confusion.tolist()
        spread = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        found["mcc"] = (tp * tn - fp * fn) / spread if spread else 0.0
    return Evaluation(**found, nll=sum(float(s["nll"]) for s in scores) / rows, rows=int(rows))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
