"""Tensors as bytes: a hash of their values; safetensors files whose errors are those of files, `OSError` where one cannot be
written, `ValueError` where one is damaged.

The library raises an error of its own for both, which names no file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


def seed_of(number: int) -> int:
    """A seed of its own for each number: itself below 2**32, from there on a hash. Of a larger seed a CPU's generator takes the
    low 32 bits alone, and numbers that differ above them would draw the same.
    """
    if number < 1 << 32:
        return number
    return int.from_bytes(hashlib.blake2b(number.to_bytes(16, "little"), digest_size=4).digest(), "little")


def digest_of_tensors(*tensors: Tensor) -> str:
    """A hash of their values."""
    state = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """`safetensors.torch.save_file(tensors, path, metadata)`.

    Raises:
        OSError: it cannot be written; names `path`.
    """
    with writing_tensors(path):
        save_file(dict(tensors), path, metadata)


def load_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """`safetensors.torch.load_file(path)`.

    Raises:
        ValueError: the file is damaged; names it. OSError: it cannot be read.
    """
    with reading_tensors(path):
        return load_file(path)


@contextlib.contextmanager
def writing_tensors(path: str | os.PathLike[str]) -> Iterator[None]:
    """What the library says in the block of a file, or of one in the folder `path`, that it cannot write is an `OSError`."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), os.fspath(path)) from error


@contextlib.contextmanager
def reading_tensors(path: str | os.PathLike[str]) -> Iterator[None]:
    """What the library says in the block of a damaged file is a `ValueError` that names `path`."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a whole safetensors file, got one that is cut short or damaged ({error})") from None
