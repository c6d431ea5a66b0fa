"""Text files: which there are, and which part each belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np


def list_files(
    paths: Iterable[str | Path], glob: str, exclude: Iterable[str] = (), key: str = "data", glob_key: str = "data.glob"
) -> list[tuple[str, Path]]:
    """(name, file) of every file, sorted by name: the path inside the folder it was found under, or the whole one where two
    folders have files of the same name.

    Raises:
        ValueError: a path does not exist, or nothing is found; names `key`, and `glob_key` as the remedy.
    """
    banned, found = set(exclude), dict[str, Path]()

    def add(name: str, file: Path) -> None:
        taken = found.setdefault(name, file)
        if not taken.samefile(file):
            found[str(file)] = file

    for path in map(Path, paths):
        if path.is_file():
            add(path.name, path)
        elif path.is_dir():
            for file in sorted(path.glob(glob)):
                name = file.relative_to(path)
                if file.is_file() and not banned.intersection(name.parts):
                    add(name.as_posix(), file)
        else:
            raise ValueError(f"{key}: expected a file or a folder, got {str(path)!r}, which does not exist")
    if not found:
        raise ValueError(f"{key}: no file matches {glob!r} in {', '.join(map(str, paths))}; set {glob_key} or another folder")
    return sorted(found.items())


def share_of(name: str, seed: int) -> float:
    """A number in [0, 1) drawn from a seeded hash of a file's name: the same on every machine, whatever else is there."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def split_files(files: list[tuple[str, Path]], shares: Sequence[float], seed: int) -> list[list[Path]]:
    """The files drawn into each of `shares`, then the rest."""
    parts: list[list[Path]] = [[] for _ in range(len(shares) + 1)]
    edges = np.cumsum(shares)
    for name, file in files:
        parts[int(np.searchsorted(edges, share_of(name, seed), side="right"))].append(file)
    return parts


def read_text(file: Path) -> str:
    """A file as UTF-8 text; bytes that are none become replacement characters."""
    return file.read_text(encoding="utf-8", errors="replace")
