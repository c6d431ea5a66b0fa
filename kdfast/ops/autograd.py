"""What every `torch.autograd.Function` of these ops shares."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])


def known_signature(forward: _F) -> _F:
    """The same function, its signature worked out once: `Function.apply` asks `inspect` for it in every call, 20 us of a loss
    on short rows, and several times as much when Python's code has left the caches."""
    forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return forward
