"""What each rank of `test_parallel` runs: every case on its slices, against the same loss on the whole vocabulary.

python parallel_ranks.py RANK WORLD FOLDER writes FOLDER/RANK.json: {case: "" or what went wrong}.
"""

from __future__ import annotations

import gc
import json
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plain
import pytest
import torch
import torch.distributed as dist
from test_divergences import CASES, ROW_OPTIONS
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from kdfast import kd_loss, linear_kd_loss, use_backend

ROWS, VOCAB, STEP = 6, 38, 19  # STEP ids on rank 0, the rest on rank 1
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: case[0] for name, case in CASES.items()},
    **{f"jsd-{name}": option[0] | {"divergence": "jsd"} for name, option in ROW_OPTIONS.items()},
}
TEACHERS: dict[str, dict[str, Any]] = {
    "one": {},
    "three-probs": {"teacher_weights": [1.0, 2.0, 0.5]},
    "three-logits": {"teacher_mix": "logits", "divergence": "reverse_kl"},
}
WEIGHTS = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 3.0])
REDUCTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "num-items": {"num_items": 3},
    "token-weight": {"token_weight": WEIGHTS},
}


def own(x: Tensor, dim: int = -1) -> Tensor:
    """This rank's slice."""
    begin = dist.get_rank() * STEP
    return x.narrow(dim, begin, min(STEP, x.shape[dim] - begin)).clone()


def rows(vocab: int = VOCAB, teacher_vocab: int = VOCAB, teachers: int = 1) -> tuple[Tensor, list[Tensor], Tensor]:
    labels = torch.randint(0, vocab, (ROWS,))
    labels[2], labels[3] = -100, vocab - 1
    return torch.randn(ROWS, vocab) * 3, [torch.randn(ROWS, teacher_vocab - i) * 3 for i in range(teachers)], labels


def heads(vocab: int = VOCAB) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Student's hidden, weight, bias; teacher's; labels."""
    labels = torch.randint(0, vocab, (ROWS,))
    labels[1] = -100
    student = [torch.randn(ROWS, 8), torch.randn(vocab, 8), torch.randn(vocab)]
    return student, [torch.randn(ROWS, 12), torch.randn(vocab, 12) / 2, torch.randn(vocab)], labels


def differentiated(loss: Callable[..., Tensor], leaves: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Value and gradients, with an incoming gradient other than 1."""
    leaves = [x.to(dtype).requires_grad_() for x in leaves]
    value = loss(*leaves)
    upstream = torch.linspace(0.5, 2, value.numel()).view(value.shape).to(value.dtype)
    return value.detach(), torch.autograd.grad(value, leaves, upstream)


def same(got: Tensor, truth: Tensor, whole: Tensor, dtype: torch.dtype, what: str) -> None:
    """`truth` is float64, `whole` the unsplit result in `dtype`."""
    plain.assert_as_good(got.double(), whole.double(), truth.double(), dtype, what)


def check_logits(vocabs: tuple[int, int], teachers: int, dtype: torch.dtype, kw: dict[str, Any]) -> None:
    student, teacher, labels = rows(*vocabs, teachers)
    options = {"temperature": 2.0, "soft_weight": 0.7, "hard_weight": 0.3} | kw
    stored = student.to(dtype)

    def whole(x: Tensor) -> Tensor:
        with use_backend("reference"):
            return kd_loss(x, [t.to(dtype).to(x.dtype) for t in teacher], labels, **options)

    def split(x: Tensor) -> Tensor:
        return kd_loss(x, [own(t.to(dtype)) for t in teacher], labels, tp_group=dist.group.WORLD, **options)

    truth, (truth_grad,) = differentiated(whole, [stored], torch.float64)
    unsplit, (unsplit_grad,) = differentiated(whole, [stored], dtype)
    value, (grad,) = differentiated(split, [own(stored)], dtype)
    same(value, truth, unsplit, dtype, "value")
    same(grad, own(truth_grad), own(unsplit_grad), dtype, "gradient")


def check_linear(dtype: torch.dtype, kw: dict[str, Any], workspace_mb: float | None, teachers: int = 1) -> None:
    student, teacher, labels = heads()
    options = {"temperature": 2.0, "soft_weight": 0.7, "hard_weight": 0.3, "workspace_mb": workspace_mb} | kw
    stored = [x.to(dtype) for x in student]
    group = dist.group.WORLD

    def whole(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        h_t, w_t, b_t = ([x.to(dtype).to(h.dtype)] * teachers for x in teacher)
        with use_backend("reference"):
            return linear_kd_loss(h, w, h_t, w_t, labels, student_bias=b, teacher_bias=b_t, **options)

    def split(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        h_t, w_t, b_t = teacher[0].to(dtype), own(teacher[1].to(dtype), 0), own(teacher[2].to(dtype), 0)
        sides = [h_t] * teachers, [w_t] * teachers
        return linear_kd_loss(h, w, *sides, labels, student_bias=b, teacher_bias=[b_t] * teachers, tp_group=group, **options)

    truth, truth_grads = differentiated(whole, stored, torch.float64)
    unsplit, unsplit_grads = differentiated(whole, stored, dtype)
    value, grads = differentiated(split, [stored[0], own(stored[1], 0), own(stored[2], 0)], dtype)
    same(value, truth, unsplit, dtype, "value")
    same(grads[0], truth_grads[0], unsplit_grads[0], dtype, "gradient of hidden")
    for name, g, t, u in zip(("weight", "bias"), grads[1:], truth_grads[1:], unsplit_grads[1:], strict=True):
        same(g, own(t, 0), own(u, 0), dtype, f"gradient of {name}")


def check_parts() -> None:
    student, teacher, labels = rows(teachers=2)
    kw = {"temperature": 2.0, "hard_weight": 0.3, "return_parts": True}
    with use_backend("reference"):
        _, expected = kd_loss(student, teacher, labels, **kw)
    _, got = kd_loss(own(student), [own(t) for t in teacher], labels, tp_group=dist.group.WORLD, **kw)
    for name, a, b in zip(expected._fields, got, expected, strict=True):
        assert a.count == b.count, name
        torch.testing.assert_close(a.sum, b.sum, rtol=2e-6, atol=1e-6, msg=name)


def check_every_rank_has_the_same_loss() -> None:
    student, teacher, labels = rows()
    loss = kd_loss(own(student), own(teacher[0]), labels, tp_group=dist.group.WORLD, divergence="jsd", hard_weight=1.0)
    everyone = [torch.empty_like(loss) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, loss)
    assert all(torch.equal(loss, other) for other in everyone)


def check_overwrite() -> None:
    student, teacher, labels = rows()
    kw = {"divergence": "tvd", "hard_weight": 0.4, "tp_group": dist.group.WORLD}
    grads = []
    for overwrite in (False, True):
        x = own(student).requires_grad_()
        (grad,) = torch.autograd.grad(kd_loss(x * 1, own(teacher[0]), labels, overwrite_logits=overwrite, **kw) * 3, x)
        grads.append(grad)
    assert torch.equal(*grads)


def check_share_of_hidden_gradient() -> None:
    student, teacher, labels = heads()
    h, w = student[0].requires_grad_(), own(student[1], 0)
    kw = {"tp_group": dist.group.WORLD, "hard_weight": 0.2}
    (summed,) = torch.autograd.grad(linear_kd_loss(h, w, teacher[0], own(teacher[1], 0), labels, **kw), h)
    (share,) = torch.autograd.grad(
        linear_kd_loss(h, w, teacher[0], own(teacher[1], 0), labels, reduce_hidden_grad=False, **kw), h
    )
    assert not torch.allclose(share, summed)
    dist.all_reduce(share)
    torch.testing.assert_close(share, summed)


def check_main_grad() -> None:
    student, teacher, labels = heads()
    w = own(student[1], 0).requires_grad_()
    w.main_grad = torch.ones_like(w)
    loss = linear_kd_loss(student[0], w, teacher[0], own(teacher[1], 0), labels, tp_group=dist.group.WORLD)
    (loss * 2).backward()
    assert w.grad is None
    whole = student[1].clone().requires_grad_()
    linear_kd_loss(student[0], whole, teacher[0], teacher[1], labels).backward()
    torch.testing.assert_close(w.main_grad, 1 + 2 * own(whole.grad, 0))


def check_dtensor_logits(vocab: int) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    student, teacher, labels = rows(vocab, vocab)
    kw = {"divergence": "jsd", "temperature": 2.0, "hard_weight": 0.3}
    x = student.clone().requires_grad_()
    sharded = distribute_tensor(student, mesh, [Shard(1)]).requires_grad_()
    loss = kd_loss(sharded, distribute_tensor(teacher[0], mesh, [Shard(1)]), labels, **kw)
    expected = _reference(x, teacher[0], labels, kw)
    (grad,) = torch.autograd.grad(loss * 3, sharded)
    (truth,) = torch.autograd.grad(expected * 3, x)
    torch.testing.assert_close(loss, expected)
    assert isinstance(grad, DTensor)
    torch.testing.assert_close(grad.full_tensor(), truth)


def _reference(x: Tensor, teacher: Tensor, labels: Tensor, kw: dict[str, Any]) -> Tensor:
    with use_backend("reference"):
        return kd_loss(x, teacher, labels, **kw)


def check_dtensor_heads(hidden_placement: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    student, teacher, labels = heads()
    kw = {"divergence": "tvd", "temperature": 2.0, "hard_weight": 0.3}
    leaves = [student[0].clone().requires_grad_(), student[1].clone().requires_grad_()]
    with use_backend("reference"):
        expected = linear_kd_loss(*leaves, teacher[0], teacher[1], labels, **kw)
    placements = {"plain": None, "replicated": Replicate(), "rows-sharded": Shard(0)}[hidden_placement]
    hidden = student[0].clone() if placements is None else distribute_tensor(student[0], mesh, [placements])
    weight = distribute_tensor(student[1], mesh, [Shard(0)]).requires_grad_()
    loss = linear_kd_loss(
        hidden.requires_grad_(), weight, teacher[0], distribute_tensor(teacher[1], mesh, [Shard(0)]), labels, **kw
    )
    truth = torch.autograd.grad(expected * 3, leaves)
    grads = torch.autograd.grad(loss * 3, (hidden, weight))
    torch.testing.assert_close(loss, expected)
    for got, wanted in zip(grads, truth, strict=True):
        torch.testing.assert_close(got.full_tensor() if isinstance(got, DTensor) else got, wanted)


def raises(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def check_no_weight(kw: dict[str, Any]) -> None:
    """An infinite divergence of weight 0 leaves the cross-entropy, an infinite cross-entropy of weight 0 the divergence."""
    student, (teacher,), labels = rows()
    student[:, 20:30] = -torch.inf
    labels[4] = 21
    teacher[:, :5] = -torch.inf
    for name, weights in (("hard", {"soft_weight": 0.0, "hard_weight": 1.0}), ("soft", {"hard_weight": 0.0})):
        left, right = (teacher, labels % 20) if name == "hard" else (student.roll(1, 0), labels)
        right = torch.where(labels == -100, labels, right)
        x, whole = own(student).requires_grad_(), student.clone().double().requires_grad_()
        split = kd_loss(x, own(left), right, tp_group=dist.group.WORLD, **weights, **kw)
        with use_backend("reference"):
            expected = kd_loss(whole, left.double(), right, **weights, **kw)
        (grad,), (truth,) = torch.autograd.grad(split.sum(), x), torch.autograd.grad(expected.sum(), whole)
        assert expected.isfinite().all(), name
        assert truth.isfinite().all(), name
        torch.testing.assert_close(split.double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad.double(), own(truth), rtol=1e-4, atol=1e-6)


def check_infinite_rows(divergence: str) -> None:
    """Where the loss of a row is infinite its gradient is that of the whole vocabulary: finite in the same places, equal."""
    student, (teacher,), labels = rows()
    student[0, 3], teacher[1, 20], student[4, 30:] = -torch.inf, -torch.inf, -torch.inf
    for reduction in ("mean", "none"):
        kw = {"divergence": divergence, "reduction": reduction, "hard_weight": 0.3}
        x, whole = own(student).requires_grad_(), student.clone().double().requires_grad_()
        split = kd_loss(x, own(teacher), labels, tp_group=dist.group.WORLD, **kw)
        with use_backend("reference"):
            expected = kd_loss(whole, teacher.double(), labels, **kw)
        (grad,), (truth,) = torch.autograd.grad(split.sum(), x), torch.autograd.grad(expected.sum(), whole)
        torch.testing.assert_close(split.double(), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(grad.isfinite(), own(truth).isfinite())
        torch.testing.assert_close(torch.where(grad.isfinite(), grad, 0).double(), own(truth).nan_to_num(0, 0, 0),
                                   rtol=1e-4, atol=1e-6)  # fmt: skip


def check_no_items() -> None:
    student, (teacher,), labels = rows()
    for num_items in (0, torch.tensor(0)):
        x = own(student).requires_grad_()
        loss = kd_loss(x, own(teacher), torch.full_like(labels, -100), num_items=num_items, tp_group=dist.group.WORLD)
        assert loss == 0
        assert (torch.autograd.grad(loss, x)[0] == 0).all()


def check_ignored_rows() -> None:
    """NaN in rows that do not count, computed through heads as on a GPU: all rows."""
    student, teacher, labels = heads()
    grads = []
    for junk in (0.0, torch.nan):
        h = student[0].clone()
        h[labels == -100] = junk
        w = own(student[1], 0).requires_grad_()
        loss = linear_kd_loss(h.requires_grad_(), w, teacher[0], own(teacher[1], 0), labels, tp_group=dist.group.WORLD)
        grads.append(torch.autograd.grad(loss, (h, w)))
    for clean, filled in zip(*grads, strict=True):
        assert torch.equal(clean, filled)


def check_errors() -> None:
    group, rank = dist.group.WORLD, dist.get_rank()
    x, label = torch.randn(4, 5), torch.zeros(4, dtype=torch.int64)
    raises("expected slices of 5 ids on every rank, fewer only on the last", lambda: kd_loss(
        torch.randn(4, 5 + rank), torch.randn(4, 5 + rank), tp_group=group))  # fmt: skip
    raises("labels: row 0 has label 10, expected 0 <= label < 10", lambda: kd_loss(
        x, x, label + 10, hard_weight=1.0, tp_group=group))  # fmt: skip
    raises("tp_group: expected a torch.distributed.ProcessGroup, got str", lambda: kd_loss(x, x, tp_group="tp"))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    by_vocab, by_rows = (distribute_tensor(torch.randn(4, 10), mesh, [Shard(d)]) for d in (1, 0))
    raises("teacher_logits: expected a DTensor sharded over its vocabulary", lambda: kd_loss(by_vocab, torch.randn(4, 10)))
    raises("student_logits: expected Shard(1) on at most one mesh dimension", lambda: kd_loss(by_rows, by_rows))
    whole = distribute_tensor(torch.randn(4, 10), mesh, [Replicate()])
    raises("teacher_logits: expected to be sliced over the group", lambda: kd_loss(by_vocab, whole))


def cases() -> dict[str, Callable[[], None]]:
    """Every case by name; each rank runs them in this order."""
    import parallel_fsdp_ranks  # which, like the next three, imports this module
    import parallel_main_grad_ranks
    import parallel_tied_ranks
    import parallel_topk_ranks

    found: dict[str, Callable[[], None]] = {}
    for dtype in (torch.float64, torch.float32):
        short = {torch.float64: "fp64", torch.float32: "fp32"}[dtype]
        for name, kw in OPTIONS.items():
            found[f"logits-{name}-{short}"] = lambda d=dtype, kw=kw: check_logits((VOCAB, VOCAB), 1, d, kw)
            found[f"linear-{name}-{short}"] = lambda d=dtype, kw=kw: check_linear(d, kw, None)
        for name, kw in TEACHERS.items():
            found[f"logits-teachers-{name}-{short}"] = lambda d=dtype, kw=kw, n=name: check_logits(
                (VOCAB, VOCAB), 1 if n == "one" else 3, d, kw
            )
        for name, kw in REDUCTIONS.items():
            found[f"logits-{name}-{short}"] = lambda d=dtype, kw=kw: check_logits((VOCAB, VOCAB), 1, d, kw)
            found[f"linear-{name}-{short}"] = lambda d=dtype, kw=kw: check_linear(d, kw | {"divergence": "jsd"}, 1e-3)
        for name, vocabs in {"ragged": (37, 37), "smaller-student": (31, 38), "smaller-teacher": (38, 24)}.items():
            found[f"logits-{name}-{short}"] = lambda d=dtype, v=vocabs: check_logits(v, 1, d, {"divergence": "jsd"})
        found[f"linear-two-teachers-{short}"] = lambda d=dtype: check_linear(d, {}, 1e-3, teachers=2)
    found["logits-bf16"] = lambda: check_logits((VOCAB, VOCAB), 1, torch.bfloat16, {"divergence": "jsd"})
    found["logits-fp16"] = lambda: check_logits((VOCAB, VOCAB), 1, torch.float16, {"divergence": "jsd"})
    found["parts"] = check_parts
    found["same-bits"] = check_every_rank_has_the_same_loss
    found["overwrite"] = check_overwrite
    found["share-of-hidden"] = check_share_of_hidden_gradient
    found["main-grad"] = check_main_grad
    found["dtensor-logits"] = lambda: check_dtensor_logits(VOCAB)
    found["dtensor-logits-ragged"] = lambda: check_dtensor_logits(37)
    for placement in ("plain", "replicated", "rows-sharded"):
        found[f"dtensor-heads-hidden-{placement}"] = lambda p=placement: check_dtensor_heads(p)
    for name, kw in {"forward-kl": {}, "reverse-kl-per-row": {"divergence": "reverse_kl", "reduction": "none"}}.items():
        found[f"no-weight-{name}"] = lambda kw=kw: check_no_weight(kw)
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        found[f"infinite-rows-{divergence}"] = lambda d=divergence: check_infinite_rows(d)
    found["no-items"] = check_no_items
    found["ignored-rows"] = check_ignored_rows
    found["errors"] = check_errors
    found |= parallel_topk_ranks.cases() | parallel_fsdp_ranks.cases() | parallel_main_grad_ranks.cases()
    return found | parallel_tied_ranks.cases()


def main(rank: int, world: int, folder: Path) -> None:
    warnings.simplefilter("ignore")  # the fallback to reference is what is tested
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    results = {}
    for name, case in cases().items():
        torch.manual_seed(0)
        try:
            case()
            results[name] = ""
        except Exception:  # whatever a case raises is its result; the other rank must not wait for this one
            results[name] = traceback.format_exc()[-3000:]
    (folder / f"{rank}.json").write_text(json.dumps(results))
    gc.collect()  # tracebacks of expected errors hold the group, which must not outlive its end: its threads abort the process
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
