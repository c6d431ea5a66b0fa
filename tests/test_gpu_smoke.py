"""What a GPU is shown first: every op in few calls, and the promises that only a GPU can break. Needs a CUDA device.

    python -m pytest tests/test_gpu_smoke.py -n 14 --maxschedchunk 1      about 70 s on 16 cores
    python -m pytest -m gpu -n 14 --maxschedchunk 1                       all, in order of `worth`: these, then the rest

`worth` is the order: 1 these calls; 2 values and gradients of every op; 3 their options; 4 edges; 5 what compiles long or
needs much memory. A run that is stopped has seen the most wanted first (`tests/conftest.py` sorts). The cluster kernel's tests
are `unproven`: they run when asked for, `-m unproven`, alone and last, for they may hang.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kdfast
from bench import smoke

DEVICE = "cuda"
OPTIONS = {"temperature": 2.0, "soft_weight": 0.7, "hard_weight": 0.3}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.smoke,
    pytest.mark.worth(1),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("call", smoke.calls(), ids=lambda call: call.name)
def test_call(call: smoke.Call) -> None:
    assert smoke.check(call, DEVICE, "triton") == ""


def losses() -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Each op as a loss of one tensor, and that tensor."""

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE)

    student, teacher, labels = random(64, 4099) * 3, random(64, 4099) * 3, torch.randint(0, 4099, (64,), device=DEVICE)
    labels[32] = -100
    targets = kdfast.topk_targets(teacher, 16, temperatures=(2.0,))
    hidden, weight, other = random(64, 32), random(4099, 32), random(4099, 32)
    q_s, q_t, k_s, k_t = (random(2, 3, 70, 16) for _ in range(4))
    mask = torch.arange(64, device=DEVICE) % 5 != 0
    return {
        "logits": (lambda x: kdfast.kd_loss(x, teacher, labels, **OPTIONS), student),
        "several": (
            lambda x: kdfast.kd_loss(x, [teacher, teacher.bfloat16()], labels, divergence="jsd", z_loss=1e-3, **OPTIONS),
            student,
        ),
        "overwrite": (lambda x: kdfast.kd_loss(x, teacher, labels, overwrite_logits=True, **OPTIONS), student),
        "rows": (lambda x: kdfast.kd_loss(x, teacher, labels, reduction="none", **OPTIONS).sum(), student),
        "capture": (lambda x: kdfast.topk_targets(x.detach(), 16, samples=4).log_z.sum() + 0 * x.sum(), student),
        "topk": (lambda x: kdfast.topk_kd_loss(x, targets, labels, **OPTIONS), student),
        "linear-topk": (lambda x: kdfast.linear_topk_kd_loss(x, weight, targets, labels, **OPTIONS), hidden * 0.5),
        "linear": (lambda x: kdfast.linear_kd_loss(x, weight, hidden, weight, labels, **OPTIONS), hidden * 0.5),
        "logit-mse": (lambda x: kdfast.linear_logit_mse(x, weight, hidden, other, mask=mask), hidden * 0.5),
        "logit-mse, every row": (lambda x: kdfast.linear_logit_mse(x, weight, hidden, other), hidden * 0.5),
        "scores": (lambda x: kdfast.attention_mse(x, k_s, q_t, k_t, on="scores"), q_s),
        "probs": (lambda x: kdfast.attention_mse(x, k_s, q_t, k_t, on="probs", causal=True), q_s),
        "kl": (lambda x: kdfast.attention_kl(x, k_s, q_t, k_t, causal=True), q_s),
        "maps": (lambda x: kdfast.attention_map_mse(x, q_t), q_s),
        "hidden": (lambda x: kdfast.hidden_mse(x, hidden, mask=mask), hidden * 0.5),
        "projected": (lambda x: kdfast.hidden_mse(x, student[:, :48], weight[:48], mask=mask), hidden * 0.5),
        "cosine": (lambda x: kdfast.hidden_cosine(x, hidden, mask=mask), hidden * 0.5),
    }


OPS = (
    "logits", "several", "overwrite", "rows", "capture", "topk", "linear-topk", "linear", "logit-mse", "logit-mse, every row",
    "scores", "probs", "kl", "maps", "hidden", "projected", "cosine",
)  # fmt: skip


@pytest.mark.parametrize("op", OPS)
def test_no_host_synchronisation(op: str) -> None:
    """Forward and backward, with an incoming gradient other than 1, enqueue work and ask the device nothing."""
    with kdfast.use_backend("triton"):
        loss, at = losses()[op]
        first, second = (at.clone().requires_grad_() for _ in range(2))
        torch.autograd.grad(loss(first) * 2, first)
        torch.cuda.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.autograd.grad(loss(second) * 2, second)
        finally:
            torch.cuda.set_sync_debug_mode(before)


@pytest.mark.hardware
@pytest.mark.parametrize("op", ["logits", "topk", "linear"])
def test_a_graph_gives_the_same_bits(op: str) -> None:
    with kdfast.use_backend("triton"):
        loss, at = losses()[op]
        x = at.requires_grad_()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                wanted = torch.autograd.grad(loss(x), x)[0]
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            (grad,) = torch.autograd.grad(loss(x), x)
        graph.replay()
        torch.testing.assert_close(grad, wanted, rtol=0, atol=0)


@pytest.mark.hardware
def test_compiles_as_one_graph() -> None:
    loss, at = losses()["logits"]
    x = at.requires_grad_()
    (wanted,) = torch.autograd.grad(loss(x), x)
    (grad,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x), x)
    torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-7)
