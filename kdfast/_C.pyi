"""The C++ extension: addresses are integers, a matrix is (address, elements between rows, columns, dtype code)."""

from collections.abc import Sequence

_Matrix = tuple[int, int, int, int]

def isa() -> str: ...
def safe_threads(wanted: int) -> int: ...
def is_intel() -> bool: ...
def pairs_of_bf16() -> bool: ...
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
    k: int,
    temperatures: int,
    n_temperatures: int,
    ids: int,
    logprobs: int,
    log_z: int,
    log_tail: int,
    threads: int,
) -> None: ...
def topk(
    forward: bool,
    rows: int,
    student: _Matrix,
    grad: _Matrix,
    ids: int,
    logprobs: int,
    log_z: int,
    log_tail: int,
    k: int,
    vocab: int,
    labels: int,
    scale: int,
    loss: int,
    stats: int,
    parts: int,
    temperature: float,
    soft_scale: float,
    hard_weight: float,
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
def codec_encode(
    k: int,
    vocab: int,
    temperatures: list[float],
    tokens: int,
    ids: int,
    logprobs: int,
    log_z: int,
    log_tail: int,
    max_kl: float,
    values_bits: int,
    kl: int,
) -> tuple[int, int, bytes, int, bool]: ...
def codec_decode(
    k: int,
    vocab: int,
    temperatures: list[float],
    tokens: int,
    data: int,
    size: int,
    id_bytes: int,
    has_counts: bool,
    ids: int,
    logprobs: int,
    log_z: int,
    log_tail: int,
) -> tuple[int, int]: ...
