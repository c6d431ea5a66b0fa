"""Rows of a teacher cache decoded where the loss is, against the copy of decoded rows that it saves."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import kdfast
from kdfast import EncodedTargets, TopKTargets
from kdfast.cache import codec, record

from .cases import Outcome
from .contest import Contest
from .peers import Peer
from .report import Model

_DISTINCT = 512


@dataclass(frozen=True)
class CodecCase:
    """The same targets in code on the device, and decoded on the host, for a GPU in pinned memory.

    Outcome: the log-probabilities' mean, and (log-probabilities, log_tail).
    """

    coded: EncodedTargets
    decoded: TopKTargets

    @classmethod
    def make(cls, n: int, vocab: int, k: int, device: str, seed: int = 0) -> CodecCase:
        distinct = min(n, _DISTINCT)
        logits = torch.randn(distinct, vocab, generator=torch.Generator().manual_seed(seed)).mul_(3)
        targets = kdfast.topk_targets(logits, k)
        rows = codec.Rows(*(x.numpy() for x in (targets.ids, targets.logprobs, targets.log_z, targets.log_tail)))
        layout = codec.Layout(k, vocab, (1.0,))
        one = _indexed(layout, codec.encode(layout, rows, 5e-5, None), distinct)
        # Every row's bytes at a place of their own, as in a batch.
        times = -(-n // distinct)
        size = one.data.numel() - 64
        data = torch.cat([one.data[:size].repeat(times), one.data[size:]])
        offsets = (one.offsets + size * torch.arange(times)[:, None]).reshape(-1)[:n]
        coded = EncodedTargets(data, offsets, one.counts.repeat(times)[:n], layout)
        decoded = coded.decode()
        if device == "cuda":
            decoded = decoded._map(lambda x: x.pin_memory())
        return cls(coded.to(device), decoded)

    def comparable(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return grads

    def truth(self) -> Outcome:
        device = self.coded.data.device
        logprobs, log_tail = (x.to(device).double() for x in (self.decoded.logprobs, self.decoded.log_tail))
        return logprobs.mean(), (logprobs, log_tail)


def _indexed(layout: codec.Layout, encoded: codec.Encoded, rows: int) -> EncodedTargets:
    """A record of these rows, as a batch of one would have it."""
    packed = record.pack(np.zeros(rows, np.int64), encoded.data, encoded.has_counts, None, None, None)
    payload = np.frombuffer(packed, np.uint8)
    checksum = np.uint64(codec.checksum(payload)).astype(np.int64)
    job = np.array([[payload.ctypes.data, payload.size, rows, 0, checksum, 0, rows, 0]], np.int64)
    index = codec.Index(np.empty(payload.size + 64, np.uint8), np.empty(rows, np.int64), np.empty(rows, np.int32))
    rest = codec.Collated(*(np.empty(rows, t) for t in (np.int64, np.int64, bool, bool)), None, None)
    codec.index_batch(layout, job, True, index, rest, 1)
    return EncodedTargets(*map(torch.from_numpy, index), layout)


def _outcome(targets: TopKTargets) -> Outcome:
    return targets.logprobs.mean(), (targets.logprobs, targets.log_tail)


def _ours(case: CodecCase) -> Outcome:
    return _outcome(case.coded.decode())


def _plain(case: CodecCase) -> Outcome:
    with kdfast.use_backend("reference"):
        return _outcome(case.coded.decode())


def _copied(case: CodecCase) -> Outcome:
    device = case.coded.data.device
    copy = case.decoded.to(device, non_blocking=True) if device.type == "cuda" else case.decoded._map(torch.clone)
    return _outcome(copy)


def contestants(n: int, vocab: int, k: int, device: str = "cpu") -> Contest:
    """kdfast's decoder, the same in plain PyTorch, and what a batch that the host decoded costs to copy."""
    moved = n * (k * 8 + 8 + int(k * 2.5))
    model = Model(bytes=moved, text=f"N*(10.5*k+8) = {moved / 1e9:.3g} GB (about 2.5 bytes an entry read, 8 written)")
    peers = [
        Peer("kdfast", _ours, ours=True),
        Peer("plain PyTorch", _plain),
        Peer("copy of decoded rows", _copied, modelled=False, note="without the host's time to decode them"),
    ]
    make = functools.partial(CodecCase.make, n, vocab, k, device)
    small = functools.partial(CodecCase.make, 7, 129, 5, device)
    return Contest("codec", peers, make, small, model, torch.float32, f"N={n} V={vocab} k={k}")
