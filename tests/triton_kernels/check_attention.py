"""The Triton attention kernels against the float64 reference. Run by `test_triton_interpreted`."""

from __future__ import annotations

import plain
import pytest
import torch
from torch import Tensor

from kdfast.backends.reference import attention as reference
from kdfast.backends.triton import attention, attention_grams
from kdfast.options import AttentionOptions

KINDS = pytest.mark.parametrize(
    ("kind", "method"), [("scores", "gram"), ("scores", "tiled"), ("probs", "auto"), ("kl", "auto")]
)

#: One unit in the last place of what gradients are rounded to: the interpreter truncates where a GPU rounds to nearest.
ULP = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def sides(heads: tuple[int, int, int], sizes: tuple[int, int], lengths: tuple[int, int], device: str) -> list[Tensor]:
    (h, hs, ht), (ds, dt), (lq, lk) = heads, sizes, lengths
    return [torch.randn(2, *shape, device=device) for shape in ((h, lq, ds), (hs, lk, ds), (h, lq, dt), (ht, lk, dt))]


def check(
    tensors: list[Tensor], kind: str, method: str, masks: tuple[Tensor | None, Tensor | None], causal: bool, bound: float,
    scales: tuple[float, float] = (0.3, 0.3),
) -> None:  # fmt: skip
    scale = torch.rand(tensors[0].shape[:2], device=tensors[0].device) + 0.5
    options = AttentionOptions(kind, *scales, causal, method)
    exact = reference.forward(*(x.double() for x in tensors), *masks, scale.double(), options, True)
    got = attention.forward(*tensors, *masks, scale, options, True)
    only_loss, *nothing = attention.forward(*tensors, *masks, scale, options, False)
    assert plain.error(only_loss, got[0].double()) <= 1e-6
    assert [x.numel() for x in nothing] == [0, 0]
    for name, mine, truth in zip(("loss", "grad_q", "grad_k"), got, exact, strict=True):
        assert mine.isfinite().all()
        assert plain.error(mine, truth) <= bound, f"{name}: {plain.error(mine, truth):.1e}"


@KINDS
@pytest.mark.parametrize(("masked", "causal"), [(False, False), (True, True)], ids=["all-pairs", "padded-causal"])
@pytest.mark.parametrize(
    ("heads", "sizes", "lengths"),
    [((2, 2, 2), (16, 16), (20, 20)), ((4, 2, 1), (8, 20), (20, 35)), ((6, 2, 3), (5, 5), (35, 9))],
    ids=["equal", "grouped-sizes-differ", "odd-groups-long-queries"],
)
def test_against_reference(
    heads: tuple[int, int, int], sizes: tuple[int, int], lengths: tuple[int, int], masked: bool, causal: bool,
    kind: str, method: str, device: str,
) -> None:  # fmt: skip
    masks = tuple(torch.rand(2, n, device=device) > 0.3 if masked else None for n in lengths)
    check(sides(heads, sizes, lengths, device), kind, method, masks, causal, 5e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["scores", "probs", "kl"])
def test_heads_wider_than_tiles(kind: str, causal: bool, device: str) -> None:
    """Whose tiles no multiprocessor holds: 327,680 bytes at 1024."""
    tensors = sides((2, 1, 2), (320, 576), (9, 7), device)
    masks = tuple(torch.rand(2, n, device=device) > 0.3 for n in (9, 7))
    check(tensors, kind, "tiled", masks, causal, 5e-6, (0.05, 0.05))


@pytest.mark.parametrize("method", ["gram", "tiled"])
def test_heads_far_apart(method: str, device: str) -> None:
    """More than 2^31 numbers between the first and the last, 4.8 GB: on a CPU memory that nobody touches."""
    queries, keys, of_teacher, its_keys = (x[:1].bfloat16() for x in sides((3, 3, 3), (8, 8), (12, 12), device))
    stride = 1_200_000_000
    far = torch.empty(2 * stride + queries[0, 0].numel(), dtype=torch.bfloat16, device=device)
    far = far.as_strided(queries.shape, (3 * stride, stride, 8, 1))
    far.copy_(queries)
    options, scale = AttentionOptions("scores", 0.3, 0.3, False, method), torch.ones(1, 3, device=device)
    got = attention.forward(far, keys, of_teacher, its_keys, None, None, scale, options, True)
    want = attention.forward(queries, keys, of_teacher, its_keys, None, None, scale, options, True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@KINDS
def test_half_precision_and_strides(kind: str, method: str, device: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        tensors = [
            x.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in sides((4, 2, 4), (32, 32), (40, 40), device)
        ]
        check(tensors, kind, method, (None, None), False, ULP[dtype])


@KINDS
@pytest.mark.parametrize("distance", [1e-1, 1e-3, 1e-5])
def test_error_does_not_grow_near_agreement(distance: float, kind: str, method: str, device: str) -> None:
    tensors = sides((2, 2, 2), (32, 32), (20, 20), device)
    for student, teacher in ((0, 2), (1, 3)):
        tensors[student] = tensors[teacher] + distance * torch.randn_like(tensors[teacher])
    check(tensors, kind, method, (None, None), False, 1e-5, scales=(0.125, 0.125))


@pytest.mark.parametrize(
    ("heads", "sizes", "masked"),
    [((1, 1, 1), (80, 80), False), ((1, 1, 1), (24, 70), True)],
    ids=["tiles", "sizes-differ-padded"],
)
def test_grams_in_slices(
    heads: tuple[int, int, int], sizes: tuple[int, int], masked: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three slices, of which the short side's last is empty."""
    monkeypatch.setattr(attention_grams, "slices", lambda *_: 3)
    lengths = (70, 40)
    masks = tuple(torch.rand(2, n, device=device) > 0.3 if masked else None for n in lengths)
    tensors = sides(heads, sizes, lengths, device)
    check(tensors, "scores", "gram", masks, False, 5e-6)
    scale, options = torch.ones(2, heads[0], device=device), AttentionOptions("scores", 0.3, 0.3, False, "gram")
    once, again = (attention.forward(*tensors, *masks, scale, options, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("case", ["scales-differ", "sizes-differ"])
def test_grams_near_agreement(case: str, device: str) -> None:
    """A student at distance 1e-4: of a scale a third of the teacher's, which no float32 holds; with columns more."""
    tensors, scales = sides((2, 2, 2), (32, 32), (40, 40), device), (0.125, 0.125)
    if case == "sizes-differ":
        tensors[0], tensors[1] = (torch.nn.functional.pad(x, (0, 8)) for x in tensors[2:])
    else:
        tensors[0], tensors[1], scales = 3 * tensors[2], tensors[3].clone(), (0.1 / 3, 0.1)
    for x in tensors[:2]:
        x += 1e-4 * torch.randn_like(x)
    check(tensors, "scores", "gram", (None, None), False, 1e-5, scales=scales)


@KINDS
def test_one_pair_of_one_column(kind: str, method: str, device: str) -> None:
    tensors = sides((2, 1, 2), (1, 1), (1, 1), device)
    scale, options = torch.ones(2, 2, device=device), AttentionOptions(kind, 0.7, 0.7, False, method)
    exact = reference.forward(*(x.double() for x in tensors), None, None, scale.double(), options, True)
    got = attention.forward(*tensors, None, None, scale, options, True)
    assert all(torch.allclose(a.double(), b, rtol=1e-5, atol=1e-7) for a, b in zip(got, exact, strict=True))


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_is_not_finite_stays_in_its_head(dtype: torch.dtype, kind: str, method: str, device: str) -> None:
    """A NaN among the queries of head 1, which does not count in head 0, nor where its head's scale is 0."""
    tensors = [x.to(dtype) for x in sides((2, 2, 2), (16, 16), (20, 20), device)]
    tensors[0][0, 1, 3, 2] = torch.nan
    scale, options = torch.ones(2, 2, device=device), AttentionOptions(kind, 0.3, 0.3, False, method)
    loss, grad_q, grad_k = attention.forward(*tensors, None, None, scale, options, True)
    assert loss.isfinite().tolist() == [[True, False], [True, True]]
    assert grad_q[0, 0].isfinite().all()
    assert grad_k[1].isfinite().all()
    scale[0, 1] = 0
    out = attention.forward(*tensors, None, None, scale, options, True)
    assert all(x.isfinite().all() and x[0, 1].abs().max() == 0 for x in out)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_equal_maps(dtype: torch.dtype, kind: str, method: str, device: str) -> None:
    """A student that is its teacher: nothing at all, not a rounding."""
    q, k = (x.to(dtype) for x in sides((1, 1, 1), (16, 16), (35, 35), device)[:2])
    options = AttentionOptions(kind, 0.3, 0.3, False, method)
    out = attention.forward(q, k, q.clone(), k.clone(), None, None, torch.ones(2, 1, device=device), options, True)
    assert all(x.abs().max() == 0 for x in out)


def test_nothing_seen(device: str) -> None:
    tensors = sides((2, 2, 2), (8, 8), (20, 20), device)
    none = torch.zeros(2, 20, dtype=torch.bool, device=device)
    for kind in ("scores", "probs", "kl"):
        for masks in ((none, None), (None, none)):
            options = AttentionOptions(kind, 1.0, 1.0, False, "tiled")
            out = attention.forward(*tensors, *masks, torch.ones(2, 2, device=device), options, True)
            assert all(x.abs().max() == 0 for x in out)


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("width", [7, 2100], ids=["one-block", "ragged-blocks"])
def test_maps(width: int, dtype: torch.dtype, masked: bool, device: str) -> None:
    maps_s, maps_t = (torch.randn(2, 3, 2, width, device=device).to(dtype).transpose(1, 2) for _ in range(2))
    mask = (torch.rand(2, 1, 1, width, device=device) > 0.3).expand(maps_s.shape) if masked else None
    scale = torch.rand(2, 2, device=device)
    exact = reference.map_forward(maps_s.double(), maps_t.double(), mask, scale.double(), True)
    got = attention.map_forward(maps_s, maps_t, mask, scale, True)
    for mine, truth, bound in zip(got, exact, (2e-6, ULP[dtype]), strict=True):
        assert plain.error(mine, truth) <= bound
    assert attention.map_forward(maps_s, maps_t, mask, scale, False)[1].numel() == 0
