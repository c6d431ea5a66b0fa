"""Cases of `parallel_ranks` for a head tied to the embedding: one parameter, of which a rank has the rows of its ids, and
whose gradient is that of both uses. The truth is a model with the whole parameter on one process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from parallel_fsdp_ranks import MESHES, mesh_of
from parallel_fsdp_ranks import own as own_rows
from parallel_ranks import ROWS, STEP, differentiated, own, same
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from kdfast import Head, linear_kd_loss, linear_topk_kd_loss, topk_targets, use_backend

VOCAB, SIZE = 37, 8  # the last slice is shorter than the first
SPARSE: dict[str, dict[str, Any]] = {
    "ghost": {},
    "uniform-jsd": {"tail": "uniform", "divergence": "jsd"},
    "renormalize": {"tail": "renormalize"},
    "chunked-per-row": {"workspace_mb": 1e-3, "reduction": "none"},
    "head": {"student_head": Head(5.0, 0.8), "divergence": "reverse_kl"},
}
DENSE: dict[str, dict[str, Any]] = {
    "forward-kl": {},
    "jsd-smooth": {"divergence": "jsd", "label_smoothing": 0.1, "z_loss": 0.01},
    "chunked-per-row": {"workspace_mb": 1e-3, "reduction": "none"},
}
Loss = Callable[..., Tensor]


class Summed(torch.autograd.Function):
    """The sum over the ranks; what comes back is the gradient of each rank's share, the same on all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def embedded(tokens: Tensor, rows: Tensor) -> Tensor:
    """`F.embedding(tokens, weight)` from the rows of weight that a rank has."""
    local = tokens - dist.get_rank() * STEP
    here = (local >= 0) & (local < len(rows))
    return Summed.apply(F.embedding(torch.where(here, local, 0), rows) * here[:, None])


def setting() -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Embedding, what lies between it and the head, tokens (of both slices, one twice), labels; the teacher's hidden, head."""
    tokens = torch.tensor([0, 36, 18, 19, 36, 5])
    assert len(tokens) == ROWS
    labels = torch.randint(0, VOCAB, (ROWS,))
    labels[1] = -100
    teacher = torch.randn(ROWS, 12), torch.randn(VOCAB, 12) / 2
    return torch.randn(VOCAB, SIZE), torch.randn(SIZE, SIZE), tokens, labels, teacher


def losses(sparse: bool, labels: Tensor, teacher: tuple[Tensor, Tensor], kw: dict[str, Any]) -> tuple[Loss, Loss]:
    """(from the whole head, from a rank's slice), as f(hidden, weight)."""
    h_t, w_t = teacher
    options = {"hard_weight": 0.3, "temperature": 2.0} | kw
    if sparse:
        targets = topk_targets(h_t @ w_t.T, 5, temperatures=(2.0,))
        loss = lambda h, w, **more: linear_topk_kd_loss(h, w, targets, labels, **options, **more)  # noqa: E731
        return loss, lambda h, w: loss(h, w, tp_group=dist.group.WORLD)
    loss = lambda h, w, t, **more: linear_kd_loss(h, w, h_t.to(h), t.to(h), labels, **options, **more)  # noqa: E731
    return lambda h, w: loss(h, w, w_t), lambda h, w: loss(h, w, own(w_t, 0), tp_group=dist.group.WORLD)


def check_slices(sparse: bool, dtype: torch.dtype, kw: dict[str, Any]) -> None:
    weight, inner, tokens, labels, teacher = setting()
    of_whole, of_slice = losses(sparse, labels, teacher, kw)

    def whole(w: Tensor, inner: Tensor) -> Tensor:
        with use_backend("reference"):
            return of_whole(F.embedding(tokens, w).tanh() @ inner, w)

    def split(w: Tensor, inner: Tensor) -> Tensor:
        return of_slice(embedded(tokens, w).tanh() @ inner, w)

    truth, truth_grads = differentiated(whole, [weight, inner], torch.float64)
    unsplit, unsplit_grads = differentiated(whole, [weight, inner], dtype)
    value, grads = differentiated(split, [own(weight, 0), inner], dtype)
    same(value, truth, unsplit, dtype, "value")
    same(grads[0], own(truth_grads[0], 0), own(unsplit_grads[0], 0), dtype, "gradient of the shared parameter")
    same(grads[1], truth_grads[1], unsplit_grads[1], dtype, "gradient of what lies between")


def check_main_grad(sparse: bool) -> None:
    """The head's part goes to `main_grad`, the embedding's to `grad`; neither is lost, neither twice."""
    weight, inner, tokens, labels, teacher = setting()
    of_whole, of_slice = losses(sparse, labels, teacher, {})
    whole = weight.double().requires_grad_()
    of_whole(F.embedding(tokens, whole).tanh() @ inner.double(), whole).backward()
    rows = own(weight, 0).requires_grad_()
    rows.main_grad = torch.ones_like(rows)
    of_slice(embedded(tokens, rows).tanh() @ inner, rows).backward()
    looked_up = torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, tokens, True)
    assert ((rows.grad != 0).any(-1) == own(looked_up)).all()
    torch.testing.assert_close((rows.main_grad - 1 + rows.grad).double(), own(whole.grad, 0), rtol=1e-5, atol=1e-6)


def check_dtensor(sparse: bool) -> None:
    """Tensor parallelism of torch: the embedding's shards are the head's slices, no group is named."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    weight, inner, tokens, labels, teacher = setting()
    weight, inner, h_t, w_t = (x.double() for x in (weight, inner, *teacher))
    targets = topk_targets(h_t @ w_t.T, 5)

    def loss(h: Tensor, w: Tensor, teacher: Tensor) -> Tensor:
        if sparse:
            return linear_topk_kd_loss(h, w, targets, labels, hard_weight=0.3)
        return linear_kd_loss(h, w, h_t, teacher, labels, hard_weight=0.3)

    whole = [weight.clone().requires_grad_(), inner.clone().requires_grad_()]
    truth = loss(F.embedding(tokens, whole[0]).tanh() @ whole[1], whole[0], w_t)
    truth_grads = torch.autograd.grad(truth * 3, whole)
    shards = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    between = distribute_tensor(inner, mesh, [Replicate()]).requires_grad_()
    everywhere = distribute_tensor(tokens, mesh, [Replicate()])
    hidden = F.embedding(everywhere, shards).redistribute(placements=[Replicate()]).tanh() @ between
    value = loss(hidden, shards, distribute_tensor(w_t, mesh, [Shard(0)]))
    torch.testing.assert_close(value, truth)
    for got, wanted in zip(torch.autograd.grad(value * 3, (shards, between)), truth_grads, strict=True):
        assert isinstance(got, DTensor)
        torch.testing.assert_close(got.full_tensor(), wanted)


class Tied(nn.Module):
    """Hidden states of a model whose head is its embedding."""

    def __init__(self, weight: Tensor, inner: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Embedding(*weight.shape, _weight=weight.clone())
        self.inner = nn.Linear(SIZE, SIZE, bias=False, dtype=weight.dtype)
        self.inner.weight.data.copy_(inner)
        self.head = nn.Linear(SIZE, VOCAB, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(self.embedding(tokens).tanh())


def check_fsdp(mesh: str, sparse: bool) -> None:
    """FSDP2, rows of its own on every rank, the loss formed behind the root's forward from the head's shards."""
    world = dist.get_world_size()
    weight, inner = torch.randn(VOCAB, SIZE).double(), torch.randn(SIZE, SIZE).double()
    tokens, labels = torch.randint(0, VOCAB, (2, 5 * world))
    h_t, w_t = torch.randn(5 * world, 12).double(), torch.randn(VOCAB, 12).double()

    def loss(h: Tensor, w: Tensor, hidden_t: Tensor, labels: Tensor) -> Tensor:
        if sparse:
            return linear_topk_kd_loss(h, w, topk_targets(hidden_t @ w_t.T, 6), labels, hard_weight=0.3)
        return linear_kd_loss(h, w, hidden_t, w_t, labels, hard_weight=0.3, temperature=2.0)

    one = Tied(weight, inner)
    truth = loss(one(tokens), one.head.weight, h_t, labels)
    (truth * 3).backward()
    model = fully_shard(Tied(weight, inner), mesh=mesh_of(mesh))
    value = loss(model(own_rows(tokens)), model.head.weight, own_rows(h_t), own_rows(labels))
    (value * 3).backward()
    mean = value.detach().clone()
    dist.all_reduce(mean)
    torch.testing.assert_close(mean / world, truth.detach())
    assert model.head.weight is model.embedding.weight
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), one.get_parameter(name).grad, msg=name)


def cases() -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {}
    for form, options in {"linear": DENSE, "linear-topk": SPARSE}.items():
        sparse = form == "linear-topk"
        for name, kw in options.items():
            for dtype, short in ((torch.float64, "fp64"), (torch.float32, "fp32")):
                found[f"tied-{form}-{name}-{short}"] = lambda s=sparse, d=dtype, kw=kw: check_slices(s, d, kw)
        found[f"tied-{form}-main-grad"] = lambda s=sparse: check_main_grad(s)
        found[f"tied-{form}-dtensor"] = lambda s=sparse: check_dtensor(s)
        for mesh in MESHES:
            found[f"tied-{form}-fsdp-{mesh}"] = lambda m=mesh, s=sparse: check_fsdp(m, s)
    return found
