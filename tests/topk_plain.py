"""The loss from sparse targets as its definition reads: densify the teacher, then plain PyTorch."""

from __future__ import annotations

import plain
import torch
from torch import Tensor

from kdfast import Head, TopKTargets

#: Every tail with every divergence that it has, by a readable name.
COMBINATIONS = {
    f"{tail}-{name}": {"tail": tail, **options}
    for tail, names in {
        "ghost": ("forward", "reverse", "jsd"), "renormalize": ("forward", "jsd"), "uniform": ("forward", "reverse", "jsd"),
        "none": ("forward",),
    }.items()
    for name, options in {
        "forward": {"divergence": "forward_kl"}, "reverse": {"divergence": "reverse_kl"},
        "jsd": {"divergence": "jsd", "beta": 0.3},
    }.items()
    if name in names
}  # fmt: skip


def entries(targets: TopKTargets, temperature: float) -> Tensor:
    """`[N, V]` float64: what the targets say of each id at T, drawn entries with their weights; duplicates add up."""
    logp = targets.logprobs.double()
    p = (logp / temperature - targets.log_z[..., targets.column(temperature), None].double()).exp()
    if targets.weights is not None:
        p = p * targets.weights.double() / logp.exp()
    p = torch.where(targets.ids >= 0, p, 0)
    dense = torch.zeros(*targets.ids.shape[:-1], targets.vocab_size, dtype=torch.float64)
    return dense.scatter_add_(-1, targets.ids.clamp(min=0).long(), p)


def dense_teacher(targets: TopKTargets, tail: str, temperature: float, log_q: Tensor) -> Tensor:
    """The teacher's log-probabilities at T, given the student's; the ghost's shape carries no gradient."""
    p = entries(targets, temperature)
    listed = p > 0
    p_tail = targets.log_tail[..., targets.column(temperature), None].double().exp()
    rest = log_q.detach().masked_fill(listed, -torch.inf)
    if tail == "ghost":
        p = torch.where(listed, p, p_tail * rest.softmax(-1).nan_to_num(0))
    elif tail == "uniform":
        p = torch.where(listed, p, p_tail / (~listed).sum(-1, keepdim=True).clamp(min=1))
    return (p / p.sum(-1, keepdim=True)).log()


def topk_rows(
    student: Tensor, targets: TopKTargets, labels: Tensor | None = None, *, tail: str, divergence: str, beta: float = 0.5,
    temperature: float = 1.0, soft: float = 1.0, student_head: Head = plain.NO_HEAD, **options: object,
) -> Tensor:  # fmt: skip
    """Loss of each row before weights and masks."""
    z = student * student_head.scale
    z = z if student_head.softcap is None else student_head.softcap * torch.tanh(z / student_head.softcap)
    log_q = (z[..., : targets.vocab_size] / temperature).log_softmax(-1)
    if tail == "none":
        t = entries(targets, temperature)
        value = torch.where(t > 0, t * (t.log() - log_q), 0).sum(-1)
        rest = plain.kd_rows(z, [z.detach()], labels, soft=0.0, **options)  # type: ignore[arg-type]
        return soft * temperature**2 * value + rest
    teacher = temperature * dense_teacher(targets, tail, temperature, log_q)
    return plain.kd_rows(
        z, [teacher], labels, name=divergence, beta=beta, temperature=temperature, soft=soft, **options  # type: ignore[arg-type]
    )  # fmt: skip
