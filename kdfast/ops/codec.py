"""`EncodedTargets`: rows of a teacher cache as their bytes, decoded on the device where a loss reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdfast import dispatch
from kdfast.ops.targets import TopKTargets, column_of
from kdfast.options import CODEC_SLACK, CodecLayout

_lib = torch.library.Library("kdfast", "FRAGMENT")
_lib.define(
    f"codec_decode(Tensor data, Tensor offsets, Tensor counts, {CodecLayout.schema()}, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _layout(k: int, vocab_size: int, temperatures: Sequence[float], *rest: Any) -> CodecLayout:
    return CodecLayout(k, vocab_size, tuple(temperatures), *rest)


@torch.library.impl(_lib, "codec_decode", "CompositeExplicitAutograd")
def _decode(data: Tensor, offsets: Tensor, counts: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *fields, backend = rest
    return tuple(dispatch.kernel("codec", backend).decode(data, offsets, counts, _layout(*fields)))


@torch.library.register_fake("kdfast::codec_decode", lib=_lib)
def _decode_fake(data: Tensor, offsets: Tensor, counts: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    layout = _layout(*rest[:-1])
    n, k, n_t = offsets.shape[0], layout.k, len(layout.temperatures)
    sizes = [(n, k), (n, n_t), (n, n_t), (n, k) if layout.samples else (0,)]
    return data.new_empty((n, k), dtype=torch.int32), *(data.new_empty(size, dtype=torch.float32) for size in sizes)


@dataclass(frozen=True)
class EncodedTargets:
    """`TopKTargets` as the bytes of docs/cache-format.md, section 4: a third of their size, on whatever device.

    A loss takes them like `TopKTargets`, and `decode()` gives those: the same floats, bit for bit, on every backend.

    Args:
        data: `[bytes]` uint8, rows and 64 bytes after the last that belong to none.
        offsets: `[...]` int64, where in `data` a row begins, behind its count.
        counts: `[...]` int32, its entries; 0: an empty row, whose offset says nothing.
        layout: what is the same for every row.
    """

    data: Tensor
    offsets: Tensor
    counts: Tensor
    layout: CodecLayout

    def __post_init__(self) -> None:
        for name, dtype in (("data", torch.uint8), ("offsets", torch.int64), ("counts", torch.int32)):
            if getattr(self, name).dtype != dtype:
                raise ValueError(f"targets.{name}: expected dtype {dtype}, got {getattr(self, name).dtype}")
        if self.data.ndim != 1 or self.data.shape[0] < CODEC_SLACK:
            raise ValueError(f"targets.data: expected shape [bytes] with {CODEC_SLACK} or more, got {list(self.data.shape)}")
        if self.offsets.shape != self.counts.shape:
            shapes = f"{list(self.offsets.shape)} and {list(self.counts.shape)}"
            raise ValueError(f"targets: expected offsets and counts of one shape, got {shapes}")

    @property
    def k(self) -> int:
        return self.layout.k

    @property
    def vocab_size(self) -> int:
        return self.layout.vocab_size

    @property
    def temperatures(self) -> tuple[float, ...]:
        return self.layout.temperatures

    def column(self, temperature: float) -> int:
        """Position of a captured temperature, as `TopKTargets.column`."""
        return column_of(temperature, self.temperatures)

    def _map(self, change: Any) -> EncodedTargets:
        return dataclasses.replace(self, data=change(self.data), offsets=change(self.offsets), counts=change(self.counts))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> EncodedTargets:
        """The same targets on another device."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> EncodedTargets:
        """The same targets where a GPU can fetch them by itself; needs one."""
        return self._map(lambda x: x.pin_memory())

    def __getitem__(self, index: Any) -> EncodedTargets:
        """Indexes the leading dimensions; the bytes stay as they are."""
        return dataclasses.replace(self, offsets=self.offsets[index], counts=self.counts[index])

    @torch.no_grad()
    def decode(self) -> TopKTargets:
        """What the bytes say. A row that no writer produces is NaN, which makes the loss that reads it name the row."""
        lead, layout = self.offsets.shape, self.layout
        backend = dispatch.choose("codec", self.data.device, torch.float32)
        flat = self.data.contiguous(), self.offsets.reshape(-1).contiguous(), self.counts.reshape(-1).contiguous()
        ids, logprobs, log_z, log_tail, weights = torch.ops.kdfast.codec_decode(*flat, *layout.values, backend)
        return TopKTargets(
            ids.view(*lead, layout.k),
            logprobs.view(*lead, layout.k),
            log_z.view(*lead, log_z.shape[1]),
            log_tail.view(*lead, log_tail.shape[1]),
            layout.temperatures,
            layout.vocab_size,
            weights.view(*lead, layout.k) if layout.samples else None,
        )
