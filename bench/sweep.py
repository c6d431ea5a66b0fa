"""What the GPU run measures, op by op, and the process that measures one op: `python -m bench.sweep OP ...`."""

from __future__ import annotations

import functools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import codec, linear, logits, scale, topk
from .contest import Contest, Settings, contest, unmeasured
from .peers import linear_peers, logits_peers, topk_peers
from .report import Limits, Row, write_csv
from .shapes import GEMMA3, GPT2, LLAMA2, LLAMA3, LLAMA3_1B, QWEN3

#: In order of worth: what a short run measures first.
OPS = ("logits", "linear", "topk", "codec", "scale")
#: Of the time left when its turn comes, how much an op may use.
SHARE = {"logits": 0.45, "linear": 0.65, "topk": 0.85, "codec": 0.5, "scale": 1.0}


@dataclass(frozen=True)
class Size:
    """Rows and vocabularies of the sweep: `full` for a data-centre GPU, `tiny` to try the machinery on a CPU."""

    dtypes: tuple[torch.dtype, ...]
    logits_rows: int
    vocabularies: tuple[int, ...]
    linear_rows: int
    dims: tuple[tuple[int, int, int], ...]  # V, Ds, Dt
    topk_rows: int
    topk_vocab: int
    compiled: bool
    repeats: int
    pace: float = 1.0  # of the expected seconds of a job


SIZES = {
    "full": Size(
        (torch.bfloat16, torch.float32), 4096, (LLAMA3.vocab, LLAMA2.vocab, GPT2.vocab, QWEN3.vocab, GEMMA3.vocab),
        8192, ((LLAMA3.vocab, LLAMA3_1B.hidden, LLAMA3.hidden), (LLAMA3.vocab, LLAMA3.hidden, LLAMA3.hidden),
               (LLAMA2.vocab, 2048, 4096)),
        4096, QWEN3.vocab, True, 20,
    ),
    "tiny": Size((torch.float32,), 8, (257, 1000), 16, ((257, 8, 16),), 8, 515, False, 3, 0.1),
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One case and the seconds it is expected to take on a data-centre GPU, most of them compilation."""

    contest: Contest
    seconds: float


def dtypes(size: str) -> tuple[torch.dtype, ...]:
    return SIZES[size].dtypes


def plan(op: str, size: str, device: str) -> list[Job]:
    """The cases of one op, most wanted first."""
    pace = SIZES[size].pace
    return [Job(job.contest, pace * job.seconds) for job in _PLANS[op](SIZES[size], device)]


def _logits(size: Size, device: str) -> list[Job]:
    jobs = []
    for dtype in size.dtypes:
        # float32 is measured at two vocabularies only: half precision is what people train in on a GPU.
        for vocab in size.vocabularies if dtype is size.dtypes[0] else size.vocabularies[:2]:
            peers = logits_peers(device, compiled=("log_target",) if size.compiled else ())
            jobs.append(Job(logits.contestants(size.logits_rows, vocab, dtype, device, peers), 15))
    return jobs


def _linear(size: Size, device: str) -> list[Job]:
    peers = functools.partial(linear_peers, device, compiled=size.compiled)
    return [
        Job(linear.contestants(size.linear_rows, *dims, size.dtypes[0], device, peers()), 40 if i == 0 else 30)
        for i, dims in enumerate(size.dims)
    ]


def _topk(size: Size, device: str) -> list[Job]:
    k, dtype = min(64, size.topk_vocab), size.dtypes[0]
    peers = topk_peers(compiled=size.compiled)
    return [
        Job(topk.capture_contestants(size.topk_rows, size.topk_vocab, k, dtype, device), 10),
        Job(topk.contestants(size.topk_rows, size.topk_vocab, k, dtype, device, peers), 20),
    ]


def _codec(size: Size, device: str) -> list[Job]:
    return [Job(codec.contestants(2 * size.topk_rows, size.topk_vocab, min(64, size.topk_vocab), device), 10)]


def _scale(size: Size, device: str) -> list[Job]:
    return [Job(scale.contestants(size.logits_rows, size.vocabularies[0], dtype, device), 5) for dtype in size.dtypes]


_PLANS: dict[str, Callable[[Size, str], list[Job]]] = {
    "logits": _logits, "linear": _linear, "topk": _topk, "codec": _codec, "scale": _scale,
}  # fmt: skip


def run(op: str, size: str, device: str, seconds: float, path: str, limits: dict[str, Limits]) -> list[Row]:
    """Measures the cases of one op that fit `seconds`; the file is rewritten after each."""
    start, rows = time.monotonic(), list[Row]()
    for job in plan(op, size, device):
        left = seconds - (time.monotonic() - start)
        if left < job.seconds:
            why = f"skipped: {max(left, 0):.0f} s of its op's budget left, needs about {job.seconds:.0f} s"
            rows += unmeasured(job.contest, why, device)
        else:
            limit = limits.get(str(job.contest.dtype).removeprefix("torch."), Limits())
            rows += contest(job.contest, limit, Settings(SIZES[size].repeats, 3, 10.0, device))
            torch.compiler.reset()  # past some recompilations of one function Dynamo quietly runs it uncompiled
        write_csv(rows, path)
    return rows


def main(argv: list[str]) -> int:
    op, size, device, seconds, path, *given = argv
    limits = {}
    for text in given:
        name, numbers = text.split("=")
        copy, gemm = (float(x) if x else math.nan for x in numbers.split(","))
        limits[name] = Limits(copy, gemm)
    run(op, size, device, float(seconds), path, limits)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
