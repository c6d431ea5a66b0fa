"""Drawn targets: their mean is the teacher, at every captured temperature, and nothing less careful passes for it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from kdfast import Head, TopKTargets, kd_loss, topk_kd_loss, topk_targets, use_backend

BACKENDS = ["cpp", "reference"]
DRAWS, VOCAB = 2000, 500


def gradients(student: Tensor, targets: TopKTargets, temperature: float, tail: str = "none") -> Tensor:
    """The gradient of every draw, `[DRAWS, VOCAB]`."""
    x = student.expand(DRAWS, -1).clone().requires_grad_()
    loss = topk_kd_loss(x, targets, tail=tail, temperature=temperature, reduction="sum")
    return torch.autograd.grad(loss, x)[0].double()


def assert_unbiased(drawn: Tensor, full: Tensor) -> None:
    """The mean gradient, seen from 32 fixed directions, lies within 3 standard errors of the full one, which are small."""
    directions = torch.randn(full.numel(), 32, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    directions /= directions.norm(dim=0)
    seen = drawn @ directions
    error = seen.std(0) / DRAWS**0.5
    assert (error <= 0.05 * full.norm()).all(), "too few draws to tell"
    off = (seen.mean(0) - full @ directions).abs() / error
    assert (off <= 3).all(), f"biased: off by {float(off.max()):.1f} standard errors"


def setting() -> tuple[Tensor, Tensor]:
    torch.manual_seed(11)
    return torch.randn(1, VOCAB) * 2, torch.randn(1, VOCAB) * 3


def drawn_targets(teacher: Tensor, k: int, samples: int, sample_temperature: float) -> TopKTargets:
    return topk_targets(
        teacher.expand(DRAWS, -1), k, temperatures=(1.0, 2.0), samples=samples, sample_temperature=sample_temperature,
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip


def full_gradient(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    x = student.double().requires_grad_()
    with use_backend("reference"):
        return torch.autograd.grad(kd_loss(x, teacher.double(), temperature=temperature), x)[0][0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    ("k", "sample_temperature"), [(0, 1.0), (0, 1.3), (12, 1.0), (12, 2.0)],
    ids=["sampled", "sampled-hot", "mixed", "mixed-hot"],
)  # fmt: skip
def test_the_mean_gradient_is_the_full_gradient(k: int, sample_temperature: float, temperature: float, backend: str) -> None:
    student, teacher = setting()
    with use_backend(backend):
        drawn = gradients(student, drawn_targets(teacher, k, 12, sample_temperature), temperature)
    assert_unbiased(drawn, full_gradient(student, teacher, temperature))


def test_stratified_draws_are_less_noisy_than_independent_ones() -> None:
    """The same kernel with independent numbers in the place of one from each n-th."""
    student, teacher = setting()
    stratified = gradients(student, drawn_targets(teacher, 0, 12, 1.0), 1.0)
    draws = torch.rand(DRAWS, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    outputs = torch.ops.kdfast.topk_capture(teacher.expand(DRAWS, -1), 0, (1.0, 2.0), draws, 1.0, 0.0, 1.0, "cpp")
    independent = gradients(student, TopKTargets(*outputs[:4], (1.0, 2.0), VOCAB, outputs[4]), 1.0)
    noise = [(g - g.mean(0)).square().sum().sqrt() for g in (stratified, independent)]
    assert noise[0] < 0.9 * noise[1]


def counts_as_targets(targets: TopKTargets, temperature: float) -> TopKTargets:
    """Targets c_i / n at every temperature, as if there were no weights to tempered probabilities."""
    p_t = (targets.logprobs / temperature - targets.log_z[..., [targets.column(temperature)]]).exp()
    return dataclasses.replace(targets, weights=targets.weights * targets.logprobs.exp() / p_t.clamp(min=1e-30))


@pytest.mark.parametrize("careless", ["weights-ignored", "renormalized"])
def test_a_careless_sampler_is_found_out(careless: str) -> None:
    student, teacher = setting()
    targets = drawn_targets(teacher, 0, 12, 1.0)
    if careless == "weights-ignored":
        drawn = gradients(student, counts_as_targets(targets, 2.0), 2.0)
    else:
        drawn = gradients(student, targets, 2.0, tail="renormalize")
    with pytest.raises(AssertionError, match="biased"):
        assert_unbiased(drawn, full_gradient(student, teacher, 2.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("vocab", "k"), [(1, 0), (2, 1), (17, 5), (5003, 0), (5003, 64)])
def test_what_a_capture_with_draws_holds(vocab: int, k: int, dtype: torch.dtype, backend: str) -> None:
    logits, head, n = (torch.randn(2, 3, vocab) * 3).to(dtype), Head(softcap=10.0), 12
    with use_backend(backend):
        got = topk_targets(logits, k, temperatures=(1.0, 2.0), samples=n, sample_temperature=1.5, head=head)
    z = 10 * torch.tanh(logits.double() / 10)
    assert got.ids.shape == got.weights.shape == (2, 3, k + n)
    assert torch.equal(got.ids[..., :k].long(), z.float().sort(dim=-1, descending=True, stable=True).indices[..., :k])
    filled = got.ids >= 0
    assert (got.logprobs[~filled] == -torch.inf).all()
    assert (got.weights[~filled] == 0).all()
    p = z.softmax(-1)
    at = p.gather(-1, got.ids.clamp(min=0).long())
    assert torch.allclose(got.logprobs.exp().double(), torch.where(filled, at, 0), rtol=1e-5, atol=1e-9)
    assert torch.allclose(got.weights[..., :k].double(), at[..., :k], rtol=1e-5)
    rest = (z / 1.5).scatter(-1, got.ids[..., :k].long(), -torch.inf).softmax(-1)
    ratio = got.weights.double() * rest.gather(-1, got.ids.clamp(min=0).long()) / at
    counts = ratio[..., k:] * n
    if vocab > k:
        assert torch.allclose(counts, counts.round(), atol=1e-3)
        assert torch.equal(counts.round().sum(-1), torch.full((2, 3), float(n), dtype=torch.float64))
    for row in got.ids.view(-1, k + n).tolist():
        listed = [i for i in row if i >= 0]
        assert len(set(listed)) == len(listed)
        assert row[k:][: len(listed) - k] == sorted(listed[k:])  # in id order, empty slots last
    mask = torch.zeros(2, 3, vocab).scatter_add_(-1, got.ids.clamp(min=0).long(), filled.float()) > 0
    for column, temperature in enumerate(got.temperatures):
        log_z = (z.log_softmax(-1) / temperature).logsumexp(-1)
        log_tail = (z.log_softmax(-1) / temperature).masked_fill(mask, -torch.inf).logsumexp(-1) - log_z
        assert torch.allclose(got.log_z[..., column].double(), log_z, atol=1e-5)
        assert torch.allclose(got.log_tail[..., column].double(), log_tail, atol=1e-5)


@pytest.mark.parametrize("scale", [30.0, 640.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_draws_from_saturated_rows(scale: float, backend: str) -> None:
    logits = torch.randn(5, 3000).sign() * scale
    with use_backend(backend):
        got = topk_targets(logits, 3, samples=20)
    assert (logits.gather(1, got.ids.clamp(min=0).long())[got.ids >= 0] == scale).all()
    p = logits.double().softmax(-1)
    listed = torch.zeros_like(p).scatter_add_(1, got.ids.clamp(min=0).long(), (got.ids >= 0).double()) > 0
    assert got.log_z.abs().max() < 1e-4
    assert torch.allclose(got.log_tail[:, 0].double(), p.masked_fill(listed, 0).sum(-1).log(), atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_generator_draws_the_same_ids(backend: str) -> None:
    logits, before, found = torch.randn(9, 5000), torch.get_num_threads(), []
    try:
        for threads, seed in ((1, 5), (2, 5), (2, 6)):
            torch.set_num_threads(threads)
            with use_backend(backend):
                found.append(topk_targets(logits, 4, samples=16, generator=torch.Generator().manual_seed(seed)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0].ids, found[1].ids)
    assert torch.equal(found[0].weights, found[1].weights)
    assert not torch.equal(found[0].ids, found[2].ids)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_impossible_id_is_never_drawn(backend: str) -> None:
    logits = torch.full((50, 3000), -torch.inf)
    logits[:, [5, 2500, 2999]] = torch.tensor([0.0, 1.0, 2.0])
    with use_backend(backend):
        drawn = topk_targets(logits, 0, samples=40).ids
        rest = topk_targets(logits, 1, samples=40).ids[:, 1:]
        nothing = topk_targets(logits, 3, samples=4)
    assert set(drawn.unique().tolist()) == {-1, 5, 2500, 2999}
    assert set(rest.unique().tolist()) == {-1, 5, 2500}
    assert (nothing.ids[:, 3:] == -1).all()
    assert torch.allclose(nothing.weights.sum(-1), torch.ones(50))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_row_is_named(backend: str) -> None:
    logits = torch.randn(4, 100)
    logits[2, 50] = torch.nan
    with use_backend(backend), pytest.raises(ValueError, match="row 2 holds NaN or"):
        topk_targets(logits, 0, samples=4)
