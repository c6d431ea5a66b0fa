"""What a kernel costs by its machine code for sm_90: instructions, special functions and products a column or score."""

from __future__ import annotations

import csv
import dataclasses
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .aot_cases import Case, cases
from .machine_code import cuobjdump

_ALU_OPS = re.compile(r"(FMNMX|FSEL|FSETP|SEL|ISETP|PLOP3|LOP3|SHF|PRMT|IADD3|VIADD|VIMNMX|LEA|F2FP|MOV|POPC|HMNMX2|HSETP2)\b")
#: Of the dense rate that warpgroup products reach, what those of a single warp do on this generation (published measurements).
_OF_A_WARP = 0.62


@dataclass(frozen=True)
class Count:
    """Per column (per score of attention), all loops together.

    Args:
        loops: how many there are; for calls that are all launches, how many of those.
        products: FLOPs on tensor cores in those of warpgroup products of halves: TF32 runs at half their rate.
        programs: on a multiprocessor at once.
        ahead: bytes that a program has on their way while it works on those before.
    """

    instructions: float
    alu: float
    special: float
    registers: int
    loops: int
    products: float = 0.0
    programs: int = 1
    ahead: int = 0


@dataclass(frozen=True)
class Loop:
    """Innermost loop over a row: its instructions, one string each."""

    first: int
    body: tuple[str, ...]

    @property
    def loaded_bits(self) -> int:
        """Of rows: those are the loads that say how long L2 should keep them."""
        bits = 0
        for op in self.body:
            if re.match(r"LDG\S*\.E[FL]\b", op):
                width = re.search(r"\.(128|64|[US]16|[US]8)\b", op)
                bits += int(width.group(1).lstrip("US")) if width else 32
        return bits

    @property
    def products(self) -> float:
        """FLOPs of a warp on tensor cores, in those of warpgroup products of halves."""
        return sum(_product(op) for op in self.body)


def _product(op: str) -> float:
    if wide := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\S*", op):
        m, n, k = map(int, wide.groups())  # four warps issue one together
        return 2 * m * n * k / 4 * (2 if "TF32" in op else 1)
    if narrow := re.match(r"HMMA\.(1688|16816|1684)\S*", op):
        k = {"1684": 4, "1688": 8, "16816": 16}[narrow.group(1)]
        return 2 * 16 * 8 * k * (2 if "TF32" in op else 1) / _OF_A_WARP
    return 0.0


def _branches(sass: str) -> tuple[list[tuple[int, str]], list[tuple[int, int]]]:
    """(instructions by address, spans of backward branches)."""
    ops: list[tuple[int, str]] = []
    for line in sass.splitlines():
        found = re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S+)([^;]*);", line)
        if found:
            ops.append((int(found.group(1), 16), found.group(2) + found.group(3)))
    spans = []
    for at, op in ops:
        target = re.match(r"BRA\s+(?:!?U?P\w+,\s*)?(?:`\(\S+\)|0x([0-9a-f]+))", op)
        if target and target.group(1) and int(target.group(1), 16) < at:
            spans.append((int(target.group(1), 16), at))
    return ops, spans


def _innermost(loops: list[Loop], spans: Sequence[tuple[int, int]]) -> list[Loop]:
    ends = dict(spans)
    return [
        loop for loop in loops
        if not any(o is not loop and loop.first <= o.first and ends[o.first] <= ends[loop.first] for o in loops)
    ]  # fmt: skip


def loops(sass: str) -> list[Loop]:
    """Loops over columns: bodies of backward branches that load from memory and hold no such loop themselves."""
    ops, spans = _branches(sass)
    skipped = [  # what a branch steps over inside a loop: the label's tile, a repeated id
        (at + 16, int(target.group(1), 16) - 16)
        for at, op in ops if (target := re.match(r"BRA\s+(?:!?U?P\w+,\s*)?0x([0-9a-f]+)", op)) and int(target.group(1), 16) > at
    ]  # fmt: skip
    found = [Loop(a, tuple(op for at, op in ops if a <= at <= b and not _within(at, skipped, a, b))) for a, b in spans]
    return _innermost([loop for loop in found if loop.loaded_bits], spans)


def product_loops(sass: str) -> list[Loop]:
    """Loops over tiles of scores: bodies of backward branches with products on tensor cores, no such loop within."""
    ops, spans = _branches(sass)
    found = [Loop(a, tuple(op for at, op in ops if a <= at <= b)) for a, b in spans]
    return _innermost([loop for loop in found if loop.products], spans)


def _within(at: int, spans: Sequence[tuple[int, int]], first: int, last: int) -> bool:
    """Whether an address lies in one of the spans that lie in a loop."""
    return any(first <= a and b <= last and a <= at <= b for a, b in spans)


def _compiled(case: Case) -> tuple[str, int]:
    """(machine code for sm_90, registers a thread)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(case.kernel, case.signature(), case.constants, case.hints())
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(case.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage, sass = cuobjdump("-res-usage", file.name), cuobjdump("-sass", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    return sass, int(registers.group(1)) if registers else 0


def count(case: Case, per_column: int) -> Count:
    """Compiles a row kernel and counts its loops over columns, of which a pass loads `per_column` bytes."""
    sass, registers = _compiled(case)
    total = [0.0, 0.0, 0.0]
    passes = 0
    before = (0, 0.0)
    for loop in loops(sass):
        columns = max(1, round(loop.loaded_bits / (8 * per_column)))
        exps = sum(op.startswith("MUFU") for op in loop.body) / columns
        if before[0] > columns and abs(exps - before[1]) < 0.3 * max(exps, 0.1):
            continue  # what an unrolled loop leaves over
        before = (columns, exps)
        passes += 1
        integers = sum(bool(_ALU_OPS.match(op)) for op in loop.body)
        total = [a + b for a, b in zip(total, (len(loop.body) / columns, integers / columns, exps), strict=True)]
    instructions, alu, special = (round(x, 2) for x in total)
    programs, ahead = _on_their_way(case, registers, per_column)
    return Count(instructions, alu, special, registers, passes, programs=programs, ahead=ahead)


def _on_their_way(case: Case, registers: int, per_column: int) -> tuple[int, int]:
    """(programs on a multiprocessor, bytes that each has on their way)."""
    threads = 32 * int(case.options["num_warps"])
    if "LANES" not in case.constants:  # a tile is all a program does at a time, and as many run as there is room for
        return min(2048, 65536 // max(registers, 1)) // threads, case.constants["BLOCK"] * per_column
    tile = case.constants["LANES"] * case.constants["VEC"] * per_column
    return max(1, 512 // threads), tile if getattr(case.constants.get("F"), "ahead", True) else 0


def count_scores(kernels: Sequence[Case]) -> Count:
    """The loops over tiles of scores of all kernels of a call together; the most registers of one."""
    total, most, walks = [0.0] * 4, 0, 0
    for case in kernels:
        sass, registers = _compiled(case)
        tile = case.constants["BLOCK_Q"] * case.constants["BLOCK_K"]
        threads = 32 * int(case.options["num_warps"])
        for loop in product_loops(sass):
            exps = sum(op.startswith("MUFU") for op in loop.body)
            integers = sum(bool(_ALU_OPS.match(op)) for op in loop.body)
            found = (len(loop.body) * threads, integers * threads, exps * threads, loop.products * threads / 32)
            total = [a + b / tile for a, b in zip(total, found, strict=True)]
            walks += 1
        most = max(most, registers)
    instructions, alu, special, products = (round(x, 2) for x in total)
    return Count(instructions, alu, special, most, walks, products)


def row_case(kernel: str, label: str, **pointers: object) -> Case:
    """A case of `aot_cases` by its kernel and label, some of its tensors of other dtypes."""
    module, name = kernel.split(".")
    case = next(
        c for c in cases()
        if c.label == label and c.kernel.__name__ == name and c.kernel.__module__.rsplit(".", 1)[-1] == module
    )  # fmt: skip
    return dataclasses.replace(case, pointers=case.pointers | pointers)  # type: ignore[arg-type]


def score_cases(kind: str) -> list[Case]:
    """The kernels behind an attention loss on bfloat16 heads of 64, forward and backward, every pair of positions counted.

    Where `aot_cases` has programs for few blocks, those: 8 heads of 4096 positions are few.
    """
    label = f"bf16 D=64,64 {kind}"
    unmasked = {"QUERY_MASK": False, "KEY_MASK": False, "CAUSAL": False}
    found = []
    for name in ("queries_kernel", "keys_kernel"):
        of_kernel = [c for c in cases() if c.kernel.__name__ == name]
        case = next(c for wanted in (f"{label} few", label) for c in of_kernel if c.label == wanted)
        found.append(dataclasses.replace(case, constants=case.constants | unmasked))
    return found


def gram_launches() -> int:
    """Launches on a device of `attention_mse` of scores by Gram matrices with both gradients: torch's operators that are no
    views, and Triton's kernels."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from kdfast.options import AttentionOptions

    from .launch import launches_only
    from .stand_in import OnDevice

    counted = 0

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal counted
            result = func._schema.returns
            view = any(r.alias_info is not None and not r.alias_info.is_write for r in result)
            name = str(func.overloadpacket).removeprefix("aten.")
            counted += not (view or not result or name.startswith(("empty", "new_empty", "view", "_unsafe_view", "expand")))
            return func(*args, **(kwargs or {}))

    with launches_only() as found:
        from kdfast.backends.triton import attention

        q_s, k_s, q_t, k_t = (OnDevice(torch.randn(2, 4, 512, 64).bfloat16()) for _ in range(4))
        scale = OnDevice(torch.ones(2, 4))
        with Counting():
            options = AttentionOptions(kind="scores", scale_s=0.125, scale_t=0.125, method="gram")
            attention.forward(q_s, k_s, q_t, k_t, None, None, scale, options, True)
    return counted + found.count


def read_counts(path: Path) -> dict[str, Count]:
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {
            r["row"]: Count(
                float(r["instructions"]), float(r["alu"]), float(r["special"]), int(r["registers"]), int(r["loops"]),
                float(r["products"]), int(r["programs"]), int(r["ahead"]),
            )
            for r in csv.DictReader(file)
        }  # fmt: skip


def counts_csv(found: dict[str, Count]) -> str:
    names = [f.name for f in dataclasses.fields(Count)]

    def lines() -> Iterator[str]:
        yield ",".join(["row", *names])
        for row, c in found.items():
            yield ",".join([f'"{row}"', *(f"{getattr(c, name):g}" for name in names)])

    return "\n".join(lines()) + "\n"
