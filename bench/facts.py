"""What a visit to a GPU asks beside its timings, each in a process of its own: `python -m bench.facts WHAT DEVICE SIZE [FILE]`.

versions   of everything, which extensions are there, and which of torch's products leave in float32
limits     copy bandwidth and matrix product rates, as rows in FILE
profile    where the time of one step of kd_loss and of linear_kd_loss goes, kernel by kernel
step       one step of kd_loss, for a profiler to look at from outside
"""

from __future__ import annotations

import importlib.util
import itertools
import platform
import sys

import torch

from . import sweep
from .contest import measure_limits
from .report import Limits, Row, commit, device_name, dtype_name, stamp, version, write_csv


def versions(device: str) -> None:
    import kdfast

    print(f"{device_name(device)}; Python {platform.python_version()}, torch {torch.__version__}, triton {version('triton')},"
          f" kdfast {kdfast.__version__} at {commit()}")  # fmt: skip
    for name in ("_C", "_cuda"):
        print(f"kdfast.{name}: {'there' if importlib.util.find_spec(f'kdfast.{name}') else 'not there'}")
    for row in kdfast.backends():
        print(f"backend {row.name}: {row.reason or 'available'}")
    if device == "cuda" and importlib.util.find_spec("triton"):
        from kdfast.backends.triton.linear import _leaves_in_float32

        for accumulate, dtype in itertools.product((False, True), (torch.bfloat16, torch.float16)):
            leaves = _leaves_in_float32(torch.device("cuda"), accumulate, dtype)
            op, name = "addmm" if accumulate else "mm", str(dtype).removeprefix("torch.")
            print(f"torch.{op}(out_dtype=float32) of {name}: {'there' if leaves else 'NOT there: the slow path is taken'}")


def measure_all(dtypes: tuple[torch.dtype, ...], device: str) -> dict[torch.dtype, Limits]:
    """Copy bandwidth once, the matrix product rate per dtype."""
    copy = measure_limits(device, copy=True).copy
    return {dtype: Limits(copy, measure_limits(device, gemm=dtype).gemm) for dtype in dtypes}


def limit_rows(limits: dict[torch.dtype, Limits], device: str) -> list[Row]:
    """The measured limits as rows, so that the file carries what its shares are shares of."""
    copy = next(iter(limits.values())).copy
    rows = [Row("limits", "copy bandwidth", gb_per_s=copy / 1e9, note="read plus written")]
    rows += [
        Row("limits", "matrix product", dtype=dtype_name(dtype), tflop_per_s=limit.gemm / 1e12)
        for dtype, limit in limits.items()
    ]
    return [stamp(row, device) for row in rows]


def profile(device: str, size: str) -> None:
    from torch.profiler import ProfilerActivity

    from .contest import Contest

    on_gpu = device == "cuda"
    activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    for op in ("logits", "linear"):
        job: Contest = sweep.plan(op, size, device)[0].contest
        ours, case = next(p for p in job.peers if p.ours), job.make(0)
        for _ in range(3):
            ours.run(case)
        with torch.profiler.profile(activities=activities) as found:
            ours.run(case)
            if on_gpu:
                torch.cuda.synchronize()
        print(f"{op}, {dtype_name(job.dtype)}, {job.shape}")
        sort = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        print(found.key_averages().table(sort_by=sort, row_limit=15, max_name_column_width=60))


def step(device: str, size: str) -> None:
    job = sweep.plan("logits", size, device)[0].contest
    next(p for p in job.peers if p.ours).run(job.make(0))
    if device == "cuda":
        torch.cuda.synchronize()


def main(argv: list[str]) -> int:
    what, device, size, *path = argv
    if what == "versions":
        versions(device)
    elif what == "limits":
        write_csv(limit_rows(measure_all(sweep.dtypes(size), device), device), path[0])
    else:
        {"profile": profile, "step": step}[what](device, size)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
