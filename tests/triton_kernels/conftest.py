"""Where the kernels run, what a launch may be given (`bench.launch_lint`), and NumPy's warnings.

Those are off: the interpreter computes both sides of a `where`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

from bench import launch_lint


@pytest.fixture(scope="session")
def device() -> str:
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@pytest.fixture(autouse=True)
def quiet() -> None:
    np.seterr(all="ignore")


@pytest.fixture(autouse=True)
def linted(device: str) -> Iterator[None]:
    """What the interpreter takes, a GPU's launch may not; what a CPU answers at once, a GPU has the host wait for."""
    if device == "cuda":
        yield
        return
    with launch_lint.interpreted():
        yield
