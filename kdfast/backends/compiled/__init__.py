"""Kernels in C++, reached through the torch-free extension `kdfast._C`."""

from __future__ import annotations

import importlib.util

import torch

from kdfast.dispatch import Backend, register


def _missing() -> str | None:
    if importlib.util.find_spec("kdfast._C") is None:
        return "the C++ extension is not built: install a C++ compiler (g++ or clang++), then reinstall kdfast"
    return None


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
