"""The CUDA extension: device addresses are integers, a matrix is as in `_C`."""

_Matrix = tuple[int, int, int, int]

parts: tuple[str, ...]

def driver_version() -> int: ...
def build_version() -> int: ...
def blocks_for(common: int, student_dtype: int, teacher_dtype: int) -> int: ...
def logits(
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
    z_loss: float,
    blocks: int,
    device: int,
    stream: int,
) -> bool: ...
