"""A head's own Gram matrix W^T W, formed in chunks of vocabulary rows and kept for as long as a frozen head lives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

#: Rows of hidden states or head that are worked on at a time.
CHUNK = 4096
#: Columns of a quarter of a Gram from which on splitting it pays.
_SPLIT = 128
#: Heads whose own Grams are kept.
_HEADS = 8


@dataclass
class Head:
    """What is known of a head: its mean row when logits are centred, and W^T W by dtype of the products."""

    mean: Tensor | None
    grams: dict[torch.dtype, Tensor] = field(default_factory=dict)

    def gram(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        if dtype not in self.grams:
            self.grams[dtype] = gram(weight, self.mean, dtype)
        return self.grams[dtype]


# Never changed in place: threads (autograd has one for each device) read it while another puts a new one in its place. Two that
# do so at once forget what one of them found, which costs it its next call.
_heads: dict[tuple[object, ...], tuple[StorageWeakRef, Head]] = {}


def head_of(weight: Tensor, center: bool) -> Head:
    """The `Head` of a weight, from an earlier call if nothing was written to it since.

    Known by its memory, place, shape and version counter, and on a GPU by the stream that forms its Gram, for which another
    stream would not wait. A CUDA graph forms its own, which is filled when it is replayed and no other may read. The memory is
    held weakly: a head that is gone is forgotten at the next call.
    """
    global _heads
    heads = _heads
    if any(memory.expired() for memory, _ in heads.values()):
        _heads = heads = {key: entry for key, entry in heads.items() if not entry[0].expired()}
    captured = weight.is_cuda and torch.cuda.is_current_stream_capturing()
    if captured or weight.is_inference():  # the latter has no version counter
        return Head(column_mean(weight) if center else None)
    memory = StorageWeakRef(weight.untyped_storage())
    stream = torch.cuda.current_stream(weight.device).cuda_stream if weight.is_cuda else 0
    place = memory.cdata, weight.storage_offset(), weight.shape, weight.stride(), weight.dtype, center, stream
    known = heads.get((*place, weight._version))
    if known is not None:
        return known[1]
    others = [(key, entry) for key, entry in heads.items() if key[:-1] != place]
    head = Head(column_mean(weight) if center else None)
    _heads = {**dict(others[max(0, len(others) - _HEADS + 1) :]), (*place, weight._version): (memory, head)}
    return head


def column_mean(weight: Tensor) -> Tensor:
    """Mean row of a head, summed in float64."""
    total = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for chunk in weight.split(CHUNK):
        total += chunk.sum(0, dtype=torch.float64)
    return total / weight.shape[0]


def head_chunk(weight: Tensor, mean: Tensor | None, rows: slice, dtype: torch.dtype) -> Tensor:
    """Rows of a head in `dtype`, centred."""
    chunk = weight[rows]
    if mean is None:
        return chunk.to(dtype)
    return (chunk.double() - mean).to(dtype) if dtype == torch.float64 else chunk.to(dtype) - mean.to(dtype)


def chunks(n: int, size: int = CHUNK) -> Iterator[slice]:
    return (slice(begin, min(begin + size, n)) for begin in range(0, n, size))


def gram(weight: Tensor, mean: Tensor | None, dtype: torch.dtype) -> Tensor:
    """W^T W of a centred head in float64, from products in `dtype`."""
    total = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)
    for rows in chunks(weight.shape[0]):
        total += square(head_chunk(weight, mean, rows, dtype))
    return total


def square(x: Tensor) -> Tensor:
    """X^T X; of wide matrices one of the two equal quarters is copied instead of multiplied."""
    half = x.shape[1] // 2
    if half < _SPLIT:
        return x.t() @ x
    out = x.new_empty(x.shape[1], x.shape[1])
    left, right = x[:, :half], x[:, half:]
    torch.mm(left.t(), x, out=out[:half])
    torch.mm(right.t(), right, out=out[half:, half:])
    out[half:, :half] = out[:half, half:].t()
    return out
