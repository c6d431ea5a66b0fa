"""Scales a gradient that was formed in the forward pass. Contract: `kdfast.backends`."""

from torch import Tensor


def scale_(grad: Tensor, upstream: Tensor) -> None:
    grad.mul_(upstream)
