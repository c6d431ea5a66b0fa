"""topk_targets: capture is exact, and what it leaves out is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdfast import Head, topk_targets, use_backend
from kdfast.ops.topk import label_logprobs

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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head", [Head(softcap=4.0), Head(scale=0.3), Head(5.0, 2.0)], ids=["cap", "scale", "both"])
def test_capture_through_a_head(head: Head, backend: str) -> None:
    logits = torch.randn(3, 3001) * 3
    z = logits.double() * head.scale
    z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    with use_backend(backend):
        got = topk_targets(logits, 9, temperatures=(1.0, 2.0), head=head)
    for column, temperature in enumerate(got.temperatures):
        logprobs, log_z, log_tail = dense_truth(z, got.ids, temperature)
        assert torch.allclose(got.logprobs.double(), logprobs, atol=2e-6)
        assert torch.allclose(got.log_z[..., column].double(), log_z, atol=2e-6)
        assert torch.allclose(got.log_tail[..., column].double(), log_tail, atol=1e-5)
    assert torch.equal(got.ids.long(), z.float().sort(dim=-1, descending=True, stable=True).indices[:, :9])


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
def test_opcheck(backend: str) -> None:
    teacher, draws = torch.randn(5, 40), torch.rand(5, 3, dtype=torch.float64)
    op = torch.ops.kdfast.topk_capture.default
    torch.library.opcheck(op, (teacher, 4, [1.0, 2.0], None, 1.0, 0.0, 1.0, backend))
    torch.library.opcheck(op, (teacher, 0, [1.0], draws, 2.0, 5.0, 1.0, backend))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k: expected 0 < k <= 20"),
        ({"k": 21}, "k: expected 0 < k <= 20"),
        ({"k": 21, "samples": 4}, "k: expected 0 <= k <= 20"),
        ({"k": 2, "temperatures": ()}, "temperatures: expected one or more"),
        ({"k": 2, "temperatures": (0.0,)}, "temperatures: expected one or more"),
        ({"k": 2, "samples": -1}, "samples: expected a number >= 0, got -1"),
        ({"k": 2, "samples": 3, "sample_temperature": 0.0}, "sample_temperature: expected a finite number above 0"),
        ({"k": 2, "head": 30.0}, r"head: expected kdfast.Head\(softcap=..., scale=...\), got 30.0"),
    ],
)
def test_capture_bad_input(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        topk_targets(torch.randn(4, 20), **arguments)
