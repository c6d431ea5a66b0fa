"""Kernels in Triton: the default on a GPU; on CPU tensors under Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

import importlib.util
import os

import torch

from kdfast.dispatch import Backend, register


def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "no GPU is visible: set TRITON_INTERPRET=1 before the first import to run it, slowly, on a CPU"
    return None


register(
    Backend(
        name="triton",
        package=__name__,
        ops=("logits", "linear", "topk", "attention", "hidden", "linear_logit_mse", "scale", "codec"),
        devices=("cuda", "cpu"),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        missing=_missing,
    )
)
