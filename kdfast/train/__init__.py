"""A thin trainer on `accelerate`: recipes read from YAML, tasks, live or cached teachers, objectives, exact resume.

from kdfast.train import Recipe, distill
result = distill(Recipe.load("student.yaml", ["steps=1000"]))
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from kdfast.models.view import Needs, View
from kdfast.train.batch import Batch
from kdfast.train.evaluate import evaluate
from kdfast.train.objective import Metric, Objective
from kdfast.train.tasks.task import Evaluation

if TYPE_CHECKING:
    from kdfast.train.class_cache import capture_classes
    from kdfast.train.loop import distill
    from kdfast.train.recipe import Recipe
    from kdfast.train.result import Result

#: What a run needs, a model's scores alone do not.
_NEEDS = ("accelerate", "rich", "safetensors", "tensorboard", "tokenizers", "transformers", "yaml")
_RUNS = {"Recipe": "kdfast.train.recipe", "Result": "kdfast.train.result", "distill": "kdfast.train.loop",
         "capture_classes": "kdfast.train.class_cache"}  # fmt: skip

__all__ = [
    "Batch",
    "Evaluation",
    "Metric",
    "Needs",
    "Objective",
    "Recipe",
    "Result",
    "View",
    "capture_classes",
    "distill",
    "evaluate",
]


def __getattr__(name: str) -> Any:
    """What a run needs, imported when it is used."""
    if name not in _RUNS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    missing = [package for package in _NEEDS if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f"kdfast.train needs {', '.join(missing)}: pip install 'kdfast[train]'")
    return getattr(importlib.import_module(_RUNS[name]), name)
