"""What the studies on MNIST share: runs of a recipe with other values, scores on the test images, tables."""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from prepare import PARTS, split
from torch import Tensor, nn

from kdfast.files import write_json, write_text
from kdfast.models.load import from_function, load_weights
from kdfast.train import Recipe, distill
from kdfast.train.tasks.image_classification import Data, ImageClassification

HERE = Path(__file__).resolve().parent
SEEDS = (1, 2, 3)


class Study:
    """Runs below `out`, each a folder that is gone on with when it is there; every model sees the test images once.

    Args:
        source: folder with MNIST's IDX files; None: `$KDFAST_DATA/mnist_t10k`. parts: rows of train, validation and test.
        changes: overrides of every recipe (fewer steps, for a trial).
    """

    def __init__(
        self, out: Path, source: Path | None = None, parts: dict[str, int] | None = None, changes: Sequence[str] = ()
    ) -> None:
        self.out, self.changes, self.rows = out, list(changes), []  # type: ignore[var-annotated]
        if source is None:
            source = Path(os.environ.get("KDFAST_DATA", "data")) / "mnist_t10k"
        self.folders = {name: out / "mnist" / name for name in PARTS}
        if not all(folder.is_dir() for folder in self.folders.values()):
            split(source, out / "mnist", parts)
        # Names of classes come from the training labels, so that they are the same whatever a small test set lacks.
        self.names: tuple[str, ...] = ()
        self.sources = {name: self._open(folder) for name, folder in self.folders.items()}

    def _open(self, folder: Path) -> Any:
        task = ImageClassification(
            ImageClassification.Options(self.names), Data(validation=(str(folder),), mean=(0.1307,), std=(0.3081,))
        )
        source = task.open(None, None, folder, needs_train=False).validation
        self.names = self.names or tuple(task.names)
        return source

    def run(self, recipe: Path, name: str, *changes: str) -> Path:
        """Trains what `recipe` says with `changes`; the folder of the run."""
        data = [f"data.{part}={self.folders[part]}" for part in ("train", "validation")]
        labels = f"task={{name: image_classification, labels: [{', '.join(self.names)}]}}"
        wanted = [f"out={self.out / name}", "tracker=none", labels, *data, *changes, *self.changes]
        print(f"{name}: {' '.join(changes)}", file=sys.stderr, flush=True)
        distill(Recipe.load(recipe, wanted), say=lambda line: None)
        return self.out / name

    def model(self, run: Path) -> nn.Module:
        """The student of a run, as its recipe makes it."""
        spec = Recipe.load(run / "recipe.yaml").student
        model = from_function(str(spec.function), spec.arguments, "student.function")
        load_weights(model, run / "model", "student")
        return model.eval()

    @torch.no_grad()
    def logits(self, model: nn.Module, part: str) -> tuple[Tensor, Tensor]:
        """`[N, C]` and labels of a part of the data."""
        source = self.sources[part]
        found, labels = [], []
        for start in range(0, len(source), 500):
            batch = source.batch(range(start, min(start + 500, len(source))))
            said = model(batch.by_name["pixel_values"])
            found.append(said if isinstance(said, Tensor) else said.logits)
            labels.append(batch.labels)
        return torch.cat(found), torch.cat(labels)

    def accuracy(self, run: Path, part: str = "test") -> float:
        logits, labels = self.logits(self.model(run), part)
        return float((logits.argmax(-1) == labels).float().mean())

    def row(
        self, group: str, what: str, parameters: int, validation: Sequence[float], test: Sequence[float], **more: Any
    ) -> None:
        """A line of the table."""
        scores = {"validation": list(validation), "test": list(test)}
        self.rows.append({"group": group, "what": what, "parameters": parameters, **scores, **more})
        write_json(self.out / "results.json", self.rows)

    def table(self) -> str:
        """Everything so far, as Markdown; `results.md` and `results.json` hold it."""
        extra = list(
            dict.fromkeys(k for row in self.rows for k in row if k not in ("group", "what", "parameters", "validation", "test"))
        )
        head = ["", "", "parameters", "validation %", "test %", *extra]
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for row in self.rows:
            cells = [row["group"], row["what"], f"{row['parameters']:,}", spread(row["validation"]), spread(row["test"])]
            lines.append("| " + " | ".join([*cells, *(shown(row.get(name, "")) for name in extra)]) + " |")
        text = "\n".join(lines) + "\n"
        write_text(self.out / "results.md", text)
        return text


def shown(value: Any) -> str:
    return spread(value) if isinstance(value, list) else str(value)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds, in percent."""
    if not values:
        return ""
    mean = f"{100 * statistics.fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.2f}"


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
