"""Scales a gradient that was formed in the forward pass. Contract: `kdfast.backends`."""

from torch import Tensor


def scale_(grad: Tensor, upstream: Tensor) -> None:
    # On a GPU torch rounds a number of no dimensions to the dtype of `grad` before the product; on a CPU it does not.
    grad.mul_(upstream if grad.device.type == "cpu" else upstream.reshape(1))
