"""kdfast: knowledge distillation that costs what the arithmetic costs.

Fused losses (`kd_loss`, `linear_kd_loss`, `topk_kd_loss`, `hidden_mse` and more), an offline teacher cache
(`kdfast.cache`) and a thin trainer (`kdfast.train`). Importing this package needs torch and numpy only.
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"


#: Whether `load` runs this file a second time, over the names of the first.
_again = "load" in globals()


def _waits() -> bool:
    """Whether this process is the command `kdfast`, which imports torch once its arguments make sense: `--help` needs none.

    Only the way this process was started counts; those that it starts (`multiprocessing`, `torchrun`) import everything.
    """
    words = iter(sys.orig_argv[1:])
    for word in words:
        if word == "-m":
            return next(words, "").partition(".")[0] == "kdfast"
        if word in ("-X", "-W"):
            next(words, None)
        elif not word.startswith("-") or word == "-c":
            return Path(word).stem == "kdfast"
    return False


def load() -> None:
    """Imports torch and registers the kernels; done by the import itself except in the command `kdfast`."""
    if "kd_loss" not in globals():
        importlib.reload(sys.modules[__name__])


if TYPE_CHECKING or _again or not _waits():
    import kdfast.backends as _  # noqa: F401  (registers the kernels)
    from kdfast.dispatch import backends, use_backend
    from kdfast.ops.attention import attention_kl, attention_mse
    from kdfast.ops.attention_map import attention_map_mse
    from kdfast.ops.codec import EncodedTargets
    from kdfast.ops.hidden import hidden_cosine, hidden_mse
    from kdfast.ops.linear import linear_kd_loss
    from kdfast.ops.linear_logit_mse import linear_logit_mse
    from kdfast.ops.linear_topk import linear_topk_kd_loss, linear_topk_targets
    from kdfast.ops.logits import kd_loss
    from kdfast.ops.rows import Part, Parts, debug_checks
    from kdfast.ops.targets import TopKTargets
    from kdfast.ops.topk import topk_kd_loss, topk_targets
    from kdfast.options import Head
else:

    def __getattr__(name: str) -> Any:
        load()
        if name not in globals():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals()[name]


__all__ = [
    "EncodedTargets",
    "Head",
    "Part",
    "Parts",
    "TopKTargets",
    "attention_kl",
    "attention_map_mse",
    "attention_mse",
    "backends",
    "debug_checks",
    "hidden_cosine",
    "hidden_mse",
    "kd_loss",
    "linear_kd_loss",
    "linear_logit_mse",
    "linear_topk_kd_loss",
    "linear_topk_targets",
    "topk_kd_loss",
    "topk_targets",
    "use_backend",
]
