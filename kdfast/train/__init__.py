"""A thin trainer on `accelerate`: recipes read from YAML, tasks, live or cached teachers, objectives, exact resume.

from kdfast.train import Recipe, distill
result = distill(Recipe.load("student.yaml", ["steps=1000"]))
"""

from importlib.util import find_spec

_NEEDS = ("accelerate", "rich", "safetensors", "tensorboard", "tokenizers", "transformers", "yaml")
_missing = [name for name in _NEEDS if find_spec(name) is None]
if _missing:
    raise ImportError(f"kdfast.train needs {', '.join(_missing)}: pip install 'kdfast[train]'")

from kdfast.models.view import Needs, View  # noqa: E402
from kdfast.train.batch import Batch  # noqa: E402
from kdfast.train.evaluate import Evaluation, evaluate  # noqa: E402
from kdfast.train.loop import Result, distill  # noqa: E402
from kdfast.train.objective import Metric, Objective  # noqa: E402
from kdfast.train.recipe import Recipe  # noqa: E402

__all__ = ["Batch", "Evaluation", "Metric", "Needs", "Objective", "Recipe", "Result", "View", "distill", "evaluate"]
