"""Cases of `parallel_ranks` for `main_grad` on heads that are DTensors: backward adds to it what `grad` would have got."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from parallel_fsdp_ranks import LOSSES, MESHES, Loss, N, V, dense, mesh_of, own, setting, sparse
from parallel_ranks import raises
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from kdfast import linear_kd_loss, linear_topk_kd_loss, topk_targets


def give(weight: Tensor, how: str) -> Tensor:
    """Ones as the `main_grad` of a DTensor; returns this rank's part."""
    whole = torch.ones_like(weight.detach(), dtype=torch.float32)
    weight.main_grad = whole if how == "dtensor" else whole.to_local().clone()
    return whole.to_local() if how == "dtensor" else weight.main_grad


def assert_added(weight: Tensor, part: Tensor, truth: Tensor) -> None:
    """The part is 1 more than the gradient of the whole head, and `grad` was left alone."""
    assert weight.grad is None
    got = DTensor.from_local(part - 1, weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride())
    torch.testing.assert_close(got.full_tensor().double(), truth.double(), rtol=1e-5, atol=1e-6)


def check_own_rows(mesh: str, loss: Loss, how: str) -> None:
    student, teacher, hidden, hidden_t, labels = setting()
    whole = [x.detach().clone().requires_grad_() for x in (hidden, student.weight, student.bias)]
    truth = loss(*whole, hidden_t, teacher.weight.detach().clone(), teacher.bias.detach().clone(), labels)
    _, truth_grad, bias_grad = torch.autograd.grad(truth * 6, whole, materialize_grads=True)
    for head in (student, teacher):
        fully_shard(head, mesh=mesh_of(mesh))
    part = give(student.weight, how)
    for factor in (2, 4):  # two micro-batches add up
        value = loss(own(hidden), student.weight, student.bias, own(hidden_t), teacher.weight, teacher.bias, own(labels))
        (value * factor).backward()
    assert_added(student.weight, part, truth_grad)
    torch.testing.assert_close(student.bias.grad.full_tensor(), bias_grad)


def check_over_tensor_parallel(how: str) -> None:
    world = dist.get_world_size()
    for dp in {world, 1}:
        mesh = init_device_mesh("cpu", (dp, world // dp), mesh_dim_names=("dp", "tp"))
        torch.manual_seed(dp)
        student, teacher = nn.Linear(8, V, bias=False).double(), nn.Linear(12, V, bias=False).double()
        hidden, hidden_t, labels = torch.randn(dp * N, 8).double(), torch.randn(dp * N, 12).double(), torch.arange(dp * N)
        weight = student.weight.detach().clone().requires_grad_()
        linear_kd_loss(hidden, weight, hidden_t, teacher.weight.detach().clone(), labels, hard_weight=0.3).backward()
        for head in (student, teacher):
            head.weight = nn.Parameter(distribute_tensor(head.weight.detach(), mesh["tp"], [Shard(0)]))
            fully_shard(head, mesh=mesh["dp"])
        part = give(student.weight, how)
        h, h_t, mine = (x.chunk(dp)[mesh.get_local_rank("dp")].clone() for x in (hidden, hidden_t, labels))
        linear_kd_loss(h, student.weight, h_t, teacher.weight, mine, hard_weight=0.3).backward()
        assert_added(student.weight, part, weight.grad)


def check_same_rows(placement: str, how: str) -> None:
    """Hidden states of all ranks: plain ones beside a mesh that says "tp" or nothing, and DTensors on the head's mesh."""
    names = ("tp",) if placement == "named" else None
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=names)
    student, teacher, hidden, hidden_t, labels = setting()
    placements = {"replicated": [Replicate()], "rows-sharded": [Shard(0)]}.get(placement)
    h = hidden.clone() if placements is None else distribute_tensor(hidden, mesh, placements)
    targets = topk_targets(torch.randn(len(hidden), V).double(), 4)
    losses: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "dense": lambda h, w, w_t: linear_kd_loss(h, w, hidden_t, w_t, labels),
        "sparse": lambda h, w, w_t: linear_topk_kd_loss(h, w, targets, labels),
    }
    for loss in losses.values():
        whole = student.weight.detach().clone().requires_grad_()
        loss(hidden, whole, teacher.weight.detach()).backward()
        weight, w_t = (distribute_tensor(x.weight.detach(), mesh, [Shard(0)]) for x in (student, teacher))
        part = give(weight.requires_grad_(), how)
        loss(h, weight, w_t).backward()
        assert_added(weight, part, whole.grad)


def check_half_precision() -> None:
    """What is added was never rounded to the dtype of the head."""
    student, _, hidden, _, labels = setting()
    targets = topk_targets(torch.randn(len(hidden), V), 4)
    half = student.weight.detach().bfloat16()
    whole = half.double().requires_grad_()
    linear_topk_kd_loss(hidden.bfloat16().double(), whole, targets, labels, hard_weight=0.3).backward()
    head = nn.Linear(8, V, bias=False).bfloat16()
    head.weight.data.copy_(half)
    fully_shard(head, mesh=mesh_of("dp"))
    mine = targets[dist.get_rank() * N : (dist.get_rank() + 1) * N]
    errors = []
    for kept in (False, True):
        if kept:
            head.weight.main_grad = torch.zeros_like(head.weight, dtype=torch.float32)
        head.weight.grad = None
        linear_topk_kd_loss(own(hidden).bfloat16(), head.weight, mine, own(labels), hard_weight=0.3).backward()
        got = (head.weight.main_grad if kept else head.weight.grad).full_tensor().double()
        errors.append((got - whole.grad).norm())
        assert torch.equal(got, got.bfloat16().double()) != kept
    assert errors[1] < 0.9 * errors[0], errors


def check_refusals() -> None:
    student, teacher, hidden, hidden_t, _ = setting()
    mesh = mesh_of("dp")
    for head in (student, teacher):
        fully_shard(head, mesh=mesh)
    weight = student.weight
    local, rest = list(weight.to_local().shape), (own(hidden_t), teacher.weight)
    targets = topk_targets(torch.randn(N, V).double(), 4)
    remedy = "use torch.zeros_like(weight, dtype=torch.float32)"
    wrong = {
        f"got torch.float32 {[V, 8]} on cpu; {remedy}": torch.zeros(V, 8),
        f"got torch.float64 {local} on cpu; {remedy}": torch.zeros(local).double(),
        "placed (Replicate(),)": distribute_tensor(torch.zeros(V, 8), mesh, [Replicate()]),
        "placed (Shard(dim=1),)": distribute_tensor(torch.zeros(V, 8), mesh, [Shard(1)]),
    }
    for got, main_grad in wrong.items():
        weight.main_grad = main_grad
        for call in (
            lambda: linear_kd_loss(own(hidden), weight, *rest),
            lambda: linear_topk_kd_loss(own(hidden), weight, targets),
        ):
            raises(f"student_weight.main_grad: expected float32 {local} on cpu or, of all ranks, {[V, 8]}", call)
            raises(got, call)
    plain = torch.zeros(V, 8, dtype=torch.float64, requires_grad=True)
    plain.main_grad = torch.zeros(3)
    raises(f"student_weight.main_grad: expected float32 {[V, 8]} on cpu, got torch.float32 [3]", lambda: linear_kd_loss(
        hidden, plain, hidden_t, torch.zeros(V, 12).double()))  # fmt: skip


def cases() -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {}
    losses = {"dense": dense, "dense-per-row": LOSSES["dense-per-row"], "sparse": sparse}
    for how in ("dtensor", "local"):
        for mesh in MESHES:
            for name, loss in losses.items():
                found[f"main-grad-{how}-{mesh}-{name}"] = lambda m=mesh, f=loss, h=how: check_own_rows(m, f, h)
        for placement in ("unnamed", "named", "replicated", "rows-sharded"):
            found[f"main-grad-{how}-same-rows-{placement}"] = lambda p=placement, h=how: check_same_rows(p, h)
        found[f"main-grad-{how}-fsdp-over-tensor-parallel"] = lambda h=how: check_over_tensor_parallel(h)
    found["main-grad-half-precision"] = check_half_precision
    found["main-grad-refusals"] = check_refusals
    return found
