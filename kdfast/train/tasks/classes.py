"""What tasks with classes share: names of labels and their ids, a held-out part, scores from a table of counts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from kdfast.models.heads import call, logits_in
from kdfast.models.load import kind_in, read_config
from kdfast.models.view import View
from kdfast.strict import refuse_unused
from kdfast.train.batch import IGNORE, Batch, check_classes, likeliest
from kdfast.train.data import Source, hold_out
from kdfast.train.tasks.task import Evaluation, Splits, Task

#: Kinds of model whose head has a logit for each class: in a folder all of them may be called `classifier`.
_HEADED = ("sequence_classification", "token_classification", "image_classification")


@dataclass(frozen=True)
class ClassOptions:
    """What the classes are.

    Args:
        labels: as the data have them, in the order of their ids; none: the classes of a model that the recipe names, else what
            the training data have, sorted.
        names: what models call the same, where that is something else (`labels: [0, 1]`, `names: [NEGATIVE, POSITIVE]`).
        no_label: what stands in the data of a row that has none (MNLI's `-`).
    """

    labels: tuple[Any, ...] = ()
    names: tuple[Any, ...] = ()
    no_label: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        for option in ("labels", "names", "no_label"):
            read = next((x for x in getattr(self, option) if isinstance(x, bool) or x is None), "")
            if read != "":
                raise ValueError(f"{option}: expected text or whole numbers, got {read}, as YAML reads it; put it in quotes")
        for option in ("labels", "names"):
            found = [label_name(label) for label in getattr(self, option)]
            if len(set(found)) < len(found) or None in found:
                raise ValueError(f"{option}: expected different names, got {', '.join(map(str, getattr(self, option)))}")
        if self.names and len(self.names) != len(self.labels):
            raise ValueError(f"names: expected one for each of the {len(self.labels)} labels, got {len(self.names)}")
        both = set(map(str, self.labels)) & set(map(str, self.no_label))
        if both:
            raise ValueError(f"no_label: expected what is no class, got {both.pop()}, which is in labels")


D = TypeVar("D")


class ClassTask(Task[D]):
    """A task whose labels have names. `names` is known once the data are open."""

    Options = ClassOptions
    cache_is_data = False

    def __init__(self, options: Any, data: D) -> None:
        super().__init__(ClassOptions() if options is None else options, data)
        self.names: list[str] = [str(label_name(label)) for label in self.options.names or self.options.labels]
        self.pad_id: int | None = None
        #: Whether rows that are no training data have to have labels.
        self.scored = True
        #: Whether `names` are what the data have, sorted: nobody has said their order.
        self.guessed = False
        #: Options of the data that were said of other files than these.
        self.inherited: frozenset[str] = frozenset()
        #: Whether a model has learned the classes: it has no logit for another one.
        self.learned = False

    def take_classes(self, configs: Iterable[Mapping[str, Any]]) -> None:
        """Where the recipe lists no classes, those of the first of these models whose config names them: a file may lack some,
        and then its first would not be the model's first. Classes of another task's head are none of the data's.
        """
        own = [config for config in configs if kind_in(config) not in _HEADED or kind_in(config) == self.kind]
        self.learned = any(kind_in(config) == self.kind for config in own)
        if not self.names:
            self.names = next((names for config in own if (names := classes_of(config))), [])

    def ids_of(self, found: Iterable[str | None], key: str) -> Tensor:
        """Ids of labels by name, `IGNORE` for None. The first data that are asked about say what labels there are.

        Raises:
            ValueError: a label that is not among them, or fewer than two of them.
        """
        none = {str(label) for label in self.options.no_label}
        found = [None if name in none else name for name in found]
        if not self.names:
            self.names, self.guessed = sorted_names({name for name in found if name is not None}), True
        labels = [str(label) for label in self.options.labels] if self.options.names else self.names
        ids = {name: i for i, name in enumerate(labels)}
        unknown = sorted_names({name for name in found if name is not None} - set(ids))
        if unknown:
            raise ValueError(
                f"{key}: expected one of the labels {_some(labels)}, got {_some(unknown)}; {self._remedy(labels, unknown)}"
            )
        if not ids:
            remedy = "; name their column in data.label" if hasattr(self.data, "label") else ""
            raise ValueError(f"{key}: expected at least two different labels, got none: no row has one{remedy}")
        if len(ids) < 2:
            raise ValueError(f"{key}: expected at least two different labels, got {_some(self.names)}")
        return torch.tensor([IGNORE if name is None else ids[name] for name in found])

    def _remedy(self, labels: Sequence[str], unknown: Sequence[str]) -> str:
        """What to write where the data have labels that the classes known have not."""
        none = f"what means none, task.no_label: {_listed(unknown)}"
        if not self.learned:
            return f"list all, task.labels: {_listed([*labels, *unknown])}, or {none}"
        names = _listed(self.names)
        if len(unknown) == len(labels) and not self.guessed:
            pairs = ", ".join(f"{name} for {label}" for label, name in zip(labels, unknown, strict=True))
            return (
                f"if they are the same, say which is which, such as {pairs}: task.labels: {_listed(unknown)}, task.names:"
                f" {names}"
            )
        return (
            f"the model has learned no others: name files with these, or {none}, or in task.labels what the data call each of"
            f" task.names: {names}"
        )

    def order_notes(self, keys: Sequence[str]) -> list[str]:
        """What a person is told where `keys` are models that have learned the classes and have no names for them: labels other
        than the numbers of the classes are sorted, and a model that was trained the other way round would be wrong each time.
        """
        if not keys or not self.guessed or self.names == [str(i) for i in range(len(self.names))]:
            return []
        taken = _some([f"class {i} is {name}" for i, name in enumerate(self.names)])
        other = f": {_listed(self.names[::-1])}" if len(self.names) == 2 else ""
        return [
            f"{', '.join(keys)}: names no classes, so the labels are taken as sorted: {taken}; if it was trained otherwise,"
            f" task.labels{other} says so"
        ]

    def splits(self, train: Labelled | None, validation: Source | None) -> Splits:
        """The same, with a seeded share of the training rows held out where there are no validation rows; those without a
        label, on which nothing can be measured, are all trained on.
        """
        share = self.data.validation_share  # type: ignore[attr-defined]
        if train is None or validation is not None or not share:
            return Splits(train, validation)
        kept, held = hold_out(train, share, train.labelled.tolist())
        if not len(held):
            self.notes.append("data.validation_share: no row with a label is held out, so nothing is evaluated")
        return Splits(kept, held if len(held) else None)

    def model_fields(self, vocab_size: int | None) -> dict[str, Any]:
        fields = {"id2label": dict(enumerate(self.names)), "label2id": {name: i for i, name in enumerate(self.names)}}
        return {"vocab_size": vocab_size, "pad_token_id": self.pad_id, **(fields if self.names else {})}

    def check_folder(self, folder: Path, key: str, heard: bool) -> None:
        """Raises where the head of the model in a folder is for other classes than the task's, or has them in another order; of
        a model that is `heard` as it is also where it is another task's head, which loads as if it were this one's.
        """
        config = read_config(folder)
        kind = kind_in(config)
        if kind == self.kind or (heard and not config.get("architectures")):
            self.check_config(config, key)
        elif heard and kind in _HEADED:
            names, count = classes_of(config), len(config.get("id2label") or (0, 1))
            wanted = f" of the {len(self.names)} classes {_some(self.names)}" if self.names else ""
            its = f" ({_some(names)})" if names else ""
            raise ValueError(
                f"{key}: expected a model for {self.kind}{wanted}, got a {config['architectures'][0]} of {count} classes{its};"
                " train one for this task first (method: supervised, student: {path: ENCODER})"
            )

    def check_config(self, config: Mapping[str, Any], key: str) -> None:
        """Raises where the config of a model says other classes, the same in another order, or another number of them."""
        said = classes_of(config)
        if self.names and not said:
            self._check_count(len(config.get("id2label") or (0, 1)), key)  # transformers writes down no two without a name
        if self.names and said and said != self.names:
            raise ValueError(
                f"{key}: expected a model of the classes {_some(self.names)} in this order, got {_some(said)}; if they are the"
                f" same, {self._order(said)}"
            )

    def _order(self, said: Sequence[str]) -> str:
        if set(said) == set(self.names):
            return "list them in its order in task.labels"
        return f"task.names: {_listed(said)} says so, beside task.labels in the same order"

    @torch.no_grad()
    def check_model(self, model: nn.Module, train: Source, key: str) -> None:
        """A model has to give a logit for each class, and one that no config describes to take the data."""
        if not self.names:
            return
        config = getattr(model, "config", None)
        if config is not None:
            self._check_count(getattr(config, "num_labels", None), key)
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
        self._check_count(found.shape[-1], key)

    def _check_count(self, found: int | None, key: str) -> None:
        if found is not None and found != len(self.names):
            raise ValueError(
                f"{key}: expected {len(self.names)} logits, one for each of the classes {_some(self.names)}, got {found}; list"
                " all in task.labels, or take a model of these"
            )

    def score(self, view: View, batch: Batch) -> dict[str, Tensor]:
        return class_scores(view.logits, batch.labels)

    def summary(self, scores: Sequence[Mapping[str, Tensor]]) -> Evaluation:
        return class_summary(scores)

    def shown(self, row: int) -> dict[str, Any]:
        """What stands beside `said` of a row, whose number may say too little."""
        return {}

    def said(self, view: View, batch: Batch) -> list[dict[str, Any]]:
        """Of each row its label (None: it has none), the likeliest class (None: of NaN) and the probabilities of all."""
        labels = [IGNORE] * len(view.logits) if batch.labels is None else batch.labels.tolist()
        best, found = likeliest(view.logits).tolist(), view.logits.float().softmax(-1).tolist()
        return [
            {"label": None if label == IGNORE else self.names[label], "said": None if most < 0 else self.names[most],
             "probabilities": dict(zip(self.names, row, strict=True))}
            for label, most, row in zip(labels, best, found, strict=True)
        ]  # fmt: skip

    def chosen_by(self, evaluation: Evaluation) -> tuple[str, int]:
        return "accuracy", 1

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
    """By number where all are whole numbers, or `LABEL_` and one as transformers names classes; else by letter."""
    names = list(names)
    for prefix in ("", "LABEL_"):
        numbers = {name: name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        if len(numbers) == len(names) and all(number.removeprefix("-").isdecimal() for number in numbers.values()):
            return sorted(names, key=lambda name: (int(numbers[name]), name))
    return sorted(names)


def check_share(data: Any) -> None:
    """Raises where data options ask for a share of the training rows beside `validation` files or a split."""
    named = next((name for name in ("validation", "validation_split") if getattr(data, name, None)), None)
    if named and data.validation_share:
        refuse_unused(data, ("validation_share",), f"beside {named} expected none")


class Labelled(Source, Protocol):
    """Rows, some of which may have no label at all: `labelled` `[N]` says which have."""

    labelled: Tensor


def class_scores(logits: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
    """`confusion` `[C, C]` (rows: labels, columns: predictions) and the summed `nll` of the rows with a label."""
    classes = logits.shape[-1]
    if labels is None:
        return {"confusion": torch.zeros(classes, classes), "nll": torch.zeros(())}
    check_classes(labels, classes)
    counted = labels != IGNORE
    logits, labels = logits[counted].float(), labels[counted]
    nll = F.cross_entropy(logits, labels, reduction="sum")
    said = likeliest(logits)
    said = torch.where(said < 0, (labels + 1) % classes, said)  # who says nothing is wrong
    pairs = torch.bincount(labels * classes + said, minlength=classes * classes)
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


def _listed(names: Sequence[str]) -> str:
    """As a recipe has them: what YAML would read as another name is in quotes."""
    plain = [int(name) if name.isdecimal() and str(int(name)) == name else name for name in names]
    return str(yaml.safe_dump(plain, default_flow_style=True, width=1 << 20, allow_unicode=True)).strip()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
