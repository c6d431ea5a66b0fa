"""Every op on the device, in every backend that runs there, against plain PyTorch in float64. Needs a CUDA device.

`test_gpu_smoke.py` comes first and says in which order all of them run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import plain
import pytest
import torch
import torch.nn.functional as F
from test_divergences import CASES, ROW_OPTIONS
from test_gpu_smoke import losses
from topk_plain import COMBINATIONS, topk_rows
from torch import Tensor

import kdfast
from kdfast.options import DIVERGENCES

DEVICE = "cuda"
BACKENDS = ["triton", "reference"]
OPTIONS = {"temperature": 2.0, "soft_weight": 0.7, "hard_weight": 0.3}
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = {"fp32": torch.float32, **HALVES}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.worth(4),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def batch(n: int, vs: int, vt: int, spread: float = 3.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = (torch.randn(n, v, device=DEVICE).mul(spread).to(dtype) for v in (vs, vt))
    labels = torch.randint(0, vs, (n,), device=DEVICE)
    labels[n // 2] = -100
    return student, teacher, labels


def eager(teacher: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    def loss(x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in HALVES.values() else x
        return plain.mean(plain.rows(wide, teacher.to(wide.dtype), labels, temperature=2.0, soft=0.7, hard=0.3), labels)

    return loss


def check(student: Tensor, teacher: Tensor, labels: Tensor, **options: bool) -> None:
    """kd_loss at least as near to float64 as plain PyTorch with float32 arithmetic, value and gradient."""
    dtype = student.dtype
    truth = plain.gradient(eager(teacher, labels), student, torch.float64)
    same = plain.gradient(eager(teacher, labels), student, dtype)
    got = plain.gradient(lambda x: kdfast.kd_loss(x.mul(1), teacher, labels, **OPTIONS, **options), student, dtype)
    plain.assert_as_good(got[0], same[0], truth[0], torch.float32, "value")
    plain.assert_as_good(got[1], same[1], truth[1], dtype, "gradient")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with kdfast.use_backend(request.param):
        yield request.param


@pytest.mark.worth(2)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ("vs", "vt"),
    [(1, 1), (2, 2), (17, 17), (1000, 1000), (50257, 50257), (151936, 151936), (5003, 4000), (4000, 5003)],
    ids=["V1", "V2", "V17-one-ragged-block", "V1000", "V50257-odd", "V151936-many-blocks", "student-larger", "teacher-larger"],
)
@pytest.mark.usefixtures("backend")
def test_logits_value_and_gradient(vs: int, vt: int, dtype: torch.dtype) -> None:
    check(*batch(9, vs, vt, dtype=dtype))


def check_options(
    student: Tensor, teachers: list[Tensor], labels: Tensor | None, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    """kd_loss against its definition, in both gradient modes: a mean (in forward) and weighted rows (in backward)."""
    hard = 0.0 if labels is None else 0.3
    weight = torch.linspace(0.5, 2, student.shape[0], device=DEVICE)

    def plain_rows(x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in HALVES.values() else x
        given = [t.to(wide.dtype) for t in teachers]
        return plain.kd_rows(wide, given, labels, temperature=2.0, soft=0.7, hard=hard, **theirs)

    def weighted(rows: Tensor) -> Tensor:
        return ((rows if labels is None else torch.where(labels != -100, rows, 0)) * weight).sum()

    def fused(x: Tensor, reduction: str) -> Tensor:
        given = teachers[0] if len(teachers) == 1 else teachers
        weights = {"soft_weight": 0.7, "hard_weight": hard}
        return kdfast.kd_loss(x, given, labels, temperature=2.0, reduction=reduction, **weights, **ours)

    pairs = [
        (lambda x: plain.mean(plain_rows(x), labels), lambda x: fused(x, "mean")),
        (lambda x: weighted(plain_rows(x)), lambda x: (fused(x, "none") * weight).sum()),
    ]
    for eagerly, kernel in pairs:
        truth = plain.gradient(eagerly, student, torch.float64)
        same, got = plain.gradient(eagerly, student, student.dtype), plain.gradient(kernel, student, student.dtype)
        plain.assert_as_good(got[0], same[0], truth[0], torch.float32, "value")
        plain.assert_as_good(got[1], same[1], truth[1], student.dtype, "gradient")


@pytest.mark.worth(3)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ("vs", "vt"), [(1000, 1000), (50257, 50257), (151936, 151936), (5003, 4000)],
    ids=["V1000", "V50257-odd", "V151936-many-blocks", "student-larger"],
)  # fmt: skip
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("backend")
def test_logits_divergences(case: str, vs: int, vt: int, dtype: torch.dtype) -> None:
    student, teacher, labels = batch(5, vs, vt, dtype=dtype)
    check_options(student, [teacher], labels, *CASES[case])


@pytest.mark.worth(3)
@pytest.mark.parametrize("option", ROW_OPTIONS)
@pytest.mark.parametrize("case", ["forward", "jsd", "reverse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("vs", "vt"), [(1003, 1003), (32000, 30000)], ids=["V1003", "student-larger"])
@pytest.mark.usefixtures("backend")
def test_logits_row_options(vs: int, vt: int, dtype: torch.dtype, case: str, option: str) -> None:
    student, teacher, labels = batch(5, vs, vt, dtype=dtype)
    both = [a | b for a, b in zip(CASES[case], ROW_OPTIONS[option], strict=True)]
    check_options(student, [teacher], labels, *both)
    if option == "z-loss":
        check_options(student, [teacher], None, *both)


@pytest.mark.worth(3)
@pytest.mark.parametrize("mix", ["probs", "logits"])
@pytest.mark.parametrize("case", ["forward", "tvd", "skew-reverse"])
@pytest.mark.parametrize("vocab", [403, 32016], ids=["V403", "V32016-aligned"])
@pytest.mark.usefixtures("backend")
def test_logits_several_teachers(vocab: int, case: str, mix: str) -> None:
    student, _, labels = batch(5, vocab, 1)
    teachers = [torch.randn(5, vocab + 16 * i, device=DEVICE).mul(3).to(d) for i, d in enumerate(DTYPES.values())]
    ours, theirs = CASES[case]
    weights = [1.0, 2.0, 0.5]
    mixed = {"teacher_weights": weights, "teacher_mix": mix}
    check_options(student, teachers, labels, ours | mixed, theirs | {"weights": weights, "mix": mix})


@pytest.mark.parametrize("distance", [0.1, 0.001])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("backend")
def test_logits_divergences_near_agreement(case: str, distance: float) -> None:
    _, teacher, _ = batch(16, 32000, 32000)
    student = teacher + distance * torch.randn_like(teacher)
    ours, theirs = CASES[case]
    truth = plain.kd_rows(student.double(), [teacher.double()], **theirs).mean()
    rows = kdfast.kd_loss(student, teacher, reduction="none", **ours)
    assert (rows >= 0).all()
    assert abs(float(rows.mean()) / float(truth) - 1) <= 1e-3


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("spread", [30.0, 640.0])
@pytest.mark.usefixtures("backend")
def test_logits_divergences_saturated_and_excluded(spread: float, divergence: str) -> None:
    student, teacher, labels = batch(8, 4001, 4001)
    student, teacher = student.sign() * spread, teacher.sign() * spread
    student[:, ::3] = teacher[:, ::3] = -torch.inf
    labels = torch.where(labels == -100, labels, labels // 3 * 3 + 1).clamp(max=4000)
    kw = {"ab_alpha": 0.5, "ab_beta": 0.5} if divergence == "alpha_beta" else {}
    student.requires_grad_()
    loss = kdfast.kd_loss(student, teacher, labels, divergence=divergence, hard_weight=0.5, **kw)
    (grad,) = torch.autograd.grad(loss, student)
    assert loss.isfinite()
    assert grad.isfinite().all()


@pytest.mark.parametrize("spread", [30.0, 640.0])
@pytest.mark.usefixtures("backend")
def test_logits_saturated_rows(spread: float) -> None:
    student, teacher, labels = batch(9, 4001, 4001)
    check(student.sign() * spread, teacher.sign() * spread, labels)


@pytest.mark.parametrize("distance", [0.3, 0.1, 0.01, 0.001])
@pytest.mark.usefixtures("backend")
def test_logits_near_agreement(distance: float) -> None:
    """The value to 1e-3 of float64 and never negative, where plain float32 is off by tens of percent."""
    _, teacher, _ = batch(16, 32000, 32000)
    student = teacher + distance * torch.randn_like(teacher)
    truth = F.kl_div(student.double().log_softmax(-1), teacher.double().log_softmax(-1), log_target=True, reduction="batchmean")
    value = kdfast.kd_loss(student, teacher)
    assert float(value) >= 0
    assert abs(float(value) - float(truth)) <= 1e-3 * float(truth)


@pytest.mark.worth(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.usefixtures("backend")
def test_logits_overwrite(dtype: torch.dtype) -> None:
    check(*batch(9, 5003, 5003, dtype=dtype), overwrite_logits=True)


@pytest.mark.usefixtures("backend")
def test_logits_overwrite_keeps_one_buffer() -> None:
    student, teacher, labels = batch(8, 4096, 4096)
    student.requires_grad_()
    loss = kdfast.kd_loss(student, teacher, labels, overwrite_logits=True, **OPTIONS)
    (grad,) = torch.autograd.grad(loss, student)
    assert grad.data_ptr() == student.data_ptr()


@pytest.mark.usefixtures("backend")
def test_logits_strided_rows_and_leading_dimensions() -> None:
    student, teacher, labels = batch(12, 2048, 2048)
    labels = labels.clamp(max=1000)
    _, wanted = plain.gradient(eager(teacher[:, :1001], labels), student[:, :1001], torch.float64)
    rows = [x.view(3, 4, -1)[..., :1001] for x in (student.requires_grad_(), teacher)]
    (grad,) = torch.autograd.grad(kdfast.kd_loss(*rows, labels.view(3, 4), **OPTIONS), student)
    assert plain.error(grad[:, :1001], wanted) <= 1e-5
    assert float(grad[:, 1001:].abs().max()) == 0


@pytest.mark.usefixtures("backend")
def test_logits_backward_twice_with_another_incoming_gradient() -> None:
    student, teacher, labels = batch(9, 3001, 3001)
    student.requires_grad_()
    loss = kdfast.kd_loss(student, teacher, labels, **OPTIONS)
    first = torch.autograd.grad(3 * loss, student, retain_graph=True)[0]
    kept = first.clone()
    second = torch.autograd.grad(0.5 * loss, student)[0]
    torch.testing.assert_close(second * 6, kept, rtol=1e-6, atol=0)
    torch.testing.assert_close(first, kept, rtol=0, atol=0)


@pytest.mark.usefixtures("backend")
def test_bad_rows_are_nan_and_the_others_untouched() -> None:
    """Nothing is read back on a GPU, so a bad row cannot raise: it is NaN, alone, and never out of bounds."""
    student, teacher, labels = batch(9, 1001, 1001)
    good = kdfast.kd_loss(student, teacher, labels, reduction="none", **OPTIONS)
    student[0, 3], teacher[1, 5], labels[2] = torch.nan, torch.inf, 1001
    got = kdfast.kd_loss(student, teacher, labels, reduction="none", **OPTIONS)
    assert got[:3].isnan().all()
    torch.testing.assert_close(got[3:], good[3:], rtol=0, atol=0)
    with kdfast.debug_checks(), pytest.raises(ValueError, match="row 0"):
        kdfast.kd_loss(student, teacher, labels, **OPTIONS)


@pytest.mark.worth(3)
@pytest.mark.usefixtures("backend")
def test_parts_match_plain_pytorch() -> None:
    student, teacher, labels = batch(9, 1001, 1001)
    _, parts = kdfast.kd_loss(student, teacher, labels, return_parts=True, **OPTIONS)
    keep = labels != -100
    log_q, log_p = student.double().log_softmax(-1)[keep], teacher.double().log_softmax(-1)[keep]
    wanted = {
        "hard": F.nll_loss(log_q, labels[keep]),
        "kl_at_1": F.kl_div(log_q, log_p, log_target=True, reduction="batchmean"),
        "teacher_nll": F.nll_loss(log_p, labels[keep]),
        "teacher_entropy": torch.special.entr(log_p.exp()).sum(-1).mean(),
        "top1_agreement": (log_q.argmax(-1) == log_p.argmax(-1)).double().mean(),
        "student_entropy": torch.special.entr(log_q.exp()).sum(-1).mean(),
    }
    for name, value in wanted.items():
        assert abs(float(getattr(parts, name).mean) - float(value)) <= 1e-5 * max(1, abs(float(value))), name


@pytest.mark.worth(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("n", "vocab"), [(13, 1001), (300, 5003)], ids=["one-chunk", "odd-chunks"])
@pytest.mark.usefixtures("backend")
def test_linear_value_and_gradients(n: int, vocab: int, dtype: torch.dtype) -> None:
    shapes = [(n, 48), (vocab, 48), (n, 80), (vocab, 80)]
    tensors = [torch.randn(s, device=DEVICE).mul(0.4 if s[0] == vocab else 1.0).to(dtype) for s in shapes]
    labels = torch.randint(0, vocab, (n,), device=DEVICE)
    labels[n // 2] = -100

    def in_dtype(to: torch.dtype, loss: Callable[..., Tensor]) -> list[Tensor]:
        hidden, weight, *teacher = (t.to(to) for t in tensors)
        hidden.requires_grad_()
        weight.requires_grad_()
        value = loss(hidden, weight, *teacher)
        return [value.detach(), *torch.autograd.grad(value, (hidden, weight))]

    def materialised(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
        return eager((teacher_hidden @ teacher_weight.t()).to(hidden.dtype), labels)(hidden @ weight.t())

    def ours(*tensors: Tensor) -> Tensor:
        return kdfast.linear_kd_loss(*tensors, labels, workspace_mb=8, **OPTIONS)

    truth, same, got = in_dtype(torch.float64, materialised), in_dtype(dtype, materialised), in_dtype(dtype, ours)
    for name, mine, theirs, true in zip(("value", "hidden", "weight"), got, same, truth, strict=True):
        plain.assert_as_good(mine, theirs.double(), true, dtype, name)


@pytest.mark.worth(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("vocab", "k"), [(17, 17), (1000, 5), (151936, 64)], ids=["k-is-V", "V1000", "V151936-k64"])
@pytest.mark.usefixtures("backend")
def test_topk_capture(vocab: int, k: int, dtype: torch.dtype) -> None:
    logits = torch.randn(9, vocab, device=DEVICE).mul(3).to(dtype)
    targets = kdfast.topk_targets(logits, k, temperatures=(1.0, 2.5))
    logp = logits.double().log_softmax(-1)
    torch.testing.assert_close(targets.logprobs.double(), logp.topk(k).values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logp.gather(-1, targets.ids.long()), logp.topk(k).values, rtol=1e-12, atol=1e-12)
    for column, temperature in enumerate(targets.temperatures):
        tempered = logp / temperature
        log_z = tempered.logsumexp(-1)
        torch.testing.assert_close(targets.log_z[:, column].double(), log_z, rtol=1e-5, atol=1e-5)
        tail = tempered.scatter(-1, targets.ids.long(), -torch.inf).logsumexp(-1) - log_z
        torch.testing.assert_close(targets.log_tail[:, column].double(), tail, rtol=1e-5, atol=1e-5)


@pytest.mark.worth(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("vocab", "k"), [(129, 5), (50257, 64)], ids=["V129", "V50257-odd"])
@pytest.mark.usefixtures("backend")
def test_topk_loss(vocab: int, k: int, dtype: torch.dtype) -> None:
    student, teacher, labels = batch(9, vocab, vocab, dtype=dtype)
    targets = kdfast.topk_targets(teacher, k, temperatures=(1.0, 2.0))

    def ghost(x: Tensor) -> Tensor:
        x = x.float() if x.dtype in HALVES.values() else x
        ids, log_q = targets.ids.long(), (x / 2).log_softmax(-1)
        log_p = targets.logprobs.to(x.dtype) / 2 - targets.log_z[:, 1:].to(x.dtype)
        log_tail = targets.log_tail[:, 1].to(x.dtype)
        q_tail = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1)
        kl = (log_p.exp() * (log_p - log_q.gather(-1, ids))).sum(-1) + log_tail.exp() * (log_tail - q_tail)
        hard = F.cross_entropy(x, labels, reduction="none", ignore_index=-100)
        return plain.mean(0.7 * 4 * kl + 0.3 * hard, labels)

    truth, same = plain.gradient(ghost, student, torch.float64), plain.gradient(ghost, student, dtype)
    got = plain.gradient(lambda x: kdfast.topk_kd_loss(x, targets, labels, **OPTIONS), student, dtype)
    plain.assert_as_good(got[0], same[0], truth[0], torch.float32, "value")
    plain.assert_as_good(got[1], same[1], truth[1], dtype, "gradient")


@pytest.mark.worth(3)
@pytest.mark.parametrize("how", COMBINATIONS.values(), ids=COMBINATIONS)
@pytest.mark.parametrize("vocab", [1008, 50257], ids=["V1008", "V50257-odd"])
@pytest.mark.usefixtures("backend")
def test_topk_tails(vocab: int, how: dict[str, Any]) -> None:
    student, teacher, labels = batch(9, vocab, vocab)
    targets = [kdfast.topk_targets(t, k, temperatures=(2.0,)) for t, k in ((teacher, 30), (teacher + student, 64))]

    def dense(x: Tensor) -> Tensor:
        options = {"temperature": 2.0, "soft": 0.7, "hard": 0.3} | how
        rows = [topk_rows(x.cpu(), t.to("cpu"), labels.cpu().clamp(min=0), **options) for t in targets]
        return plain.mean((rows[0] + rows[1]) / 2, labels.cpu())

    truth = plain.gradient(dense, student, torch.float64)
    got = plain.gradient(lambda x: kdfast.topk_kd_loss(x, targets, labels, **OPTIONS, **how), student, torch.float32)
    assert plain.error(got[0].cpu(), truth[0]) <= 1e-5
    assert plain.error(got[1], truth[1]) <= 6e-6


@pytest.mark.usefixtures("backend")
def test_topk_ids_listed_twice_give_the_same_bits() -> None:
    """Of an id's slots the first is the first, whichever program's atomic came first."""
    student, teacher, labels = batch(300, 5003, 5003)
    once = kdfast.topk_targets(teacher, 32, temperatures=(2.0,))
    # Two shares of what a probability is at T = 2: a row's entries and its tail sum to 1 at that temperature.
    first, second = (2 * math.log(share) for share in (0.6, 0.4))
    logprobs = torch.cat([once.logprobs + first, once.logprobs + second], 1)
    targets = dataclasses.replace(once, ids=once.ids.repeat(1, 2), logprobs=logprobs)
    found = []
    for _ in range(3):
        x = student.clone().requires_grad_()
        rows = kdfast.topk_kd_loss(x, targets, labels, reduction="none", **OPTIONS)
        found.append((rows.detach(), *torch.autograd.grad(rows.sum(), x)))
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))
    want = kdfast.topk_kd_loss(student, once, labels, reduction="none", **OPTIONS)
    torch.testing.assert_close(found[0][0], want, rtol=1e-4, atol=1e-5)


@pytest.mark.worth(3)
@pytest.mark.parametrize("k", [0, 16])
@pytest.mark.usefixtures("backend")
def test_topk_draws(k: int) -> None:
    logits, n = torch.randn(9, 50257, device=DEVICE) * 3, 40
    found = [kdfast.topk_targets(logits, k, samples=n, generator=torch.Generator(DEVICE).manual_seed(1)) for _ in range(2)]
    assert torch.equal(found[0].ids, found[1].ids)
    targets, p = found[0], logits.double().softmax(-1)
    ids = targets.ids.long()
    rest = p.scatter(-1, ids[:, :k], 0)
    at = torch.where(ids >= 0, p.gather(-1, ids.clamp(min=0)), 1)
    counts = targets.weights.double() / at * rest.gather(-1, ids.clamp(min=0)) / rest.sum(-1, keepdim=True) * n
    torch.testing.assert_close(counts[:, k:], counts[:, k:].round(), rtol=0, atol=1e-2)
    assert (counts[:, k:].round().sum(-1) == n).all()


@pytest.mark.hardware
@pytest.mark.worth(5)
@pytest.mark.parametrize("op", ["logits", "several", "topk", "linear-topk", "linear"])
@pytest.mark.usefixtures("backend")
def test_compiles_as_one_graph(op: str) -> None:
    loss, at = losses()[op]
    x = at.requires_grad_()
    value = loss(x)
    (wanted,) = torch.autograd.grad(value, x)
    torch.compiler.reset()
    got = torch.compile(loss, fullgraph=True)(x)
    (grad,) = torch.autograd.grad(got, x)
    torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.worth(2)
@pytest.mark.parametrize("upstream", [1.0, -3.0], ids=["leaves-at-once", "full-pass"])
@pytest.mark.usefixtures("backend")
def test_scale(upstream: float, backend: str) -> None:
    grad = torch.randn(7, 1001, device=DEVICE)
    wanted = grad * upstream
    torch.ops.kdfast.scale_(grad, torch.tensor(upstream, device=DEVICE), backend)
    torch.testing.assert_close(grad, wanted, rtol=0, atol=0)


@pytest.mark.hardware
@pytest.mark.worth(5)
def test_rows_beyond_two_to_the_31() -> None:
    """Offsets are 64-bit: the last of 2^31 + elements gets its gradient."""
    vocab = 262144
    n = 2**31 // vocab + 2
    if torch.cuda.mem_get_info()[0] < 4 * n * vocab * 2:
        pytest.skip("needs 17 GB of free GPU memory")
    student = torch.randn(n, vocab, device=DEVICE, dtype=torch.bfloat16)
    teacher = torch.randn(n, vocab, device=DEVICE, dtype=torch.bfloat16)
    last = student[-1:].clone(), teacher[-1:].clone()
    with kdfast.use_backend("triton"):
        student.requires_grad_()
        (grad,) = torch.autograd.grad(kdfast.kd_loss(student, teacher, reduction="sum"), student)
        alone = last[0].requires_grad_()
        (wanted,) = torch.autograd.grad(kdfast.kd_loss(alone, last[1], reduction="sum"), alone)
    torch.testing.assert_close(grad[-1:], wanted, rtol=0, atol=0)
