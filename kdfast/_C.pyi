"""The C++ extension: addresses are integers, a matrix is (address, elements between rows, columns, dtype code)."""

_Matrix = tuple[int, int, int, int]

def isa() -> str: ...
def safe_threads(wanted: int) -> int: ...
def logits(
    forward: bool,
    rows: int,
    student: _Matrix,
    teacher: _Matrix,
    grad: _Matrix,
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
