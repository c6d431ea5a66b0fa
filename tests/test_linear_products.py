"""The C++ products behind linear heads: every pair of dtypes, strides and odd size against float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import plain
import pytest
import torch
from torch import Tensor

_C = pytest.importorskip("kdfast._C")
from kdfast.backends.compiled.extension import address, operand  # noqa: E402

HALVES = [torch.bfloat16, torch.float16]
PAIRS = [
    (torch.float32, torch.float32),
    *((h, h) for h in HALVES),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]
#: (rows, columns, depth): a tile, ragged tiles, an odd depth that splits a pair, several blocks of each
SHAPES = [(12, 32, 16), (5, 7, 3), (1, 1, 1), (37, 130, 777), (100, 513, 2051), (1600, 40, 33), (30, 2100, 40)]


def matmul(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None, add: bool = False, threads: int = 2) -> Tensor:
    (rows, depth), columns = a.shape, b.shape[1]
    _C.matmul(rows, columns, depth, operand(a), operand(b), out.data_ptr(), out.stride(0), address(bias), add, threads)
    return out


def stored(rows: int, columns: int, dtype: torch.dtype, layout: str) -> Tensor:
    if layout == "transposed":
        return torch.randn(columns, rows).to(dtype).t()
    if layout == "strided":
        return torch.randn(2 * rows, 3 * columns).to(dtype)[::2, ::3]
    return torch.randn(rows, columns).to(dtype)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: "-".join(str(d).removeprefix("torch.") for d in p))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize(
    "layouts", [("plain", "plain"), ("plain", "transposed"), ("transposed", "plain"), ("strided", "strided")]
)
def test_product(layouts: tuple[str, str], shape: tuple[int, int, int], pair: tuple[torch.dtype, torch.dtype]) -> None:
    rows, columns, depth = shape
    a, b = stored(rows, depth, pair[0], layouts[0]), stored(depth, columns, pair[1], layouts[1])
    truth = a.double() @ b.double()
    room = torch.empty(rows, columns + 5)  # rows of the result further apart than they are long
    out = room[:, :columns]
    assert plain.error(matmul(a, b, out), truth) <= 2e-6
    bias, before = torch.randn(columns), torch.randn(rows, columns)
    assert plain.error(matmul(a, b, out, bias=bias), truth + bias.double()) <= 2e-6
    assert plain.error(matmul(a, b, out.copy_(before), add=True), truth + before.double()) <= 2e-6
    assert room[:, columns:].isnan().all()  # nothing is written beside the result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_bits(dtype: torch.dtype) -> None:
    a, b = torch.randn(300, 700).to(dtype), torch.randn(700, 500).to(dtype)
    results = [matmul(a, b, torch.empty(300, 500), threads=threads) for threads in (1, 2, 3)]
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_inf_come_through(dtype: torch.dtype) -> None:
    a, b = torch.randn(20, 40).to(dtype), torch.randn(40, 50).to(dtype)
    a[3, 5], b[7, 11] = torch.nan, torch.inf
    out = matmul(a, b, torch.empty(20, 50))
    assert out.isnan().all(-1).nonzero().flatten().tolist() == [3]
    assert not out[:, 11].isfinite().any()
    assert out[0].isfinite().sum() == 49


@pytest.mark.parametrize("layouts", [("plain", "transposed"), ("transposed", "plain")])
def test_large_bfloat16_product(layouts: tuple[str, str]) -> None:
    """More than one block of rows, of columns and of depth, whose panels are packed anew or found from the block before."""
    a, b = stored(4400, 70, torch.bfloat16, layouts[0]), stored(70, 1100, torch.bfloat16, layouts[1])
    assert plain.error(matmul(a, b, torch.empty(4400, 1100)), a.double() @ b.double()) <= 2e-6
    a, b = stored(40, 40000, torch.bfloat16, layouts[0]), stored(40000, 70, torch.bfloat16, layouts[1])
    assert plain.error(matmul(a, b, torch.empty(40, 70)), a.double() @ b.double()) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_of_no_products(dtype: torch.dtype) -> None:
    a, b, bias = torch.empty(3, 0).to(dtype), torch.empty(0, 5).to(dtype), torch.randn(5)
    assert torch.equal(matmul(a, b, torch.empty(3, 5)), torch.zeros(3, 5))
    assert torch.equal(matmul(a, b, torch.empty(3, 5), bias=bias), bias.expand(3, 5))
    assert torch.equal(matmul(a, b, torch.ones(3, 5), add=True), torch.ones(3, 5))


@pytest.mark.skipif("KDFAST_ISA" in os.environ, reason="asks for less than the processor has")
def test_tiles_are_used_where_the_processor_has_them() -> None:
    file = Path("/proc/cpuinfo")
    flags = file.read_text().split() if file.is_file() else []
    assert _C.tiles_of_bf16() == ({"amx_bf16", "amx_tile", "avx512_bf16"} <= set(flags))


def test_torchs_products_are_the_same_beside_ours() -> None:
    """They may use the tile unit too, set up otherwise."""
    a, b = torch.randn(64, 96).bfloat16(), torch.randn(96, 64).bfloat16()
    alone = a @ b
    for _ in range(3):
        matmul(a, b, torch.empty(64, 64))
        assert torch.equal(a @ b, alone)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_lower_instruction_sets(isa: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "strided or 130x777 or nan"]
    if os.environ.get("KDFAST_ISA"):
        pytest.skip("one level down is enough")
    done = subprocess.run(command, env=os.environ | {"KDFAST_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
