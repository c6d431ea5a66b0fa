"""Rows of infinite loss (`infinite_rows`), in Triton."""

from __future__ import annotations

import pytest
from infinite_rows import *  # noqa: F403  its tests


@pytest.fixture
def backend() -> str:
    return "triton"
