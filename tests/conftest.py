"""Memory that nobody wrote is NaN: a kernel that leaves a hole in an output cannot pass."""

import os

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # workers side by side share the cores; two threads each would wait for one another
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))

torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
