"""The losses as modules: options are given once, `forward` calls the function of the same name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from kdfast.ops.attention import attention_kl, attention_mse
from kdfast.ops.attention_map import attention_map_mse
from kdfast.ops.hidden import hidden_cosine, hidden_mse
from kdfast.ops.linear import linear_kd_loss
from kdfast.ops.linear_logit_mse import linear_logit_mse
from kdfast.ops.linear_topk import linear_topk_kd_loss
from kdfast.ops.logits import kd_loss
from kdfast.ops.topk import topk_kd_loss


class _Loss(nn.Module):
    """Holds the keyword options of a loss function; an option given at the call wins over one given here."""

    function: Callable[..., Any]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        inspect.signature(type(self).function).bind_partial(**options)
        self.options = options

    def forward(self, *args: Any, **options: Any) -> Any:
        return type(self).function(*args, **{**self.options, **options})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class KDLoss(_Loss):
    """`KDLoss(**options)(student_logits, teacher_logits, labels)` equals `kd_loss(..., **options)`."""

    function = staticmethod(kd_loss)


class LinearKDLoss(_Loss):
    """`LinearKDLoss(**options)(student_hidden, student_weight, teacher_hidden, teacher_weight, labels)` equals
    `linear_kd_loss(..., **options)`."""

    function = staticmethod(linear_kd_loss)


class TopKKDLoss(_Loss):
    """`TopKKDLoss(**options)(student_logits, targets, labels)` equals `topk_kd_loss(..., **options)`."""

    function = staticmethod(topk_kd_loss)


class LinearTopKKDLoss(_Loss):
    """`LinearTopKKDLoss(**options)(student_hidden, student_weight, targets, labels)` equals
    `linear_topk_kd_loss(..., **options)`."""

    function = staticmethod(linear_topk_kd_loss)


class AttentionMSELoss(_Loss):
    """`AttentionMSELoss(**options)(q_s, k_s, q_t, k_t)` equals `attention_mse(..., **options)`."""

    function = staticmethod(attention_mse)


class AttentionKLLoss(_Loss):
    """`AttentionKLLoss(**options)(q_s, k_s, q_t, k_t)` equals `attention_kl(..., **options)`."""

    function = staticmethod(attention_kl)


class AttentionMapMSELoss(_Loss):
    """`AttentionMapMSELoss(**options)(maps_s, maps_t)` equals `attention_map_mse(..., **options)`."""

    function = staticmethod(attention_map_mse)


class HiddenMSELoss(_Loss):
    """`HiddenMSELoss(**options)(h_s, h_t, projection, bias)` equals `hidden_mse(..., **options)`."""

    function = staticmethod(hidden_mse)


class HiddenCosineLoss(_Loss):
    """`HiddenCosineLoss(**options)(h_s, h_t)` equals `hidden_cosine(..., **options)`."""

    function = staticmethod(hidden_cosine)


class LinearLogitMSELoss(_Loss):
    """`LinearLogitMSELoss(**options)(student_hidden, student_weight, teacher_hidden, teacher_weight)` equals
    `linear_logit_mse(..., **options)`."""

    function = staticmethod(linear_logit_mse)
