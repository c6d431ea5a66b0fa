"""Memory that nobody wrote is NaN: a kernel that leaves a hole in an output cannot pass."""

import gc
import os
from collections.abc import Iterator

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
def seeded(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    # An earlier test may have asked for others. A module whose sizes give threads nothing to share says so by `THREADS`.
    torch.set_num_threads(getattr(request.module, "THREADS", _THREADS))


@pytest.fixture(scope="module")
def imports_are_no_garbage() -> Iterator[None]:
    """Measuring collects garbage before every call: what imports have left is none of it."""
    gc.freeze()
    yield
    gc.unfreeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of a GPU in order of `worth` (`test_gpu_smoke.py`), what has none where it stood, before them; what is `unproven`
    only where `-m` names it."""

    def worth(item: pytest.Item) -> int:
        mark = item.get_closest_marker("worth")
        return mark.args[0] if mark else 0

    if "unproven" not in config.getoption("markexpr"):
        items[:] = [item for item in items if not item.get_closest_marker("unproven")]
    items.sort(key=worth)
