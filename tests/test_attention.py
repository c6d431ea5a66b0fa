"""attention_mse and attention_kl against the materialised form in float64."""

from __future__ import annotations

import os
import subprocess
import sys

import attention_plain as plain_attention
import plain
import pytest
import torch
from attention_plain import gradients, inputs
from torch import Tensor

from kdfast import attention_kl, attention_mse, use_backend
from kdfast.losses import AttentionKLLoss, AttentionMSELoss

BACKENDS = ["cpp", "reference"]
LOSSES = {
    "gram": (attention_mse, {"method": "gram"}),
    "tiled": (attention_mse, {"method": "tiled"}),
    "auto": (attention_mse, {}),
    "probs": (attention_mse, {"on": "probs"}),
    "kl": (attention_kl, {}),
}
LOSS = pytest.mark.parametrize("loss", LOSSES)
MASKS = pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["all-pairs", "causal"])


def compare(loss: str, sides: tuple[Tensor, ...], backend: str, dtype: torch.dtype, **options: object) -> None:
    """Value and gradients at most twice as far from float64 as the materialised form in the same dtype."""
    function, own = LOSSES[loss]
    truth = gradients(plain_attention.loss, loss, sides, torch.float64, **options)
    same = gradients(plain_attention.loss, loss, sides, dtype, **options)
    with use_backend(backend):
        got = gradients(lambda _, *x, **o: function(*x, **own, **o), loss, sides, dtype, **options)
    for name, mine, theirs, exact in zip(("loss", "grad_q", "grad_k"), got, same, truth, strict=True):
        assert mine.isfinite().all(), f"{name} is not finite"
        if exact.norm() > 1e-12:
            plain.assert_as_good(mine, theirs, exact, dtype, name)
        else:
            assert mine.abs().max() < 1e-7, f"{name}: {mine} where the truth is 0"


@pytest.mark.parametrize("backend", BACKENDS)
@LOSS
@MASKS
@CAUSAL
@pytest.mark.parametrize("reduction", ["mean", "none"], ids=["in-forward", "in-backward"])
@pytest.mark.parametrize(
    ("heads", "sizes", "lengths"),
    [
        ((4, 4, 4), (8, 8), (37, 37)),
        ((4, 2, 1), (8, 6), (37, 37)),
        ((6, 2, 3), (8, 8), (70, 19)),
        ((2, 2, 1), (5, 7), (19, 70)),
        ((2, 1, 2), (4, 4), (1, 1)),
    ],
    ids=["equal", "grouped-sizes-differ", "odd-groups-long-queries", "long-keys", "one-pair"],
)
def test_value_and_gradient(
    heads: tuple[int, int, int], sizes: tuple[int, int], lengths: tuple[int, int], reduction: str, causal: bool,
    masked: bool, loss: str, backend: str,
) -> None:  # fmt: skip
    sides = inputs(heads, sizes, lengths)
    options: dict[str, object] = {"causal": causal, "reduction": reduction}
    if masked:
        options |= {"query_mask": torch.rand(2, lengths[0]) > 0.3, "key_mask": torch.rand(2, lengths[1]) > 0.3}
    compare(loss, sides, backend, torch.float32, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@LOSS
@CAUSAL
def test_half_precision(causal: bool, loss: str, dtype: torch.dtype) -> None:
    sides = tuple(x.to(dtype) for x in inputs((4, 2, 4), (16, 16), (50, 50)))
    compare(loss, sides, "cpp", dtype, causal=causal)


@LOSS
@CAUSAL
@pytest.mark.parametrize(
    ("heads", "sizes", "length", "batch"),
    [
        ((2, 1, 2), (16, 16), 700, 2),
        ((2, 1, 2), (8, 8), 700, 2),
        ((1, 1, 1), (16, 16), 1100, 1),
        ((2, 1, 1), (24, 16), 200, 2),
    ],
    ids=["fused", "tiles-of-one-head", "fewer-heads-than-threads", "tiles-of-several-heads"],
)
def test_every_way_on_a_cpu(
    heads: tuple[int, int, int], sizes: tuple[int, int], length: int, batch: int, causal: bool, loss: str
) -> None:
    sides = inputs(heads, sizes, (length, length - 3), batch)
    masks = {"query_mask": torch.rand(batch, length) > 0.3, "key_mask": torch.rand(batch, length - 3) > 0.3}
    compare(loss, sides, "cpp", torch.float32, causal=causal, **masks)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_instruction_sets(isa: str) -> None:
    """The instruction set is chosen once a process: these run in processes of their own."""
    code = (
        "import torch, kdfast\n"
        "x = [torch.randn(2, 2, 61, 32) for _ in range(4)]\n"
        "for f, o in ((kdfast.attention_mse, {}), (kdfast.attention_mse, {'on': 'probs'}), (kdfast.attention_kl, {})):\n"
        "    grads = []\n"
        "    for dtype in (torch.float32, torch.float64):\n"
        "        q, k = (s.to(dtype).requires_grad_() for s in x[:2])\n"
        "        value = f(q, k, *(s.to(dtype) for s in x[2:]), causal=True, **o)\n"
        "        grads.append([value.detach(), *torch.autograd.grad(value, (q, k))])\n"
        "    assert all(((a - b).norm() / b.norm()).item() < 5e-6 for a, b in zip(*grads)), grads\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"KDFAST_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("backend", BACKENDS)
@LOSS
@pytest.mark.parametrize("normalize", ["valid", "all"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_by_hand(reduction: str, normalize: str, loss: str, backend: str) -> None:
    """One batch of two heads, 2 of 3 queries and 1 of 2 keys that count: every divisor is a small number."""
    sides = inputs((2, 2, 2), (4, 4), (3, 2), batch=1)
    masks = {"query_mask": torch.tensor([[True, False, True]]), "key_mask": torch.tensor([[False, True]])}
    function, own = LOSSES[loss]
    with use_backend(backend):
        got = function(*sides, **own, **masks, normalize=normalize, reduction=reduction)
    assert got.shape == ((1, 2) if reduction == "none" else ())
    if loss in ("probs", "kl"):  # a softmax over one key is 1 on both sides
        assert got.abs().max() < 1e-12
        return
    q_s, k_s, q_t, k_t = (x.double() for x in sides)
    error = (q_s @ k_s.mT - q_t @ k_t.mT)[0, :, [0, 2], 1].square().sum(1) / 4
    divisor = 1 if reduction == "sum" else {"valid": 2, "all": 6}[normalize] * (2 if reduction == "mean" else 1)
    expected = error[None] / divisor if reduction == "none" else error.sum() / divisor
    assert torch.allclose(got.double(), expected, rtol=1e-6)


def test_kl_by_hand() -> None:
    """Teacher 3/4 to 1/4, student even: log 2 - H(1/4); the masked query would add another row."""
    q_t, k_t = torch.tensor([[[[3.0], [9.0]]]]).log(), torch.tensor([[[[1.0], [0.0]]]])
    zero = torch.zeros_like(q_t)
    mask = torch.tensor([[True, False]])
    expected = 0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()
    assert torch.allclose(attention_kl(zero, zero, q_t, k_t, query_mask=mask), expected)
    assert torch.allclose(attention_kl(zero, zero, q_t, k_t, query_mask=mask, normalize="all"), expected / 2)


@pytest.mark.parametrize("distance", [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
@LOSS
@pytest.mark.parametrize("case", ["equal", "scales-differ", "causal"])
def test_error_does_not_grow_near_agreement(case: str, loss: str, distance: float) -> None:
    q_t, k_t = torch.randn(2, 2, 300, 64), torch.randn(2, 2, 300, 64)
    options: dict[str, object] = {"causal": case == "causal"}
    q_s = q_t
    if case == "scales-differ":
        q_s, options = q_t * 3, {"scale_s": 0.1 / 3, "scale_t": 0.1}
    sides = (q_s + distance * torch.randn_like(q_s), k_t + distance * torch.randn_like(k_t), q_t, k_t)
    truth, got = truth_and_ours(loss, sides, options)
    for name, mine, exact in zip(("loss", "grad_q", "grad_k"), got, truth, strict=True):
        assert plain.error(mine, exact) <= 1e-5, f"{name}: {plain.error(mine, exact):.1e}"


@pytest.mark.parametrize("distance", [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
@LOSS
@CAUSAL
def test_error_with_head_sizes_that_differ(causal: bool, loss: str, distance: float) -> None:
    """Scores constructed to agree: the student's extra columns are zero before the noise."""
    q_t, k_t = torch.randn(2, 2, 300, 48), torch.randn(2, 2, 300, 48)
    wider = [torch.nn.functional.pad(x, (0, 16)) for x in (q_t, k_t)]
    sides = (*(x + distance * torch.randn_like(x) for x in wider), q_t, k_t)
    truth, got = truth_and_ours(loss, sides, {"scale_s": 48**-0.5, "causal": causal})
    for name, mine, exact in zip(("loss", "grad_q", "grad_k"), got, truth, strict=True):
        assert plain.error(mine, exact) <= 1e-4, f"{name}: {plain.error(mine, exact):.1e}"


def truth_and_ours(loss: str, sides: tuple[Tensor, ...], options: dict[str, object]) -> tuple[list[Tensor], list[Tensor]]:
    function, own = LOSSES[loss]
    truth = gradients(plain_attention.loss, loss, sides, torch.float64, **options)
    return truth, gradients(lambda _, *x, **o: function(*x, **own, **o), loss, sides, torch.float32, **options)


def test_agreement_in_another_basis_is_done_in_float64() -> None:
    """Queries turned one way and keys the other: equal head sizes, equal scores, and no small difference anywhere."""
    q_t, k_t = torch.randn(1, 2, 300, 32), torch.randn(1, 2, 300, 32)
    turn = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64))[0].float()
    sides = (q_t @ turn + 1e-4 * torch.randn_like(q_t), k_t @ turn, q_t, k_t)
    truth, got = truth_and_ours("gram", sides, {})
    for mine, exact in zip(got, truth, strict=True):
        assert plain.error(mine, exact) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@LOSS
def test_what_a_mask_leaves_out_is_not_used(loss: str, backend: str) -> None:
    function, own = LOSSES[loss]
    sides = inputs((2, 2, 2), (8, 8), (20, 20))
    masks = {"query_mask": torch.rand(2, 20) > 0.3, "key_mask": torch.rand(2, 20) > 0.3}
    poisoned = [x.clone() for x in sides]
    for x, name in zip(poisoned, ("query_mask", "key_mask") * 2, strict=True):
        x.masked_fill_(~masks[name][:, None, :, None], torch.nan)
    with use_backend(backend):
        clean, got = (gradients(lambda _, *x, **o: function(*x, **own, **o), loss, tuple(s), torch.float32, **masks)
                      for s in (sides, poisoned))  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(clean, got, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@LOSS
@pytest.mark.parametrize("case", ["no-query", "no-key", "first-key-masked-causal", "no-length", "no-keys-at-all", "no-batch"])
def test_nothing_to_compare(case: str, loss: str, backend: str) -> None:
    shape = {"no-length": (0, 0), "no-keys-at-all": (5, 0)}.get(case, (5, 5))
    sides = inputs((2, 2, 2), (4, 4), shape, batch=0 if case == "no-batch" else 2)
    options: dict[str, object] = {}
    if case == "no-query":
        options["query_mask"] = torch.zeros(2, 5, dtype=torch.bool)
    elif case == "no-key":
        options["key_mask"] = torch.zeros(2, 5, dtype=torch.bool)
    elif case == "first-key-masked-causal":
        options |= {"key_mask": torch.tensor([[False] * 4 + [True]] * 2), "causal": True}
    function, own = LOSSES[loss]
    with use_backend(backend):
        value, grad_q, grad_k = gradients(lambda _, *x, **o: function(*x, **own, **o), loss, sides, torch.float32, **options)
    if case == "first-key-masked-causal" and loss not in ("probs", "kl"):
        assert value > 0
        assert grad_q[:, :, :4].abs().max() == 0
    else:
        assert value.abs().sum() < 1e-12
        assert grad_q.abs().sum() < 1e-6
        assert grad_k.abs().sum() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@LOSS
def test_strides_are_free(loss: str, backend: str) -> None:
    function, own = LOSSES[loss]
    sides = inputs((4, 2, 4), (8, 8), (30, 30))
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in sides]
    strided[2] = torch.stack([sides[2], sides[2]], -1)[..., 0]
    with use_backend(backend):
        expected, got = (gradients(lambda _, *x, **o: function(*x, **own, **o), loss, tuple(s), torch.float32)
                         for s in (sides, strided))  # fmt: skip
    assert all(plain.error(a, b) < 1e-6 for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@LOSS
def test_backward_twice_with_another_gradient(loss: str, backend: str) -> None:
    function, own = LOSSES[loss]
    q_s, k_s, q_t, k_t = inputs((2, 2, 2), (8, 8), (20, 20))
    q_s.requires_grad_(), k_s.requires_grad_()
    with use_backend(backend):
        value = function(q_s, k_s, q_t, k_t, **own)
        first = torch.autograd.grad(value, (q_s, k_s), retain_graph=True)
        kept = [g.clone() for g in first]
        second = torch.autograd.grad(3 * value, (q_s, k_s))
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    assert all(torch.allclose(b, 3 * a) for a, b in zip(first, second, strict=True))


def test_relation_heads() -> None:
    """Different head counts meet in as many relation heads as both divide into, or as many as are asked for."""
    q_s, k_s, q_t, k_t = (torch.randn(2, h, 11, d) for h, d in ((6, 8), (3, 8), (4, 16), (4, 16)))
    cut = lambda x, heads: x.transpose(1, 2).reshape(2, 11, heads, -1).transpose(1, 2)  # noqa: E731
    for asked, heads in ((None, 2), (8, 8), (1, 1)):
        by_hand = attention_mse(cut(q_s, heads), cut(k_s.repeat_interleave(2, 1), heads), cut(q_t, heads), cut(k_t, heads))
        assert torch.allclose(attention_mse(q_s, k_s, q_t, k_t, relation_heads=asked), by_hand)
    q_s.requires_grad_()
    attention_kl(q_s, k_s, q_t, k_t).backward()
    assert q_s.grad is not None
    assert q_s.grad.shape == q_s.shape


@LOSS
def test_gradcheck(loss: str) -> None:
    function, own = LOSSES[loss]
    sides = [x.double() for x in inputs((4, 2, 1), (3, 4), (5, 6), batch=1)]
    mask = torch.tensor([[True, True, False, True, True]])
    for reduction in ("mean", "none"):
        torch.autograd.gradcheck(
            lambda q, k, r=reduction: function(q, k, *sides[2:], **own, query_mask=mask, causal=True, reduction=r),
            [x.requires_grad_() for x in sides[:2]],
        )


@pytest.mark.parametrize("backend", BACKENDS)
@LOSS
def test_opcheck(loss: str, backend: str) -> None:
    own = LOSSES[loss][1]
    kind = "kl" if loss == "kl" else own.get("on", "scores")
    mask = torch.rand(2, 9) > 0.2
    arguments = (*inputs((4, 2, 4), (8, 8), (9, 9)), mask, mask, torch.rand(2, 4), kind, 0.3, 0.3, True,
                 own.get("method", "auto"), backend)  # fmt: skip
    for need_grad in (True, False):
        torch.library.opcheck(torch.ops.kdfast.attention.default, (*arguments, need_grad, need_grad))


@pytest.mark.parametrize("loss", ["auto", "kl"])
def test_compiles_in_one_graph_and_under_functional_transforms(loss: str) -> None:
    function, own = LOSSES[loss]
    q_s, k_s, q_t, k_t = inputs((2, 2, 2), (8, 8), (20, 20))
    eager = torch.func.grad(lambda q: function(q, k_s, q_t, k_t, **own))(q_s)
    step = torch.compile(lambda q: function(q, k_s, q_t, k_t, **own) * 2, fullgraph=True, backend="aot_eager")
    q = q_s.clone().requires_grad_()
    step(q).backward()
    assert torch.allclose(q.grad, 2 * eager)


def test_modules_equal_their_functions() -> None:
    sides = inputs((2, 2, 2), (8, 8), (20, 20))
    assert torch.equal(AttentionMSELoss(on="probs", causal=True)(*sides), attention_mse(*sides, on="probs", causal=True))
    assert torch.equal(AttentionKLLoss(reduction="sum")(*sides), attention_kl(*sides, reduction="sum"))


GOOD = dict(zip(("q_s", "k_s", "q_t", "k_t"), inputs((4, 2, 4), (8, 8), (5, 6)), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_s": torch.randn(2, 4, 5)}, r"q_s: expected shape \[B, H, L, D\] .* got \[2, 4, 5\]"),
        ({"q_s": torch.ones(2, 4, 5, 8, dtype=torch.int64)}, "q_s: expected dtype"),
        ({"k_s": torch.randn(2, 3, 6, 8)}, "k_s: expected a number of heads that divides q_s's 4, got 3"),
        ({"k_s": torch.randn(2, 2, 6, 7)}, r"k_s: expected batch and head size \[2, 8\] like q_s, got \[2, 7\]"),
        ({"k_t": torch.randn(2, 4, 6, 8).half()}, "k_t: expected dtype torch.float32 like q_t"),
        ({"q_t": torch.randn(2, 4, 4, 8)}, r"q_t: expected batch and length \[2, 5\] like q_s, got \[2, 4\]"),
        ({"query_mask": torch.ones(2, 6, dtype=torch.bool)}, r"query_mask: expected shape \[2, 5\], got \[2, 6\]"),
        ({"key_mask": torch.ones(2, 6)}, "key_mask: expected dtype torch.bool"),
        ({"scale_s": 0.0}, "scale_s: expected a finite number above 0"),
        ({"on": "logits"}, "on: expected one of scores, probs"),
        ({"on": "probs", "method": "gram"}, "method: expected auto or tiled because on is 'probs'"),
        ({"method": "flash"}, "method: expected one of"),
        ({"normalize": "mean"}, "normalize: expected one of valid, all"),
        ({"reduction": "max"}, "reduction: expected one of mean, sum, none"),
        ({"relation_heads": 5}, "relation_heads: expected a divisor of q_s's width 32"),
        ({"k_t": GOOD["k_t"].index_fill(2, torch.tensor([3]), torch.inf)}, r"k_t: \[0, 0, 3\] holds NaN or infinity"),
        ({"q_s": GOOD["q_s"] * 1e30}, "overflow float32"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_mse(**(GOOD | change))
