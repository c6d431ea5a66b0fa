"""Every test of this folder is linted under the interpreter (`conftest.linted`). Run by `test_triton_interpreted`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import kdfast
from kdfast.backends.triton.scale import scale_kernel


@pytest.fixture(autouse=True)
def interpreter_only(device: str) -> None:
    if device == "cuda":
        pytest.skip("on a GPU Triton's binder and the driver refuse by themselves")


@pytest.mark.parametrize(
    ("grid", "upstream", "error", "says"),
    [
        ((1,), [1.0], TypeError, "scale_kernel: upstream_ptr: a list; expected int, float, bool, str, a tensor"),
        ((0,), torch.ones(()), ValueError, "scale_kernel: grid: 0 blocks along x"),
        ((1, 65536), torch.ones(()), ValueError, "scale_kernel: grid: 65536 blocks along y, expected 1 to 65535"),
        (lambda meta: (meta["n"] - 8,), torch.ones(()), ValueError, "scale_kernel: grid: 0 blocks along x"),
    ],
    ids=["list", "empty", "y", "computed"],
)
def test_launches(grid: Any, upstream: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        scale_kernel[grid](torch.ones(8), upstream, 8, BLOCK=16)


@pytest.mark.parametrize(
    "asks", ["x.tolist()", "x[0].item()", "bool(x.any())", "x.nonzero()", "x.numpy()", "torch.tensor(1.0, device=x.device)"]
)
def test_waits_of_the_backend(asks: str) -> None:
    place = Path(kdfast.__file__).parent / "backends" / "triton" / "somewhere.py"
    names: dict[str, Any] = {"torch": torch, "x": torch.ones(3)}
    with pytest.raises(RuntimeError, match=r"somewhere.py:1: .* would make the host wait for the device"):
        eval(compile(asks, str(place), "eval"), names)
    eval(asks, names)  # a test's own line may ask
