"""The students behind `bench sparse_targets`: one teacher, one text, and a real cache for every kind of targets.

Text, tokenizer and teacher are the quickstart's with a larger vocabulary (Python's standard library, split by file). Every
student sees the same sequences in the same order from the same initialisation, so two students differ by their targets alone.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import kdfast
from kdfast.cache import CacheReader, CacheWriter
from kdfast.cli.progress import bar
from kdfast.cli.quickstart_job import Corpus, Job, Plan
from kdfast.files import locked, written
from kdfast.models.load import from_config, load_folder

VOCAB = 16384
_BINS = 15


@dataclass(frozen=True)
class Method:
    """How a student's targets come about: k likeliest ids, `samples` draws, and what stands for all others.

    k = samples = 0: the whole teacher. hard: weight of the labels, the rest being the teacher's. max_kl: the cache's rounding,
    nats. epochs: how often the student sees the sequences.
    """

    name: str
    k: int = 0
    samples: int = 0
    tail: str = "ghost"
    hard: float = 0.0
    max_kl: float = 5e-5
    epochs: int = 1

    @property
    def sparse(self) -> bool:
        return self.k + self.samples > 0

    @property
    def cache(self) -> str:
        """Name of the cache: methods that differ by their tail alone share one."""
        return f"top{self.k}-drawn{self.samples}-kl{self.max_kl:g}"

    @property
    def settings(self) -> dict[str, Any]:
        kind = "topk" if not self.samples else "mixed" if self.k else "sampled"
        return {"k": self.k + self.samples, "kind": kind, "samples": self.samples, "max_kl": self.max_kl}


HARD, WHOLE = Method("hard labels", hard=1.0), Method("whole teacher")


@dataclass(frozen=True)
class Side:
    """A model that ends in a head without bias."""

    body: nn.Module
    weight: Tensor

    @classmethod
    def of(cls, model: Any) -> Side:
        return cls(model.model, model.lm_head.weight)

    def hidden(self, ids: Tensor) -> Tensor:
        return self.body(input_ids=ids, use_cache=False).last_hidden_state


class Study:
    """The data, the teacher, its last hidden states on what students see, and its caches; all of it is kept in `out`."""

    def __init__(self, out: Path, steps: int, batch_size: int, teacher_steps: int) -> None:
        self.out = out = out.absolute()
        self.steps = steps
        self.plan, self.batch_size = dataclasses.replace(Plan(), vocab_size=VOCAB, teacher_steps=teacher_steps), batch_size
        job = Job(out, self.plan, [1], bar, lambda line: print(line, file=sys.stderr))
        with locked(out):
            job.prepare(fresh=False)
            self.corpus: Corpus = job.corpus()
            self.teacher = Side.of(load_folder(job.teacher(self.corpus).model, "teacher").eval().requires_grad_(False))
        self.ids = self.corpus.train.ids[: steps * batch_size].long()
        with locked(out):
            self.states = self._states()

    @torch.no_grad()
    def _states(self) -> Tensor:
        count = len(self.ids)
        file = self.out / "states.safetensors"
        if not file.is_file():
            parts = []
            with bar("teacher", count, "sequences") as shown:
                for some in self.ids.split(32):
                    parts.append(self.teacher.hidden(some))
                    shown.update(32 * len(parts))
            with written(file) as part:
                save_file({"states": torch.cat(parts)}, part)
        states = load_file(file)["states"]
        if len(states) < count:
            raise ValueError(
                f"--steps, --batch-size: {self.out} holds a study of {len(states)} sequences, asked for {count};"
                " give another --out"
            )
        return states[:count]

    def capture(self, methods: Sequence[Method]) -> None:
        """The caches that are not there yet, all from one pass over the teacher's logits."""
        missing = {m.cache: m for m in methods if m.sparse and not self._path(m).exists()}
        if not missing:
            return
        part = {name: self.out / "caches" / f"{name}.part" for name in missing}
        writers = {
            name: CacheWriter(
                part[name],
                vocab_size=VOCAB,
                teacher="the study's teacher",
                tokenizer_hash="the study's tokenizer",
                **m.settings,
            )
            for name, m in missing.items()
        }
        with torch.no_grad(), bar("capture", len(self.ids), "sequences") as shown:
            for start in range(0, len(self.ids), 8):
                logits = self.states[start : start + 8] @ self.teacher.weight.T
                for name, method in missing.items():
                    targets = self._targets(logits, method, start)
                    for i in range(len(logits)):
                        if start + i >= len(writers[name]):
                            writers[name].add(self.ids[start + i], targets[i])
                shown.update(start + len(logits))
        for name, method in missing.items():
            writers[name].close()
            part[name].replace(self._path(method))

    def _path(self, method: Method) -> Path:
        return self.out / "caches" / method.cache

    @staticmethod
    def _targets(logits: Tensor, method: Method, seed: int) -> kdfast.TopKTargets:
        draws = torch.Generator().manual_seed(seed) if method.samples else None
        return kdfast.topk_targets(logits, method.k, samples=method.samples, generator=draws)

    def reader(self, method: Method) -> CacheReader:
        return CacheReader(self._path(method))

    def loss(self, method: Method, reader: CacheReader | None, student: Side, rows: Sequence[int]) -> Tensor:
        """The loss of a student on some of the sequences, as all the steps have it."""
        at = torch.as_tensor(rows) % len(self.ids)
        ids = self.ids[at]
        hidden = student.hidden(ids)
        labels = F.pad(ids[:, 1:], (0, 1), value=-100) if method.hard else None
        weights = {"soft_weight": 1 - method.hard, "hard_weight": method.hard}
        if reader is None and method.hard < 1:
            return kdfast.linear_kd_loss(hidden, student.weight, self.states[at], self.teacher.weight, labels, **weights)
        targets = self.silent(ids.shape) if reader is None else reader.batch(at).targets
        return kdfast.linear_topk_kd_loss(hidden, student.weight, targets, labels, tail=method.tail, **weights)

    @staticmethod
    def silent(lead: torch.Size) -> kdfast.TopKTargets:
        """Targets of a teacher that says nothing, so that hard labels go the way of everything else."""
        none = torch.full((*lead, 1), -1, dtype=torch.int32), torch.full((*lead, 1), -torch.inf)
        return kdfast.TopKTargets(*none, torch.zeros(*lead, 1), torch.zeros(*lead, 1), (1.0,), VOCAB)

    def train(self, method: Method, seed: int, advance: Callable[[int], None]) -> nn.Module:
        """A student after all steps: AdamW, linear warm-up, cosine to a twentieth; bfloat16 products, float32 logits."""
        torch.manual_seed(seed)
        model = from_config("llama", self.plan.student, "student", vocab_size=VOCAB)
        student, size = Side.of(model), self.batch_size
        reader = self.reader(method) if method.sparse else None
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.plan.student_lr, betas=(0.9, 0.95), weight_decay=0.01)
        steps = self.steps * method.epochs
        warm = max(steps // 15, 1)

        def rate(step: int) -> float:
            return min((step + 1) / warm, 0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        for step in range(steps):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16):
                loss = self.loss(method, reader, student, range(step * size, (step + 1) * size))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            advance(step + 1)
        return model.eval()

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """(perplexity, expected calibration error of the top-1 probability) on the held-out files."""
        side, nll, count = Side.of(model), 0.0, 0
        bins = torch.zeros(_BINS, 3, dtype=torch.float64)  # tokens, confidence, hits
        for ids in self.corpus.test.ids.long().split(16):
            logp = (side.hidden(ids)[:, :-1] @ side.weight.T).log_softmax(-1).flatten(0, 1)
            labels = ids[:, 1:].flatten()
            nll -= float(logp.gather(1, labels[:, None]).double().sum())
            count += len(labels)
            best, at = logp.max(-1)
            confidence = best.exp().double()
            index = (confidence * _BINS).long().clamp(max=_BINS - 1)
            facts = torch.stack([torch.ones_like(confidence), confidence, (at == labels).double()], 1)
            bins.index_add_(0, index, facts)
        return math.exp(nll / count), float((bins[:, 1] - bins[:, 2]).abs().sum() / count)

    def keep(self, model: nn.Module) -> None:
        """Keeps the first student that has learned from the whole teacher: the one whose gradients are compared."""
        file = self.out / "learned.safetensors"
        if file.is_file():
            return
        with written(file) as part:
            save_file({k: v.clone() for k, v in model.state_dict().items()}, part)

    def bias(self, method: Method, draws: int = 32) -> tuple[float, float]:
        """(||E[g] - g_full||, ||g - E[g]||) / ||g_full|| of the gradient of the last hidden states of the kept student.

        The first is freed of what `draws` draws leave of their noise in the mean.
        """
        file = self.out / "learned.safetensors"
        if not file.is_file():
            return math.nan, math.nan
        model = from_config("llama", self.plan.student, "student", vocab_size=VOCAB)
        model.load_state_dict(load_file(file), strict=False)
        model.tie_weights()
        rows, side = slice(0, 8), Side.of(model)
        hidden = side.hidden(self.ids[rows]).detach().requires_grad_()

        def slope(loss: Tensor) -> Tensor:
            return torch.autograd.grad(loss, hidden)[0].double()

        full = slope(kdfast.linear_kd_loss(hidden, side.weight, self.states[rows], self.teacher.weight))
        logits, found = self.states[rows] @ self.teacher.weight.T, []
        for seed in range(draws if method.samples else 1):
            targets = self._targets(logits, method, seed)
            found.append(slope(kdfast.linear_topk_kd_loss(hidden, side.weight, targets, tail=method.tail)))
        each = torch.stack(found)
        mean = each.mean(0)
        noise = (each - mean).square().sum() / max(len(each) - 1, 1)
        off = ((mean - full).square().sum() - noise / len(each)).clamp(min=0)
        return float(off.sqrt() / full.norm()), float(noise.sqrt() / full.norm())
