"""How the Triton attention kernels are cut into programs: pure functions, no device."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")

from kdfast.backends.triton import attention_grams as grams
from kdfast.backends.triton import attention_tiles as tiles


@pytest.mark.parametrize("length", [512, 1024, 2048, 4096])
@pytest.mark.parametrize("heads", [1, 8, 96])
def test_slices_fill_the_multiprocessors(heads: int, length: int) -> None:
    """Both sides' Gram matrices in three tiles each: two programs a multiprocessor, unless slices would fall below LEAST."""
    matrices = 2 * heads * 3
    n = grams.slices(matrices, length, 132)
    assert n == 1 or length / n > grams.LEAST / 2
    assert matrices * n >= 2 * 132 or n == length // grams.LEAST
    assert n == 1 or matrices * (n - 1) < 2 * 132


def test_short_and_many() -> None:
    assert grams.slices(6, 1, 132) == grams.slices(6, grams.LEAST, 132) == 1
    assert grams.slices(100_000, 4096, 132) == 1
    assert grams.slices(48, 1024, 132) == 6


def test_few_blocks_are_halved() -> None:
    many, few = (tiles.launch(64, 64, torch.bfloat16, False, n) for n in (264, 263))
    assert (many.own, few.own) == (128, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [8, 64, 128, 256])
def test_products_of_tensor_cores(size: int, dtype: torch.dtype) -> None:
    """A side of a product is 16 or more, a power of two; what is wider than 64 in float32 is left to IEEE products."""
    for of_keys, older in itertools.product((False, True), repeat=2):
        found = tiles.launch(size, size, dtype, of_keys, older=older)
        assert all(n >= 16 and n & (n - 1) == 0 for n in (found.own, found.other))
    how = tiles.flags(0, size, size, dtype, False, False, False)["PRECISION"]
    assert how == ("half" if dtype != torch.float32 else "tf32x3" if size <= 64 else "ieee")
