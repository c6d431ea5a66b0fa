"""The losses as modules: options are given once, `forward` calls the function of the same name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from kdfast.ops.logits import kd_loss
from kdfast.ops.topk import topk_kd_loss


class _Loss(nn.Module):
    """Holds the keyword options of a loss function; an option given at the call wins over one given here."""

    function: Callable[..., Any]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, *args: Any, **options: Any) -> Any:
        return type(self).function(*args, **{**self.options, **options})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class KDLoss(_Loss):
    """`KDLoss(**options)(student_logits, teacher_logits, labels)` equals `kd_loss(..., **options)`."""

    function = staticmethod(kd_loss)


class TopKKDLoss(_Loss):
    """`TopKKDLoss(**options)(student_logits, targets, labels)` equals `topk_kd_loss(..., **options)`."""

    function = staticmethod(topk_kd_loss)
