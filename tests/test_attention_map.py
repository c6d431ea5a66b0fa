"""attention_map_mse: maps that exist already, under any mask that broadcasts."""

from __future__ import annotations

import plain
import pytest
import torch
from torch import Tensor

from kdfast import attention_map_mse, use_backend
from kdfast.losses import AttentionMapMSELoss

BACKENDS = pytest.mark.parametrize("backend", ["cpp", "reference"])
MASKS = {
    "none": None,
    "keys": (2, 1, 1, 70),
    "queries": (2, 1, 9, 1),
    "pairs": (2, 3, 9, 70),
    "one-pair-map": (9, 70),
}


def materialised(maps_s: Tensor, maps_t: Tensor, mask: Tensor | None, reduction: str) -> Tensor:
    counts = torch.ones_like(maps_s, dtype=torch.bool) if mask is None else mask.expand(maps_s.shape)
    total = torch.where(counts, maps_s - maps_t, 0).square().sum((-1, -2))
    number = counts.sum((-1, -2))
    return total / number.clamp(min=1) if reduction == "none" else total.sum() / number.sum().clamp(min=1)


def outcome(function, maps_s: Tensor, maps_t: Tensor, dtype: torch.dtype) -> list[Tensor]:
    x = maps_s.to(dtype).detach().requires_grad_()
    value = function(x, maps_t.to(dtype))
    incoming = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)
    return [v.detach().double() for v in (value, *torch.autograd.grad(value, x, incoming))]


@BACKENDS
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("reduction", ["mean", "none"], ids=["in-forward", "in-backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_value_and_gradient(dtype: torch.dtype, reduction: str, mask: str, backend: str) -> None:
    maps_s, maps_t = torch.randn(2, 3, 9, 70).to(dtype), torch.randn(2, 3, 9, 70).to(dtype)
    shape = MASKS[mask]
    counts = None if shape is None else torch.rand(shape) > 0.4
    exact, same = (
        outcome(lambda a, b: materialised(a, b, counts, reduction), maps_s, maps_t, d) for d in (torch.float64, dtype)
    )
    with use_backend(backend):
        got = outcome(lambda a, b: attention_map_mse(a, b, mask=counts, reduction=reduction), maps_s, maps_t, dtype)
    for name, mine, theirs, truth in zip(("loss", "grad"), got, same, exact, strict=True):
        plain.assert_as_good(mine, theirs, truth, dtype, name)


@BACKENDS
def test_masked_entries_may_be_infinite_and_strides_are_free(backend: str) -> None:
    counts = torch.rand(2, 1, 1, 33) > 0.4
    maps = [torch.randn(2, 17, 3, 33).transpose(1, 2).masked_fill(~counts, -torch.inf) for _ in range(2)]
    finite = [m.masked_fill(~counts, 5.0).contiguous() for m in maps]
    with use_backend(backend):
        got, expected = (
            outcome(lambda a, b: attention_map_mse(a, b, mask=counts), *pair, torch.float32) for pair in (maps, finite)
        )
        swapped = attention_map_mse(finite[0].mT, finite[1].mT, mask=counts.mT)
    assert all(plain.error(a, b) < 1e-6 for a, b in zip(got, expected, strict=True))
    assert torch.allclose(swapped.double(), expected[0])


@BACKENDS
@pytest.mark.parametrize(
    "shape", [(0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0), (2, 2, 3, 4)], ids=["B0", "Lq0", "Lk0", "all-masked"]
)
def test_nothing_to_compare(shape: tuple[int, ...], backend: str) -> None:
    mask = torch.zeros(shape, dtype=torch.bool)
    with use_backend(backend):
        value, grad = outcome(
            lambda a, b: attention_map_mse(a, b, mask=mask), torch.randn(shape), torch.randn(shape), torch.float32
        )
    assert value == 0
    assert grad.abs().sum() == 0


@BACKENDS
def test_normalize_and_sum_by_hand(backend: str) -> None:
    maps_s, maps_t = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), torch.zeros(1, 1, 2, 2)
    mask = torch.tensor([[True, False], [False, True]])
    with use_backend(backend):
        values = [attention_map_mse(maps_s, maps_t, mask=mask, normalize=n, reduction=r).item()
                  for n, r in (("valid", "mean"), ("all", "mean"), ("valid", "sum"), ("all", "none"))]  # fmt: skip
    assert values == [8.5, 4.25, 17.0, 4.25]


@BACKENDS
def test_backward_twice_opcheck_and_one_graph(backend: str) -> None:
    maps_s, maps_t = torch.randn(2, 3, 5, 7, requires_grad=True), torch.randn(2, 3, 5, 7)
    mask = (torch.rand(2, 1, 1, 7) > 0.3).expand(2, 3, 5, 7)
    with use_backend(backend):
        value = attention_map_mse(maps_s, maps_t, mask=mask)
        (first,) = torch.autograd.grad(value, maps_s, retain_graph=True)
        kept = first.clone()
        (second,) = torch.autograd.grad(3 * value, maps_s)
        assert torch.equal(first, kept)
        assert torch.allclose(second, 3 * first)
        step = torch.compile(lambda x: attention_map_mse(x, maps_t, mask=mask) * 2, fullgraph=True, backend="aot_eager")
        assert torch.allclose(torch.autograd.grad(step(maps_s), maps_s)[0], 2 * first)
    for need_grad in (True, False):
        torch.library.opcheck(
            torch.ops.kdfast.attention_map.default, (maps_s.detach(), maps_t, mask, torch.rand(2, 3), backend, need_grad)
        )


def test_gradcheck_and_module() -> None:
    maps_s, maps_t = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True), torch.randn(1, 2, 3, 4).double()
    for reduction in ("mean", "none"):
        torch.autograd.gradcheck(lambda x, r=reduction: attention_map_mse(x, maps_t, reduction=r), maps_s)
    module = AttentionMapMSELoss(reduction="sum")
    assert torch.equal(module(maps_s, maps_t), attention_map_mse(maps_s, maps_t, reduction="sum"))


MAPS = torch.randn(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"maps_s": MAPS[0]}, r"maps_s: expected shape \[B, H, Lq, Lk\], got \[3, 4, 5\]"),
        ({"maps_t": MAPS[:1]}, r"maps_t: expected shape \[2, 3, 4, 5\] like maps_s, got \[1, 3, 4, 5\]"),
        ({"mask": torch.ones(2, 5)}, "mask: expected dtype torch.bool"),
        (
            {"mask": torch.ones(2, 5, dtype=torch.bool)},
            r"mask: expected a shape that broadcasts to \[2, 3, 4, 5\], got \[2, 5\]",
        ),
        ({"maps_s": MAPS / 0}, "batch 0, head 0 has a difference that is not finite"),
    ],
)
def test_bad_input(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_map_mse(**({"maps_s": MAPS, "maps_t": MAPS} | change))
