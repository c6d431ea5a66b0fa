"""Cases of `parallel_ranks` for heads that FSDP2 stores in shards: every rank has rows of its own.

The truth is one process with the rows of all ranks: the mean of the ranks' losses, the gradient of that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from parallel_ranks import raises
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from kdfast import (
    attention_kl,
    attention_map_mse,
    attention_mse,
    hidden_cosine,
    hidden_mse,
    kd_loss,
    linear_kd_loss,
    linear_logit_mse,
    linear_topk_kd_loss,
    linear_topk_targets,
    topk_kd_loss,
    topk_targets,
)

N, V = 5, 37  # rows of a rank; ids, which the ranks cannot share evenly
MESHES: dict[str, tuple[tuple[int, ...], tuple[str, ...] | None]] = {
    "dp": ((-1,), None),
    "named": ((-1,), ("dp_shard",)),
    "hsdp": ((1, -1), ("replicate", "shard")),
    "replicated": ((-1, 1), ("replicate", "shard")),
}


def mesh_of(name: str) -> DeviceMesh:
    sizes, names = MESHES[name]
    return init_device_mesh("cpu", tuple(dist.get_world_size() if s < 0 else s for s in sizes), mesh_dim_names=names)


def setting() -> tuple[nn.Linear, nn.Linear, Tensor, Tensor, Tensor]:
    """Student's head, teacher's head, hidden states of both and labels of all ranks."""
    rows = N * dist.get_world_size()
    student, teacher = nn.Linear(8, V).double(), nn.Linear(12, V).double()
    labels = torch.randint(0, V, (rows,))
    return student, teacher, torch.randn(rows, 8).double(), torch.randn(rows, 12).double(), labels


def own(x: Tensor) -> Tensor:
    return x.chunk(dist.get_world_size())[dist.get_rank()].clone()


Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def dense(h: Tensor, w: Tensor, b: Tensor, h_t: Tensor, w_t: Tensor, b_t: Tensor, labels: Tensor, **kw: Any) -> Tensor:
    return linear_kd_loss(h, w, h_t, w_t, labels, student_bias=b, teacher_bias=b_t, hard_weight=0.3, temperature=2.0, **kw)


def sparse(h: Tensor, w: Tensor, b: Tensor, h_t: Tensor, w_t: Tensor, b_t: Tensor, labels: Tensor, **kw: Any) -> Tensor:
    targets = linear_topk_targets(h_t, w_t, 6, bias=b_t)
    return linear_topk_kd_loss(h, w, targets, labels, student_bias=b, hard_weight=0.3, **kw)


def matched(h: Tensor, w: Tensor, b: Tensor, h_t: Tensor, w_t: Tensor, b_t: Tensor, labels: Tensor) -> Tensor:
    return linear_logit_mse(h, w, h_t, w_t)


LOSSES: dict[str, Loss] = {
    "dense": dense,
    "dense-chunked": lambda *x: dense(*x, workspace_mb=1e-3),
    "dense-per-row": lambda *x: dense(*x, reduction="none").mean(),
    "sparse": sparse,
    "sparse-per-row": lambda *x: sparse(*x, reduction="none").mean(),
    "logit-mse": matched,
}


def check_loss(mesh: str, loss: Loss, change: Callable[[nn.Module, DeviceMesh], None] | None = None) -> None:
    student, teacher, hidden, hidden_t, labels = setting()
    whole = [x.detach().clone().requires_grad_() for x in (hidden, student.weight, student.bias)]
    truth = loss(*whole, hidden_t, teacher.weight.detach().clone(), teacher.bias.detach().clone(), labels)
    truth_grads = torch.autograd.grad(truth * 3, whole, materialize_grads=True)
    for head in (student, teacher):
        (change or (lambda head, mesh: fully_shard(head, mesh=mesh)))(head, mesh_of(mesh))
        assert isinstance(head.weight, DTensor)
    mine = own(hidden).requires_grad_()
    value = loss(mine, student.weight, student.bias, own(hidden_t), teacher.weight, teacher.bias, own(labels))
    (value * 3).backward()
    mean = value.detach().clone()
    dist.all_reduce(mean)
    ranks = dist.get_world_size()
    torch.testing.assert_close(mean / ranks, truth.detach())
    torch.testing.assert_close(mine.grad / ranks, own(truth_grads[0]))
    for parameter, wanted in zip((student.weight, student.bias), truth_grads[1:], strict=True):
        if parameter.grad is None:
            assert not wanted.any()
            continue
        assert isinstance(parameter.grad, DTensor)
        assert parameter.grad.placements == parameter.placements
        torch.testing.assert_close(parameter.grad.full_tensor(), wanted)


def check_over_tensor_parallel() -> None:
    """FSDP2 over data parallelism stores what tensor parallelism has sliced: rows differ over dp, the vocabulary over tp."""
    world = dist.get_world_size()
    for dp in {world, 1, max(world // 2, 1)}:
        mesh = init_device_mesh("cpu", (dp, world // dp), mesh_dim_names=("dp", "tp"))
        torch.manual_seed(dp)
        student, teacher = nn.Linear(8, V).double(), nn.Linear(12, V).double()
        hidden, hidden_t, labels = torch.randn(dp * N, 8).double(), torch.randn(dp * N, 12).double(), torch.arange(dp * N)
        whole = [x.detach().clone().requires_grad_() for x in (hidden, student.weight, student.bias)]
        truth = dense(*whole, hidden_t, teacher.weight.detach().clone(), teacher.bias.detach().clone(), labels)
        truth_grads = torch.autograd.grad(truth, whole)
        for head in (student, teacher):
            for name, parameter in list(head.named_parameters()):
                setattr(head, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh["tp"], [Shard(0)])))
            fully_shard(head, mesh=mesh["dp"])
        rows = [x.chunk(dp)[mesh.get_local_rank("dp")].clone() for x in (hidden, hidden_t, labels)]
        mine = rows[0].requires_grad_()
        value = dense(mine, student.weight, student.bias, rows[1], teacher.weight, teacher.bias, rows[2])
        value.backward()
        mean = value.detach().clone()
        dist.all_reduce(mean)
        torch.testing.assert_close(mean / world, truth.detach())
        torch.testing.assert_close(mine.grad / dp, truth_grads[0].chunk(dp)[mesh.get_local_rank("dp")])
        for parameter, wanted in zip((student.weight, student.bias), truth_grads[1:], strict=True):
            torch.testing.assert_close(parameter.grad.full_tensor(), wanted)


def check_same_rows(names: tuple[str, ...] | None) -> None:
    """Tensor parallelism with plain hidden states, whether its mesh says so ("tp": slices) or not (gathered)."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=names)
    student, teacher, hidden, hidden_t, labels = setting()
    whole = [x.detach().clone().requires_grad_() for x in (hidden, student.weight, student.bias)]
    for loss in (dense, lambda *x: linear_topk_kd_loss(*x[:2], topk_targets(x[3], 4), x[6], student_bias=x[2])):
        targets = hidden_t if loss is dense else torch.randn(len(hidden), V).double()
        truth = loss(*whole, targets, teacher.weight.detach(), teacher.bias.detach(), labels)
        truth_grads = torch.autograd.grad(truth, whole)
        sides = [distribute_tensor(x.detach(), mesh, [Shard(0)]) for x in (*whole[1:], teacher.weight, teacher.bias)]
        leaves = [hidden.clone().requires_grad_(), *(x.requires_grad_() for x in sides[:2])]
        value = loss(*leaves, targets, *sides[2:], labels)
        torch.testing.assert_close(value, truth)
        for got, wanted in zip(torch.autograd.grad(value, leaves), truth_grads, strict=True):
            torch.testing.assert_close(got.full_tensor() if isinstance(got, DTensor) else got, wanted)


def check_hidden_mse() -> None:
    _, _, hidden, hidden_t, _ = setting()
    projection = nn.Linear(8, 12).double()
    whole = [x.detach().clone().requires_grad_() for x in projection.parameters()]
    truth_grads = torch.autograd.grad(hidden_mse(hidden, hidden_t, *whole), whole)
    fully_shard(projection, mesh=mesh_of("dp"))
    hidden_mse(own(hidden), own(hidden_t), *projection.parameters()).backward()
    for parameter, wanted in zip(projection.parameters(), truth_grads, strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor(), wanted)


def check_capture() -> None:
    _, teacher, _, hidden_t, _ = setting()
    expected = linear_topk_targets(own(hidden_t), teacher.weight.detach().clone(), 6, bias=teacher.bias.detach().clone())
    fully_shard(teacher, mesh=mesh_of("dp"))
    got = linear_topk_targets(own(hidden_t), teacher.weight, 6, bias=teacher.bias)
    assert torch.equal(got.ids, expected.ids)
    torch.testing.assert_close(got.logprobs, expected.logprobs)


def check_logits_of_a_rank() -> None:
    """Plain logits without a group are a rank's own rows, and no DTensor beside them changes that."""
    mesh = mesh_of("dp")
    torch.manual_seed(dist.get_rank())
    x, t = torch.randn(4, 6), torch.randn(4, 6)
    expected = torch.nn.functional.kl_div(x.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="batchmean")
    torch.testing.assert_close(kd_loss(x, t), expected)
    torch.testing.assert_close(topk_kd_loss(x, topk_targets(t, 6)), expected)
    sharded = distribute_tensor(torch.zeros(4, 6 * dist.get_world_size()), mesh, [Shard(1)])
    raises("teacher_logits: expected to be sliced over the group '' like the others", lambda: kd_loss(x, sharded))
    whole = distribute_tensor(torch.zeros(4, 6), mesh, [Replicate()])
    raises("student_logits: expected Shard(1) on at most one mesh dimension", lambda: topk_kd_loss(
        distribute_tensor(torch.zeros(4, 6), mesh, [Shard(0)]), topk_targets(t, 2)))  # fmt: skip
    torch.testing.assert_close(kd_loss(whole, t), kd_loss(torch.zeros(4, 6), t))


def check_sides_that_differ() -> None:
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    weight = distribute_tensor(torch.randn(6 * world, 4), mesh, [Shard(0)])
    h, plain = torch.randn(3, 4), torch.randn(6 * world, 4)
    raises("teacher_weight: expected a DTensor sharded over its vocabulary", lambda: linear_kd_loss(h, weight, h, plain))
    raises("teacher_weight: expected to be sliced over the group ''", lambda: linear_kd_loss(h, plain, h, weight))
    longer = distribute_tensor(torch.randn(6 * world + 1, 4), mesh, [Shard(0)])
    raises(f"cut every side at multiples of 7 = ceil({7 * world} / {world})", lambda: linear_kd_loss(h, weight, h, longer))
    other = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    raises("expected Shard(0) on mesh dimension 0, that of tp_group", lambda: linear_kd_loss(
        h, distribute_tensor(plain, other, [Replicate()]), h, plain, tp_group=other.get_group()))  # fmt: skip


def check_where_no_dtensor_is_taken() -> None:
    """A loss of a rank's own rows says so in one line, whichever argument it is."""
    mesh = mesh_of("dp")
    h, w = torch.randn(4, 6), torch.randn(5, 6)
    rows, whole = (distribute_tensor(h.clone(), mesh, [p]) for p in (Shard(0), Replicate()))
    q = torch.randn(2, 2, 4, 3)
    heads = distribute_tensor(q.clone(), mesh, [Shard(1)])
    calls = {
        "student_hidden": lambda: linear_logit_mse(rows, w, h, w),
        "teacher_hidden": lambda: linear_logit_mse(h, w, whole, w),
        "h_s": lambda: hidden_mse(rows, h),
        "h_t": lambda: hidden_cosine(h, whole),
        "q_s": lambda: attention_mse(heads, q, q, q),
        "k_t": lambda: attention_kl(q, q, q, heads),
        "maps_t": lambda: attention_map_mse(q, heads),
        "hidden": lambda: linear_topk_targets(rows, w, 2),
    }
    for name, call in calls.items():
        raises(f"{name}: expected this rank's tensor, got a DTensor placed (", call)
    raises("pass .to_local() of one that is sharded by rows, .full_tensor() of any other", calls["h_s"])
    shared = distribute_tensor(w.clone(), mesh, [Shard(0)])
    torch.testing.assert_close(linear_logit_mse(h, shared, h + 1, shared), linear_logit_mse(h, w, h + 1, w))


def cases() -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {}
    for mesh in MESHES:
        for name, loss in LOSSES.items():
            found[f"fsdp-{mesh}-{name}"] = lambda m=mesh, f=loss: check_loss(m, f)
    found["fsdp-over-tensor-parallel"] = check_over_tensor_parallel
    found["fsdp-hidden-mse"] = check_hidden_mse
    found["fsdp-capture"] = check_capture
    found["fsdp-logits"] = check_logits_of_a_rank
    found["same-rows-named"] = lambda: check_same_rows(("tp",))
    found["same-rows-unnamed"] = lambda: check_same_rows(None)
    found["sides-that-differ"] = check_sides_that_differ
    found["where-no-dtensor-is-taken"] = check_where_no_dtensor_is_taken
    return found
