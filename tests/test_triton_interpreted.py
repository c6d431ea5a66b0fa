"""The Triton kernels: on the CPU under Triton's interpreter, on a GPU as they are.

Each module of `tests/triton_kernels` runs in a process of its own. TRITON_INTERPRET counts only when it is set before
triton is first imported, and once set it would turn every Triton kernel of this process, the backend's availability and
`bench aot` included, into its interpreted twin.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
FOLDER = Path(__file__).parent / "triton_kernels"
MODULES = sorted(path.name for path in FOLDER.glob("check_*.py"))


def run(module: str, interpret: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / module)]
    # One thread: the interpreter has no use for more, and modules may run side by side.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    env |= {"TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-8000:]


@pytest.mark.parametrize("module", MODULES)
def test_interpreted(module: str) -> None:
    run(module, "1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
@pytest.mark.parametrize("module", MODULES)
def test_on_gpu(module: str) -> None:
    run(module, "0")
