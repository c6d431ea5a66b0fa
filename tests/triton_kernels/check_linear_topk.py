"""Sparse targets through a head in Triton, captured and learnt from, against float64. Run by `test_triton_interpreted`."""

from __future__ import annotations

import plain
import pytest
import torch
import torch.nn.functional as F

from kdfast import linear_topk_kd_loss, linear_topk_targets, topk_kd_loss, topk_targets, use_backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("tail", "samples"), [("ghost", 0), ("uniform", 0), ("none", 6)])
def test_through_heads(tail: str, samples: int, dtype: torch.dtype, device: str) -> None:
    hidden, weight = torch.randn(7, 16, device=device).to(dtype), torch.randn(300, 16, device=device).div(2).to(dtype)
    teacher, labels = torch.randn(7, 8, device=device), torch.randint(0, 300, (7,), device=device)
    head = torch.randn(280, 8, device=device)
    with use_backend("triton"):
        options = {"temperatures": (2.0,), "samples": samples}
        targets = linear_topk_targets(teacher, head, 5, workspace_mb=0.004, **options)
        exact = topk_targets(F.linear(teacher, head), 5, temperatures=(2.0,))
    assert torch.equal(targets.ids[:, :5], exact.ids)
    assert torch.allclose(targets.logprobs[:, :5], exact.logprobs, atol=1e-5)
    assert torch.allclose(targets.log_z, exact.log_z, atol=1e-5)

    def run(x: torch.Tensor, w: torch.Tensor, backend: str) -> tuple[torch.Tensor, ...]:
        x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
        shared = {"tail": tail, "temperature": 2.0, "hard_weight": 0.5}
        with use_backend(backend):
            if backend == "triton":
                loss = linear_topk_kd_loss(x, w, targets, labels, workspace_mb=0.004, **shared)
            else:
                loss = topk_kd_loss(F.linear(x, w), targets, labels, **shared)
            return loss.detach(), *torch.autograd.grad(loss, (x, w))

    truth = run(hidden.double(), weight.double(), "reference")
    for got, expected in zip(run(hidden, weight, "triton"), truth, strict=True):
        assert plain.error(got, expected) <= {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
