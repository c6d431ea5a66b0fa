"""topk_kd_loss: what the dense loss makes of the teacher that the targets and their tail stand for."""

from __future__ import annotations

import dataclasses

import plain
import pytest
import torch
import torch.nn.functional as F
from topk_plain import COMBINATIONS, topk_rows
from torch import Tensor

from kdfast import Head, TopKTargets, kd_loss, topk_kd_loss, topk_targets, use_backend
from kdfast.options import RowOptions

BACKENDS = ["cpp", "reference"]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
COMBINED = pytest.mark.parametrize("how", COMBINATIONS.values(), ids=COMBINATIONS)


def run(loss, student: Tensor, dtype: torch.dtype, upstream: Tensor) -> tuple[Tensor, Tensor]:
    x = student.to(dtype).detach().requires_grad_()
    value = loss(x)
    return value.detach().double(), torch.autograd.grad(value, x, upstream.to(value.dtype))[0].double()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "temperature", "reduction"),
    [(torch.float32, 1.0, "mean"), (torch.float32, 3.0, "none"), (torch.bfloat16, 2.0, "mean"), (torch.float16, 1.0, "mean")],
    ids=["fp32-T1-in-forward", "fp32-T3-in-backward", "bf16-T2-in-forward", "fp16-T1-in-backward"],
)
@pytest.mark.parametrize(
    ("vs", "vt", "k"), [(1, 1, 1), (17, 17, 16), (5100, 5003, 64), (50, 50, 50)],
    ids=["V1", "one-unselected", "student-larger", "k=V"],
)  # fmt: skip
@COMBINED
def test_value_and_gradient(
    how: dict[str, object], vs: int, vt: int, k: int, dtype: torch.dtype, temperature: float, reduction: str, backend: str
) -> None:
    teacher, student = torch.randn(6, vt) * 3, (torch.randn(6, vs) * 3).to(dtype)
    labels = torch.randint(0, vs, (6,))
    labels[4] = -100
    targets = topk_targets(teacher, k, temperatures=(temperature,))
    upstream = torch.rand(6).double() if reduction == "none" else torch.tensor(1.0).double()

    def dense(x: Tensor) -> Tensor:
        row = topk_rows(x, targets, labels, temperature=temperature, soft=0.7, hard=0.3, **how)
        row = torch.where(labels != -100, row, 0)
        return row if reduction == "none" else row.sum() / (labels != -100).sum()

    def ours(x: Tensor) -> Tensor:
        weights = {"soft_weight": 0.7, "hard_weight": 0.3}
        return topk_kd_loss(x, targets, labels, temperature=temperature, reduction=reduction, **weights, **how)

    truth_value, truth_grad = run(dense, student, torch.float64, upstream)
    with use_backend(backend):
        value, grad = run(ours, student, dtype, upstream)
    assert plain.error(value, truth_value) <= 1e-5
    assert plain.error(grad, truth_grad) <= plain.EPS[dtype] + 4e-6  # the targets themselves are float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 6.0], ids=["scaled", "capped"])
@COMBINED
def test_every_row_option_at_once(how: dict[str, object], softcap: float | None, backend: str) -> None:
    teacher, student = torch.randn(2, 4, 2100) * 2, torch.randn(2, 4, 2207) * 4
    labels, weight = torch.randint(0, 2207, (2, 4)), torch.rand(2, 4)
    labels[0, 1], labels[1, 2], weight[1, 3] = -1, 2150, 0  # ignored; beyond the teacher's vocabulary; without weight
    targets, head = topk_targets(teacher, 33, temperatures=(1.0, 2.0)), Head(softcap, 0.8)
    labels[0, 0] = targets.ids[0, 0, 3]
    shared = {"z_loss": 0.01, "student_head": head}

    def dense(x: Tensor) -> Tensor:
        # soft weight: without the T^2 that topk_rows multiplies by
        args = (targets, labels.clamp(min=0))
        row = topk_rows(x, *args, temperature=2.0, soft=0.5 / 4, hard=0.3, smoothing=0.1, **shared, **how)
        return (row * weight * (labels != -1)).sum() / 20

    def ours(x: Tensor) -> Tensor:
        return topk_kd_loss(
            x, targets, labels, temperature=2.0, soft_weight=0.5, hard_weight=0.3, scale_by_t2=False, ignore_index=-1,
            token_weight=weight, label_smoothing=0.1, num_items=20, **shared, **how,
        )  # fmt: skip

    truth_value, truth_grad = plain.gradient(dense, student, torch.float64)
    with use_backend(backend):
        value, grad = plain.gradient(ours, student, torch.float32)
    assert plain.error(value, truth_value) <= 1e-5
    assert plain.error(grad, truth_grad) <= 6e-6


@pytest.mark.parametrize("backend", BACKENDS)
@COMBINED
def test_several_targets(how: dict[str, object], backend: str) -> None:
    """The weighted sum of the losses, where the targets share some entries and not others."""
    student, teachers = torch.randn(6, 300) * 3, [torch.randn(6, 300) * 3 for _ in range(3)]
    teachers[1] = teachers[0] + torch.randn(6, 300)
    labels, weights = torch.randint(0, 300, (6,)), (1.0, 2.0, 5.0)
    targets = [topk_targets(t, k, temperatures=(2.0,)) for t, k in zip(teachers, (5, 40, 9), strict=True)]

    def one(x: Tensor, i: int) -> Tensor:
        return topk_rows(x, targets[i], labels, temperature=2.0, hard=0.5, z_loss=0.01, **how).mean()

    def dense(x: Tensor) -> Tensor:
        return sum(w / 8 * one(x, i) for i, w in enumerate(weights))

    def ours(x: Tensor, **more: object) -> Tensor:
        options = {"temperature": 2.0, "hard_weight": 0.5, "z_loss": 0.01, "teacher_weights": weights}
        return topk_kd_loss(x, targets, labels, **options, **how, **more)

    truth_value, truth_grad = plain.gradient(dense, student, torch.float64)
    with use_backend(backend):
        value, grad = plain.gradient(ours, student, torch.float32)
        _, again = plain.gradient(lambda x: ours(x, reduction="none").mean(), student, torch.float32)
    assert plain.error(value, truth_value) <= 1e-5
    assert plain.error(grad, truth_grad) <= 6e-6
    assert plain.error(again, truth_grad) <= 6e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [30.0, 640.0])
@COMBINED
def test_saturated_rows(how: dict[str, object], scale: float, backend: str) -> None:
    teacher, student = torch.randn(6, 1000).sign() * scale, torch.randn(6, 1000).sign() * scale
    teacher[:, :8] += 2
    targets = topk_targets(teacher, 8, temperatures=(2.0,))
    truth, truth_grad = plain.gradient(lambda x: topk_rows(x, targets, temperature=2.0, **how).mean(), student, torch.float64)
    student.requires_grad_()
    with use_backend(backend):
        loss = topk_kd_loss(student, targets, temperature=2.0, **how)
        (grad,) = torch.autograd.grad(loss, student)
    assert torch.allclose(loss.double(), truth, rtol=1e-4)
    assert plain.error(grad, truth_grad) <= 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3])
@COMBINED
def test_value_near_agreement(how: dict[str, object], distance: float, backend: str) -> None:
    teacher = torch.randn(8, 3000) * 3
    targets = topk_targets(teacher, 64)
    if how["tail"] != "ghost":
        below = float(targets.log_tail.mean() - torch.tensor(2936.0).log()) if how["tail"] == "uniform" else -60.0
        agreeing = torch.full_like(teacher, below).scatter_(1, targets.ids.long(), targets.logprobs)
        if how["tail"] == "uniform":
            tails = targets.log_tail - torch.tensor(2936.0).log()
            agreeing = tails.expand(8, 3000).scatter(1, targets.ids.long(), targets.logprobs)
        teacher = agreeing
    student = teacher + distance * torch.randn_like(teacher)
    if how["tail"] == "none":  # sum t log t is a constant that no student changes
        t = targets.logprobs.double().exp().sum(-1)
        constant = (t * t.log()).mean()
    else:
        constant = torch.zeros(())
    truth = topk_rows(student.double(), targets, **how).mean() - constant
    with use_backend(backend):
        loss = topk_kd_loss(student, targets, **how) - constant
    assert abs(float(loss) / float(truth) - 1) < 2e-3 + (1e-6 / float(truth) if how["tail"] == "none" else 0)
    assert how["tail"] == "none" or loss >= 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_jsd_ends_are_the_kls(beta: float, backend: str) -> None:
    student, targets = torch.randn(4, 200), topk_targets(torch.randn(4, 200), 6)
    name = "forward_kl" if beta == 0 else "reverse_kl"
    with use_backend(backend):
        got = topk_kd_loss(student, targets, divergence="jsd", beta=beta)
        assert torch.equal(got, topk_kd_loss(student, targets, divergence=name))


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_ids_listed_is_the_dense_loss(backend: str) -> None:
    student, teacher = torch.randn(4, 90), torch.randn(4, 90)
    with use_backend(backend):
        targets = topk_targets(teacher, 90)
        for how in COMBINATIONS.values():
            dense = {name: value for name, value in how.items() if name != "tail"}
            assert torch.allclose(topk_kd_loss(student, targets, **how), kd_loss(student, teacher, **dense), rtol=1e-5)


def rearranged(targets: TopKTargets, ids: Tensor, logprobs: Tensor) -> TopKTargets:
    return dataclasses.replace(targets, ids=ids, logprobs=logprobs)


@pytest.mark.parametrize("backend", BACKENDS)
@COMBINED
def test_empty_slots_and_any_order(how: dict[str, object], backend: str) -> None:
    teacher, student = torch.randn(4, 200), torch.randn(4, 200)
    targets = topk_targets(teacher, 6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    padded = rearranged(
        targets,
        torch.cat([targets.ids[:, order], torch.full((4, 2), -1, dtype=torch.int32)], -1),
        torch.cat([targets.logprobs[:, order], torch.full((4, 2), -torch.inf)], -1),
    )
    with use_backend(backend):
        a, b = (torch.func.grad(lambda x, t=t: topk_kd_loss(x, t, **how))(student) for t in (targets, padded))
    assert torch.allclose(a, b, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
@COMBINED
def test_an_id_listed_twice_adds_up(how: dict[str, object], backend: str) -> None:
    teacher, student = torch.randn(4, 200), torch.randn(4, 200)
    targets = topk_targets(teacher, 6)
    halves = targets.logprobs[:, [0, 0, 1, 2, 3, 4, 5]].clone()
    halves[:, :2] -= torch.tensor([0.25, 0.75]).log().neg()
    twice = rearranged(targets, targets.ids[:, [0, 0, 1, 2, 3, 4, 5]], halves)
    with use_backend(backend):
        a, b = (torch.func.grad(lambda x, t=t: topk_kd_loss(x, t, **how))(student) for t in (targets, twice))
    assert torch.allclose(a, b, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_without_entries(backend: str) -> None:
    """Nothing was said of it: with tail "none" no soft loss, the ghost's is 0 for any student."""
    student, targets = torch.randn(3, 50), topk_targets(torch.randn(3, 50), 4)
    ids, logprobs, log_tail = targets.ids.clone(), targets.logprobs.clone(), targets.log_tail.clone()
    ids[1], logprobs[1], log_tail[1] = -1, -torch.inf, 0.0
    empty = dataclasses.replace(targets, ids=ids, logprobs=logprobs, log_tail=log_tail)
    with use_backend(backend):
        for tail in ("none", "ghost"):
            x = student.clone().requires_grad_()
            loss = topk_kd_loss(x, empty, tail=tail, reduction="none")
            (grad,) = torch.autograd.grad(loss.sum(), x)
            assert loss[1].detach().abs() < 1e-6
            assert grad[1].abs().max() < 1e-6
            assert loss[0] != 0
        with pytest.raises(ValueError, match="row 1 has no entries, expected at least one with tail 'renormalize'"):
            topk_kd_loss(student, empty, tail="renormalize")


@COMBINED
def test_overwrite_matches(how: dict[str, object]) -> None:
    source, targets = torch.randn(5, 999, requires_grad=True), topk_targets(torch.randn(5, 999), 9)
    options = {"labels": torch.randint(0, 999, (5,)), "hard_weight": 0.5, "student_head": Head(softcap=8.0), **how}
    (expected,) = torch.autograd.grad(topk_kd_loss(source * 1, targets, **options), source)
    logits = source * 1
    (grad,) = torch.autograd.grad(topk_kd_loss(logits, targets, overwrite_logits=True, **options), source)
    assert torch.equal(grad, expected)
    assert torch.equal(logits.detach(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts(backend: str) -> None:
    teacher, student, labels = torch.randn(40, 30) * 2, torch.randn(40, 30) * 2, torch.randint(0, 30, (40,))
    student[:20] += teacher[:20] * 2
    targets = topk_targets(teacher, 30, temperatures=(1.0,))  # k = V: the parts are the dense ones
    with use_backend(backend):
        _, parts = topk_kd_loss(student, targets, labels, return_parts=True)
        _, reverse = topk_kd_loss(student, targets, labels, divergence="reverse_kl", return_parts=True)
        _, several = topk_kd_loss(student, [targets, targets], labels, return_parts=True)
    log_p = teacher.log_softmax(-1)
    assert torch.allclose(parts.teacher_nll.mean, F.nll_loss(log_p, labels), rtol=1e-5)
    assert torch.allclose(parts.teacher_entropy.mean, -(log_p.exp() * log_p).sum(-1).mean(), rtol=1e-5)
    assert torch.allclose(parts.hard.mean, F.cross_entropy(student, labels), rtol=1e-5)
    assert parts.kl_at_1.sum == parts.soft.sum
    assert reverse.kl_at_1.sum.isnan()
    agree = (student.argmax(-1) == teacher.argmax(-1)).sum()
    assert 0 < agree < 40
    assert parts.top1_agreement.sum == agree
    for one, two in zip(parts, several, strict=True):
        assert torch.allclose(one.sum, two.sum, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("tail", ["ghost", "uniform", "renormalize", "none"])
def test_student_entropy(tail: str, temperature: float, dtype: torch.dtype, backend: str) -> None:
    """Over the targets' vocabulary at T = 1, wherever the largest logits stand, after the head; no NaN from excluded ids."""
    width, vocab, k = 5000, 4990, 7
    teacher = torch.randn(6, vocab)
    student = torch.randn(6, width) * torch.tensor([0.1, 1.0, 3.0, 8.0, 1.0, 1.0])[:, None]
    student[1] += torch.linspace(-600, 600, width)  # the maximum rises block by block
    student[2] += torch.linspace(600, -600, width)
    student[4, : vocab - 1], student[5, 100:4900] = -torch.inf, -torch.inf  # one id is left; most are excluded
    student, labels = student.to(dtype), torch.tensor([1, 2, 3, 4, width - 1, 0])
    targets = topk_targets(teacher, k, temperatures=(1.0, 2.0, 3.0))
    for head in (Head(), Head(softcap=30.0), Head(scale=0.5)):
        z = student.double() * head.scale
        z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
        truth = torch.special.entr(z[:, :vocab].softmax(-1)).sum(-1)
        options = {"tail": tail, "temperature": temperature, "student_head": head, "return_parts": True}
        with use_backend(backend):
            for row in range(6):
                _, parts = topk_kd_loss(student[row : row + 1], targets[row : row + 1], labels[row : row + 1], **options)
                torch.testing.assert_close(parts.student_entropy.sum.double(), truth[row], rtol=2e-5, atol=1e-5)
            _, parts = topk_kd_loss(student, targets, torch.where(labels < 3, labels, -100), **options)
        assert parts.student_entropy.count == 3
        torch.testing.assert_close(parts.student_entropy.sum.double(), truth[[0, 1, 5]].sum(), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_and_opcheck(backend: str) -> None:
    student, teacher, labels = torch.randn(5, 40), torch.randn(5, 40), torch.randint(0, 40, (5,))

    def loss(x: Tensor) -> Tensor:
        targets = topk_targets(teacher, 4, temperatures=(2.0,))
        options = {"temperature": 2.0, "hard_weight": 0.5}
        return topk_kd_loss(x, targets, labels, **options) * 2 + topk_kd_loss(x, [targets] * 2, tail="uniform", temperature=2.0)

    with use_backend(backend):
        _, expected = plain.gradient(loss, student, torch.float32)
        _, compiled = plain.gradient(torch.compile(loss, fullgraph=True, backend="aot_eager"), student, torch.float32)
        targets = topk_targets(teacher, 4)
    assert torch.allclose(compiled, expected, rtol=1e-5, atol=1e-8)
    ops, one = torch.ops.kdfast, torch.ones(5, 1)
    rows = ([targets.ids, targets.logprobs[:, None], targets.log_tail, one], labels, torch.ones(5))
    options = (*RowOptions(hard_weight=0.5).values, 40, False, backend)  # at T = 1 no part is NaN, which would not equal itself
    torch.library.opcheck(ops.topk.default, (student, *rows, *options, True, True))
    torch.library.opcheck(ops.topk_overwrite.default, (student.clone(), *rows, *options, True))
    stats = ops.topk(student, *rows, *options, False, False)[1]
    torch.library.opcheck(ops.topk_backward.default, (student, *rows, stats, *options))


@COMBINED
def test_threads_do_not_change_a_bit(how: dict[str, object]) -> None:
    student, targets = torch.randn(9, 5000), topk_targets(torch.randn(9, 5000), 20)
    before, grads = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            grads.append(torch.func.grad(lambda x: topk_kd_loss(x, targets, **how))(student))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_targets_of_a_float64_teacher(backend: str) -> None:
    teacher, student = torch.randn(4, 100, dtype=torch.float64), torch.randn(4, 100)
    wide, narrow = topk_targets(teacher, 5), topk_targets(teacher.float(), 5)
    with use_backend(backend):
        assert torch.allclose(topk_kd_loss(student, wide), topk_kd_loss(student, narrow), rtol=1e-5)


def shifted(targets: TopKTargets, value: int) -> TopKTargets:
    ids = targets.ids.clone()
    ids[1, 0] = value
    return dataclasses.replace(targets, ids=ids)


TARGETS = topk_targets(torch.randn(4, 20), 3)
DRAWN = dataclasses.replace(TARGETS, weights=torch.ones(4, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": TARGETS[:3]}, r"targets: expected leading dimensions \[4\] .* got \[3\]"),
        ({"targets": torch.zeros(4)}, "targets: expected TopKTargets, got Tensor"),
        ({"targets": []}, "at least one teacher"),
        ({"targets": [TARGETS, topk_targets(torch.randn(4, 21), 3)]}, r"targets\[1\]: expected vocab_size 20 .* got 21"),
        ({"temperature": 2.0}, "temperature: 2 was not captured; the targets hold 1"),
        ({"student_logits": torch.randn(4, 19)}, "student_logits: expected a vocabulary of at least 20"),
        ({"targets": shifted(TARGETS, 20)}, "targets: row 1 lists id 20, expected ids < 20"),
        ({"labels": torch.full((4,), 20), "hard_weight": 1.0}, "labels: row 0 has label 20"),
        ({"student_logits": torch.full((4, 20), torch.nan)}, "student logits: row 0 holds NaN"),
        ({"tail": "bucket"}, "tail: expected one of ghost, renormalize, uniform, none, got 'bucket'"),
        ({"divergence": "tvd"}, "divergence: expected one of forward_kl, reverse_kl, jsd, got 'tvd'"),
        ({"divergence": "reverse_kl", "tail": "renormalize"}, "'renormalize' is infinite"),
        ({"divergence": "jsd", "beta": 1.0, "tail": "renormalize"}, "'renormalize' is infinite"),
        ({"divergence": "jsd", "tail": "none"}, "divergence: expected forward_kl with tail 'none', .* got jsd"),
        ({"targets": DRAWN}, "tail: expected 'none' .* because targets holds drawn entries .* got 'ghost'"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input(change: dict[str, object], message: str, backend: str) -> None:
    with use_backend(backend), pytest.raises(ValueError, match=message):
        topk_kd_loss(**({"student_logits": torch.randn(4, 20), "targets": TARGETS} | change))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("never", [1, 10])
def test_an_even_tail_has_its_share_where_the_student_says_never(backend: str, divergence: str, never: int) -> None:
    """Against float64 by hand: ids at -inf in the student are ids all the same."""
    torch.manual_seed(0)
    vocab, k = 64, 8
    student, teacher = torch.randn(3, vocab), torch.randn(3, vocab)
    student[:, 30 : 30 + never] = -torch.inf
    targets = topk_targets(teacher.index_fill(1, torch.arange(30, 30 + never), -9.0), k)
    q = student.double().softmax(-1)
    tail = (targets.log_tail.double().exp() / (vocab - k)).expand(3, vocab)
    p = tail.scatter(1, targets.ids.long(), targets.logprobs.double().exp())
    m = p if divergence == "reverse_kl" else (p + q) / 2
    want = torch.xlogy(q, q / m).sum(-1)
    if divergence == "jsd":
        want = (want + torch.xlogy(p, p / m).sum(-1)) / 2
    with use_backend(backend):
        loss = topk_kd_loss(student, targets, tail="uniform", divergence=divergence)
    assert loss.item() == pytest.approx(want.mean().item(), rel=1e-5)
