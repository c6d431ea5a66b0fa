"""The cluster kernel on the device against plain PyTorch in float64. Needs a CUDA device of sm_90 or sm_100.

Unproven, so that it may hang or spoil the device for what comes after: `-m unproven`, last, in a process that can be killed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import plain
import pytest
import torch
from test_gpu import DEVICE, DTYPES, batch, check, check_options, eager
from torch import Tensor

import kdfast
from kdfast.options import PARTS, RowOptions

PAIRS = {name: (dtype, dtype) for name, dtype in DTYPES.items()} | {
    "fp32+bf16": (torch.float32, torch.bfloat16), "fp32+fp16": (torch.float32, torch.float16),
}  # fmt: skip
OPTIONS = {"temperature": 2.0, "soft_weight": 0.7, "hard_weight": 0.3}


pytestmark = [
    pytest.mark.unproven,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.fixture(autouse=True)
def backend() -> Iterator[None]:
    reason = next(row.reason for row in kdfast.backends() if row.name == "cuda")
    if reason:
        pytest.skip(reason)
    with kdfast.use_backend("cuda"):
        yield


def assert_not_triton(student: Tensor, teacher: Tensor) -> None:
    from kdfast.backends.cuda import logits

    assert logits.refusal(student, [teacher], RowOptions(), torch.empty_like(student)) is None


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(
    ("vs", "vt"),
    [(1, 1), (2, 2), (17, 17), (1000, 1000), (4096, 4096), (20480, 20480), (32000, 32000), (50257, 50257), (128256, 128256),
     (151936, 151936), (5008, 4000), (4000, 5008)],
    ids=["V1", "V2", "V17", "V1000-1-block", "V4096-one-chunk", "V20480-1-block", "V32000-2-blocks", "V50257-odd-4-blocks",
         "V128256-8-blocks", "V151936-8-blocks", "student-larger", "teacher-larger"],
)  # fmt: skip
def test_value_and_gradient(vs: int, vt: int, pair: str) -> None:
    student, teacher, labels = batch(9, vs, vt)
    student, teacher = student.to(PAIRS[pair][0]), teacher.to(PAIRS[pair][1])
    assert_not_triton(student, teacher)
    check(student, teacher, labels)


@pytest.mark.parametrize("vocab", [262144, 400000], ids=["16-blocks-fp32", "8-whole-blocks-bf16"])
def test_rows_that_want_whole_multiprocessors(vocab: int) -> None:
    student, teacher, labels = batch(5, vocab, vocab, dtype=torch.float32 if vocab == 262144 else torch.bfloat16)
    assert_not_triton(student, teacher)
    check(student, teacher, labels)


@pytest.mark.parametrize("case", ["soft T=1", "soft T=2", "hard T=1", "hard T=2", "hard T=3", "z-loss"])
@pytest.mark.parametrize("vocab", [5003, 32000], ids=["V5003-odd", "V32000"])
def test_every_way_to_the_softmax_at_1(vocab: int, case: str) -> None:
    """More rows than clusters, many of them ignored, in a run and scattered; gradients formed in forward and in backward."""
    student, teacher, labels = batch(700, vocab, vocab, dtype=torch.bfloat16)
    labels[torch.rand(700, device=DEVICE) < 0.3] = -100
    labels[200:500] = -100
    temperature = float(case[-1]) if "T=" in case else 2.0
    soft, hard, z = 0.7, 0.3 if "hard" in case else 0.0, 1e-3 if case == "z-loss" else 0.0
    weight = torch.rand(700, device=DEVICE)

    def plain_rows(x: Tensor) -> Tensor:
        wide = x.float() if x.dtype == torch.bfloat16 else x
        rows = plain.kd_rows(wide, [teacher.to(wide.dtype)], labels, temperature=temperature, soft=soft, hard=hard, z_loss=z)
        return torch.where(labels != -100, rows, 0)

    def ours(x: Tensor, reduction: str) -> Tensor:
        return kdfast.kd_loss(
            x, teacher, labels, temperature=temperature, soft_weight=soft, hard_weight=hard, z_loss=z, reduction=reduction
        )

    pairs: list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = [
        (lambda x: plain_rows(x).sum(), lambda x: ours(x, "sum")),
        (lambda x: (plain_rows(x) * weight).sum(), lambda x: (ours(x, "none") * weight).sum()),
    ]
    for eagerly, fused in pairs:
        truth, same, got = (
            plain.gradient(f, student, d)
            for f, d in ((eagerly, torch.float64), (eagerly, torch.bfloat16), (fused, torch.bfloat16))
        )
        plain.assert_as_good(got[0], same[0], truth[0], torch.float32, "value")
        plain.assert_as_good(got[1], same[1], truth[1], torch.bfloat16, "gradient")
        assert float(got[1][200:500].abs().max()) == 0


def test_every_row_ignored_and_no_row() -> None:
    student, teacher, labels = batch(300, 4099, 4099)
    student.requires_grad_()
    loss = kdfast.kd_loss(student, teacher, torch.full_like(labels, -100), reduction="sum", **OPTIONS)
    assert float(loss) == 0
    assert float(torch.autograd.grad(loss, student)[0].abs().max()) == 0
    assert kdfast.kd_loss(student[:0], teacher[:0], labels[:0], reduction="none").shape == (0,)


@pytest.mark.parametrize("start", [1, 5, 8], ids=["1-in", "5-in", "8-in"])
def test_rows_that_start_between_boundaries(start: int) -> None:
    student, teacher, labels = batch(40, 4104, 4104, dtype=torch.bfloat16)
    labels = labels.clamp(max=4000)
    inside = slice(start, start + 4001)
    ours = student.clone().requires_grad_()
    (got,) = torch.autograd.grad(kdfast.kd_loss(ours[:, inside], teacher[:, inside], labels, **OPTIONS), ours)
    _, truth = plain.gradient(eager(teacher[:, inside], labels), student[:, inside], torch.float64)
    assert plain.error(got[:, inside], truth) <= 2 * plain.EPS[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocab", [50257, 128256], ids=["V50257-odd", "V128256"])
def test_overwrite(vocab: int, dtype: torch.dtype) -> None:
    check(*batch(200, vocab, vocab, dtype=dtype), overwrite_logits=True)


def test_overwrite_refuses_float16() -> None:
    student, teacher, labels = batch(5, 4099, 4099, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"overwrite_logits: expected .* a dtype other than float16"):
        kdfast.kd_loss(student.requires_grad_(), teacher, labels, overwrite_logits=True, **OPTIONS)


@pytest.mark.parametrize("spread", [30.0, 640.0])
def test_saturated_rows(spread: float) -> None:
    student, teacher, labels = batch(9, 4001, 4001)
    check(student.sign() * spread, teacher.sign() * spread, labels)


@pytest.mark.parametrize("distance", [0.3, 0.1, 0.01, 0.001])
def test_near_agreement(distance: float) -> None:
    _, teacher, _ = batch(16, 32000, 32000)
    student = teacher + distance * torch.randn_like(teacher)
    truth = plain.kd_rows(student.double(), [teacher.double()]).mean()
    rows = kdfast.kd_loss(student, teacher, reduction="none")
    assert (rows >= 0).all()
    assert abs(float(rows.mean()) / float(truth) - 1) <= 1e-3


def test_bad_rows_are_nan_and_the_others_untouched() -> None:
    student, teacher, labels = batch(300, 33000, 33000)
    good = kdfast.kd_loss(student, teacher, labels, reduction="none", **OPTIONS)
    student[0, 3], teacher[1, 5], labels[2] = torch.nan, torch.inf, 33000
    got = kdfast.kd_loss(student, teacher, labels, reduction="none", **OPTIONS)
    assert got[:3].isnan().all()
    torch.testing.assert_close(got[3:], good[3:], rtol=0, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("vs", "vt"), [(1001, 1001), (33008, 33000)], ids=["V1001", "student-larger"])
def test_parts_match_triton(vs: int, vt: int, temperature: float) -> None:
    student, teacher, labels = batch(300, vs, vt)
    labels = labels.clamp(max=vt - 1)
    options: dict[str, Any] = OPTIONS | {"temperature": temperature, "z_loss": 1e-3}
    _, ours = kdfast.kd_loss(student, teacher, labels, return_parts=True, **options)
    with kdfast.use_backend("triton"):
        _, theirs = kdfast.kd_loss(student, teacher, labels, return_parts=True, **options)
    for name in PARTS:
        torch.testing.assert_close(getattr(ours, name).mean, getattr(theirs, name).mean, rtol=1e-5, atol=1e-6, msg=name)


def test_the_same_bits_twice_also_from_a_graph() -> None:
    student, teacher, labels = batch(500, 50257, 50257, dtype=torch.bfloat16)
    first = kdfast.kd_loss(student, teacher, labels, reduction="none", **OPTIONS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kdfast.kd_loss(student, teacher, labels, reduction="none", **OPTIONS)
    for _ in range(3):
        graph.replay()
        torch.testing.assert_close(captured, first, rtol=0, atol=0)


def test_no_host_synchronisation() -> None:
    student, teacher, labels = batch(64, 4099, 4099)
    student.requires_grad_()
    torch.autograd.grad(kdfast.kd_loss(student, teacher, labels, **OPTIONS) * 2, student)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(kdfast.kd_loss(student, teacher, labels, **OPTIONS) * 2, student)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_inputs_without_a_kernel_go_to_triton() -> None:
    student, teacher, labels = batch(5, 1003, 1003)
    check_options(student, [teacher], labels, {"divergence": "jsd"}, {"name": "jsd"})
    check(*batch(5, 5003, 4000, dtype=torch.bfloat16))
