"""A training step in six spellings: one small student, one text, one teacher, and six ways to a loss.

Text and tokenizer are the quickstart's (Python's standard library). The teacher is trained for a few steps, so that what it
says has the shape of a model's distributions: a cache of uniform ones would be read at another speed.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdfast
from kdfast.cache import CacheReader, CacheWriter, capture
from kdfast.cli.progress import bar
from kdfast.cli.quickstart_job import Job, Plan, llama
from kdfast.models.heads import call, logits_in
from kdfast.models.load import from_config
from kdfast.train.data import next_labels

from .cases import Objective, ghost_sum
from .peer import options, topk_options, wide
from .peers_linear import no_linear_ce
from .peers_logits import eager_log_target
from .sparse_study import Side
from .train import CACHED, EAGER, HEAD, LIVE, PLAIN, SPARSE

_LR = 1e-3


@dataclass(frozen=True)
class Spec:
    """Sizes of the job. student, teacher: width and layers of llama models with tied heads."""

    vocab: int = 16384
    length: int = 128
    batch: int = 8
    student: tuple[int, int] = (256, 6)
    teacher: tuple[int, int] = (384, 6)
    k: int = 64
    teacher_steps: int = 8
    batches: int = 8
    part: float = 0.3
    half: bool = False  # autocast to bfloat16
    device: str = "cpu"

    @classmethod
    def quick(cls) -> Spec:
        return cls(vocab=8192, length=64, student=(192, 3), teacher=(256, 4), teacher_steps=4, batches=4, part=0.1)

    @classmethod
    def tiny(cls) -> Spec:
        """Small enough for a test."""
        return cls(512, 16, 2, (64, 1), (64, 1), 8, teacher_steps=2, batches=2, part=0.01)

    @classmethod
    def gpu(cls) -> Spec:
        """Enough rows to fill one."""
        return cls(vocab=32000, length=512, batch=16, student=(1024, 12), teacher=(1536, 16), half=True, device="cuda")

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.length


@dataclass(frozen=True)
class Bench:
    """What every contestant shares: sequences `[batches * B, L]`, the teacher, its cache, and a student to begin from."""

    spec: Spec
    ids: Tensor
    teacher: Any
    reader: CacheReader
    student: Any
    objective: Objective = Objective()

    def rows(self, turn: int) -> range:
        start = turn % self.spec.batches * self.spec.batch
        return range(start, start + self.spec.batch)

    def text(self, turn: int) -> tuple[Tensor, Tensor]:
        """Input ids and labels of a step."""
        rows = self.rows(turn)
        ids = self.ids[rows.start : rows.stop]
        return ids, next_labels(ids)

    def autocast(self) -> Any:
        return torch.autocast(self.spec.device, torch.bfloat16) if self.spec.half else contextlib.nullcontext()


Loss = Callable[[Bench, Any, int], Tensor]


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """`[B, L, V]`, without keys kept for a text that goes on."""
    return logits_in(call(model, {"input_ids": ids}))


def plain(b: Bench, student: Any, turn: int) -> Tensor:
    """No distillation: what the student costs by itself."""
    ids, labels = b.text(turn)
    return F.cross_entropy(logits_of(student, ids).flatten(0, 1), labels.flatten())


def through_head(b: Bench, student: Any, turn: int) -> Tensor:
    """No distillation either, and no logits of all rows at once; as `plain` where torch has no such loss."""
    if no_linear_ce():
        return plain(b, student, turn)
    (ids, labels), side = b.text(turn), Side.of(student)
    return F.linear_cross_entropy(side.hidden(ids).flatten(0, 1), side.weight, labels.flatten())


def eager(b: Bench, student: Any, turn: int) -> Tensor:
    """Logits of both sides, F.kl_div and F.cross_entropy."""
    ids, labels = b.text(turn)
    with torch.no_grad():
        teacher = logits_of(b.teacher, ids).flatten(0, 1)
    return eager_log_target(logits_of(student, ids).flatten(0, 1), teacher, labels.flatten(), b.objective)


def live(b: Bench, student: Any, turn: int) -> Tensor:
    """Hidden states of both sides."""
    ids, labels = b.text(turn)
    side, other = Side.of(student), Side.of(b.teacher)
    with torch.no_grad():
        teacher = other.hidden(ids)
    return kdfast.linear_kd_loss(side.hidden(ids), side.weight, teacher, other.weight, labels, **options(b.objective))


def cached(b: Bench, student: Any, turn: int) -> Tensor:
    """The step reads ids, labels and targets from the cache's files."""
    batch = b.reader.batch(b.rows(turn), b.spec.device)
    side, settings = Side.of(student), topk_options(b.objective)
    return kdfast.linear_topk_kd_loss(side.hidden(batch.input_ids), side.weight, batch.targets, batch.labels, **settings)


class Sparse:
    """What one writes by hand: targets in memory, log-probabilities gathered at their ids, the k renormalised."""

    def __init__(self, b: Bench) -> None:
        self._targets = [b.reader.batch(b.rows(turn), b.spec.device).targets for turn in range(b.spec.batches)]

    def __call__(self, b: Bench, student: Any, turn: int) -> Tensor:
        (ids, labels), o = b.text(turn), b.objective
        targets = self._targets[turn % b.spec.batches][: len(ids)]  # the check takes fewer sequences
        logits = wide(logits_of(student, ids))
        log_q = F.log_softmax(logits / o.temperature, -1).gather(-1, targets.ids.long())
        log_p = F.log_softmax(targets.logprobs.to(log_q.dtype) / o.temperature, -1)
        keep = labels != o.ignore_index
        kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
        soft = o.temperature**2 * (kl * keep).sum() / keep.sum()
        return o.soft_weight * soft + o.hard_weight * F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def materialised(b: Bench, student: Any, turn: int) -> Tensor:
    """The truth of `cached`: the loss from a ghost bucket in plain PyTorch on the student's logits."""
    (ids, labels), targets = b.text(turn), b.reader.batch(b.rows(turn), b.spec.device).targets
    flat = dataclasses.replace(
        targets, **{name: getattr(targets, name).flatten(0, 1) for name in ("ids", "logprobs", "log_z", "log_tail")}
    )
    return ghost_sum(logits_of(student, ids).flatten(0, 1), flat, labels.flatten(), b.objective) / (labels != -100).sum()


def renormalised(b: Bench, student: Any, turn: int) -> Tensor:
    """The truth of `Sparse`: the same loss as kdfast spells it, on the student's logits."""
    (ids, labels), targets = b.text(turn), b.reader.batch(b.rows(turn), b.spec.device).targets
    return kdfast.topk_kd_loss(
        logits_of(student, ids), targets, labels, tail="renormalize", **topk_options(b.objective)
    )  # fmt: skip


#: The loss that each contestant must have, computed in float64.
TRUTH: dict[str, Loss] = {PLAIN: plain, HEAD: plain, EAGER: eager, LIVE: eager, CACHED: materialised, SPARSE: renormalised}


def losses(b: Bench) -> dict[str, Loss]:
    """The contestants by name."""
    return {PLAIN: plain, HEAD: through_head, EAGER: eager, LIVE: live, CACHED: cached, SPARSE: Sparse(b)}


class Trainee:
    """A student of one contestant and its optimizer: every call is one whole step."""

    def __init__(self, b: Bench, loss: Loss) -> None:
        self.bench, self.loss = b, loss
        self.student = model_of(b.spec, b.spec.student)
        self.student.load_state_dict(b.student.state_dict())
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=_LR)

    def __call__(self, turn: object) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with self.bench.autocast():
            loss = self.loss(self.bench, self.student, int(str(turn)))
        loss.backward()
        self.optimizer.step()
        if self.bench.spec.device == "cuda":
            torch.cuda.synchronize()
        return loss.detach()


def model_of(spec: Spec, shape: tuple[int, int]) -> Any:
    """A llama of some width and number of layers; draws its weights from torch's global generator."""
    fields = {**llama(*shape), "max_position_embeddings": max(512, spec.length)}
    return from_config("llama", fields, "student", vocab_size=spec.vocab).to(spec.device)


def prepare(spec: Spec, folder: Path, say: Callable[[str], None]) -> Bench:
    """Text, teacher, cache and student, in `folder`."""
    torch.manual_seed(0)
    plan = dataclasses.replace(Plan(), vocab_size=spec.vocab, length=spec.length, part=spec.part, student_sequences=0)
    job = Job(folder, plan, [0], bar, say)
    job.prepare(fresh=True)
    count = spec.batches * spec.batch
    text = job.corpus().train.ids[:count].long()
    if len(text) < count:
        raise ValueError(f"batches: expected at most {len(text) // spec.batch} batches of the text, got {spec.batches}")
    ids = text[:count].to(spec.device)
    teacher = _teacher(spec, ids)
    with CacheWriter(
        folder / "cache", vocab_size=spec.vocab, k=spec.k, temperatures=(1.0, 2.0), teacher="the benchmark's teacher",
        tokenizer_hash="the benchmark's tokenizer", records_per_shard=spec.batch * 4,
    ) as writer:  # fmt: skip
        capture(teacher, list(ids.cpu()), writer, batch_size=spec.batch, device=spec.device)
    return Bench(spec, ids, teacher, CacheReader(folder / "cache"), model_of(spec, spec.student))


def _teacher(spec: Spec, ids: Tensor) -> nn.Module:
    """Trained for some steps on the text."""
    model = model_of(spec, spec.teacher)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    with bar("teacher", spec.teacher_steps, "steps") as shown:
        for step in range(spec.teacher_steps):
            at = step % spec.batches * spec.batch
            batch = ids[at : at + spec.batch]
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(logits_of(model, batch).flatten(0, 1), next_labels(batch).flatten()).backward()
            optimizer.step()
            shown.update(step + 1)
    return model.eval().requires_grad_(False)
