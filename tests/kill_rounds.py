"""Kills a writer at chosen points, lets it go on, and compares what came out: `python -m tests.kill_rounds --rounds 200`.

A round is one process that ends by SIGKILL inside a write (half of the bytes are there), before or after an fsync, before or
after a rename, or at a random moment. After it the folder must hold a cache that goes on: records that were safe stay
safe. When a capture comes to its end, its files must be those of an undisturbed one, byte for byte.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import pytest
from cache_helpers import SETTINGS, document

from kdfast import files
from kdfast.cache import CacheError, CacheReader, CacheWriter, manifest, verify
from kdfast.cache.shard import Shard

DOCUMENTS = 14
POINTS = ("write", "before fsync", "after fsync", "before rename", "after rename", "any time")


def capture(path: Path, documents: list[Any], queue: int) -> None:
    with CacheWriter(path, **SETTINGS, records_per_shard=3, queue=queue) as writer:
        for ids, targets in documents[len(writer) :]:
            writer.add(ids, targets)


def arm(point: str, nth: int, share: float) -> None:
    """Makes this process kill itself at the nth operation of a kind."""
    left = [nth]

    def due() -> bool:
        left[0] -= 1
        return left[0] < 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    fsync, replace = os.fsync, os.replace
    if point == "write":

        class Half:
            def __init__(self, descriptor: int, mode: str) -> None:
                self.file = open(descriptor, mode, buffering=0)  # noqa: SIM115

            def __enter__(self) -> Half:
                return self

            def __exit__(self, *_: object) -> None:
                self.file.close()

            def __getattr__(self, name: str) -> Any:
                return getattr(self.file, name)

            def write(self, data: Any) -> int:
                if due():
                    self.file.write(bytes(data)[: int(len(data) * share)])
                    die()
                return self.file.write(data)

        files.open = Half  # type: ignore[attr-defined]
    elif point.endswith("fsync"):

        def fsync_and_die(descriptor: int) -> None:
            last = due()
            if last and point.startswith("before"):
                die()
            fsync(descriptor)
            if last:
                die()

        os.fsync = fsync_and_die
    elif point.endswith("rename"):

        def replace_and_die(source: Any, target: Any) -> None:
            last = due()
            if last and point.startswith("before"):
                die()
            replace(source, target)
            if last:
                die()

        os.replace = replace_and_die


def disturbed(path: Path, documents: list[Any], point: str, chance: random.Random) -> bool:
    """One process; whether it was killed."""
    nth, share, queue, wait = chance.randrange(12), chance.random(), chance.choice((0, 2)), chance.uniform(0, 0.02)
    child = os.fork()
    if not child:
        try:
            arm(point, nth, share)
            capture(path, documents, queue)
        finally:
            os._exit(0)
    if point == "any time":
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def safe_records(path: Path) -> int:
    """Records that the manifest lists, each of them sound; a reader for training has to refuse an unfinished cache."""
    if not (path / manifest.MANIFEST).exists():
        return 0
    found, _ = manifest.read_manifest(path)
    for entry in found.shards:
        shard = Shard(path, entry, found.settings)
        for i in range(len(shard.tokens)):
            shard.read(i)
    if not found.complete:
        with pytest.raises(CacheError, match="not finished"):
            CacheReader(path)
    return sum(entry.records for entry in found.shards)


def contents(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


def run(rounds: int, seed: int, folder: Path) -> dict[str, int]:
    """Kills a writer `rounds` times; returns how often at which point.

    Raises:
        AssertionError: something that was safe is gone, or a finished cache differs.
    """
    chance = random.Random(seed)
    documents = [document(i, 5 + 7 * i % 40) for i in range(DOCUMENTS)]
    capture(folder / "whole", documents, 0)
    whole, kills, captures = contents(folder / "whole"), collections.Counter[str](), 0
    path, safe = folder / "0", 0
    while kills.total() < rounds:
        # The points take turns; one that is not reached (the capture ends before) does not count.
        point = POINTS[kills.total() % len(POINTS)]
        if disturbed(path, documents, point, chance):
            kills[point] += 1
        now = safe_records(path)
        assert now >= safe, f"{path}: {safe} records were safe, {now} are left"
        safe = now
        if path.exists() and (path / manifest.MANIFEST).exists() and manifest.read_manifest(path)[0].complete:
            assert contents(path) == whole, f"{path}: differs from an undisturbed capture"
            captures += 1
            path, safe = folder / str(captures), 0
    if not (path / manifest.MANIFEST).exists() or not manifest.read_manifest(path)[0].complete:
        capture(path, documents, 0)
    assert contents(path) == whole, f"{path}: differs from an undisturbed capture"
    verify(path)
    return {**kills, "captures that came to their end": captures + 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for point, count in run(args.rounds, args.seed, Path(folder)).items():
            print(f"{count:5d}  {point}")


if __name__ == "__main__":
    main()
