"""Large buffers on a CPU that outlive the step that needed them.

A gradient of 100 MB that is returned to the system and asked for again in the next step costs its page faults each
time: more than the arithmetic that fills it, and several times more where a virtual machine has meanwhile handed the
free memory back to its host. So a large buffer that nobody holds any more is kept, and given to the next that fits.
GPUs have such an allocator in torch already.
"""

from __future__ import annotations

import collections
import math
import mmap
import os
import weakref

import torch
from torch import Tensor

#: Smaller buffers are left to torch, whose allocator recycles them.
_LARGE = 4 << 20
_HUGE_PAGE = 2 << 20
#: MiB of idle buffers that are kept, the ones used last; 0 keeps none.
KEEP_MB = int(os.environ.get("KDFAST_KEEP_MB", "1024"))

# Buffers come back from wherever a tensor dies: any thread, or a garbage collection in the middle of `_take`. Only
# single operations of the deque are relied on, each of them atomic, and no lock that such a return could wait for.
_idle: collections.deque[mmap.mmap] = collections.deque()


def empty(shape: tuple[int, ...] | torch.Size, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty(shape, dtype=dtype, device=device); large ones on a CPU from memory that earlier ones have left.

    The memory belongs to the tensor and all its views until the last of them is gone.
    """
    count = math.prod(shape)
    nbytes = count * dtype.itemsize
    if device.type != "cpu" or nbytes < _LARGE or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.empty(shape, dtype=dtype, device=device)
    pages = _take(nbytes) or _new(nbytes)
    view = memoryview(pages)
    # The tensor's storage holds `view`, and nothing else does: when it goes, the pages are free again.
    weakref.finalize(view, _give_back, pages).atexit = False
    tensor = torch.frombuffer(view, dtype=dtype, count=count).view(shape)
    if torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory:  # type: ignore[attr-defined]
        tensor.fill_(torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max)  # as torch.empty does
    return tensor


def release() -> int:
    """Hands all idle buffers back to the system; returns their bytes."""
    freed = 0
    while _idle:
        freed += len(_idle.popleft())
    return freed


def _take(nbytes: int) -> mmap.mmap | None:
    """The idle buffer that was used last among those that fit without wasting as much again."""
    passed: list[mmap.mmap] = []
    found = None
    while found is None:
        try:
            pages = _idle.pop()
        except IndexError:
            break
        if nbytes <= len(pages) <= 2 * nbytes:
            found = pages
        else:
            passed.append(pages)
    _idle.extend(reversed(passed))
    return found


def _new(nbytes: int) -> mmap.mmap:
    size = -(-nbytes // _HUGE_PAGE) * _HUGE_PAGE
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def _give_back(pages: mmap.mmap) -> None:
    _idle.append(pages)
    while sum(len(kept) for kept in _idle.copy()) > KEEP_MB << 20:
        try:
            _idle.popleft()
        except IndexError:
            return
