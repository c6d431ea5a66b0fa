"""topk_targets and topk_kd_loss: capture is exact, and the bucket is what the dense loss would see of it."""

from __future__ import annotations

import plain
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import TopKTargets, topk_kd_loss, topk_targets, use_backend
from kdfast.ops.topk import label_logprobs
from kdfast.options import RowOptions

BACKENDS = ["cpp", "reference"]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])


def dense_truth(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, log_z, log_tail) in float64 by the definition in TopKTargets."""
    logp = logits.double().log_softmax(-1)
    ids = ids.long()
    log_z = (logp / temperature).logsumexp(-1)
    log_tail = (logp / temperature).scatter(-1, ids, -torch.inf).logsumexp(-1) - log_z
    return logp.gather(-1, ids), log_z, log_tail


@pytest.mark.parametrize("backend", BACKENDS)
@DTYPES
@pytest.mark.parametrize("scale", [1.0, 30.0, 640.0], ids=["flat", "sharp", "saturated"])
@pytest.mark.parametrize(
    ("vocab", "k"), [(1, 1), (2, 1), (17, 17), (1000, 7), (5003, 64), (5003, 4096)],
    ids=["V1", "V2", "k=V", "ragged", "many-blocks", "k4096"],
)  # fmt: skip
def test_capture(vocab: int, k: int, scale: float, dtype: torch.dtype, backend: str) -> None:
    logits = (torch.randn(2, 3, vocab) * scale).to(dtype)
    with use_backend(backend):
        got = topk_targets(logits, k, temperatures=(1.0, 2.0, 3.0))
    order = logits.double().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    assert torch.equal(got.ids.long(), order)
    for column, temperature in enumerate(got.temperatures):
        logprobs, log_z, log_tail = dense_truth(logits, got.ids, temperature)
        assert torch.allclose(got.logprobs.double(), logprobs, rtol=1e-6, atol=2e-6)
        assert torch.allclose(got.log_z[..., column].double(), log_z, rtol=1e-5, atol=1e-5 * max(1.0, scale / 100))
        assert torch.allclose(got.log_tail[..., column].double(), log_tail, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_capture_ties_go_to_the_lower_id(backend: str) -> None:
    logits = torch.zeros(1, 5000)
    logits[0, 4000:4003] = 1.0
    with use_backend(backend):
        assert topk_targets(logits, 5).ids.tolist() == [[4000, 4001, 4002, 0, 1]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_capture_of_impossible_ids(backend: str) -> None:
    logits = torch.full((1, 3000), -torch.inf)
    logits[0, [7, 2900]] = torch.tensor([0.0, 1.0])
    with use_backend(backend):
        got = topk_targets(logits, 4)
    assert got.ids.tolist() == [[2900, 7, 0, 1]]
    assert got.log_tail.tolist() == [[-torch.inf]]
    assert got.logprobs[0, 2] == -torch.inf


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 999], ids=["among-the-first-k", "later"])
def test_capture_names_a_bad_row(column: int, value: float, backend: str) -> None:
    logits = torch.randn(4, 1000)
    logits[2, column] = value
    with use_backend(backend), pytest.raises(ValueError, match="row 2 holds NaN or"):
        topk_targets(logits, 8)


def ghost_rows(student: Tensor, targets: TopKTargets, teacher: Tensor, temperature: float) -> Tensor:
    """The bucketed KL in float64 from dense distributions; log_tail by log-sum-exp."""
    ids = targets.ids.long()
    log_p, log_q = (x.double().div(temperature).log_softmax(-1) for x in (teacher, student[..., : targets.vocab_size]))
    buckets = []
    for log in (log_p, log_q):
        tail = log.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        buckets.append(torch.cat([log.gather(-1, ids), tail], -1))
    p, q = buckets
    return torch.where(p.isneginf(), 0, p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("backend", BACKENDS)
@DTYPES
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("reduction", ["mean", "none"], ids=["in-forward", "in-backward"])
@pytest.mark.parametrize(
    ("vs", "vt", "k"), [(1, 1, 1), (17, 17, 16), (1000, 1000, 7), (5100, 5003, 64), (50, 50, 50)],
    ids=["V1", "one-unselected", "ragged", "student-larger", "k=V"],
)  # fmt: skip
def test_value_and_gradient(
    vs: int, vt: int, k: int, reduction: str, temperature: float, dtype: torch.dtype, backend: str
) -> None:
    teacher, student = torch.randn(6, vt) * 3, (torch.randn(6, vs) * 3).to(dtype)
    labels = torch.randint(0, vs, (6,))
    labels[4] = -100
    targets = topk_targets(teacher, k, temperatures=(temperature,))
    upstream = torch.rand(6).double() if reduction == "none" else torch.tensor(1.0).double()

    def run(loss, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = student.to(dtype).detach().requires_grad_()
        value = loss(x)
        return value.detach().double(), torch.autograd.grad(value, x, upstream.to(value.dtype))[0].double()

    def dense(x: Tensor) -> Tensor:
        row = 0.7 * temperature**2 * ghost_rows(x, targets, teacher, temperature)
        row = torch.where(labels != -100, row + 0.3 * F.cross_entropy(x, labels, reduction="none"), 0)
        return row if reduction == "none" else row.sum() / (labels != -100).sum()

    def ours(x: Tensor) -> Tensor:
        return topk_kd_loss(x, targets, labels, temperature=temperature, soft_weight=0.7, hard_weight=0.3, reduction=reduction)

    truth_value, truth_grad = run(dense, torch.float64)
    with use_backend(backend):
        value, grad = run(ours, dtype)
    assert plain.error(value, truth_value) <= 1e-5
    assert plain.error(grad, truth_grad) <= plain.EPS[dtype] + 4e-6  # the targets themselves are float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [30.0, 640.0])
def test_saturated_rows(scale: float, backend: str) -> None:
    teacher, student = torch.randn(6, 1000).sign() * scale, torch.randn(6, 1000).sign() * scale
    teacher[:, :8] += 2
    targets = topk_targets(teacher, 8, temperatures=(2.0,))
    truth = ghost_rows(student, targets, teacher, 2.0).mean()
    student.requires_grad_()
    with use_backend(backend):
        loss = topk_kd_loss(student, targets, temperature=2.0, scale_by_t2=False)
        (grad,) = torch.autograd.grad(loss, student)
    assert torch.allclose(loss.double(), truth, rtol=1e-4)
    assert grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3])
def test_value_near_agreement(distance: float, backend: str) -> None:
    teacher = torch.randn(8, 3000) * 3
    student = teacher + distance * torch.randn_like(teacher)
    targets = topk_targets(teacher, 64)
    truth = ghost_rows(student, targets, teacher, 1.0).mean()
    with use_backend(backend):
        loss = topk_kd_loss(student, targets)
    assert abs(float(loss) / float(truth) - 1) < 2e-3
    assert loss >= 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_slots_and_any_order(backend: str) -> None:
    teacher, student = torch.randn(4, 200), torch.randn(4, 200)
    targets = topk_targets(teacher, 6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    padded = TopKTargets(
        torch.cat([targets.ids[:, order], torch.full((4, 2), -1, dtype=torch.int32)], -1),
        torch.cat([targets.logprobs[:, order], torch.full((4, 2), -torch.inf)], -1),
        targets.log_z, targets.log_tail, targets.temperatures, targets.vocab_size,
    )  # fmt: skip
    with use_backend(backend):
        a, b = (torch.func.grad(lambda x, t=t: topk_kd_loss(x, t))(student) for t in (targets, padded))
    assert torch.allclose(a, b, atol=1e-8)


def test_overwrite_matches() -> None:
    source, targets = torch.randn(5, 999, requires_grad=True), topk_targets(torch.randn(5, 999), 9)
    labels = torch.randint(0, 999, (5,))
    (expected,) = torch.autograd.grad(topk_kd_loss(source * 1, targets, labels, hard_weight=0.5), source)
    logits = source * 1
    (grad,) = torch.autograd.grad(topk_kd_loss(logits, targets, labels, hard_weight=0.5, overwrite_logits=True), source)
    assert torch.equal(grad, expected)
    assert torch.equal(logits.detach(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts(backend: str) -> None:
    teacher, student, labels = torch.randn(40, 30) * 2, torch.randn(40, 30) * 2, torch.randint(0, 30, (40,))
    student[:20] += teacher[:20] * 2
    targets = topk_targets(teacher, 30, temperatures=(1.0,))  # k = V: the parts are the dense ones
    with use_backend(backend):
        _, parts = topk_kd_loss(student, targets, labels, return_parts=True)
    log_p = teacher.log_softmax(-1)
    assert torch.allclose(parts.teacher_nll.mean, F.nll_loss(log_p, labels), rtol=1e-5)
    assert torch.allclose(parts.teacher_entropy.mean, -(log_p.exp() * log_p).sum(-1).mean(), rtol=1e-5)
    assert torch.allclose(parts.hard.mean, F.cross_entropy(student, labels), rtol=1e-5)
    assert parts.kl_at_1.sum == parts.soft.sum
    agree = (student.argmax(-1) == teacher.argmax(-1)).sum()
    assert 0 < agree < 40
    assert parts.top1_agreement.sum == agree


def test_label_logprobs_share_the_tail() -> None:
    teacher = torch.randn(3, 10)
    targets = topk_targets(teacher, 4)
    unlisted = next(i for i in range(10) if i not in targets.ids[0].tolist())
    labels = torch.tensor([unlisted, int(targets.ids[1, 2]), int(targets.ids[2, 0])])
    got = label_logprobs(targets, labels)
    share = (1 - targets.logprobs[0].exp().sum()) / 6
    assert torch.allclose(
        got.exp(), torch.stack([share, targets.logprobs[1, 2].exp(), targets.logprobs[2, 0].exp()]), rtol=1e-5
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_and_opcheck(backend: str) -> None:
    student, teacher, labels = torch.randn(5, 40), torch.randn(5, 40), torch.randint(0, 40, (5,))

    def loss(x: Tensor) -> Tensor:
        return topk_kd_loss(x, topk_targets(teacher, 4, temperatures=(2.0,)), labels, temperature=2.0, hard_weight=0.5) * 2

    with use_backend(backend):
        _, expected = plain.gradient(loss, student, torch.float32)
        _, compiled = plain.gradient(torch.compile(loss, fullgraph=True, backend="aot_eager"), student, torch.float32)
        targets = topk_targets(teacher, 4)
    assert torch.allclose(compiled, expected, rtol=1e-5, atol=1e-8)
    ops, rows = (
        torch.ops.kdfast,
        ([targets.ids, targets.logprobs, targets.log_z[:, 0], targets.log_tail[:, 0]], labels, torch.ones(5)),
    )
    options = (*RowOptions(hard_weight=0.5).values, 40, backend)  # at T = 1 no part is NaN, which would not equal itself
    torch.library.opcheck(ops.topk_capture.default, (teacher, 4, [1.0, 2.0], backend))
    torch.library.opcheck(ops.topk.default, (student, *rows, *options, True, True))
    torch.library.opcheck(ops.topk_overwrite.default, (student.clone(), *rows, *options, True))
    stats = ops.topk(student, *rows, *options, False, False)[1]
    torch.library.opcheck(ops.topk_backward.default, (student, *rows, stats, *options))


def shifted(targets: TopKTargets, value: int) -> TopKTargets:
    ids = targets.ids.clone()
    ids[1, 0] = value
    return TopKTargets(ids, targets.logprobs, targets.log_z, targets.log_tail, targets.temperatures, targets.vocab_size)


TARGETS = topk_targets(torch.randn(4, 20), 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": TARGETS[:3]}, r"targets: expected leading dimensions \[4\] .* got \[3\]"),
        ({"targets": torch.zeros(4)}, "targets: expected TopKTargets, got Tensor"),
        ({"temperature": 2.0}, "temperature: 2 was not captured; the targets hold 1"),
        ({"student_logits": torch.randn(4, 19)}, "student_logits: expected a vocabulary of at least 20"),
        ({"targets": shifted(TARGETS, 20)}, "row 1"),
        ({"labels": torch.full((4,), 20), "hard_weight": 1.0}, "labels: row 0 has label 20"),
        ({"student_logits": torch.full((4, 20), torch.nan)}, "student logits: row 0 holds NaN"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input(change: dict[str, object], message: str, backend: str) -> None:
    with use_backend(backend), pytest.raises(ValueError, match=message):
        topk_kd_loss(**({"student_logits": torch.randn(4, 20), "targets": TARGETS} | change))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k: expected 0 < k <= 20"),
        ({"k": 21}, "k: expected 0 < k <= 20"),
        ({"k": 2, "temperatures": ()}, "temperatures: expected one or more"),
        ({"k": 2, "temperatures": (0.0,)}, "temperatures: expected one or more"),
    ],
)
def test_capture_bad_input(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        topk_targets(torch.randn(4, 20), **arguments)
