"""Rows of infinite loss (`infinite_rows`), on a CPU. Triton's kernels: `triton_kernels/check_infinite_rows.py`."""

from __future__ import annotations

import pytest
from infinite_rows import *  # noqa: F403  its tests


@pytest.fixture(params=["cpp", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def device() -> str:
    return "cpu"
