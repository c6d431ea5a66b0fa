"""linear_logit_mse: the value and gradients of plain logit matching at every distance, without its memory."""

from __future__ import annotations

import concurrent.futures
import gc
import os
import subprocess
import sys
import threading

import plain
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import head_grams, linear_logit_mse, use_backend
from kdfast.logit_grams import gram_is_cheaper

BACKENDS = ["cpp", "reference"]
METHODS = ["gram", "logits"]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])

Sides = tuple[Tensor, Tensor, Tensor, Tensor]


def make(n: int, vocab: int, student_dim: int, teacher_dim: int, dtype: torch.dtype = torch.float32) -> Sides:
    """Hidden and head of the student, then of the teacher; their columns have means, as those of trained heads do."""

    def side(dim: int) -> tuple[Tensor, Tensor]:
        return (torch.randn(n, dim) + 0.3).to(dtype), (torch.randn(vocab, dim) / dim**0.5 + 0.1).to(dtype)

    return *side(student_dim), *side(teacher_dim)


def eager(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor, mask: Tensor | None, center: bool) -> Tensor:
    vocab = min(w_s.shape[0], w_t.shape[0])
    z_s, z_t = F.linear(h_s, w_s[:vocab]), F.linear(h_t, w_t[:vocab])
    if center:
        z_s, z_t = z_s - z_s.mean(-1, keepdim=True), z_t - z_t.mean(-1, keepdim=True)
    return F.mse_loss(z_s, z_t) if mask is None else F.mse_loss(z_s[mask], z_t[mask])


def gradients(loss, sides: Sides, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(value, gradient of the student's hidden, of its head) in float64 of a loss evaluated in `dtype`."""
    h_s, w_s, h_t, w_t = (x.to(dtype) for x in sides)
    leaves = [x.detach().requires_grad_() for x in (h_s, w_s)]
    value = loss(*leaves, h_t, w_t)
    return value.detach().double(), *(g.double() for g in torch.autograd.grad(value, leaves))


@pytest.mark.parametrize("backend", BACKENDS)
@DTYPES
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("center", [False, True], ids=["plain", "centred"])
@pytest.mark.parametrize(
    ("vs", "vt", "ds", "dt"), [(1, 1, 1, 1), (37, 37, 8, 8), (37, 37, 6, 11), (4500, 4499, 9, 7), (600, 600, 257, 257)],
    ids=["one", "equal", "unequal", "several-chunks", "split-gram"],
)  # fmt: skip
def test_value_and_gradients(
    vs: int, vt: int, ds: int, dt: int, center: bool, method: str, dtype: torch.dtype, backend: str
) -> None:
    h_s, w_s, _, _ = make(9, vs, ds, dt, dtype)
    _, _, h_t, w_t = make(9, vt, ds, dt, dtype)
    mask = torch.tensor([True] * 7 + [False] * 2)

    def theirs(*x: Tensor) -> Tensor:
        return eager(*x, mask, center)

    def ours(*x: Tensor) -> Tensor:
        return linear_logit_mse(*x, mask=mask, center=center, method=method)

    sides = h_s, w_s, h_t, w_t
    truth = gradients(theirs, sides, torch.float64)
    if center and vs == 1:  # a single logit centred is 0
        assert float(truth[0]) == 0
    expected = gradients(theirs, sides, dtype)
    with use_backend(backend):
        got = gradients(ours, sides, dtype)
    for name, mine, other, exact in zip(("value", "hidden", "head"), got, expected, truth, strict=True):
        plain.assert_as_good(mine, other, exact, dtype, name)


def pair_at(distance: float, kind: str, n: int = 200, vocab: int = 1500) -> Sides:
    """Student and teacher whose logits are `distance` apart: the same, of another size, or in a rotated basis."""
    teacher_dim, student_dim = 48, 32 if kind == "unequal" else 48
    h, w = torch.randn(n, student_dim) + 0.3, torch.randn(vocab, student_dim) / student_dim**0.5 + 0.1
    h_t, w_t = h, w
    if kind != "equal":
        turn = torch.linalg.qr(torch.randn(teacher_dim, student_dim, dtype=torch.float64)).Q
        h_t, w_t = (h.double() @ turn.T).float(), (w.double() @ turn.T).float()
    return h + distance * torch.randn_like(h), w + distance * torch.randn_like(w) / student_dim**0.5, h_t, w_t


@pytest.mark.parametrize("center", [False, True], ids=["plain", "centred"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["equal", "unequal", "rotated"])
@pytest.mark.parametrize("distance", [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
def test_accuracy_near_agreement(distance: float, kind: str, method: str, center: bool) -> None:
    sides = pair_at(distance, kind)
    truth = gradients(lambda *x: eager(*x, None, center), sides, torch.float64)
    got = gradients(lambda *x: linear_logit_mse(*x, method=method, center=center), sides, torch.float32)
    for name, mine, exact in zip(("value", "hidden", "head"), got, truth, strict=True):
        assert plain.error(mine, exact) <= 1e-4, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_agreement_is_zero(method: str, backend: str) -> None:
    h, w, _, _ = make(9, 50, 8, 8)
    with use_backend(backend):
        value, hidden, head = gradients(
            lambda *x: linear_logit_mse(*x, method=method), (h, w, h.clone(), w.clone()), torch.float32
        )
    assert float(value) == float(hidden.abs().max()) == float(head.abs().max()) == 0


@pytest.mark.parametrize("center", [False, True], ids=["plain", "centred"])
def test_one_head_on_both_sides(center: bool) -> None:
    """The same tensor on both sides is recognised; the student's use of it still gets its gradient."""
    h_s, w, h_t, _ = make(9, 50, 8, 8)
    w.requires_grad_()

    def run(teacher: Tensor) -> tuple[Tensor, Tensor]:
        loss = linear_logit_mse(h_s, w, h_t, teacher, center=center, method="gram")
        return loss, torch.autograd.grad(loss, w)[0]

    (one, one_grad), (two, two_grad) = run(w), run(w.detach().clone())
    assert torch.allclose(one, two, rtol=1e-5)
    assert torch.allclose(one_grad, two_grad, rtol=1e-4, atol=1e-7)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the heads whose Gram is formed from now on."""
    formed: list[tuple[int, ...]] = []
    original = head_grams.gram
    monkeypatch.setattr(
        head_grams, "gram", lambda weight, mean, dtype: formed.append(tuple(weight.shape)) or original(weight, mean, dtype)
    )
    return formed


def test_the_teachers_gram_is_kept_until_it_changes_or_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    h_s, w_s, h_t, w_t = make(9, 50, 6, 8)
    formed = counted(monkeypatch)

    def teacher_grams() -> int:
        formed.clear()
        value = linear_logit_mse(h_s, w_s, h_t, w_t, method="gram")
        assert torch.allclose(value, eager(h_s, w_s, h_t, w_t, None, False), rtol=1e-5)
        return formed.count((50, 8))

    assert [teacher_grams() for _ in range(3)] == [1, 0, 0]
    linear_logit_mse(h_s, w_s, h_t, w_t, center=True, method="gram")
    assert teacher_grams() == 0  # the centred one is kept beside it
    with torch.no_grad():
        w_t[3] += 1
    assert [teacher_grams(), teacher_grams()] == [1, 0]
    with torch.inference_mode():
        w_t = w_t.clone()
    assert [teacher_grams(), teacher_grams()] == [1, 1]  # no version counter to trust
    held = len(head_grams._heads)
    doomed = torch.randn(50, 8)
    linear_logit_mse(h_s, w_s, h_t, doomed, method="gram")
    assert len(head_grams._heads) == held + 1
    del doomed
    gc.collect()
    teacher_grams()
    assert len(head_grams._heads) <= held


def test_few_heads_are_kept() -> None:
    h_s, w_s, h_t, _ = make(9, 50, 6, 8)
    alive = [torch.randn(50, 8) for _ in range(12)]
    for teacher in alive:
        linear_logit_mse(h_s, w_s, h_t, teacher, method="gram")
        assert len(head_grams._heads) <= 8
    assert len(head_grams._heads) == 8


def test_threads_keep_heads_at_once() -> None:
    """Heads live and die in several threads (autograd has one for each device); none may see another's changes half done."""
    h_s, w_s, h_t, w_t = make(9, 50, 6, 8)
    expected = linear_logit_mse(h_s, w_s, h_t, w_t, method="gram")
    start, before = threading.Barrier(8), sys.getswitchinterval()

    def work() -> None:
        start.wait()
        for _ in range(150):
            assert torch.equal(linear_logit_mse(h_s, w_s, h_t, w_t.clone(), method="gram"), expected)
            assert torch.equal(linear_logit_mse(h_s, w_s, h_t, w_t, method="gram"), expected)

    sys.setswitchinterval(1e-6)
    try:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(work) for _ in range(8)]:
                done.result()
    finally:
        sys.setswitchinterval(before)
    assert len(head_grams._heads) <= 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_do_not_count_may_hold_anything(backend: str) -> None:
    h_s, w_s, h_t, w_t = make(6, 50, 8, 6)
    mask = torch.tensor([True, False] * 3)
    h_s[1], h_t[3] = torch.nan, torch.inf
    for x in (h_s, w_s):
        x.requires_grad_()
    for method in METHODS:
        with use_backend(backend):
            hidden, head = torch.autograd.grad(linear_logit_mse(h_s, w_s, h_t, w_t, mask=mask, method=method), (h_s, w_s))
        assert (hidden[~mask] == 0).all()
        assert hidden.isfinite().all()
        assert head.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("lead", "mask"), [((0,), None), ((2, 0), None), ((3,), torch.zeros(3, dtype=torch.bool))], ids=["none", "2d", "masked"]
)
def test_no_rows(lead: tuple[int, ...], mask: Tensor | None, backend: str) -> None:
    w = torch.randn(20, 8, requires_grad=True)
    with use_backend(backend):
        loss = linear_logit_mse(torch.randn(*lead, 8), w, torch.randn(*lead, 6), torch.randn(20, 6), mask=mask)
    loss.backward()
    assert float(loss.detach()) == 0
    assert (w.grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_and_leading_dimensions(backend: str) -> None:
    h_s, w_s, h_t, w_t = make(12, 50, 8, 6)
    strided = torch.randn(3, 4, 16)[..., ::2].copy_(h_s.view(3, 4, 8)), w_s.t().contiguous().t()
    with use_backend(backend):
        expected = linear_logit_mse(h_s, w_s, h_t, w_t, method="gram")
        got = linear_logit_mse(strided[0], strided[1], h_t.view(3, 4, 6), w_t.t().contiguous().t(), method="gram")
    assert torch.allclose(got, expected, rtol=1e-5)


def test_backward_twice_with_another_incoming_gradient() -> None:
    h_s, w_s, h_t, w_t = make(9, 50, 8, 6)
    w_s.requires_grad_()
    loss = linear_logit_mse(h_s, w_s, h_t, w_t)
    (first,) = torch.autograd.grad(loss, w_s, torch.tensor(3.0), retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, w_s, torch.tensor(0.5))
    assert torch.equal(first, kept)
    assert torch.allclose(first, 6 * second)


@pytest.mark.parametrize("frozen", ["hidden", "head"])
@pytest.mark.parametrize("method", METHODS)
def test_frozen_side_gets_no_gradient(method: str, frozen: str) -> None:
    h_s, w_s, h_t, w_t = make(9, 50, 8, 6)
    h_s.requires_grad_(frozen != "hidden"), w_s.requires_grad_(frozen != "head")
    linear_logit_mse(h_s, w_s, h_t, w_t, method=method).backward()
    assert (h_s.grad is None) == (frozen == "hidden")
    assert (w_s.grad is None) == (frozen == "head")


def test_auto_takes_the_cheaper_form() -> None:
    assert gram_is_cheaper(4096, 32000, 512, 512)
    assert not gram_is_cheaper(64, 32000, 512, 512)


def test_compile_func_and_opcheck() -> None:
    h_s, w_s, h_t, w_t = make(9, 50, 8, 6)

    def loss(x: Tensor) -> Tensor:
        return linear_logit_mse(h_s, x, h_t, w_t, center=True) * 1.5

    _, expected = plain.gradient(loss, w_s, torch.float32)
    _, compiled = plain.gradient(torch.compile(loss, fullgraph=True, backend="aot_eager"), w_s, torch.float32)
    assert torch.allclose(compiled, expected, rtol=1e-5, atol=1e-8)
    assert torch.allclose(torch.func.grad(loss)(w_s).double(), expected, rtol=1e-5, atol=1e-8)
    mask = torch.ones(9, dtype=torch.bool)
    for backend in BACKENDS:
        for dtype in (torch.float32, torch.bfloat16):
            inputs = [x.to(dtype) for x in (h_s, w_s, h_t, w_t)]
            op = torch.ops.kdfast.linear_logit_mse.default
            torch.library.opcheck(op, (*inputs, mask, True, "gram", backend, True, True))
            torch.library.opcheck(op, (*inputs, None, False, "logits", backend, False, True))


MEMORY_SCRIPT = """
import torch
from kdfast import linear_logit_mse
h, w, t, v = (torch.randn(*s) for s in ((8192, 16), (20000, 16), (8192, 24), (20000, 24)))
h.requires_grad_(), w.requires_grad_()
linear_logit_mse(h[:8], w, t[:8], v, method="%s").backward()

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
before = peak()
linear_logit_mse(h, w, t, v, method="%s").backward()
print((peak() - before) / 1024)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to reset the peak of memory")
@pytest.mark.parametrize(("method", "limit"), [("gram", 32), ("logits", 96)])
def test_logits_are_never_held(method: str, limit: int) -> None:
    """N x V float32 is 625 MiB here."""
    done = subprocess.run([sys.executable, "-c", MEMORY_SCRIPT % (method, method)], capture_output=True, check=True)
    assert float(done.stdout) < limit


GOOD = make(4, 20, 8, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_hidden": torch.randn(4, 9)}, r"student_hidden: expected shape \[..., 8\] to match student_weight \[20, 8\]"),
        ({"teacher_hidden": torch.randn(5, 6)}, r"teacher_hidden: expected leading dimensions \[4\] .* got \[5\]"),
        ({"teacher_weight": torch.randn(6)}, r"teacher_weight: expected shape \[V, D\]"),
        ({"mask": torch.ones(4)}, r"mask: expected dtype bool \(True = counts\), got torch.float32"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, r"mask: expected shape \[4\]"),
        ({"method": "fast"}, "method: expected one of auto, gram, logits, got 'fast'"),
        ({"student_weight": torch.full((20, 8), torch.nan)}, "student_weight: expected finite numbers"),
        ({"teacher_hidden": torch.full((4, 6), torch.inf)}, "teacher_hidden: expected finite numbers"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input(change: dict[str, object], message: str, backend: str) -> None:
    names = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
    with use_backend(backend), pytest.raises(ValueError, match=message):
        linear_logit_mse(**(dict(zip(names, GOOD, strict=True)) | change))
