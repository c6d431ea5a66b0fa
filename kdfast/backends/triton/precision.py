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


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Within the block products of float32 are not rounded to TF32, whatever the user allows: for sums whose terms cancel."""
    settings, (name, exact) = torch.backends.cuda.matmul, setting()
    before = getattr(settings, name)
    if before == exact:
        yield
        return
    setattr(settings, name, exact)
    try:
        yield
    finally:
        setattr(settings, name, before)
