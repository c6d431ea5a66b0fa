"""`attention_map_mse`: for those who have the attention maps. The kernels are those of `attention`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdfast import dispatch
from kdfast.ops import attention_inputs as inputs
from kdfast.ops import rows
from kdfast.ops.autograd import outside_autocast
from kdfast.ops.formed import InBackward, InForward

_lib = torch.library.Library("kdfast", "FRAGMENT")
_lib.define(
    "attention_map(Tensor maps_s, Tensor maps_t, Tensor? mask, Tensor scale, str backend, bool need_grad) -> (Tensor, Tensor)"
)


@torch.library.impl(_lib, "attention_map", "CompositeExplicitAutograd")
@outside_autocast
def _attention_map(
    maps_s: Tensor, maps_t: Tensor, mask: Tensor | None, scale: Tensor, backend: str, need_grad: bool
) -> tuple[Tensor, Tensor]:
    loss, grad = dispatch.kernel("attention", backend).map_forward(maps_s, maps_t, mask, scale, need_grad)
    if rows.values_are_checked(loss.device) and not math.isfinite(loss.sum()):
        batch, head = (~loss.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"maps_s, maps_t: batch {batch}, head {head} has a difference that is not finite where the mask counts;"
            " expected finite numbers: leave masked scores of -inf out by `mask`"
        )
    return loss, grad


@torch.library.register_fake("kdfast::attention_map", lib=_lib)
def _attention_map_fake(
    maps_s: Tensor, maps_t: Tensor, mask: Tensor | None, scale: Tensor, backend: str, need_grad: bool
) -> tuple[Tensor, Tensor]:
    shape = maps_s.shape if need_grad else (0,)
    return torch.empty_like(scale), torch.empty(shape, dtype=maps_s.dtype, device=maps_s.device)


def attention_map_mse(
    maps_s: Tensor,
    maps_t: Tensor,
    *,
    mask: Tensor | None = None,
    normalize: str = "valid",
    reduction: str = "mean",
) -> Tensor:
    """Mean squared difference of two attention maps that exist already: one read of each, the gradient in the same pass.

    Equals

        loss = (maps_s - maps_t)[mask.expand_as(maps_s)].square().mean()

    Args:
        maps_s: `[B, H, Lq, Lk]` scores or probabilities; float32, bfloat16, float16 (or float64, on the reference backend).
        maps_t: same shape, any float dtype. No gradient.
        mask: bool, True counts, of a shape that broadcasts to the maps', such as `[B, 1, 1, Lk]`. What it leaves out is
            ignored and may be -inf.
        normalize: "valid" divides by the pairs that count, "all" by every pair.
        reduction: "mean", "sum", or "none" (`[B, H]`, each head by itself).

    Raises:
        ValueError: a shape, dtype, device, option, or (on a CPU, or under `debug_checks()`) a value is wrong.

    Source: Jiao et al. 2020 (TinyBERT), arXiv 1909.10351, equation 7.
    """
    rows.check_float("maps_s", maps_s)
    rows.check_float("maps_t", maps_t, like=maps_s, like_name="maps_s")
    if maps_s.ndim != 4:
        raise ValueError(f"maps_s: expected shape [B, H, Lq, Lk], got {list(maps_s.shape)}")
    if maps_t.shape != maps_s.shape:
        raise ValueError(f"maps_t: expected shape {list(maps_s.shape)} like maps_s, got {list(maps_t.shape)}")
    lq, lk = maps_s.shape[2:]
    counts: Tensor | int = lq * lk
    if mask is not None:
        mask = _expanded(mask, maps_s)
        counts = mask.sum((-1, -2))
    scale = inputs.head_scale(counts, lq * lk, normalize, reduction, maps_s)
    backend = dispatch.choose("attention", maps_s.device, maps_s.dtype)
    arguments = (maps_s, maps_t.detach(), mask, scale, backend)
    needs_grad = maps_s.requires_grad and torch.is_grad_enabled()
    if needs_grad and reduction != "none" and maps_s.dtype != torch.float16:
        return InForward.apply("attention_map", 1, *arguments, True)[0]
    loss = InBackward.apply("attention_map", 1, 4, *arguments, needs_grad)
    return loss if reduction == "none" else loss.sum()


def _expanded(mask: Tensor, maps: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        raise ValueError(f"mask: expected dtype torch.bool (True counts), got {mask.dtype}; use mask.bool()")
    if mask.device != maps.device:
        raise ValueError(f"mask: expected device {maps.device} like maps_s, got {mask.device}")
    padded = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    if mask.ndim > 4 or any(m not in (1, n) for m, n in zip(padded, maps.shape, strict=True)):
        raise ValueError(f"mask: expected a shape that broadcasts to {list(maps.shape)}, got {list(mask.shape)}")
    return mask.expand(maps.shape)
