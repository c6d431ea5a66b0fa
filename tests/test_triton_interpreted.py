"""The Triton kernels: on the CPU under Triton's interpreter, on a GPU as they are.

Each module of `tests/triton_kernels` runs in a process of its own. TRITON_INTERPRET counts only when it is set before
triton is first imported, and once set it would turn every Triton kernel of this process, the backend's availability and
`bench aot` included, into its interpreted twin.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
MODULES = [
    "check_logits.py",
    "check_divergences.py",
    "check_topk.py",
    "check_linear.py",
    "check_hidden.py",
    "check_linear_logit_mse.py",
    "check_attention.py",
]
FOLDER = Path(__file__).parent / "triton_kernels"


def start(module: str, interpret: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / module)]
    # One thread each: the interpreter has no use for more, and the modules run side by side.
    env = os.environ | {"TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate()
    assert process.returncode == 0, output[-8000:]


@pytest.fixture(scope="module")
def interpreted(request: pytest.FixtureRequest) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All chosen modules, started together."""
    chosen = [item for item in request.session.items if "interpreted" in getattr(item, "fixturenames", ())]
    processes = {item.callspec.params["module"]: start(item.callspec.params["module"], "1") for item in chosen}
    yield processes
    for process in processes.values():
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("module", MODULES)
def test_interpreted(module: str, interpreted: dict[str, subprocess.Popen[str]]) -> None:
    finish(interpreted[module])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
@pytest.mark.parametrize("module", MODULES)
def test_on_gpu(module: str) -> None:
    finish(start(module, "0"))
