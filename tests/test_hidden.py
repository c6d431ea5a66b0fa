"""hidden_mse and hidden_cosine: values, gradients, masks and digits near agreement."""

from __future__ import annotations

import doctest

import plain
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import hidden_cosine, hidden_mse, use_backend
from kdfast.ops import hidden as hidden_module

BACKENDS = pytest.mark.parametrize("backend", ["cpp", "reference"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def reduced(row: Tensor, mask: Tensor | None, normalize: str, reduction: str) -> Tensor:
    mask = torch.ones_like(row, dtype=torch.bool) if mask is None else mask
    row = torch.where(mask, row, 0)
    if reduction != "mean":
        return row if reduction == "none" else row.sum()
    return row.sum() / (mask.sum() if normalize == "valid" else row.numel())


def eager_mse(leaves: list[Tensor], h_t: Tensor, mask: Tensor | None, normalize: str, reduction: str) -> Tensor:
    h = leaves[0] if len(leaves) == 1 else F.linear(*leaves)
    return reduced(F.mse_loss(h, h_t, reduction="none").mean(-1), mask, normalize, reduction)


def run(loss, leaves: list[Tensor], dtype: torch.dtype, upstream: Tensor) -> tuple[Tensor, ...]:
    """(value, *gradients) in float64 of a loss evaluated in `dtype`."""
    moved = [x.to(dtype).detach().requires_grad_() for x in leaves]
    value = loss(moved)
    grads = torch.autograd.grad(value, moved, upstream.to(value.dtype))
    return value.detach().double(), *(g.double() for g in grads)


def assert_all_as_good(ours, theirs, leaves: list[Tensor], dtype: torch.dtype, upstream: Tensor, backend: str) -> None:
    truth, expected = run(theirs, leaves, torch.float64, upstream), run(theirs, leaves, dtype, upstream)
    with use_backend(backend):
        got = run(ours, leaves, dtype, upstream)
    names = ("value", "hidden", "projection", "bias")
    for name, mine, other, exact in zip(names, got, expected, truth, strict=False):
        plain.assert_as_good(mine, other, exact, dtype, name)


@BACKENDS
@DTYPES
@REDUCTIONS
@pytest.mark.parametrize("normalize", ["valid", "all"])
@pytest.mark.parametrize("masked", [False, True], ids=["all-rows", "masked"])
@pytest.mark.parametrize(
    ("n", "student", "teacher", "parts"),
    [(5, 1, 1, 1), (5, 37, 37, 1), (40, 2053, 2053, 1), (5, 7, 13, 2), (5, 7, 13, 3), (600, 20, 1030, 3)],
    ids=["D1", "ragged", "several-spans", "projection", "bias", "several-chunks"],
)
def test_mse(
    n: int,
    student: int,
    teacher: int,
    parts: int,
    masked: bool,
    normalize: str,
    reduction: str,
    dtype: torch.dtype,
    backend: str,
) -> None:
    leaves = [torch.randn(n, student), torch.randn(teacher, student) / student**0.5, torch.randn(teacher)][:parts]
    leaves, h_t = [x.to(dtype) for x in leaves], torch.randn(n, teacher).to(dtype)
    mask = torch.arange(n) % 3 != 1 if masked else None
    upstream = torch.rand(n) + 0.5 if reduction == "none" else torch.tensor(1.7)
    options = {"normalize": normalize, "reduction": reduction}
    assert_all_as_good(
        lambda x: hidden_mse(x[0], h_t.to(x[0].dtype), *x[1:], mask=mask, **options),
        lambda x: eager_mse(x, h_t.to(x[0].dtype), mask, **options),
        leaves, dtype, upstream, backend,
    )  # fmt: skip


@BACKENDS
@DTYPES
@REDUCTIONS
@pytest.mark.parametrize("masked", [False, True], ids=["all-rows", "masked"])
@pytest.mark.parametrize("width", [2, 37, 2053], ids=["D2", "ragged", "several-spans"])
def test_cosine(width: int, masked: bool, reduction: str, dtype: torch.dtype, backend: str) -> None:
    h_s, h_t = torch.randn(9, width).to(dtype), torch.randn(9, width).to(dtype)
    mask = torch.arange(9) % 3 != 1 if masked else None
    upstream = torch.rand(9) + 0.5 if reduction == "none" else torch.tensor(1.7)

    def theirs(x: list[Tensor]) -> Tensor:
        return reduced(1 - F.cosine_similarity(x[0], h_t.to(x[0].dtype), -1), mask, "valid", reduction)

    def ours(x: list[Tensor]) -> Tensor:
        return hidden_cosine(x[0], h_t.to(x[0].dtype), mask=mask, reduction=reduction)

    assert_all_as_good(ours, theirs, [h_s], dtype, upstream, backend)


def cosine_truth(h_s: Tensor, h_t: Tensor) -> Tensor:
    """1 - cos in float64 as half the squared distance of unit vectors."""
    return (F.normalize(h_s, dim=-1) - F.normalize(h_t, dim=-1)).square().sum(-1).mean() / 2


@pytest.mark.parametrize("distance", [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("factor", [1.0, 1.7, -1.0], ids=["same-length", "longer", "opposite"])
def test_cosine_keeps_its_digits_near_agreement(factor: float, distance: float) -> None:
    h_t = torch.randn(16, 300)
    h_s = factor * h_t + distance * torch.randn(16, 300)
    truth, exact = plain.gradient(lambda x: cosine_truth(x, h_t.double()), h_s, torch.float64)
    value, grad = plain.gradient(lambda x: hidden_cosine(x, h_t), h_s, torch.float32)
    assert plain.error(value, truth) <= 1e-6
    assert plain.error(grad, exact) <= 1e-6


@BACKENDS
def test_cosine_of_a_zero_row_is_one_without_gradient(backend: str) -> None:
    h_s, h_t = torch.randn(3, 8), torch.randn(3, 8)
    h_s[0], h_t[1] = 0, 0
    h_s.requires_grad_()
    with use_backend(backend):
        rows = hidden_cosine(h_s, h_t, reduction="none")
        rows.sum().backward()
    assert rows[:2].tolist() == [1, 1]
    assert (h_s.grad[:2] == 0).all()
    assert h_s.grad[2].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_teacher_of_another_dtype(dtype: torch.dtype) -> None:
    h_s, h_t = torch.randn(5, 37).to(dtype), torch.randn(5, 37)
    assert torch.allclose(hidden_mse(h_s, h_t), F.mse_loss(h_s.float(), h_t), rtol=1e-5)
    assert torch.allclose(hidden_mse(h_t, h_s), F.mse_loss(h_t, h_s.float()), rtol=1e-5)
    expected = (1 - F.cosine_similarity(h_s.float(), h_t, -1)).mean()
    assert torch.allclose(hidden_cosine(h_s, h_t), expected, rtol=1e-5)
    projection = torch.randn(37, 37, requires_grad=True)  # autocast leaves hidden states narrower than the weights
    loss = hidden_mse(h_s, h_t, projection)
    assert torch.allclose(loss, F.mse_loss(F.linear(h_s.float(), projection), h_t), rtol=1e-5)


def losses() -> dict[str, object]:
    projection = torch.randn(8, 8)
    return {
        "mse": hidden_mse,
        "projected": lambda s, t, **o: hidden_mse(s, t, projection, **o),
        "cosine": hidden_cosine,
    }


@BACKENDS
@pytest.mark.parametrize("name", ["mse", "projected", "cosine"])
def test_rows_that_do_not_count_may_hold_anything(name: str, backend: str) -> None:
    h_s, h_t, mask = torch.randn(6, 8), torch.randn(6, 8), torch.tensor([True, False] * 3)
    projection = torch.randn(8, 8, requires_grad=True)
    h_s[1], h_t[3] = torch.nan, torch.inf
    h_s.requires_grad_()
    with use_backend(backend):
        loss = hidden_mse(h_s, h_t, projection, mask=mask) if name == "projected" else losses()[name](h_s, h_t, mask=mask)
        loss.backward()
    assert loss.isfinite()
    assert h_s.grad.isfinite().all()
    assert (h_s.grad[~mask] == 0).all()
    assert projection.grad is None or projection.grad.isfinite().all()


@BACKENDS
@pytest.mark.parametrize("name", ["mse", "projected", "cosine"])
def test_no_rows_and_strides(name: str, backend: str) -> None:
    loss = losses()[name]
    with use_backend(backend):
        empty = torch.randn(2, 0, 8, requires_grad=True)
        loss(empty, torch.randn(2, 0, 8)).backward()
        assert empty.grad.shape == (2, 0, 8)
        assert float(loss(torch.randn(3, 8), torch.randn(3, 8), mask=torch.zeros(3, dtype=torch.bool))) == 0
        wide, turned = torch.randn(3, 4, 16), torch.randn(8, 4, 3)
        strided = loss(wide[..., ::2], turned.permute(2, 1, 0))
        assert torch.allclose(strided, loss(wide[..., ::2].contiguous(), turned.permute(2, 1, 0).contiguous()), rtol=1e-6)


def test_large_rows_are_streamed() -> None:
    """Gradients beyond 16 MiB are written past the caches: the same numbers."""
    h_s, h_t = torch.randn(5000, 900, requires_grad=True), torch.randn(5000, 900)
    for loss in (hidden_mse, hidden_cosine):
        (many,) = torch.autograd.grad(loss(h_s, h_t) * 5000, h_s)
        (few,) = torch.autograd.grad(loss(h_s[:9], h_t[:9]) * 9, h_s)
        assert torch.allclose(many[:9], few[:9], rtol=1e-6)
        assert many.isfinite().all()


@pytest.mark.parametrize("name", ["mse", "projected", "cosine"])
def test_backward_twice_with_another_incoming_gradient(name: str) -> None:
    h_s, h_t = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8)
    loss = losses()[name](h_s, h_t)
    (first,) = torch.autograd.grad(loss, h_s, torch.tensor(3.0), retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, h_s, torch.tensor(0.5))
    assert torch.equal(first, kept)
    assert torch.allclose(first, 6 * second)


def test_float16_gradients_survive_a_loss_scale() -> None:
    """2 / (N * D) of a small difference is below float16's least number; times 65536 it is not."""
    h_t = torch.randn(4096, 64).half()
    h_s = (h_t + 0.05).requires_grad_()
    for loss in (hidden_mse(h_s, h_t) * 65536, hidden_mse(h_s, h_t, torch.eye(64).half()) * 65536):
        (grad,) = torch.autograd.grad(loss, h_s)
        expected = 65536 * 2 / h_t.numel() * (h_s - h_t).detach().float()
        assert plain.error(grad, expected.double()) < 2e-3


@pytest.mark.parametrize("frozen", ["hidden", "projection", "bias"])
@BACKENDS
def test_frozen_inputs_get_no_gradient(frozen: str, backend: str) -> None:
    leaves = {"hidden": torch.randn(5, 8), "projection": torch.randn(6, 8), "bias": torch.randn(6)}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name != frozen)
    with use_backend(backend):
        hidden_mse(leaves["hidden"], torch.randn(5, 6), leaves["projection"], leaves["bias"]).backward()
    assert {name for name, leaf in leaves.items() if leaf.grad is None} == {frozen}


@BACKENDS
@pytest.mark.parametrize("reduction", ["mean", "none"], ids=["in-forward", "in-backward"])
def test_compile_func_and_opcheck(reduction: str, backend: str) -> None:
    h_s, h_t, projection, mask = torch.randn(5, 8), torch.randn(5, 6), torch.randn(6, 8), torch.tensor([True] * 4 + [False])

    def loss(x: Tensor) -> Tensor:
        projected = hidden_mse(x, h_t, projection, mask=mask, reduction=reduction).sum()
        return 1.5 * projected + hidden_cosine(x, h_s.flip(0), mask=mask, reduction=reduction).sum()

    with use_backend(backend):
        _, expected = plain.gradient(loss, h_s, torch.float32)
        _, compiled = plain.gradient(torch.compile(loss, fullgraph=True, backend="aot_eager"), h_s, torch.float32)
        functional = torch.func.grad(loss)(h_s)
    assert torch.allclose(compiled, expected, rtol=1e-5, atol=1e-8)
    assert torch.allclose(functional.double(), expected, rtol=1e-5, atol=1e-8)
    ops = torch.ops.kdfast
    for dtype in (torch.float32, torch.float16):
        s, t, p = (x.to(dtype) for x in (h_s, h_t, projection))
        scale, bias = mask.float(), torch.zeros(6, dtype=dtype)
        torch.library.opcheck(ops.hidden_mse.default, (s, p, bias, t, scale, backend, True, True, True))
        torch.library.opcheck(ops.hidden_mse.default, (s, p, None, t, scale, backend, False, True, False))
        torch.library.opcheck(ops.hidden_mse.default, (s, None, None, s.flip(0), scale, backend, True, False, False))
        torch.library.opcheck(ops.hidden_cosine.default, (s, s.flip(0), scale, backend, True))


def test_docstring_examples() -> None:
    names = {"torch": torch, "hidden_mse": hidden_mse, "hidden_cosine": hidden_cosine}
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    for test in finder.find(hidden_module, globs=names):
        runner.run(test)
    assert runner.tries >= 4
    assert runner.failures == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"h_s": torch.randn(4, 7)}, r"h_s: expected shape \[..., 6\] like h_t, got \[4, 7\]; or pass projection \[6, 7\]"),
        ({"h_t": torch.randn(5, 6)}, r"h_t: expected leading dimensions \[4\] like h_s, got \[5\]"),
        ({"h_s": torch.zeros(4, 6, dtype=torch.int64)}, "h_s: expected dtype float32, .* got torch.int64"),
        ({"bias": torch.randn(6)}, "bias: expected None without a projection"),
        ({"projection": torch.randn(6, 7)}, r"projection: expected shape \[6, 6\]"),
        ({"projection": torch.randn(6, 6), "bias": torch.randn(5)}, r"bias: expected shape \[6\]"),
        ({"mask": torch.ones(4)}, r"mask: expected dtype bool \(True = counts\), got torch.float32; write mask != 0"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, r"mask: expected shape \[4\]"),
        ({"normalize": "none"}, "normalize: expected one of valid, all, got 'none'"),
        ({"reduction": "avg"}, "reduction: expected one of mean, sum, none, got 'avg'"),
        ({"h_s": torch.full((4, 6), torch.nan)}, "h_s: row 0 holds NaN"),
        ({"h_t": torch.full((4, 6), torch.nan)}, "h_t: row 0 holds NaN"),
        ({"projection": torch.full((6, 6), torch.nan)}, "row 0 has loss NaN: the projection"),
    ],
)
@BACKENDS
def test_bad_input(arguments: dict[str, object], message: str, backend: str) -> None:
    with use_backend(backend), pytest.raises(ValueError, match=message):
        hidden_mse(**({"h_s": torch.randn(4, 6), "h_t": torch.randn(4, 6)} | arguments))


def test_cosine_of_different_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"h_s: expected shape \[..., 6\] like h_t, got \[4, 7\]; project it first"):
        hidden_cosine(torch.randn(4, 7), torch.randn(4, 6))
