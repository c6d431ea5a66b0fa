"""`Batch`, and the one piece of memory its parts lie in, so that it reaches a GPU in one copy."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdfast import memory
from kdfast.cache import codec
from kdfast.cache.format import CacheError
from kdfast.ops.codec import EncodedTargets
from kdfast.ops.targets import TopKTargets
from kdfast.options import CODEC_SLACK

_SIZE = codec.JOB.index("size")
_CONTEXT_AT = codec.JOB.index("context_at")
_ALIGNMENT = 64
#: Where targets are decoded: by threads of the host, on the batch's device, or by the loss that reads them.
DECODE = ("auto", "host", "device", "loss")


@dataclass(frozen=True)
class Batch:
    """B documents padded at their end to the longest, Lmax.

    input_ids int64 [B, Lmax] (0 in the padding); targets [B, Lmax, k] (empty slots and a tail of 1 in the padding);
    loss_mask bool [B, Lmax], True where row t counts; labels int64 [B, Lmax], aligned with the logits, -100 where they
    do not count; attention_mask bool [B, Lmax]. context_ids and context_mask [B, Cmax] when a document has a context.

    Packed (`CacheReader.packed`), a row holds several documents: position_ids int64 [B, L] counts from 0 in each and
    document_ids int64 [B, L] numbers them from 0, -1 in the padding; a token may attend to its own document only.

    The parts share one piece of memory, which is free when the last of them is gone. Targets are `EncodedTargets` where they
    were asked for with `decode="loss"`. `place` is (epoch, batches of it so far) of a `CacheStream`, for its `state_dict`.
    """

    input_ids: Tensor
    targets: TopKTargets | EncodedTargets
    loss_mask: Tensor
    labels: Tensor
    attention_mask: Tensor
    context_ids: Tensor | None = None
    context_mask: Tensor | None = None
    position_ids: Tensor | None = None
    document_ids: Tensor | None = None
    place: tuple[int, int] | None = None

    def _map(self, change: Any) -> Batch:
        """Every part that there is changed by `change`."""
        parts: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "place"}
        changed: dict[str, Any] = {name: change(x) for name, x in parts.items() if x is not None}
        return dataclasses.replace(self, **changed)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on another device, part by part; a stream's `device` takes one copy."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch where a GPU can fetch it by itself; needs one."""
        return self._map(lambda x: x.pin_memory())


class Place(NamedTuple):
    """Where a tensor lies in a buffer: its first byte, dtype and shape."""

    at: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Staged:
    """A batch before it is taken apart: `places` in `buffer` (uint8), named as in `Batch`, `codec.Rows` and `codec.Index`."""

    buffer: Tensor
    places: dict[str, Place]
    layout: codec.Layout
    decode: str

    def to(self, device: torch.device | str) -> Staged:
        """The same on another device, in one copy; from pinned memory it does not wait."""
        return dataclasses.replace(self, buffer=self.buffer.to(device, non_blocking=True))

    def tensor(self, name: str) -> Tensor:
        at, dtype, shape = self.places[name]
        return self.buffer[at : at + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def batch(self) -> Batch:
        """Its parts, the targets decoded unless they are left to the loss."""
        fields: dict[str, Any] = {f.name: self.tensor(f.name) for f in dataclasses.fields(Batch) if f.name in self.places}
        return Batch(targets=self._targets(), **fields)

    def _targets(self) -> TopKTargets | EncodedTargets:
        if self.decode != "host":
            encoded = EncodedTargets(**{name: self.tensor(name) for name in codec.Index._fields}, layout=self.layout)
            return encoded if self.decode == "loss" else encoded.decode()
        rows = {name: self.tensor(name) for name in codec.Rows._fields if name in self.places}
        return TopKTargets(**rows, temperatures=self.layout.temperatures, vocab_size=self.layout.vocab_size)


def where_to_decode(decode: str, device: torch.device | str) -> str:
    """`decode` with "auto" resolved: on the device where that is a GPU with kernels, else by the host.

    Raises:
        CacheError: it is none of `DECODE`.
    """
    if decode not in DECODE:
        raise CacheError(f"decode: expected one of {', '.join(DECODE)}, got {decode!r}")
    if decode != "auto":
        return decode
    return "device" if torch.device(device).type == "cuda" else "host"


@dataclass(frozen=True)
class Plan:
    """What a batch is made of.

    Args:
        jobs: int64 [n, 8], the columns `codec.JOB`, all but context_at filled in.
        shape: rows and tokens a row.
        contexts: room for context ids of every record, 0 for none.
        extra: more fields of the batch, int64 of its shape.
    """

    jobs: np.ndarray
    shape: tuple[int, int]
    contexts: int = 0
    extra: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def stage(layout: codec.Layout, plan: Plan, next_label: bool, threads: int, decode: str, pin: bool) -> Staged:
    """Checks the records of a plan and puts them together, decoded ("host") or still in code; `pin`: in pinned memory.

    Raises:
        CorruptCache: a record is not what was written; its `job` says which.
    """
    places, size = _places(layout, plan, decode)
    staged = Staged(_buffer(size, pin), places, layout, decode)
    arrays = {name: staged.tensor(name).numpy() for name in places}
    jobs = plan.jobs
    jobs[:, _CONTEXT_AT] = np.arange(len(jobs)) * plan.contexts
    out = codec.Collated(*(arrays.get(name) for name in codec.Collated._fields))  # type: ignore[arg-type]
    if decode == "host":
        rows = codec.Rows(*(arrays.get(name) for name in codec.Rows._fields))  # type: ignore[arg-type]
        codec.decode_batch(layout, jobs, next_label, rows, out, threads)
    else:
        codec.index_batch(layout, jobs, next_label, codec.Index(*(arrays[n] for n in codec.Index._fields)), out, threads)
    for name, values in plan.extra.items():
        arrays[name][...] = values
    return staged


def _places(layout: codec.Layout, plan: Plan, decode: str) -> tuple[dict[str, Place], int]:
    """Where everything goes, and how many bytes that takes."""
    shape, context = plan.shape, (len(plan.jobs), plan.contexts)
    wanted: dict[str, Any] = dict.fromkeys(("input_ids", "labels", *plan.extra), (torch.int64, shape))
    wanted |= dict.fromkeys(("loss_mask", "attention_mask"), (torch.bool, shape))
    if plan.contexts:
        wanted |= {"context_ids": (torch.int64, context), "context_mask": (torch.bool, context)}
    if decode == "host":
        k, n_t = (*shape, layout.k), (*shape, len(layout.temperatures))
        wanted |= {"ids": (torch.int32, k), "logprobs": (torch.float32, k)}
        wanted |= {"log_z": (torch.float32, n_t), "log_tail": (torch.float32, n_t)}
        wanted |= {"weights": (torch.float32, k)} if layout.samples else {}
    else:
        data = int(plan.jobs[:, _SIZE].sum()) + CODEC_SLACK
        wanted |= {"offsets": (torch.int64, shape), "counts": (torch.int32, shape), "data": (torch.uint8, (data,))}
    places, at = {}, 0
    for name, (dtype, dimensions) in wanted.items():
        places[name] = Place(at, dtype, dimensions)
        at += -(-math.prod(dimensions) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    return places, at


def _buffer(size: int, pin: bool) -> Tensor:
    """Uninitialised bytes; ordinary memory that outlives them (`kdfast.memory`), or pinned memory, which torch recycles."""
    if pin:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    return memory.empty((size // 4,), dtype=torch.float32, device=torch.device("cpu")).view(torch.uint8)
