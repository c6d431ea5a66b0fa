"""What a distillation from a cache costs before it is run: `docs/scaling.md` derives every line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple


class Gpu(NamedTuple):
    """Published peak rates: dense bfloat16 in FLOP/s, memory in bytes/s and bytes."""

    flops: float
    bandwidth: float
    memory: float


#: From the vendors' data sheets (SXM or OAM boards, without sparsity).
GPUS = {
    "a100": Gpu(312e12, 2.04e12, 80e9),
    "h100": Gpu(989e12, 3.35e12, 80e9),
    "h200": Gpu(989e12, 4.8e12, 141e9),
    "b200": Gpu(2250e12, 8.0e12, 180e9),
    "l40s": Gpu(362e12, 0.864e12, 48e9),
    "mi300x": Gpu(1307e12, 5.3e12, 192e9),
}

#: Bytes of one logit in the plain form, forward and backward in bfloat16 with float32 softmaxes: student and teacher logits
#: (2 + 2), both log-softmaxes (4 + 4), the gradient in float32 and as bfloat16 (4 + 2).
PLAIN_BYTES_A_LOGIT = 18
#: Bytes of one float32 logit in a chunk of `linear_kd_loss`: student, teacher, and both read and one written.
_ROW_BYTES_A_LOGIT = 4 * (2 + 2 + 1)
#: The same of a capture: written by the GEMM, read once.
_CAPTURE_BYTES_A_LOGIT = 4 * 2
#: Measured at V = 151936 and 16384, k = 64.
_LEVEL_BITS = 6.8
#: What `linear_kd_loss` takes for its chunks on a GPU unless told otherwise.
WORKSPACE = 1 << 30


@dataclass(frozen=True)
class Job:
    """What is to be distilled and on what; parameters are those of the body, without embeddings and head."""

    tokens: float
    vocab: int
    k: int
    teacher_hidden: int
    student_hidden: int
    teacher_params: float
    student_params: float
    gpu: Gpu
    count: int
    epochs: float = 1.0
    temperatures: int = 1
    micro_batch: int = 16384
    efficiency: float = 0.4
    bytes_per_token: float | None = None

    @property
    def token_bytes(self) -> float:
        return token_bytes(self.vocab, self.k, self.temperatures) if self.bytes_per_token is None else self.bytes_per_token


def body_params(hidden: int) -> float:
    """A guess from the width alone: hidden/128 layers of 13 hidden^2, which is Llama's shape from 1B to 8B."""
    return hidden / 128 * 13 * hidden**2


def token_bytes(vocab: int, k: int, temperatures: int = 1) -> float:
    """Bytes of a cached token: ids by Elias-Fano, levels at the default max_kl, tails, its own id, a share of the index."""
    k = min(k, vocab)
    ids = k * (2 + math.log2(vocab / k)) / 8
    return ids + k * _LEVEL_BITS / 8 + 2 * temperatures + math.ceil(math.log2(max(vocab, 2)) / 8) + 0.3


@dataclass(frozen=True)
class Phase:
    """One pass over tokens: what a token costs, and the seconds it all takes."""

    flops_a_token: float
    bytes_a_token: float
    roofline_s: float
    expected_s: float

    @classmethod
    def of(cls, tokens: float, flops: float, moved: float, job: Job) -> Phase:
        """The matrix products and the memory traffic of the fused kernels one after another, spread over every GPU."""
        seconds = tokens * (flops / job.gpu.flops + moved / job.gpu.bandwidth) / job.count
        return cls(flops, moved, seconds, seconds / job.efficiency)


@dataclass(frozen=True)
class Plan:
    """Bytes, seconds and bytes a second of a job."""

    cache_bytes: float
    capture: Phase
    train_cached: Phase
    train_live: Phase
    loss_bytes_plain: float
    loss_bytes_kdfast: float
    read_bytes_per_s: float

    @property
    def break_even_epochs(self) -> float:
        """How many passes over the tokens, by one student or several, it takes for the capture to have paid for itself."""
        saved = self.train_live.expected_s - self.train_cached.expected_s
        return math.inf if saved <= 0 else self.capture.expected_s / saved


def plan(job: Job) -> Plan:
    """The whole plan; the two training phases are for `job.epochs` passes over the tokens."""
    head_t, head_s = job.vocab * job.teacher_hidden, job.vocab * job.student_hidden
    teacher = 2 * (job.teacher_params + head_t)
    student = 6 * (job.student_params + head_s)
    per_token = job.vocab * _ROW_BYTES_A_LOGIT
    trained = job.tokens * job.epochs
    cached = Phase.of(trained, student, job.vocab * 4 * 3, job)
    return Plan(
        cache_bytes=job.tokens * job.token_bytes,
        capture=Phase.of(job.tokens, teacher, job.vocab * _CAPTURE_BYTES_A_LOGIT, job),
        train_cached=cached,
        train_live=Phase.of(trained, student + teacher, per_token, job),
        loss_bytes_plain=PLAIN_BYTES_A_LOGIT * job.micro_batch * job.vocab,
        loss_bytes_kdfast=WORKSPACE + 4.0 * head_s + 2.0 * job.micro_batch * job.student_hidden,
        read_bytes_per_s=trained / cached.expected_s * job.token_bytes,
    )
