"""What the GPU run measures, op by op, and the process that measures a group of ops: `python -m bench.sweep OP,OP ...`."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kdfast.options import DIVERGENCES

from . import attention, codec, hidden, linear, linear_hard, linear_logit_mse, linear_topk, logits, scale, topk, train
from .contest import Contest, Settings, contest, unmeasured
from .measure import failures, reason
from .peers import divergence_peers, linear_peers, logits_peers, topk_peers
from .report import Limits, Row, write_csv
from .shapes import GEMMA3, GPT2, LLAMA2, LLAMA3, LLAMA3_1B, QWEN3

#: In order of worth: what a short run measures first. One group is one process: its start costs about ten seconds, and a
#: kernel that hangs or faults costs what is left of its group.
GROUPS = (
    "logits", "linear", "attention", "topk,codec,linear_topk", "hidden,linear_logit_mse,divergences,linear_hard,scale", "train",
    "cluster",
)  # fmt: skip
#: The group of kernels that no GPU has run yet, which may hang.
UNPROVEN = GROUPS[-1]
OPS = tuple(op for group in GROUPS for op in group.split(","))
#: Seconds that the training step needs: text, tokenizer, teacher, checks and steps.
_TRAIN_S = 60.0
#: Seconds a group has beside its peers, on a data-centre GPU.
SECONDS = dict(zip(GROUPS, (80.0, 70.0, 25.0, 40.0, 45.0, _TRAIN_S, 30.0), strict=True))
_CLUSTER = "cluster kernel"


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
    lengths: tuple[int, ...]  # of attention maps
    linear_topk: tuple[int, int, int]  # N, V, D
    hidden: tuple[int, int, int]  # N, Ds, Dt
    match: tuple[int, int, int]  # N, V, D
    divergences: tuple[int, int]  # N, V
    compiled: bool
    repeats: int
    pace: float = 1.0  # of the expected seconds of a job
    alone: str = ""  # the size for kdfast without its peers, "" for the same
    peers: bool = True


SIZES = {
    "full": Size(
        (torch.bfloat16, torch.float32), 4096, (LLAMA3.vocab, LLAMA2.vocab, GPT2.vocab, QWEN3.vocab, GEMMA3.vocab),
        8192, ((LLAMA3.vocab, LLAMA3_1B.hidden, LLAMA3.hidden), (LLAMA3.vocab, LLAMA3.hidden, LLAMA3.hidden),
               (LLAMA2.vocab, 2048, 4096)),
        4096, QWEN3.vocab, (4096, 1024), (2048, LLAMA3.vocab, LLAMA3_1B.hidden), (32768, 2048, 4096),
        (8192, LLAMA2.vocab, 2048), (4096, LLAMA2.vocab), True, 20, alone="alone",
    ),
    "tiny": Size(
        (torch.float32,), 8, (257, 1000), 16, ((257, 8, 16),), 8, 515, (33,), (8, 257, 16), (16, 8, 24), (16, 257, 8), (8, 257),
        False, 3, 0.1,
    ),
}  # fmt: skip
SIZES["alone"] = dataclasses.replace(SIZES["full"], compiled=False, repeats=10, pace=0.15, alone="", peers=False)


@dataclass(frozen=True)
class Job:
    """One case and the seconds it is expected to take on a data-centre GPU, most of them compilation."""

    contest: Contest
    seconds: float


def dtypes(size: str) -> tuple[torch.dtype, ...]:
    return SIZES[size].dtypes


def plan(ops: str, size: str, device: str) -> list[Job]:
    """The cases of one op, or of several with commas between, most wanted first; the training step is none."""
    wanted, made = SIZES[size], [_PLANS[op](SIZES[size], device) for op in ops.split(",") if op != "train"]
    return [Job(_with(job.contest, wanted.peers), wanted.pace * job.seconds) for jobs in made for job in jobs]


def _with(job: Contest, peers: bool) -> Contest:
    return job if peers else dataclasses.replace(job, peers=[p for p in job.peers if p.ours])


def _logits(size: Size, device: str) -> list[Job]:
    jobs = []
    for dtype in size.dtypes:
        # float32 is measured at two vocabularies only: half precision is what people train in on a GPU.
        for vocab in size.vocabularies if dtype is size.dtypes[0] else size.vocabularies[:2]:
            peers = [p for p in logits_peers(device, compiled=("log_target",) if size.compiled else ()) if p.name != _CLUSTER]
            jobs.append(Job(logits.contestants(size.logits_rows, vocab, dtype, device, peers), 15))
    return jobs


def _cluster(size: Size, device: str) -> list[Job]:
    """The cluster kernel beside the kernel it would replace."""
    peers = [p for p in logits_peers(device, compiled=()) if p.name in ("kdfast", _CLUSTER)]
    vocabularies = dict.fromkeys((*size.vocabularies, 1000))
    jobs = [logits.contestants(size.logits_rows, vocab, size.dtypes[0], device, peers) for vocab in vocabularies]
    return [Job(dataclasses.replace(job, op="cluster"), 3) for job in jobs]


def _linear(size: Size, device: str) -> list[Job]:
    # bfloat16 logits beside ours: those are what Liger has.
    peers = functools.partial(linear_peers, device, compiled=size.compiled, half=size.dtypes[0] == torch.bfloat16)
    jobs = [
        Job(linear.contestants(size.linear_rows, *dims, size.dtypes[0], device, peers()), 40 if i == 0 else 30)
        for i, dims in enumerate(size.dims)
    ]
    if size.dtypes[0] == torch.bfloat16:  # what float16 costs beside it: the products alone, and ours
        few = [p for p in linear_peers(device, compiled=False) if p.name in ("kdfast", "four GEMMs alone")]
        jobs.insert(1, Job(linear.contestants(size.linear_rows, *size.dims[0], torch.float16, device, few), 8))
    return jobs


def _attention(size: Size, device: str) -> list[Job]:
    dtype = size.dtypes[0]
    return [Job(attention.contestants(kind, n, dtype, device), 10) for n in size.lengths for kind in attention.KINDS]


def _topk(size: Size, device: str) -> list[Job]:
    k, dtype = min(64, size.topk_vocab), size.dtypes[0]
    peers = topk_peers(compiled=size.compiled)
    return [
        Job(topk.capture_contestants(size.topk_rows, size.topk_vocab, k, dtype, device), 10),
        Job(topk.contestants(size.topk_rows, size.topk_vocab, k, dtype, device, peers), 20),
    ]


def _codec(size: Size, device: str) -> list[Job]:
    return [Job(codec.contestants(2 * size.topk_rows, size.topk_vocab, min(64, size.topk_vocab), device), 10)]


def _linear_topk(size: Size, device: str) -> list[Job]:
    case = *size.linear_topk, 64, size.dtypes[0], device
    return [Job(linear_topk.contestants(*case), 15), Job(linear_topk.capture_contestants(*case), 10)]


def _hidden(size: Size, device: str) -> list[Job]:
    # The projection first: the others are one read of memory.
    kinds = sorted(hidden.KINDS, key=lambda kind: kind != "projected")
    return [Job(hidden.contestants(kind, *size.hidden, size.dtypes[0], device), 6) for kind in kinds]


def _linear_logit_mse(size: Size, device: str) -> list[Job]:
    n, vocab, dim = size.match
    return [Job(linear_logit_mse.contestants(n, vocab, dim, dim, 1.0, torch.float32, device), 10)]


def _divergences(size: Size, device: str) -> list[Job]:
    case = *size.divergences, size.dtypes[0], device
    return [Job(logits.contestants(*case, divergence_peers(), name), 6) for name in DIVERGENCES if name != "forward_kl"]


def _linear_hard(size: Size, device: str) -> list[Job]:
    vocab, dim, _ = size.dims[0]
    peers = linear_hard.hard_peers(device, compiled=size.compiled, half=size.dtypes[0].itemsize < 4)
    return [Job(linear_hard.contestants(size.linear_rows, vocab, dim, size.dtypes[0], device, peers), 30)]


def _scale(size: Size, device: str) -> list[Job]:
    return [Job(scale.contestants(size.logits_rows, size.vocabularies[0], dtype, device), 5) for dtype in size.dtypes]


_PLANS: dict[str, Callable[[Size, str], list[Job]]] = {
    "logits": _logits, "linear": _linear, "attention": _attention, "topk": _topk, "codec": _codec, "linear_topk": _linear_topk,
    "hidden": _hidden, "linear_logit_mse": _linear_logit_mse, "divergences": _divergences, "linear_hard": _linear_hard,
    "scale": _scale, "cluster": _cluster,
}  # fmt: skip


def unreached(ops: str, size: str, device: str, rows: list[Row], why: str) -> list[Row]:
    """Rows, each with the reason, of everything in `ops` that `rows` has nothing of."""
    seen, out = {row.case for row in rows}, list[Row]()
    for job in plan(ops, size, device):
        planned = unmeasured(job.contest, why, device)
        out += planned if planned[0].case not in seen else []
    if "train" in ops.split(",") and not any(row.op == "train" for row in rows):
        out += train.unmeasured_rows(why, device)
    return out


def out_of_time(left: float, needed: float, whose: str) -> str:
    """The reason of a row that was not reached."""
    return f"out of time: {max(left, 0):.0f} s of {whose} budget left, needs about {needed:.0f} s"


def run(ops: str, size: str, device: str, seconds: float, path: str, limits: dict[str, Limits]) -> list[Row]:
    """Measures the cases of some ops that fit `seconds`; the file is rewritten after each."""
    start, rows = time.monotonic(), list[Row]()
    for job in plan(ops, size, device):
        left = seconds - (time.monotonic() - start)
        if left < job.seconds:
            rows += unmeasured(job.contest, out_of_time(left, job.seconds, "its op's"), device)
        else:
            limit = limits.get(str(job.contest.dtype).removeprefix("torch."), Limits())
            rows += contest(job.contest, limit, Settings(SIZES[size].repeats, 3, 10.0, device))
            torch.compiler.reset()  # past some recompilations of one function Dynamo quietly runs it uncompiled
        write_csv(rows, path)
    if "train" in ops.split(","):
        rows += _train(size, device, seconds - (time.monotonic() - start), limits)
        write_csv(rows, path)
    return rows


def _train(size: str, device: str, left: float, limits: dict[str, Limits]) -> list[Row]:
    """The rows of the training step."""
    needed = _TRAIN_S * SIZES[size].pace
    why = train.missing() or (out_of_time(left, needed, "its op's") if left < needed else "")
    if why:
        return train.unmeasured_rows(why, device)
    from .train_step import Spec

    spec = dataclasses.replace(Spec.gpu() if size == "full" else Spec.tiny(), device=device)
    limit = limits.get("bfloat16" if spec.half else "float32", Limits())
    try:
        return train.measure(spec, Settings(SIZES[size].repeats, 2, left / 3, device), limit, lambda line: None)
    except failures() as error:
        return train.unmeasured_rows(reason(error), device)


def main(argv: list[str]) -> int:
    ops, size, device, seconds, path, *given = argv
    limits = {}
    for text in given:
        name, numbers = text.split("=")
        copy, gemm = (float(x) if x else math.nan for x in numbers.split(","))
        limits[name] = Limits(copy, gemm)
    run(ops, size, device, float(seconds), path, limits)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
