"""What is computed: random inputs of one shape, and the float64 truth for the loss and gradients on them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.ops.targets import TopKTargets

from .plain import from_logs

Outcome = tuple[Tensor, tuple[Tensor, ...]]

# Elements of float64 logits worked on at a time, and of float64 gradient kept to compare with.
_CHUNK, _KEPT = 1 << 23, 1 << 25


@dataclass(frozen=True)
class Objective:
    """soft_weight * T^2 * D(teacher_T, student_T) + hard_weight * CE, mean over labels other than ignore_index."""

    temperature: float = 2.0
    soft_weight: float = 0.5
    hard_weight: float = 0.5
    ignore_index: int = -100
    divergence: str = "forward_kl"
    beta: float = 0.5
    skew: float = 0.1
    ab_alpha: float = 0.5
    ab_beta: float = 0.5


def _generator(device: str, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _labels(n: int, vocab: int, ignored: int, device: str, random: torch.Generator) -> Tensor:
    labels = torch.randint(0, vocab, (n,), device=device, generator=random)
    labels[:ignored] = Objective.ignore_index
    return labels


def _plain_sum(student: Tensor, teacher: Tensor, labels: Tensor, objective: Objective) -> Tensor:
    """Plain PyTorch, summed over the rows that count."""
    t = objective.temperature
    keep = labels != objective.ignore_index
    kl = from_logs(objective, F.log_softmax(teacher / t, -1), F.log_softmax(student / t, -1))
    ce = F.cross_entropy(student, labels, reduction="sum", ignore_index=objective.ignore_index)
    return objective.soft_weight * t * t * (kl * keep).sum() + objective.hard_weight * ce


@dataclass(frozen=True)
class LogitsCase:
    """Student and teacher logits `[N, V]`, labels `[N]`; the gradient is of the student."""

    student: Tensor
    teacher: Tensor
    labels: Tensor
    objective: Objective = Objective()
    ignored: int = 0  # rows whose label is ignore_index, known to the host

    @classmethod
    def make(
        cls, n: int, vocab: int, dtype: torch.dtype, *, device: str = "cpu", ignored: int = 0, seed: int = 0,
        objective: Objective = Objective(),
    ) -> LogitsCase:  # fmt: skip
        random = _generator(device, seed)
        teacher = torch.randn(n, vocab, device=device, dtype=dtype, generator=random).mul_(3)
        student = torch.randn(n, vocab, device=device, dtype=dtype, generator=random).mul_(2).add_(teacher, alpha=0.5)
        return cls(student.requires_grad_(), teacher, _labels(n, vocab, ignored, device, random), objective, ignored)

    @property
    def wanted(self) -> tuple[Tensor, ...]:
        return (self.student,)

    @property
    def shape(self) -> str:
        return "N={} V={}".format(*self.student.shape)

    def fresh(self) -> LogitsCase:
        """The same case with its own copy of the student's logits, for a contestant that overwrites them."""
        return replace(self, student=self.student.detach().clone().requires_grad_())

    def comparable(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The part of the gradients that `truth` holds: the first rows, as many as fit a few hundred megabytes."""
        return (grads[0][: max(1, _KEPT // self.student.shape[1])],)

    def truth(self) -> Outcome:
        """Loss and `comparable` gradients in float64, row chunk by row chunk."""
        rows = max(1, _CHUNK // self.student.shape[1])
        count = (self.labels != self.objective.ignore_index).sum()
        total = torch.zeros((), dtype=torch.float64, device=self.student.device)
        grads, held, kept = [], 0, max(1, _KEPT // self.student.shape[1])
        for i in range(0, self.student.shape[0], rows):
            s = self.student.detach()[i : i + rows].double().requires_grad_(held < kept)
            loss = self._sum(s, slice(i, i + rows)) / count
            total += loss.detach()
            if held < kept:
                grads.append(torch.autograd.grad(loss, s)[0])
                held += s.shape[0]
        return total, (torch.cat(grads)[:kept],)

    def _sum(self, student: Tensor, rows: slice) -> Tensor:
        return _plain_sum(student, self.teacher[rows].double(), self.labels[rows], self.objective)


@dataclass(frozen=True)
class TopKCase(LogitsCase):
    """A student `[N, V]` against a captured teacher (k entries and a ghost bucket)."""

    targets: TopKTargets | None = None

    @property
    def shape(self) -> str:
        return f"{super().shape} k={self.held.k}"

    @property
    def held(self) -> TopKTargets:
        """The targets, which a case for this loss always has."""
        if self.targets is None:
            raise ValueError("TopKCase: expected targets, got None; make it with TopKCase.captured")
        return self.targets

    @classmethod
    def captured(cls, case: LogitsCase, targets: TopKTargets) -> TopKCase:
        """The case with its teacher reduced to `targets`, captured from `case.teacher`."""
        return cls(case.student, case.teacher, case.labels, case.objective, case.ignored, targets)

    def _sum(self, student: Tensor, rows: slice) -> Tensor:
        return ghost_sum(student, self.held[rows], self.labels[rows], self.objective)


def ghost_sum(student: Tensor, targets: TopKTargets, labels: Tensor, objective: Objective) -> Tensor:
    """Plain PyTorch for k entries and one bucket for the rest, summed over the rows that count."""
    t, ids, keep = objective.temperature, targets.ids.long(), labels != objective.ignore_index
    column = targets.column(t)
    log_q = F.log_softmax(student / t, -1)
    log_p = targets.logprobs.to(log_q.dtype) / t - targets.log_z[:, column, None].to(log_q.dtype)
    log_p_tail = targets.log_tail[:, column].to(log_q.dtype)
    log_q_tail = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1)
    kl = (log_p.exp() * (log_p - log_q.gather(-1, ids))).sum(-1) + log_p_tail.exp() * (log_p_tail - log_q_tail)
    ce = F.cross_entropy(student, labels, reduction="sum", ignore_index=objective.ignore_index)
    return objective.soft_weight * t * t * (kl * keep).sum() + objective.hard_weight * ce


@dataclass(frozen=True)
class LinearCase:
    """Hidden states `[N, D]` and head weights `[V, D]` of both sides; gradients of the student's two."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor
    objective: Objective = Objective()
    ignored: int = 0  # rows whose label is ignore_index, known to the host

    @classmethod
    def make(
        cls, n: int, vocab: int, student_dim: int, teacher_dim: int, dtype: torch.dtype, *,
        device: str = "cpu", ignored: int = 0, seed: int = 0, objective: Objective = Objective(),
    ) -> LinearCase:  # fmt: skip
        random = _generator(device, seed)

        def normal(rows: int, dim: int, spread: float) -> Tensor:
            return torch.randn(rows, dim, device=device, dtype=dtype, generator=random).mul_(spread)

        # Logits then have a standard deviation near 3, as those of trained models do.
        student = normal(n, student_dim, 1.0), normal(vocab, student_dim, 3 * student_dim**-0.5)
        teacher = normal(n, teacher_dim, 1.0), normal(vocab, teacher_dim, 3 * teacher_dim**-0.5)
        labels = _labels(n, vocab, ignored, device, random)
        return cls(student[0].requires_grad_(), student[1].requires_grad_(), *teacher, labels, objective, ignored)

    @property
    def wanted(self) -> tuple[Tensor, ...]:
        return self.student_hidden, self.student_weight

    @property
    def shape(self) -> str:
        (n, ds), (v, dt) = self.student_hidden.shape, self.teacher_weight.shape
        return f"N={n} V={v} Ds={ds} Dt={dt}"

    def comparable(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return grads

    def truth(self) -> Outcome:
        """Loss and gradients in float64, row chunk by row chunk."""
        rows = max(1, _CHUNK // self.student_weight.shape[0])
        weight = self.student_weight.detach().double().requires_grad_()
        teacher_weight = self.teacher_weight.double()
        count = (self.labels != self.objective.ignore_index).sum()
        total = torch.zeros((), dtype=torch.float64, device=weight.device)
        grad_weight, grad_hidden = torch.zeros_like(weight), []
        for i in range(0, self.labels.shape[0], rows):
            hidden = self.student_hidden.detach()[i : i + rows].double().requires_grad_()
            teacher = self.teacher_hidden[i : i + rows].double() @ teacher_weight.t()
            loss = _plain_sum(hidden @ weight.t(), teacher, self.labels[i : i + rows], self.objective) / count
            of_hidden, of_weight = torch.autograd.grad(loss, (hidden, weight))
            grad_hidden.append(of_hidden)
            grad_weight += of_weight
            total += loss.detach()
        return total, (torch.cat(grad_hidden), grad_weight)


@dataclass(frozen=True)
class CaptureCase:
    """Teacher logits `[N, V]` to reduce to k entries and log-sum-exps. Outcome: the log-probabilities' mean, and
    (log-probabilities, log_z, log_tail); a contestant may leave out the last."""

    logits: Tensor
    k: int
    temperatures: tuple[float, ...] = (1.0, 2.0)

    @classmethod
    def make(cls, n: int, vocab: int, k: int, dtype: torch.dtype, *, device: str = "cpu", seed: int = 0) -> CaptureCase:
        return cls(torch.randn(n, vocab, device=device, dtype=dtype, generator=_generator(device, seed)).mul_(3), k)

    @property
    def shape(self) -> str:
        n, v = self.logits.shape
        return f"N={n} V={v} k={self.k} T={','.join(format(t, 'g') for t in self.temperatures)}"

    def comparable(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return grads

    def truth(self) -> Outcome:
        """In float64, row chunk by row chunk; log_tail over the unselected ids, never as 1 - sum."""
        rows, parts = max(1, _CHUNK // self.logits.shape[1]), []
        for i in range(0, self.logits.shape[0], rows):
            logp = self.logits[i : i + rows].double().log_softmax(-1)
            top, ids = logp.topk(self.k)
            rest = logp.scatter(-1, ids, -torch.inf)
            log_z = torch.stack([(logp / t).logsumexp(-1) for t in self.temperatures], -1)
            parts.append((top, log_z, torch.stack([(rest / t).logsumexp(-1) for t in self.temperatures], -1) - log_z))
        outputs = tuple(torch.cat(column) for column in zip(*parts, strict=True))
        return outputs[0].mean(), outputs
