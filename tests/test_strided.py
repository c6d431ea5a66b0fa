"""Tensors with something else between their values: a column of a table of labels, a slice of weights, a bias beside others."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import kdfast
from kdfast import TopKTargets

N, V, D = 24, 64, 16
BACKENDS = [b.name for b in kdfast.backends() if b.available and b.name in ("reference", "cpp")]
MAPS = {"maps_s": (2, 2, 12, 12), "maps_t": (2, 2, 12, 12)}
HEADS = {"student_hidden": (N, D), "student_weight": (V, D), "teacher_hidden": (N, D), "teacher_weight": (V, D)}
BIASES = {"student_bias": (V,), "teacher_bias": (V,)}
LOGITS = {"student_logits": (N, V), "teacher_logits": (N, V)}
STATES = {"h_s": (N, D), "h_t": (N, D)}
HEADS_OF_ATTENTION = dict.fromkeys(("q_s", "k_s", "q_t", "k_t"), (2, 2, 12, 8))
MASKS = {"query_mask": (2, 12), "key_mask": (2, 12)}


def sparse(student_logits: Tensor, weights: Tensor | None = None, **tensors: Any) -> Tensor:
    tables = [tensors.pop(name) for name in ("ids", "logprobs", "log_z", "log_tail")]
    tail = "ghost" if weights is None else "none"
    return kdfast.topk_kd_loss(student_logits, TopKTargets(*tables, (1.0,), V, weights), tail=tail, **tensors)


def tables(samples: int) -> dict[str, Tensor]:
    found = kdfast.topk_targets(torch.randn(N, V), 4, samples=samples)
    return {name: x for name in ("ids", "logprobs", "log_z", "log_tail", "weights") if (x := getattr(found, name)) is not None}


def arguments(shapes: dict[str, Sequence[int]]) -> dict[str, Tensor]:
    """Random ones by name; the student's come first."""
    made: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if name == "labels":
            made[name] = torch.randint(V, shape)
        elif "mask" in name:
            made[name] = torch.rand(shape) > 0.2
        else:
            made[name] = torch.rand(shape) if name == "token_weight" else torch.randn(shape)
    return made


half = {"hard_weight": 0.5}
LOSSES: dict[str, tuple[Callable[..., Tensor], dict[str, Sequence[int]]]] = {
    "kd, weights": (kdfast.kd_loss, LOGITS | {"token_weight": (N,)}),
    "kd, labels": (functools.partial(kdfast.kd_loss, **half), LOGITS | {"labels": (N,)}),
    "linear, weights": (kdfast.linear_kd_loss, HEADS | BIASES | {"token_weight": (N,)}),
    "linear, labels": (functools.partial(kdfast.linear_kd_loss, **half), HEADS | BIASES | {"labels": (N,)}),
    "topk": (sparse, {"student_logits": (N, V), "token_weight": (N,)}),
    "topk, labels": (functools.partial(sparse, **half), {"student_logits": (N, V), "labels": (N,)}),
    "topk, drawn": (sparse, {"student_logits": (N, V)}),
    "hidden_mse": (kdfast.hidden_mse, STATES | {"mask": (N,)}),
    "hidden_mse, projected": (kdfast.hidden_mse, {
        "h_s": (N, D), "projection": (D + 3, D), "bias": (D + 3,), "h_t": (N, D + 3), "mask": (N,)}),
    "hidden_cosine": (kdfast.hidden_cosine, STATES | {"mask": (N,)}),
    "attention_mse": (kdfast.attention_mse, HEADS_OF_ATTENTION | MASKS),
    "attention_kl": (kdfast.attention_kl, HEADS_OF_ATTENTION | MASKS),
    "attention_map_mse": (kdfast.attention_map_mse, MAPS | {"mask": (2, 1, 12, 12)}),
    "linear_logit_mse": (kdfast.linear_logit_mse, HEADS | {"mask": (N,)}),
}  # fmt: skip


def apart(x: Tensor) -> Tensor:
    """The same values in every other place of each dimension; NaN, a number that is no label, or the other truth between."""
    between = torch.nan if x.is_floating_point() else 0 if x.dtype == torch.bool else -7
    room = torch.full([2 * n for n in x.shape], between, dtype=x.dtype)
    return room[(slice(None, None, 2),) * x.ndim].copy_(x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_what_lies_between_the_values_of_a_tensor_is_not_read(
    name: str, reduction: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "cpp":
        from kdfast.backends.compiled import products

        monkeypatch.setattr(products, "_beats_mkl", lambda: True)  # products of our own, whatever the processor
    loss, shapes = LOSSES[name]
    if name != "linear_logit_mse":
        loss = functools.partial(loss, reduction=reduction)
    given = arguments(shapes) | (tables(3 if name == "topk, drawn" else 0) if name.startswith("topk") else {})
    student = next(iter(shapes))

    def found(**changed: Tensor) -> list[Tensor]:
        tensors = given | changed
        own = tensors[student].detach().requires_grad_()
        value = loss(**(tensors | {student: own}))
        return [value.detach(), *torch.autograd.grad(value.sum(), own)]

    with kdfast.use_backend(backend):
        wanted = found()
        for key, tensor in given.items():
            torch.testing.assert_close(found(**{key: apart(tensor)}), wanted, msg=lambda said, key=key: f"{key}: {said}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_capture_of_logits_with_something_between(backend: str) -> None:
    logits = torch.randn(N, V)
    with kdfast.use_backend(backend), contextlib.nullcontext():
        whole, strided = (kdfast.topk_targets(x, 4, temperatures=(1.0, 2.0)) for x in (logits, apart(logits)))
    assert torch.equal(whole.ids, strided.ids)
    torch.testing.assert_close([whole.logprobs, whole.log_tail], [strided.logprobs, strided.log_tail])
