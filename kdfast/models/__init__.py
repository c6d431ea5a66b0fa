"""Models: built and loaded, their heads named, and what a method looks at taken out of one forward pass."""

from importlib.util import find_spec

_missing = [name for name in ("safetensors", "transformers") if find_spec(name) is None]
if _missing:
    raise ImportError(f"kdfast.models needs {', '.join(_missing)}: pip install 'kdfast[train]'")
