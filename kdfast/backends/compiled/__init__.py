"""Kernels in C++, reached through the torch-free extension `kdfast._C`."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import torch

from kdfast.dispatch import Backend, register
from kdfast.options import other_parts

REMEDY = "install a C++ compiler (g++ or clang++), then reinstall kdfast"
#: Of an extension that was built from other sources than this Python was written for.
REBUILD = "rebuild it: reinstall kdfast, or in its sources run python setup.py build_ext --inplace"
#: One function of every file of bindings: an extension that lacks one was built from other sources.
_FUNCTIONS = ("isa", "matmul", "logits", "topk", "attention_tile", "hidden", "codec_decode_indexed")


def load() -> tuple[ModuleType | None, str | None]:
    """`kdfast._C`, or why it cannot be used, with the remedy. Processes that never need a kernel do not load it."""
    if importlib.util.find_spec("kdfast._C") is None:
        return None, f"the C++ extension is not built: {REMEDY}"
    try:
        module = importlib.import_module("kdfast._C")
    except ImportError as error:
        return None, f"the C++ extension is broken ({error}): {REMEDY}"
    lacking = [name for name in _FUNCTIONS if not hasattr(module, name)]
    if lacking:
        return None, f"the C++ extension is another version's (it lacks {', '.join(lacking)}): {REBUILD}"
    stale = other_parts(module)
    return (module, None) if stale is None else (None, f"the C++ extension is another version's ({stale}): {REBUILD}")


def _missing() -> str | None:
    return load()[1]


register(
    Backend(
        name="cpp",
        package=__name__,
        ops=("logits", "linear", "topk", "attention", "hidden", "linear_logit_mse", "scale", "codec"),
        devices=("cpu",),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        missing=_missing,
    )
)
