"""A thin trainer on `accelerate`: recipes read from YAML, live or cached teachers, exact resume.

from kdfast.train import Recipe, distill
result = distill(Recipe.load("student.yaml", ["steps=1000"]))
"""

from importlib.util import find_spec

_NEEDS = ("accelerate", "rich", "safetensors", "tensorboard", "tokenizers", "transformers", "yaml")
_missing = [name for name in _NEEDS if find_spec(name) is None]
if _missing:
    raise ImportError(f"kdfast.train needs {', '.join(_missing)}: pip install 'kdfast[train]'")

from kdfast.train.loop import Result, distill  # noqa: E402
from kdfast.train.recipe import Recipe  # noqa: E402

__all__ = ["Recipe", "Result", "distill"]
