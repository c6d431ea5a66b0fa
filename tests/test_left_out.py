"""What takes no part leaves no trace (`left_out`), on a CPU. Triton's kernels: `triton_kernels/check_left_out.py`."""

from __future__ import annotations

import pytest
from left_out import *  # noqa: F403  its tests


@pytest.fixture(params=["cpp", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def device() -> str:
    return "cpu"
