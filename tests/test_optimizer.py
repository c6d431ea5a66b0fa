"""The trainer's AdamW steps as `torch.optim.AdamW` by itself does, whatever lies beside a parameter in memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kdfast.train.optimizer import make_optimizer
from kdfast.train.recipe import Optimizer

PARAMETERS: dict[str, Callable[[], Tensor]] = {
    "dense": lambda: torch.randn(8, 16),
    "vector": lambda: torch.randn(7),
    "scalar": lambda: torch.randn(()),
    "channels-last": lambda: torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
    "columns-of-a-wider-one": lambda: torch.randn(8, 40)[:, :16],
    "transposed": lambda: torch.randn(8, 16).T,
    "every-other-row": lambda: torch.randn(16, 5)[::2],
    "complex": lambda: torch.randn(8, 4, dtype=torch.complex64),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_steps_are_those_of_adamw(name: str) -> None:
    torch.manual_seed(0)
    start = PARAMETERS[name]()
    options = Optimizer(lr=1e-2, weight_decay=0.1)
    ours = nn.ParameterList([nn.Parameter(start), nn.Parameter(torch.randn(3, 3))])
    theirs = nn.ParameterList([nn.Parameter(p.detach().clone()) for p in ours])
    outside = start._base.clone() if start._base is not None else None
    decays = [{"params": [p], "weight_decay": 0.1 if p.ndim >= 2 else 0.0} for p in theirs]
    plain = torch.optim.AdamW(decays, lr=1e-2, betas=(options.beta1, options.beta2), eps=options.eps, foreach=False)
    made = make_optimizer(ours, options)
    for _ in range(5):
        for parameters, optimizer in ((ours, made), (theirs, plain)):
            optimizer.zero_grad()
            sum(((p.abs() + p.abs().cos()).float().sum() for p in parameters), torch.zeros(())).backward()
            optimizer.step()
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.detach(), want.detach(), rtol=1e-6, atol=1e-6)
    if name == "columns-of-a-wider-one":
        assert outside is not None
        assert torch.equal(start._base[:, 16:], outside[:, 16:])
