"""The C++ extension: addresses are integers, a matrix is (address, elements between rows, columns, dtype code)."""

from collections.abc import Sequence
from typing import Any

_Matrix = tuple[int, int, int, int]

parts: tuple[str, ...]

def isa() -> str: ...
def safe_threads(wanted: int) -> int: ...
def is_intel() -> bool: ...
def pairs_of_bf16() -> bool: ...
def tiles_of_bf16() -> bool: ...
def matmul(
    rows: int,
    columns: int,
    depth: int,
    a: _Matrix,
    b: _Matrix,
    out: int,
    out_row: int,
    bias: int,
    add: bool,
    threads: int,
) -> None: ...

class LogitsOptions:
    def __init__(
        self,
        kind: int,
        first: float,
        second: float,
        temperature: float,
        soft_scale: float,
        hard_weight: float,
        label_smoothing: float,
        z_loss: float,
        student_softcap: float,
        student_scale: float,
        teacher_softcap: float,
        teacher_scale: float,
        mix_probs: bool,
    ) -> None: ...

def logits(
    forward: bool,
    rows: int,
    student: _Matrix,
    teachers: list[_Matrix],
    teacher_weights: Sequence[float],
    grad: _Matrix,
    labels: int,
    scale: int,
    loss: int,
    stats: int,
    parts: int,
    options: LogitsOptions,
    threads: int,
) -> None: ...
def topk_capture(
    rows: int,
    logits: _Matrix,
    softcap: float,
    scale: float,
    k: int,
    temperatures: int,
    n_temperatures: int,
    draws: int,
    n_draws: int,
    sample_temperature: float,
    ids: int,
    logprobs: int,
    log_z: int,
    log_tail: int,
    weights: int,
    threads: int,
) -> None: ...
def topk(
    forward: bool,
    rows: int,
    student: _Matrix,
    grad: _Matrix,
    ids: int,
    log_p: int,
    log_tail: int,
    mass: int,
    k: int,
    vocab: int,
    spread: bool,
    weights: Sequence[float],
    labels: int,
    scale: int,
    loss: int,
    stats: int,
    parts: int,
    options: LogitsOptions,
    threads: int,
) -> None: ...
def attention_tile(
    kind: int,
    difference: int,
    teacher: int,
    sizes: tuple[int, int, int],
    first_group: int,
    first_row: int,
    groups_per_batch: int,
    heads: int,
    queries: int,
    query_mask: int,
    key_mask: int,
    mask_keys: int,
    scale: int,
    loss: int,
    factor_s: float,
    factor_t: float,
    causal: bool,
    threads: int,
) -> None: ...
def attention_direct(
    kind: int,
    sides: tuple[int, ...],
    grads: tuple[int, int],
    sizes: tuple[int, ...],
    query_mask: int,
    key_mask: int,
    scale: int,
    loss: int,
    scale_s: float,
    ratio: float,
    causal: bool,
    threads: int,
) -> None: ...
def attention_maps(
    student: int,
    student_dtype: int,
    teacher: int,
    teacher_dtype: int,
    grad: int,
    mask: int,
    sizes: tuple[int, ...],
    student_strides: tuple[int, ...],
    teacher_strides: tuple[int, ...],
    mask_strides: tuple[int, ...],
    scale: int,
    loss: int,
    threads: int,
) -> None: ...
def hidden(
    cosine: bool,
    rows: int,
    student: _Matrix,
    teacher: _Matrix,
    grad: _Matrix,
    bias: int,
    scale: int,
    loss: int,
    threads: int,
) -> None: ...

_CodecLayout = tuple[Any, ...]

codec_version: int

def codec_encode(
    layout: _CodecLayout, tokens: int, rows: list[int], max_kl: float, values_bits: int, kl: int
) -> tuple[int, int, bytes, bool, int]: ...
def codec_decode(
    layout: _CodecLayout, tokens: int, data: int, size: int, has_counts: bool, rows: list[int]
) -> tuple[int, int]: ...
def codec_decode_batch(
    layout: _CodecLayout,
    jobs: int,
    count: int,
    next: bool,
    rows: list[int],
    rest: list[int],
    context_room: int,
    threads: int,
) -> tuple[int, int, int]: ...
def codec_index_batch(
    layout: _CodecLayout,
    jobs: int,
    count: int,
    next: bool,
    index: list[int],
    rest: list[int],
    context_room: int,
    threads: int,
) -> tuple[int, int, int]: ...
def codec_decode_indexed(
    layout: _CodecLayout,
    data: int,
    size: int,
    offsets: int,
    counts: int,
    tokens: int,
    rows: list[int],
    threads: int,
) -> None: ...
def codec_checksum(data: int, size: int) -> int: ...
