"""Kernels in CUDA for what Triton cannot reach, through the torch-free extension `kdfast._cuda`: data-centre GPUs from sm_90.

Unproven: nothing here has been measured on a GPU, so that only `use_backend("cuda")` reaches it. Ops and inputs without a
kernel here go to Triton.
"""

from __future__ import annotations

import importlib.util

import torch

from kdfast.dispatch import Backend, register
from kdfast.options import other_parts

#: Majors whose multiprocessors have clusters and 227 KiB of shared memory for a block.
_MAJORS = (9, 10)


def _missing() -> str | None:
    if importlib.util.find_spec("kdfast._cuda") is None:
        return "the CUDA extension is not built: reinstall kdfast with KDFAST_BUILD=cuda and nvcc (CUDA 12 or later) on PATH"
    try:
        from kdfast import _cuda
    except ImportError as error:
        return f"the CUDA extension is broken ({error}): reinstall kdfast with KDFAST_BUILD=cuda and nvcc on PATH"
    stale = other_parts(_cuda)
    if stale is not None:
        return f"the CUDA extension is another version's ({stale}): reinstall kdfast with KDFAST_BUILD=cuda and nvcc on PATH"
    return driver_refusal(_cuda.driver_version(), _cuda.build_version()) or _device_refusal()


def driver_refusal(driver: int, build: int) -> str | None:
    """Why a driver cannot run what this build holds; versions are 1000 * major + 10 * minor, driver 0 is none."""
    if driver == 0:
        return "there is no CUDA driver: install NVIDIA's driver on a machine with a GPU"
    if driver // 1000 < build // 1000:
        return (
            f"the driver's CUDA is {_text(driver)}, expected {build // 1000}.0 or later as this build: "
            "update the driver, or reinstall kdfast with an older nvcc on PATH"
        )
    return None


def _text(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _device_refusal() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no GPU: install a CUDA build of torch on a machine with one"
    found = torch.cuda.get_device_capability()
    if found[0] not in _MAJORS:
        return f"it needs a data-centre GPU of sm_90 or sm_100, this one is sm_{found[0]}{found[1]}: use triton"
    return None


register(
    Backend(
        name="cuda",
        package=__name__,
        ops=("logits",),
        devices=("cuda",),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        missing=_missing,
        proven=False,
        gives_way_to="triton",
    )
)
