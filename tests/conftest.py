"""Memory that nobody wrote is NaN: a kernel that leaves a hole in an output cannot pass."""

import pytest
import torch

torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
