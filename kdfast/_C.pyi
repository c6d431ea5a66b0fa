"""The C++ extension: addresses are integers, a matrix is (address, elements between rows, columns, dtype code)."""

from collections.abc import Sequence

_Matrix = tuple[int, int, int, int]

def isa() -> str: ...
def safe_threads(wanted: int) -> int: ...
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
