"""Cases of `parallel_ranks` for sparse targets: captured from, and learnt through, slices of the vocabulary."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel_ranks import WEIGHTS, differentiated, heads, own, rows, same
from topk_plain import COMBINATIONS
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import kdfast
from bench import launch_lint
from kdfast import Head, linear_topk_kd_loss, topk_kd_loss, topk_targets, use_backend

OPTIONS: dict[str, dict[str, Any]] = {
    **COMBINATIONS,
    "every-row-option": {
        "label_smoothing": 0.1, "z_loss": 0.01, "student_head": Head(5.0, 0.8), "divergence": "jsd", "token_weight": WEIGHTS
    },
    "none-per-row": {"reduction": "none"},
}  # fmt: skip


def check_loss(vocabs: tuple[int, int], several: int, dtype: torch.dtype, kw: dict[str, Any]) -> None:
    student, teachers, labels = rows(*vocabs, teachers=1)
    more = [teachers[0] + torch.randn_like(teachers[0]) for _ in range(several - 1)]
    targets = [topk_targets(t, 4 + i, temperatures=(2.0,)) for i, t in enumerate([*teachers, *more])]
    options = {"temperature": 2.0, "soft_weight": 0.7, "hard_weight": 0.3} | kw
    stored = student.to(dtype)

    def whole(x: Tensor) -> Tensor:
        with use_backend("reference"):
            return topk_kd_loss(x, targets, labels, **options)

    def split(x: Tensor) -> Tensor:
        return topk_kd_loss(x, targets, labels, tp_group=dist.group.WORLD, **options)

    truth, (truth_grad,) = differentiated(whole, [stored], torch.float64)
    unsplit, (unsplit_grad,) = differentiated(whole, [stored], dtype)
    value, (grad,) = differentiated(split, [own(stored)], dtype)
    same(value, truth, unsplit, dtype, "value")
    same(grad, own(truth_grad), own(unsplit_grad), dtype, "gradient")


def check_linear(kw: dict[str, Any]) -> None:
    student, _, labels = heads()
    targets = topk_targets(torch.randn(6, 38) * 2, 5, temperatures=(2.0,))
    options = {"temperature": 2.0, "hard_weight": 0.3} | kw

    def whole(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        with use_backend("reference"):
            return linear_topk_kd_loss(h, w, targets, labels, student_bias=b, **options)

    def split(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        group = {"tp_group": dist.group.WORLD, "workspace_mb": 1e-3}
        return linear_topk_kd_loss(h, w, targets, labels, student_bias=b, **group, **options)

    truth, truth_grads = differentiated(whole, student, torch.float64)
    unsplit, unsplit_grads = differentiated(whole, student, torch.float32)
    value, grads = differentiated(split, [student[0], own(student[1], 0), own(student[2], 0)], torch.float32)
    same(value, truth, unsplit, torch.float32, "value")
    same(grads[0], truth_grads[0], unsplit_grads[0], torch.float32, "gradient of hidden")
    for g, t, u in zip(grads[1:], truth_grads[1:], unsplit_grads[1:], strict=True):
        same(g, own(t, 0), own(u, 0), torch.float32, "gradient of the head")


def check_capture(k: int, ties: bool) -> None:
    logits, head = torch.randn(5, 38) * 3, Head(scale=0.5)
    if ties:
        logits = logits.round()
    whole = topk_targets(logits, k, temperatures=(1.0, 2.0), head=head)
    split = topk_targets(own(logits), k, temperatures=(1.0, 2.0), head=head, tp_group=dist.group.WORLD)
    assert split.vocab_size == 38
    assert torch.equal(split.ids, whole.ids)
    for name in ("logprobs", "log_z", "log_tail"):
        torch.testing.assert_close(getattr(split, name), getattr(whole, name), rtol=1e-5, atol=1e-5, msg=name)


def check_drawn(k: int, samples: int, slices: int = 38) -> None:
    logits, head = torch.randn(5, slices) * 3, Head(scale=0.5)
    logits[0, 1:19] = -torch.inf  # a rank that has nearly nothing to draw
    logits[0, 0] = -200
    kw = {"temperatures": (1.0, 2.0), "samples": samples, "sample_temperature": 1.5, "head": head}
    with use_backend("reference"):
        whole = topk_targets(logits, k, generator=torch.Generator().manual_seed(5), **kw)
    # Only the first rank's draws count.
    own_seed = torch.Generator().manual_seed(5 + dist.get_rank())
    split = topk_targets(own(logits), k, generator=own_seed, tp_group=dist.group.WORLD, **kw)
    assert torch.equal(split.ids, whole.ids)
    for name in ("logprobs", "log_z", "log_tail", "weights"):
        torch.testing.assert_close(getattr(split, name), getattr(whole, name), rtol=1e-5, atol=1e-5, msg=name)


def check_parts() -> None:
    student, teachers, labels = rows()
    targets = topk_targets(teachers[0], 5)
    kw = {"hard_weight": 0.3, "return_parts": True}
    with use_backend("reference"):
        _, expected = topk_kd_loss(student, targets, labels, **kw)
    _, got = topk_kd_loss(own(student), targets, labels, tp_group=dist.group.WORLD, **kw)
    for name, a, b in zip(expected._fields, got, expected, strict=True):
        assert a.count == b.count, name
        torch.testing.assert_close(a.sum, b.sum, rtol=2e-6, atol=1e-6, msg=name)


def check_dtensor() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    student, teachers, labels = rows()
    kw = {"tail": "uniform", "hard_weight": 0.3}
    sharded = distribute_tensor(student, mesh, [Shard(1)]).requires_grad_()
    targets = topk_targets(distribute_tensor(teachers[0], mesh, [Shard(1)]), 5)
    x = student.clone().requires_grad_()
    with use_backend("reference"):
        (truth,) = torch.autograd.grad(topk_kd_loss(x, topk_targets(teachers[0], 5), labels, **kw), x)
    (grad,) = torch.autograd.grad(topk_kd_loss(sharded, targets, labels, **kw), sharded)
    assert isinstance(grad, DTensor)
    torch.testing.assert_close(grad.full_tensor(), truth)


def check_no_distribution() -> None:
    student, teachers, _ = rows()
    good = topk_targets(teachers[0], 5)
    ids, logprobs, log_tail = good.ids.clone(), good.logprobs.clone(), good.log_tail.clone()
    ids[1], logprobs[1], log_tail[1] = -1, -torch.inf, -torch.inf
    bad = dataclasses.replace(good, ids=ids, logprobs=logprobs, log_tail=log_tail)
    kw = {"tp_group": dist.group.WORLD, "reduction": "none"}
    for tail in ("ghost", "uniform", "none"):
        with pytest.raises(ValueError, match="targets: row 1 has neither entries nor a tail"):
            topk_kd_loss(own(student), bad, tail=tail, **kw)
        expected = topk_kd_loss(own(student), good, torch.where(torch.arange(len(ids)) == 1, -100, 0), tail=tail, **kw)
        got = topk_kd_loss(own(student), bad, torch.where(torch.arange(len(ids)) == 1, -100, 0), tail=tail, **kw)
        assert torch.equal(got, expected)


def check_row_without_entries() -> None:
    """With tail "none" it has no soft loss, and keeps its hard one."""
    student, teachers, labels = rows()
    good = topk_targets(teachers[0], 5)
    ids, logprobs, log_tail = good.ids.clone(), good.logprobs.clone(), good.log_tail.clone()
    ids[1], logprobs[1], log_tail[1] = -1, -torch.inf, 0.0
    empty = dataclasses.replace(good, ids=ids, logprobs=logprobs, log_tail=log_tail)
    kw = {"tail": "none", "hard_weight": 0.5, "reduction": "none"}
    x, whole = own(student).requires_grad_(), student.clone().requires_grad_()
    loss = topk_kd_loss(x, empty, labels, tp_group=dist.group.WORLD, **kw)
    with use_backend("reference"):
        expected = topk_kd_loss(whole, empty, labels, **kw)
    torch.testing.assert_close(loss, expected)
    (grad,), (truth,) = torch.autograd.grad(loss.sum(), x), torch.autograd.grad(expected.sum(), whole)
    torch.testing.assert_close(grad, own(truth), rtol=1e-4, atol=1e-6)


def check_errors() -> None:
    group, targets = dist.group.WORLD, topk_targets(torch.randn(4, 12), 3)
    with pytest.raises(ValueError, match=re.escape("tp_group: expected slices of at least 12 ids like the targets', got 10")):
        topk_kd_loss(torch.randn(4, 5), targets, tp_group=group)
    with pytest.raises(ValueError, match=re.escape("k: expected 0 < k <= 10 (the vocabulary of all ranks), got 11")):
        topk_targets(torch.randn(4, 5), 11, tp_group=group)


def check_no_wait() -> None:
    """Nothing between the exchanges is asked of the device, where slices hold more ids than the targets know."""
    targets = [topk_targets(torch.randn(4, 8), 3), topk_targets(torch.randn(4, 8), 3)]
    student = torch.randn(4, 5).requires_grad_()
    options: dict[str, Any] = {"hard_weight": 0.5, "return_parts": True, "tp_group": dist.group.WORLD}
    options["labels"] = torch.arange(4)
    expected, _ = topk_kd_loss(student, targets, **options)
    package = Path(kdfast.__file__).parent
    between = (str(package / "ops" / "parallel"), str(package / "backends" / "reference" / "parallel"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch_lint, "_NEVER", between)
        patch.setattr("kdfast.ops.rows.values_are_checked", lambda _: False)
        with launch_lint.no_waits():
            loss, _ = topk_kd_loss(student, targets, **options)
            loss.backward()
            short = topk_kd_loss(torch.randn(4, 3), targets, tp_group=dist.group.WORLD)
        with pytest.raises(RuntimeError, match="would make the host wait"), launch_lint.no_waits():
            topk_targets(torch.randn(4, 5), 3, tp_group=dist.group.WORLD)
    assert torch.equal(loss, expected)
    assert short.isnan()  # slices of fewer ids than the targets' are named where values are looked at


def cases() -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {}
    for name, kw in OPTIONS.items():
        found[f"topk-{name}-fp32"] = lambda kw=kw: check_loss((38, 38), 1, torch.float32, kw)
        found[f"topk-{name}-several-fp64"] = lambda kw=kw: check_loss((38, 38), 2, torch.float64, kw)
        if "token_weight" not in kw:
            found[f"linear-topk-{name}"] = lambda kw=kw: check_linear(kw)
    found["topk-smaller-teacher"] = lambda: check_loss((38, 24), 1, torch.float32, {})
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        kw = {"divergence": kind, "student_head": Head(5.0, 0.8)}
        found[f"topk-teacher-in-the-first-slice-{kind}"] = lambda kw=kw: check_loss((38, 10), 2, torch.float64, kw)
    found["topk-bf16"] = lambda: check_loss((38, 38), 1, torch.bfloat16, {})
    for k, ties in ((3, False), (9, True), (30, False), (38, False)):
        found[f"topk-capture-{k}"] = lambda k=k, ties=ties: check_capture(k, ties)
    for k, samples in ((0, 6), (4, 12), (0, 50), (38, 3)):
        found[f"topk-drawn-{k}-{samples}"] = lambda k=k, samples=samples: check_drawn(k, samples)
    found["topk-parts"] = check_parts
    found["topk-no-wait"] = check_no_wait
    found["topk-dtensor"] = check_dtensor
    found["topk-no-distribution"] = check_no_distribution
    found["topk-row-without-entries"] = check_row_without_entries
    found["topk-errors"] = check_errors
    return found
