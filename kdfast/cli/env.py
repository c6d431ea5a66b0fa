"""`kdfast env`: what is here, what runs, and what to do about what does not."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata, util
from typing import Any

from kdfast.files import json_text

_PACKAGES = ("torch", "numpy", "triton", "transformers", "accelerate", "tokenizers", "safetensors", "rich", "matplotlib")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "env", help="versions, processor, threads, backends", epilog="example: kdfast env --json",
        description="Prints versions, the processor's instruction set, threads, GPUs, and every backend with its remedy.",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    found = collect()
    print(json_text(found, indent=2)) if args.json else _show(found)
    return 0


def collect() -> dict[str, Any]:
    """Everything `kdfast env` prints, as plain values."""
    import torch

    import kdfast

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {
        "kdfast": kdfast.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in _PACKAGES},
        "extension": _extension(),
        "cuda_extension": _cuda_extension(),
        "cpu": {"capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()},
        "gpus": gpus,
        "backends": [
            {"name": b.name, "available": b.available, "reason": b.reason, "devices": list(b.devices), "ops": list(b.ops),
             "proven": b.proven}
            for b in kdfast.backends()
        ],
    }  # fmt: skip


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _extension() -> str:
    from kdfast.backends import compiled

    module, why = compiled.load()
    if module is None:
        return str(why).removeprefix("the C++ extension is ")
    halves = "tiles (AMX)" if module.tiles_of_bf16() else "pairs (AVX512_BF16)" if module.pairs_of_bf16() else "float32"
    return f"built, kernels for {module.isa()}, bfloat16 products on {halves}"


def _cuda_extension() -> str:
    if util.find_spec("kdfast._cuda") is None:
        return "not built (unproven): reinstall kdfast with KDFAST_BUILD=cuda and nvcc (CUDA 12 or later) on PATH"
    from kdfast import _cuda

    def text(version: int) -> str:
        return f"CUDA {version // 1000}.{version % 1000 // 10}"

    driver = _cuda.driver_version()
    return f"built with {text(_cuda.build_version())}, driver {text(driver) if driver else 'missing'}"


def _show(found: dict[str, Any]) -> None:
    print(f"kdfast {found['kdfast']}, Python {found['python']}, {found['system']}")
    print("packages  " + ", ".join(f"{name} {version or 'missing'}" for name, version in found["packages"].items()))
    print(f"cpu       {found['cpu']['capability']}, {found['cpu']['threads']} threads")
    print(f"gpu       {', '.join(found['gpus']) or 'none'}")
    print(f"extension {found['extension']}")
    print(f"cuda      {found['cuda_extension']}")
    for b in found["backends"]:
        state = "ready" if b["available"] else f"missing: {b['reason']}"
        unproven = "" if b["proven"] else " (unproven: only use_backend reaches it)"
        print(f"backend   {b['name']:<10}{state}{unproven}; devices {', '.join(b['devices'])}; ops {', '.join(b['ops'])}")
