"""TF32 on a GPU, as the user told torch: read without tripping over how they said it, off where terms cancel."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from kdfast import grams
from kdfast.backends.triton.precision import exact_products, setting


def tf32_allowed() -> bool:
    return getattr(torch.backends.cuda.matmul, setting()[0]) in ("tf32", True)


#: The ways to tell torch, the older ones first: the newer flag, once used, has the older one raise.
WAYS = """
import torch
from kdfast.backends.triton.precision import exact_products, setting, tf32_products

m = torch.backends.cuda.matmul

def tf32_allowed():
    return getattr(m, setting()[0]) in ("tf32", True)

def check(allowed):
    assert tf32_allowed() is allowed
    with exact_products():
        assert not tf32_allowed()
        with exact_products():
            assert not tf32_allowed()
        assert not tf32_allowed()
        with tf32_products():
            assert tf32_allowed()
        assert not tf32_allowed()
    assert tf32_allowed() is allowed

check(False)
for m.allow_tf32 in (True, False):
    check(m.allow_tf32)
for precision in ("high", "highest"):
    torch.set_float32_matmul_precision(precision)
    check(precision == "high")
    assert torch.get_float32_matmul_precision() == precision
if hasattr(m, "fp32_precision"):
    for m.fp32_precision in ("tf32", "ieee"):
        check(m.fp32_precision == "tf32")
    m.fp32_precision = "none"
    torch.backends.fp32_precision = "tf32"
    check(True)
"""


def test_every_way_to_allow_tf32_is_read_and_put_back() -> None:
    """In a process of its own: what was told stays."""
    done = subprocess.run([sys.executable, "-c", WAYS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_it_is_put_back_after_an_error() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(ZeroDivisionError), exact_products():
            raise ZeroDivisionError
        assert tf32_allowed()
    finally:
        torch.set_float32_matmul_precision(before)


def test_causal_gram_products_of_attention_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from kdfast.backends.triton import attention
    from kdfast.options import AttentionOptions

    seen, form = [], grams.score_mse
    monkeypatch.setattr(grams, "score_mse", lambda *args: seen.append(tf32_allowed()) or form(*args))
    x = torch.randn(1, 1, 4, 8)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        options = AttentionOptions(kind="scores", method="gram", causal=True, scale_s=1.0, scale_t=1.0)
        attention.forward(x, x, x, x, None, None, torch.ones(1, 1), options, True)
        assert seen == [False]
        assert tf32_allowed()
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("dtype", "rounded"), [(torch.float16, True), (torch.bfloat16, True), (torch.float32, False)], ids=["fp16", "bf16", "fp32"]
)
def test_gradients_beside_halves_may_run_in_tf32(dtype: torch.dtype, rounded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 heads stay as the user told torch; halves are held exactly, whatever the product is made of."""
    pytest.importorskip("triton")
    from kdfast.backends.triton import linear

    seen, add, multiply = [], torch.Tensor.addmm_, torch.mm
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda *args: seen.append(tf32_allowed()) or add(*args))
    monkeypatch.setattr(torch, "mm", lambda *args, **kw: seen.append(tf32_allowed()) or multiply(*args, **kw))
    monkeypatch.setattr(linear, "_leaves_in_float32", lambda *_: False)
    gemms, grad, hidden, weight = linear._Gemms(), torch.randn(4, 6), torch.randn(4, 3).to(dtype), torch.randn(6, 3).to(dtype)
    gemms.logits(hidden, weight, None, torch.empty(4, 6))
    gemms.grad_hidden(grad, weight, torch.empty(4, 3))
    total = torch.zeros(6, 3)
    gemms.grad_weight(grad, hidden, total, accumulate=False)
    gemms.grad_weight(grad, hidden, total, accumulate=True)
    assert len(seen) == 4
    assert set(seen) == {rounded}
    assert not tf32_allowed()
    torch.testing.assert_close(total, 2 * grad.t() @ hidden.float())


def test_a_float32_side_is_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from kdfast.backends.triton import linear

    seen, multiply = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **kw: seen.append(tf32_allowed()) or multiply(*args, **kw))
    linear.mm(torch.randn(4, 6), torch.randn(6, 3).half(), torch.empty(4, 3))
    assert seen == [False]
