"""Targets to bytes and back, by the C++ codec where it is built and by the Python one where it is not."""

from __future__ import annotations

import importlib.util
import math
import warnings
from typing import Any

import numpy as np
import torch

from kdfast import memory
from kdfast.backends import compiled
from kdfast.cache import codec_encode, codec_math, codec_python
from kdfast.cache.codec_arrays import JOB as JOB
from kdfast.cache.codec_arrays import Collated as Collated
from kdfast.cache.codec_arrays import Encoded as Encoded
from kdfast.cache.codec_arrays import Index as Index
from kdfast.cache.codec_arrays import Rows as Rows
from kdfast.cache.codec_python import Status
from kdfast.cache.format import VERSION, CacheError, CorruptCache, Settings
from kdfast.options import CODEC_SLACK
from kdfast.options import CodecLayout as Layout

_native, _why_not = compiled.load()
if _native is not None and getattr(_native, "codec_version", 1) != VERSION:
    _native, _why_not = None, f"the C++ extension writes another cache format than {VERSION}: {compiled.REBUILD}"
#: Entries and bytes that plain Python works on before it says that it is slow: about a second. An extension that is there and
#: broken is said at once.
_NOTICED = 1 << 16 if importlib.util.find_spec("kdfast._C") is None else 0
_worked = 0

_FAULTS = {
    Status.TRUNCATED: "it ends before its last code",
    Status.BAD_CODE: "it holds a code that no writer produces",
    Status.BAD_ID: "it holds ids that do not rise or lie outside the vocabulary",
    Status.BAD_COUNT: "it claims more entries than k",
    Status.BAD_TAIL: "its tail contradicts its number of entries",
    Status.TRAILING: "bytes follow its last code",
    Status.BAD_DRAWS: "its draws contradict the kind of the cache",
    Status.BAD_HEADER: "its header holds flags, widths or lengths that no writer produces or the index contradicts",
    Status.BAD_CHECKSUM: "it does not match its checksum; capture it again or restore the file",
    Status.INPUT_ID: "targets.ids: expected ids in [-1, vocab_size)",
    Status.INPUT_TWICE: "targets.ids: expected distinct ids, got one twice",
    Status.INPUT_VALUE: "targets: expected logprobs and log_tail <= 0 without NaN",
    Status.INPUT_MASS: "targets: expected exp(logprobs / T - log_z) and exp(log_tail) to sum to 1 at every temperature, or"
    " a loss_mask that leaves the row out",
    Status.INPUT_DRAWS: "targets.weights: expected draws that sum to `samples` in every row",
}


def native() -> bool:
    """Whether the C++ codec is built."""
    return _native is not None


def _slow(work: int) -> None:
    """Says once, when there is work to notice it by, that plain Python does it."""
    global _worked, _why_not
    _worked += work
    if _why_not is not None and _worked > _NOTICED:
        warnings.warn(
            f"kdfast.cache: targets are coded in plain Python, about a thousand times slower: {_why_not}", stacklevel=4
        )
        _why_not = None


def layout_of(settings: Settings) -> Layout:
    """What the codec needs to know of a cache."""
    return Layout(
        settings.k, settings.vocab_size, settings.temperatures, settings.samples, settings.kind == "mixed",
        settings.sample_temperature,
    )  # fmt: skip


def empty_rows(layout: Layout, lead: tuple[int, ...]) -> Rows:
    """Uninitialised rows of the given leading dimensions, in one piece of memory that outlives them (`kdfast.memory`)."""
    n, k, n_t = math.prod(lead), layout.k, len(layout.temperatures)
    widths = [k, k, n_t, n_t, *([k] if layout.samples else [])]
    buffer = memory.empty((n * sum(widths),), dtype=torch.float32, device=torch.device("cpu")).numpy()
    ends = np.cumsum([0, *(n * w for w in widths)]).tolist()
    ids, *rest = (buffer[a:b].reshape(*lead, w) for a, b, w in zip(ends, ends[1:], widths, strict=False))
    return Rows(ids.view(np.int32), *rest)


def checksum(data: np.ndarray | bytes) -> int:
    """XXH64 of the bytes, seed 0."""
    if _native is None:
        _slow(len(data))
        return codec_math.xxh64(bytes(data))
    array = np.frombuffer(data, np.uint8)
    return int(_native.codec_checksum(array.ctypes.data, array.size))


def encode(
    layout: Layout,
    rows: Rows,
    max_kl: float,
    values_bits: int | None,
    draws: np.ndarray | None = None,
    counted: np.ndarray | None = None,
) -> Encoded:
    """Rows as bytes with a KL error of at most `max_kl` nats a token at every temperature, or with `values_bits` bits a value.

    Args:
        draws: int32 [L, k], how often each entry was drawn, 0 for an exact one; with samples only.
        counted: bool [L], False where a row that is no distribution becomes an empty one; None: every row counts.

    Raises:
        CacheError: the targets are not a distribution over ids of the vocabulary; names the row.
    """
    tokens = len(rows.ids)
    kl = np.empty(tokens, np.float32)
    arrays = (*rows[:4], draws, counted)
    if _native is None:
        _slow(rows.ids.size)
        result = codec_encode.encode(layout, arrays, max_kl, values_bits or 0, kl)
    else:
        result = _native.codec_encode(layout.native, tokens, _addresses(arrays), max_kl, values_bits or 0, kl.ctypes.data)
    status, row, data, has_counts, exact = result
    if status:
        raise CacheError(f"{_FAULTS[Status(status)]}; row {row} of the record is at fault")
    return Encoded(data, has_counts, kl, exact)


def decode(layout: Layout, data: np.ndarray, has_counts: bool, rows: Rows) -> None:
    """Writes the rows that `data` (uint8) holds to `rows`, whose length says how many there are.

    Raises:
        CorruptCache: the bytes are not what an encoder wrote; nothing outside `rows` was touched.
    """
    tokens = len(rows.ids)
    if _native is None:
        _slow(rows.ids.size)
        status, row = codec_python.decode(layout, data.tobytes(), has_counts, tokens, rows)
    else:
        status, row = _native.codec_decode(layout.native, tokens, data.ctypes.data, data.size, has_counts, _addresses(rows))
    if status:
        raise CorruptCache(f"targets of a record are corrupt at token {row}: {_FAULTS[Status(status)]}")


def decode_batch(layout: Layout, jobs: np.ndarray, next_label: bool, rows: Rows, out: Collated, threads: int) -> None:
    """Checks and decodes whole records to a batch; the memory at the jobs' addresses must be theirs.

    Args:
        jobs: int64 [n, 8], the columns `JOB`.
        next_label: without stored labels, whether the label of a row is the next input id.
        threads: how many work on it; none of them outlives the call.

    Raises:
        CorruptCache: a record is not what was written; its `job` says which. MemoryError: there is not enough.
    """
    room = 0 if out.context_ids is None else out.context_ids.shape[-1]
    if _native is None:
        _slow(rows.ids.size)
        result = codec_python.decode_batch(layout, jobs, next_label, rows, out)
    else:
        result = _native.codec_decode_batch(
            layout.native, jobs.ctypes.data, len(jobs), next_label, _addresses(rows), _addresses(out), room, threads
        )
    if result[0] == Status.NO_MEMORY:
        raise MemoryError(f"no memory to decode {len(jobs)} records of the cache with {threads} threads")
    _raise_of_job(*result)


def index_batch(layout: Layout, jobs: np.ndarray, next_label: bool, index: Index, out: Collated, threads: int) -> None:
    """`decode_batch` that leaves the rows in code: checks whole records, copies their rows' bytes, and says where they are.

    What decoding alone shows (ids, patches or draws that contradict themselves in a record whose checksum is right) is left
    to whoever decodes: such a row becomes NaN.

    Raises:
        CorruptCache: as `decode_batch`.
    """
    room = 0 if out.context_ids is None else out.context_ids.shape[-1]
    needed = int(jobs[:, JOB.index("size")].sum()) + CODEC_SLACK
    if index.data.size != needed:
        raise ValueError(f"index.data: expected {needed} bytes for these jobs, got {index.data.size}")
    if _native is None:
        _slow(index.data.size)
        result = codec_python.index_batch(layout, jobs, next_label, index, out)
    else:
        result = _native.codec_index_batch(
            layout.native, jobs.ctypes.data, len(jobs), next_label, _addresses(index), _addresses(out), room, threads
        )
    _raise_of_job(*result)


def count_exact(layout: Layout, jobs: np.ndarray) -> int:
    """Rows of these records that are stored exactly.

    Raises:
        CorruptCache: as `decode_batch`.
    """
    rows, size = int(jobs[:, JOB.index("tokens")].sum()), int(jobs[:, JOB.index("size")].sum())
    index = Index(np.empty(size + CODEC_SLACK, np.uint8), np.empty(rows, np.int64), np.empty(rows, np.int32))
    numbers, flags = (lambda: np.empty(rows, np.int64)), (lambda: np.empty(rows, bool))
    rest = Collated(numbers(), numbers(), flags(), flags(), None, None)
    own = jobs.copy()
    own[:, JOB.index("room")] = own[:, JOB.index("tokens")]
    own[:, JOB.index("at")] = own[:, JOB.index("tokens")].cumsum() - own[:, JOB.index("tokens")]
    index_batch(layout, own, False, index, rest, 1)
    at = index.offsets[index.counts > 0]
    return int(((index.data[at] == 255) & (index.data[at + 1] == 255)).sum())


def _raise_of_job(status: int, job: int, token: int) -> None:
    if status:
        where = f" at token {token}" if status < Status.BAD_HEADER else ""
        error = CorruptCache(f"the record is corrupt{where}: {_FAULTS[Status(status)]}")
        error.job = job
        raise error


def _addresses(arrays: tuple[Any, ...]) -> list[int]:
    for array in arrays:
        if array is not None and not array.flags.c_contiguous:
            raise ValueError("rows: expected contiguous arrays")
    return [0 if array is None else array.ctypes.data for array in arrays]
