"""Where the kernels run, and NumPy's warnings: the interpreter computes both sides of a `where`."""

from __future__ import annotations

import os

import numpy as np
import pytest


@pytest.fixture(scope="session")
def device() -> str:
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@pytest.fixture(autouse=True)
def quiet() -> None:
    np.seterr(all="ignore")
