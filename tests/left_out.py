"""What takes no part leaves no trace: terms of weight 0, means over nothing, rows and positions that a mask leaves out, and
targets that are no distribution. The modules that import these tests say on which backend and device they run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast
from kdfast import Head, TopKTargets, debug_checks, kd_loss, linear_kd_loss, linear_topk_kd_loss, topk_kd_loss, topk_targets
from kdfast.ops import rows as row_contract
from kdfast.options import DIVERGENCES

VOCAB = 70
KINDS: dict[str, dict[str, Any]] = {
    **{kind: {"divergence": kind} for kind in DIVERGENCES},
    "alpha-0": {"divergence": "alpha_beta", "ab_alpha": 0.0, "ab_beta": 0.5},
    "beta-0": {"divergence": "alpha_beta", "ab_alpha": 0.5, "ab_beta": 0.0},
    "both-0": {"divergence": "alpha_beta", "ab_alpha": 0.0, "ab_beta": 0.0},
}
TAILS = [
    ("ghost", "forward_kl"), ("ghost", "reverse_kl"), ("ghost", "jsd"), ("uniform", "forward_kl"), ("uniform", "reverse_kl"),
    ("uniform", "jsd"), ("renormalize", "forward_kl"), ("renormalize", "jsd"), ("none", "forward_kl"),
]  # fmt: skip
#: Row options of terms that stay when the divergence has no weight; gradients formed in forward and in backward.
ROW_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "in-forward": ({}, "mean"),
    "T2-z-in-backward": ({"temperature": 2.0, "z_loss": 0.1}, "none"),
    "softcap-in-backward": ({"student_head": Head(softcap=5.0)}, "none"),
    "smooth-softcap-in-forward": ({"student_head": Head(softcap=5.0), "label_smoothing": 0.1}, "mean"),
}
REDUCTIONS = ["mean", "none"]
INF = float("inf")


def excluding(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in which both sides exclude ids that the other does not: most divergences are infinite. The last is ignored."""
    student, teacher = torch.randn(4, VOCAB + 3), torch.randn(4, VOCAB)
    teacher[:, 10:20] = student[:, 30:40] = -INF
    student[3] = teacher[3] = torch.nan
    return student.to(device), teacher.to(device), torch.tensor([0, 1, 2, -100], device=device)


def differentiated(loss: Callable[..., Tensor], *leaves: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Value and gradients, with an incoming gradient of 1.5."""
    xs = [x.detach().clone().requires_grad_() for x in leaves]
    value = loss(*xs)
    assert value.requires_grad
    return value.detach(), list(torch.autograd.grad(value.sum() * 1.5, xs))


def assert_cross_entropy(loss: Callable[[Tensor], Tensor], student: Tensor, labels: Tensor, reduction: str, how: Any) -> None:
    """`loss` is that of the hard terms alone, in value and gradient; rows of label -100 do not count."""
    head, z_loss = how.get("student_head", Head()), how.get("z_loss", 0.0)

    def exact(x: Tensor) -> Tensor:
        z = x if head.softcap is None else head.softcap * torch.tanh(x / head.softcap)
        ce = F.cross_entropy(z, labels, reduction="none", label_smoothing=how.get("label_smoothing", 0.0))
        row = ce + z_loss * torch.where(labels >= 0, z.logsumexp(-1) ** 2, 0)
        return row.sum() / (labels >= 0).sum() if reduction == "mean" else row

    value, (grad,) = differentiated(loss, student)
    truth, (truth_grad,) = differentiated(exact, torch.where((labels >= 0)[:, None], student, 0).double())
    torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), torch.where((labels >= 0)[:, None], truth_grad, 0), rtol=1e-4, atol=1e-6)


@pytest.mark.thinned(2)
@pytest.mark.parametrize(("how", "reduction"), ROW_OPTIONS.values(), ids=ROW_OPTIONS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_an_infinite_divergence_without_weight(kind: Any, how: Any, reduction: str, backend: str, device: str) -> None:
    student, teacher, labels = excluding(device)
    options = {"soft_weight": 0.0, "hard_weight": 1.0, "reduction": reduction, **kind, **how}
    several = [teacher, torch.where(teacher.isneginf(), 0.5, teacher)]
    with kdfast.use_backend(backend):
        for teachers in (teacher, several):
            for mix in ("probs", "logits"):
                loss = lambda x, t=teachers, m=mix: kd_loss(x, t, labels, teacher_mix=m, **options)  # noqa: E731
                assert_cross_entropy(loss, student, labels, reduction, how)


@pytest.mark.thinned(2)
@pytest.mark.parametrize(("how", "reduction"), ROW_OPTIONS.values(), ids=ROW_OPTIONS)
@pytest.mark.parametrize(("tail", "divergence"), TAILS)
def test_an_infinite_sparse_divergence_without_weight(
    tail: str, divergence: str, how: Any, reduction: str, backend: str, device: str
) -> None:
    student, teacher, labels = excluding(device)
    teacher[3] = 0
    options = {"soft_weight": 0.0, "hard_weight": 1.0, "reduction": reduction, "tail": tail, "divergence": divergence, **how}
    with kdfast.use_backend(backend):
        targets = topk_targets(teacher, 8, temperatures=(1.0, 2.0))
        assert_cross_entropy(lambda x: topk_kd_loss(x, targets, labels, **options), student, labels, reduction, how)


def test_a_part_stays_what_it_is_without_weight(backend: str, device: str) -> None:
    student, teacher, labels = excluding(device)
    with kdfast.use_backend(backend):
        _, parts = kd_loss(student, teacher, labels, soft_weight=0.0, hard_weight=1.0, return_parts=True)
    assert parts.soft.sum == INF
    assert parts.hard.sum.isfinite()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["", "smooth"])
def test_an_infinite_cross_entropy_without_weight(smoothing: float, reduction: str, backend: str, device: str) -> None:
    student, teacher, labels = excluding(device)
    student[:, 30:40] = 0.0
    student[0, 0] = teacher[0, 0] = -INF
    options = {"hard_weight": 0.0, "label_smoothing": smoothing, "reduction": reduction}
    with kdfast.use_backend(backend):
        targets = topk_targets(torch.where(teacher.isnan(), 0, teacher), 8)
        for loss in (kd_loss, topk_kd_loss):
            compared = teacher if loss is kd_loss else targets
            value, (grad,) = differentiated(lambda x, f=loss, t=compared: f(x, t, labels, **options), student)
            safe = torch.where(labels == 0, 1, labels)
            expected, (expected_grad,) = differentiated(lambda x, f=loss, t=compared, s=safe: f(x, t, s, **options), student)
            assert grad.isfinite().all()
            torch.testing.assert_close(value, expected)
            torch.testing.assert_close(grad, expected_grad)


def test_a_bad_row_is_named_without_weight(backend: str, device: str) -> None:
    student, teacher = torch.randn(3, 9, device=device), torch.randn(3, 9, device=device)
    labels = torch.tensor([0, 9, 1], device=device)
    with kdfast.use_backend(backend), debug_checks():
        targets = topk_targets(teacher, 3)
        for loss, compared in ((kd_loss, teacher), (topk_kd_loss, targets)):
            with pytest.raises(ValueError, match="labels: row 1 has label 9"):
                loss(student, compared, labels, hard_weight=0.0)
        teacher[2, 3] = torch.nan
        with pytest.raises(ValueError, match="teacher logits: row 2 holds NaN"):
            kd_loss(student, teacher, labels.clamp(max=8), soft_weight=0.0, hard_weight=1.0)
        teacher[2] = -INF
        with pytest.raises(ValueError, match="row 2 has loss NaN: the teacher logits are -inf throughout"):
            kd_loss(student, teacher, labels.clamp(max=8), soft_weight=0.0, hard_weight=1.0)


# Means over nothing.


def losses(device: str, rows: int = 4) -> dict[str, tuple[Callable[..., Any], list[Tensor]]]:
    """Every loss that takes num_items, as f(*leaves, **options), and its leaves."""
    logits, teacher = torch.randn(rows, VOCAB, device=device), torch.randn(rows, VOCAB, device=device)
    hidden, weight, bias = (torch.randn(s, device=device) for s in ((rows, 8), (VOCAB, 8), (VOCAB,)))
    h_t, w_t = torch.randn(rows, 6, device=device), torch.randn(VOCAB, 6, device=device)
    targets = topk_targets(teacher, 5)
    return {
        "kd_loss": (lambda x, **kw: kd_loss(x, teacher, **kw), [logits]),
        "topk": (lambda x, **kw: topk_kd_loss(x, targets, **kw), [logits]),
        "linear": (lambda h, w, b, **kw: linear_kd_loss(h, w, h_t, w_t, student_bias=b, **kw), [hidden, weight, bias]),
        "linear_topk": (lambda h, w, b, **kw: linear_topk_kd_loss(h, w, targets, student_bias=b, **kw), [hidden, weight, bias]),
    }


@pytest.mark.thinned(4)
@pytest.mark.parametrize("checked", [True, False], ids=["", "unchecked"])
@pytest.mark.parametrize("labels", ["none-counts", "some-count", "unlabelled"])
@pytest.mark.parametrize(
    "num_items", [0, 0.0, "int tensor", "float tensor"], ids=["int", "float", "int-tensor", "float-tensor"]
)
@pytest.mark.parametrize("name", ["kd_loss", "topk", "linear", "linear_topk"])
def test_no_items(
    name: str, num_items: Any, labels: str, checked: bool, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not checked:
        monkeypatch.setattr(row_contract, "values_are_checked", lambda _: False)
    if isinstance(num_items, str):
        num_items = torch.tensor(0, dtype=torch.int64 if "int" in num_items else torch.float32, device=device)
    kw: dict[str, Any] = {"num_items": num_items, "hard_weight": 0.0 if labels == "unlabelled" else 0.5, "z_loss": 0.1}
    if labels != "unlabelled":
        kw["labels"] = torch.full((4,), -100, device=device)
        kw["labels"][:2] += 101 if labels == "some-count" else 0
    with kdfast.use_backend(backend):
        loss, leaves = losses(device)[name]
        value, grads = differentiated(lambda *xs: loss(*xs, **kw), *leaves)
    assert value == 0
    for grad in grads:
        assert (grad == 0).all()


def test_items_below_0_or_more_than_one_number(backend: str, device: str) -> None:
    x = torch.randn(4, 9, device=device)
    with kdfast.use_backend(backend):
        for bad in (-1, float("nan"), INF):
            with pytest.raises(ValueError, match="num_items: expected a finite number >= 0"):
                kd_loss(x, x, num_items=bad)
        with pytest.raises(ValueError, match=r"num_items: expected one number, got a tensor of shape \[4\]"):
            kd_loss(x, x, num_items=torch.ones(4, device=device))


# Targets that are no distribution.


def sparse(device: str, rows: int = 3) -> TopKTargets:
    return topk_targets(torch.randn(rows, VOCAB, device=device), 4)


def with_row(targets: TopKTargets, row: int, **fields: float) -> TopKTargets:
    """The targets with every number of a row's fields set."""
    changed = {name: getattr(targets, name).clone() for name in fields}
    for name, value in fields.items():
        changed[name][row] = value
    return dataclasses.replace(targets, **changed)


BAD_TARGETS: dict[str, tuple[dict[str, float], str]] = {
    "nothing": ({"ids": -1, "logprobs": -INF, "log_tail": -INF}, "has neither entries nor a tail, expected a distribution"),
    "listed-at-0": ({"logprobs": -INF, "log_tail": -INF}, "has neither entries nor a tail, expected a distribution"),
    "half": ({"ids": -1, "logprobs": -INF, "log_tail": -0.7}, "has probabilities that sum to 0.4966 with the tail, expected 1"),
    "twice": ({"log_tail": 0.0}, "has probabilities that sum to"),
    "nan-tail": ({"log_tail": torch.nan}, "holds NaN"),
    "nan-entries": ({"logprobs": torch.nan}, "holds NaN"),
    "id": ({"ids": VOCAB}, f"lists id {VOCAB}, expected ids < {VOCAB}"),
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("linear", "soft_weight"), [(False, 1.0), (False, 0.0), (True, 1.0)], ids=["logits", "logits-no-weight", "linear"]
)
@pytest.mark.parametrize(("tail", "divergence"), [*TAILS[:3], ("uniform", "reverse_kl")])
@pytest.mark.parametrize(("fields", "says"), BAD_TARGETS.values(), ids=BAD_TARGETS)
def test_targets_that_are_no_distribution(
    fields: Any, says: str, tail: str, divergence: str, soft_weight: float, linear: bool, backend: str, device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    kw = {"tail": tail, "divergence": divergence, "soft_weight": soft_weight, "reduction": "none"}
    hidden, weight = torch.randn(3, 8, device=device), torch.randn(VOCAB, 8, device=device)
    with kdfast.use_backend(backend):
        bad = with_row(sparse(device), 1, **fields)

        def loss(**more: Any) -> Tensor:
            if linear:
                return linear_topk_kd_loss(hidden, weight, bad, **kw, **more)
            return topk_kd_loss(hidden @ weight.T, bad, **kw, **more)

        with debug_checks(), pytest.raises(ValueError, match=f"targets: row 1 {says}"):
            loss()
        # Rows that do not count are not read.
        for left_out in (
            {"labels": torch.tensor([1, -100, 2], device=device)},
            {"token_weight": torch.tensor([1.0, 0.0, 2.0])},
        ):
            value = loss(**{k: v.to(device) for k, v in left_out.items()})
            assert value.isfinite().all()
            assert value[1] == 0
        monkeypatch.setattr(row_contract, "values_are_checked", lambda _: False)
        assert loss().isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("tail", ["renormalize", "none"])
def test_no_entries_and_no_tail(tail: str, backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    says = "has no entries" if tail == "renormalize" else "has neither entries nor a tail"
    student = torch.randn(3, VOCAB, device=device)
    with kdfast.use_backend(backend):
        bad = with_row(sparse(device), 1, ids=-1, logprobs=-INF, log_tail=-INF)
        with debug_checks(), pytest.raises(ValueError, match=f"targets: row 1 {says}"):
            topk_kd_loss(student, bad, tail=tail)
        monkeypatch.setattr(row_contract, "values_are_checked", lambda _: False)
        assert topk_kd_loss(student, bad, tail=tail, reduction="none").isnan().tolist() == [False, True, False]


def test_the_one_of_several_targets_is_named(backend: str, device: str) -> None:
    student = torch.randn(3, VOCAB, device=device)
    with kdfast.use_backend(backend), debug_checks():
        good = sparse(device)
        bad = with_row(good, 2, ids=-1, logprobs=-INF, log_tail=-INF)
        with pytest.raises(ValueError, match=r"targets\[1\]: row 2 has neither entries nor a tail"):
            topk_kd_loss(student, [good, bad])


# Rows and positions that a mask leaves out.


def assert_same_whatever_is_left_out(loss: Callable[..., Tensor], tensors: list[Tensor], where: list[Tensor | None]) -> None:
    """Value and gradients of `loss(*tensors)` are the same bits with NaN or infinity in the rows `where` is True."""
    expected, expected_grads = differentiated(loss, *tensors)
    for junk in (torch.nan, INF):
        filled = [x if at is None else x.masked_fill(at, junk) for x, at in zip(tensors, where, strict=True)]
        value, grads = differentiated(loss, *filled)
        torch.testing.assert_close(value, expected, rtol=0, atol=0)
        for at, grad, wanted in zip(where, grads, expected_grads, strict=True):
            torch.testing.assert_close(grad, wanted, rtol=0, atol=0)
            assert at is None or (grad.masked_select(at) == 0).all()


@pytest.mark.thinned(2)
@pytest.mark.parametrize("every_row", [False, True], ids=["", "as-on-a-gpu"])
@pytest.mark.parametrize(
    ("dtype", "ignored", "reduction"),
    [(torch.float32, "label", "mean"), (torch.float32, "token_weight", "none"), (torch.bfloat16, "token_weight", "mean"),
     (torch.float16, "label", "mean")],
    ids=["fp32-in-forward", "fp32-in-backward", "bf16", "fp16"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["kd_loss", "topk", "linear", "linear_topk"])
def test_rows_that_do_not_count(
    name: str, dtype: torch.dtype, every_row: bool, ignored: str, reduction: str, backend: str, device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if every_row:
        # Which rows count is not asked of a GPU: all are computed.
        monkeypatch.setattr("kdfast.ops.linear_op._counting_rows", lambda scale, row_index: row_index)
    labels = torch.randint(0, VOCAB, (8,), device=device)
    out = torch.tensor([0, 1, 0, 0, 1, 1, 0, 0], dtype=torch.bool, device=device)
    kw: dict[str, Any] = {"labels": labels.masked_fill(out, -100)}
    if ignored == "token_weight":
        kw = {"labels": labels.masked_fill(out, VOCAB), "token_weight": torch.ones(8, device=device).masked_fill(out, 0)}
    kw |= {"hard_weight": 0.5, "z_loss": 0.1, "reduction": reduction}
    if "linear" in name:
        kw["workspace_mb"] = 1e-3  # chunks of a few rows
    with kdfast.use_backend(backend):
        loss, leaves = losses(device, 8)[name]
        leaves = [x.to(dtype) for x in leaves]
        where = [out[:, None], None, None][: len(leaves)]
        assert_same_whatever_is_left_out(lambda *xs: loss(*xs, **kw), leaves, where)


def test_token_weight_of_ignored_rows(backend: str, device: str) -> None:
    x, teacher = torch.randn(4, 9, device=device), torch.randn(4, 9, device=device)
    labels, weight = torch.tensor([1, -100, 2, -100], device=device), torch.tensor([1.0, torch.nan, 2.0, INF], device=device)
    with kdfast.use_backend(backend):
        expected = kd_loss(x, teacher, labels, token_weight=weight.nan_to_num(0, 0))
        assert kd_loss(x, teacher, labels, token_weight=weight) == expected


@pytest.mark.parametrize("name", ["kd_loss", "topk", "linear", "linear_topk", "hidden_mse", "hidden_cosine"])
def test_incoming_gradient_of_rows_that_do_not_count(name: str, backend: str, device: str) -> None:
    """Dividing row losses by a weight of 0 sends infinity, or NaN, to rows that do not count."""
    mask = torch.tensor([True, False, True, False], device=device)
    upstream = torch.tensor([1.0, INF, 2.0, torch.nan], device=device)
    with kdfast.use_backend(backend):
        if name in ("hidden_mse", "hidden_cosine"):
            f, teacher = getattr(kdfast, name), torch.randn(4, 8, device=device)
            loss, leaves = (lambda x: f(x, teacher, mask=mask, reduction="none")), [torch.randn(4, 8, device=device)]
        else:
            f, leaves = losses(device)[name]
            labels = torch.where(mask, 3, -100)
            loss = lambda *xs: f(*xs, labels=labels, reduction="none")  # noqa: E731
        xs = [x.requires_grad_() for x in leaves]
        wanted = torch.autograd.grad(loss(*xs), xs, torch.where(mask, upstream, 0))
        for grad, expected in zip(torch.autograd.grad(loss(*xs), xs, upstream), wanted, strict=True):
            torch.testing.assert_close(grad, expected, rtol=0, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["mse", "projected", "cosine"])
def test_masked_hidden_states(name: str, reduction: str, backend: str, device: str) -> None:
    out = torch.tensor([[0, 1, 0], [1, 1, 0]], dtype=torch.bool, device=device)
    h_s, h_t, p, b = (torch.randn(s, device=device) for s in ((2, 3, 12), (2, 3, 12), (12, 12), (12,)))
    kw = {"mask": ~out, "reduction": reduction}
    junk_t = h_t.masked_fill(out[..., None], torch.nan)
    with kdfast.use_backend(backend):
        if name == "projected":
            loss, leaves = (lambda h, p, b: kdfast.hidden_mse(h, junk_t, p, b, **kw)), [h_s, p, b]
        else:
            f = kdfast.hidden_mse if name == "mse" else kdfast.hidden_cosine
            loss, leaves = (lambda h: f(h, junk_t, **kw)), [h_s]
        assert_same_whatever_is_left_out(loss, leaves, [out[..., None], None, None][: len(leaves)])


@pytest.mark.parametrize("center", [False, True], ids=["", "center"])
@pytest.mark.parametrize("method", ["gram", "logits"])
def test_masked_rows_of_logit_mse(method: str, center: bool, backend: str, device: str) -> None:
    out = torch.tensor([0, 1, 0, 1, 0], dtype=torch.bool, device=device)
    h, w, h_t, w_t = (torch.randn(s, device=device) for s in ((5, 8), (30, 8), (5, 8), (30, 8)))
    h_t = h_t.masked_fill(out[:, None], torch.nan)
    with kdfast.use_backend(backend):
        loss = lambda h, w: kdfast.linear_logit_mse(h, w, h_t, w_t, mask=~out, method=method, center=center)  # noqa: E731
        assert_same_whatever_is_left_out(loss, [h, w], [out[:, None], None])


MASKS = {"queries": (True, False), "keys": (False, True), "both": (True, True), "none": (False, False)}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("gram", (16, 16)), ("gram", (16, 12)), ("tiled", (16, 16)), ("tiled", (16, 12)), ("probs", (16, 16)), ("kl", (16, 12))],
    ids=["gram", "gram-other-size", "tiled", "tiled-other-size", "probs", "kl-other-size"],
)
def test_positions_in_no_pair_that_counts(
    kind: str, masks: str, causal: bool, sizes: tuple[int, int], backend: str, device: str
) -> None:
    lq, lk = 7, 10
    query_mask, key_mask = torch.rand(3, lq, device=device) < 0.7, torch.rand(3, lk, device=device) < 0.7
    query_mask[0, 4:], key_mask[0, :2] = False, False  # padding on the right and on the left
    query_mask[1], key_mask[2] = False, False  # nothing counts
    query_mask, key_mask = (m if used else None for m, used in zip((query_mask, key_mask), MASKS[masks], strict=True))
    pairs = torch.ones(3, lq, lk, dtype=torch.bool, device=device)
    pairs = pairs.tril() if causal else pairs
    pairs = pairs if query_mask is None else pairs & query_mask[:, :, None]
    pairs = pairs if key_mask is None else pairs & key_mask[:, None, :]
    no_query, no_key = ~pairs.any(2)[:, None, :, None], ~pairs.any(1)[:, None, :, None]
    q_s, k_s = torch.randn(3, 4, lq, sizes[0], device=device), torch.randn(3, 2, lk, sizes[0], device=device)
    q_t, k_t = torch.randn(3, 4, lq, sizes[1], device=device), torch.randn(3, 2, lk, sizes[1], device=device)
    q_t, k_t = q_t.masked_fill(no_query, torch.nan), k_t.masked_fill(no_key, torch.nan)
    kw: dict[str, Any] = {"query_mask": query_mask, "key_mask": key_mask, "causal": causal}

    def loss(q: Tensor, k: Tensor) -> Tensor:
        if kind == "kl":
            return kdfast.attention_kl(q, k, q_t, k_t, **kw)
        on, method = ("probs", "auto") if kind == "probs" else ("scores", kind)
        return kdfast.attention_mse(q, k, q_t, k_t, on=on, method=method, **kw)

    with kdfast.use_backend(backend):
        assert_same_whatever_is_left_out(loss, [q_s, k_s], [no_query, no_key])


def test_masked_pairs_of_maps(backend: str, device: str) -> None:
    out = (torch.rand(2, 1, 5, 9) < 0.5).to(device)
    out[0, :, 2] = True
    maps_s, maps_t = torch.randn(2, 3, 5, 9, device=device), torch.randn(2, 3, 5, 9, device=device)
    maps_t = maps_t.masked_fill(out, -INF)
    with kdfast.use_backend(backend):
        assert_same_whatever_is_left_out(lambda m: kdfast.attention_map_mse(m, maps_t, mask=~out), [maps_s], [out])
