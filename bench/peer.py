"""A contestant, and what it must agree on before its time counts."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cases import Objective, Outcome
from .measure import relative_error

Run = Callable[[Any], Outcome]


@dataclass(frozen=True)
class Peer:
    """A contestant.

    Args:
        run: a case -> (loss, gradients): forward and backward.
        missing: why it cannot run here, with the remedy; "" when it can.
        note: what a reader must know beside its number.
        ours: kdfast; ratios are to the first of these.
        comparable: it computes the same result, so that it is checked against ours and can be ahead of us. A floor
            (less work than the job) is not.
        modelled: it does the work that the op's byte and FLOP model counts, so that a rate can be told from its time.
        fresh: it destroys the case's logits, so that each call gets its own copy (made outside the timing).
        plain: the same function before compilation, which `agree` runs to spare a second compilation.
    """

    name: str
    run: Run
    missing: str = ""
    note: str = ""
    ours: bool = False
    comparable: bool = True
    fresh: bool = False
    modelled: bool = True
    plain: Run | None = None


def trained(loss: Callable[[Any], Tensor]) -> Run:
    """Forward and backward of a loss: gradients of what the case wants, nothing accumulated."""

    def run(case: Any) -> Outcome:
        value = loss(case)
        return value.detach(), torch.autograd.grad(value, case.wanted)

    return run


def ours_through_heads(loss: Callable[..., Tensor], half: bool) -> list[Peer]:
    """kdfast through a head; `half`: with logits rounded to bfloat16 as well, which `loss` takes as `logits_dtype`."""
    peers = [Peer("kdfast", trained(loss), ours=True, note="float32 logits" if half else "")]
    if half:
        run = trained(functools.partial(loss, logits_dtype=torch.bfloat16))
        peers.append(Peer("kdfast bfloat16 logits", run, ours=True, note="the precision of the others"))
    return peers


def agree(peer: Peer, ours: Peer, case: Any, tolerance: float = 1e-5) -> str:
    """ "" when loss and gradients of both are within `tolerance` of each other on a float64 case, else what differs.

    Several peers accumulate in float32 whatever they are given, hence 1e-5; another objective (T^2, the sides, the
    divisor) is off by orders more.
    """
    theirs, mine = ((p.plain or p.run)(case.fresh() if p.fresh else case) for p in (peer, ours))
    return differs(theirs, mine, tolerance)


def differs(got: Outcome, truth: Outcome, tolerance: float) -> str:
    """ "" when loss and gradients are within the relative `tolerance`, else the sentence that says what is off."""
    for name, error in (("loss", relative_error(got[:1], truth[:1])), ("gradient", relative_error(got[1], truth[1]))):
        if not error <= tolerance:  # NaN is off too
            return f"disagrees: {name} off by {error:.2g} of its norm, allowed {tolerance:.0e}"
    return ""


def not_installed(module: str, package: str) -> str:
    """ "" when a peer's module can be imported, else the sentence for its rows; nothing is imported."""
    return "" if importlib.util.find_spec(module) is not None else f"{package} is not installed: pip install {package}"


def needs_gpu(device: str, module: str, package: str) -> str:
    """The same for a peer whose kernels are Triton alone."""
    return not_installed(module, package) or ("" if device == "cuda" else "its kernels are Triton and need a GPU")


def options(o: Objective) -> dict[str, Any]:
    return dataclasses.asdict(o)


def topk_options(o: Objective) -> dict[str, Any]:
    names = ("temperature", "soft_weight", "hard_weight", "ignore_index")
    return {name: getattr(o, name) for name in names}


def wide(logits: Tensor) -> Tensor:
    """Half precision in float32, as Transformers' and TRL's losses do: in bfloat16 the gradient is off by percents."""
    return logits if logits.dtype == torch.float64 else logits.float()
