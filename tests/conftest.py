"""Memory that nobody wrote is NaN: a kernel that leaves a hole in an output cannot pass."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers side by side share the cores; two threads each would wait for one another. Set before torch reads it, and in
    # the environment, so that a process a test starts computes in the same order.
    cores = os.cpu_count() or 1
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))

import pytest
import torch

torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True


_THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(_THREADS)  # an earlier test may have asked for others
