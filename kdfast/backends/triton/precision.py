"""How torch multiplies float32 on a GPU: set through the one interface that a version of torch has.

Reading the older flag raises once anybody used the newer one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def setting() -> tuple[str, str | bool]:
    """The attribute of `torch.backends.cuda.matmul`, and its value for products that round nothing."""
    newer = hasattr(torch.backends.cuda.matmul, "fp32_precision")
    return ("fp32_precision", "ieee") if newer else ("allow_tf32", False)


def exact_products() -> contextlib.AbstractContextManager[None]:
    """Within the block products of float32 are not rounded to TF32, whatever the user allows: for sums whose terms cancel."""
    return _products(setting()[1])


def tf32_products() -> contextlib.AbstractContextManager[None]:
    """Within the block products of float32 run in TF32: for halves, which it holds exactly, and gradients beside halves.

    TF32 keeps 10 bits of a mantissa as float16 does, and the exponents of float32.
    """
    name, _ = setting()
    return _products("tf32" if name == "fp32_precision" else True)


@contextlib.contextmanager
def _products(wanted: str | bool) -> Iterator[None]:
    settings, (name, _) = torch.backends.cuda.matmul, setting()
    before = getattr(settings, name)
    if before == wanted:
        yield
        return
    setattr(settings, name, wanted)
    try:
        yield
    finally:
        setattr(settings, name, before)
