"""Several finished caches as one: parts that ranks captured side by side, joined without copying."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from kdfast.cache.capture_file import read_capture, write_capture
from kdfast.cache.format import MANIFEST, CacheError, CacheMismatch
from kdfast.cache.manifest import CacheInfo, Manifest, ShardEntry, read_manifest, write_atomically
from kdfast.cache.remote import writable
from kdfast.cache.shard import Shard
from kdfast.files import sync_folder

_PART = re.compile(r"part-(\d{5})-of-(\d{5})")


def part_path(path: str | os.PathLike[str], rank: int, world: int) -> Path:
    """Where a rank writes its part of the cache at `path`; `merge` finds it there."""
    if not 0 <= rank < world <= 99999:
        raise CacheError(f"rank: expected 0 to {world - 1} of at most 99999, got {rank} of {world}")
    return writable(path) / f"part-{rank:05d}-of-{world:05d}"


def parts_of(path: Path) -> list[Path]:
    """The parts in a cache's folder, every rank's.

    Raises:
        CacheError: there are none, one is missing, or they are of captures with other numbers of ranks.
    """
    found = sorted(p for p in path.glob("part-*") if _PART.fullmatch(p.name))
    worlds = {p.name[-5:] for p in found}
    if not found:
        raise CacheError(f"{path}: expected parts like part-00000-of-00004 to merge, found none; name the caches to join")
    if len(worlds) > 1:
        raise CacheError(f"{path}: expected parts of one capture, found some of {' and some of '.join(sorted(worlds))} ranks")
    world = int(worlds.pop())
    missing = [r for r in range(world) if part_path(path, r, world) not in found]
    if missing:
        raise CacheError(f"{path}: expected {world} parts, the one of rank {missing[0]} is missing; capture it first")
    return found


def merge(path: str | os.PathLike[str], parts: Sequence[str | os.PathLike[str]] | None = None) -> CacheInfo:
    """Joins finished caches, in their order, into the one at `path`, by hard links to their shards: no byte is copied.

    Args:
        path: an empty or missing folder, or one that holds the `parts`.
        parts: the caches; None: those that ranks wrote under `path` (`part_path`), which are removed afterwards. Others stay.

    Raises:
        CacheMismatch: they were made with different settings; names both sides.
        CacheError: one is not finished, or `path` holds something else. CorruptCache: an index is not what was written.
        OSError: `path` is on another file system than a part.
    """
    target = writable(path)
    if parts is None and (target / MANIFEST).is_file() and not any(target.glob("part-*")):
        manifest, size = read_manifest(target)  # the last rank of a build merged them
        if manifest.complete:
            return CacheInfo.of(manifest, size)
    folders = parts_of(target) if parts is None else [writable(p, "parts") for p in parts]
    manifests = [_finished(folder) for folder in folders]
    for folder, manifest in zip(folders[1:], manifests[1:], strict=True):
        different = manifests[0].settings.differences(manifest.settings)
        if different:
            raise CacheMismatch(f"{folder}: made with other settings than {folders[0]} ({'; '.join(different)})")
    placed = _placed(folders, manifests)
    merged = _joined(manifests, [entry for _, entry in placed])
    data = merged.to_bytes()
    if not (target / MANIFEST).exists():
        target.mkdir(parents=True, exist_ok=True)
        for (folder, source), entry in zip(placed, merged.shards, strict=True):
            _link(folder / source.name, target / entry.name)
        if parts is None and (described := read_capture(folders[0])):
            write_capture(target, {name: value for name, value in described.items() if name != "turns"})
        sync_folder(target)
        write_atomically(target / MANIFEST, [data])
    elif parts is not None or (target / MANIFEST).read_bytes() != data:
        raise CacheError(f"{target}: expected a folder without a cache, found {MANIFEST}; merge to another path")
    if parts is None:  # also those of a merge that was killed before it removed them
        for folder in folders:
            shutil.rmtree(folder)
    return CacheInfo.of(merged, len(data))


def _placed(folders: list[Path], manifests: list[Manifest]) -> list[tuple[Path, ShardEntry]]:
    """The shards of all parts with their folders, in the order of the records: part after part, or, where ranks took turns
    at one stream of documents, turn after turn."""
    turns = [sizes for folder in folders if (sizes := read_capture(folder).get("turns")) is not None]
    if len(turns) < len(folders):
        return [(folder, entry) for folder, manifest in zip(folders, manifests, strict=True) for entry in manifest.shards]
    queues = [_by_turn(f, m, t) for f, m, t in zip(folders, manifests, turns, strict=True)]
    placed: list[tuple[Path, ShardEntry]] = []
    for number in range(max(map(len, queues))):
        for folder, queue in zip(folders, queues, strict=True):
            entries, whole = queue[number] if number < len(queue) else ([], False)
            placed += [(folder, entry) for entry in entries]
            if not whole:  # the stream's end, or a part that stopped at its limit: what comes after would leave a gap
                return placed
    return placed


def _by_turn(folder: Path, manifest: Manifest, sizes: Sequence[int]) -> list[tuple[list[ShardEntry], bool]]:
    """The shards of each turn, and whether all of its records are there."""
    left, out = list(manifest.shards), []
    for size in sizes:
        taken: list[ShardEntry] = []
        while left and sum(e.records for e in taken) < size:
            taken.append(left.pop(0))
        records = sum(e.records for e in taken)
        if records > size or (records < size and not read_capture(folder).get("stopped")):
            raise CacheError(f"{folder}: its shards do not end where the turns of its rank do; capture this part again")
        out.append((taken, records == size))
    return out


def _joined(manifests: list[Manifest], placed: list[ShardEntry]) -> Manifest:
    entries = tuple(dataclasses.replace(e, name=f"shard-{i:05d}.safetensors") for i, e in enumerate(placed))
    groups = {m.group_size for m in manifests}
    whole = all(e.records % (manifests[0].group_size or 1) == 0 for e in entries[:-1])
    return Manifest(manifests[0].settings, entries, True, groups.pop() if len(groups) == 1 and whole else None)


def _finished(folder: Path) -> Manifest:
    manifest, _ = read_manifest(folder)
    if not manifest.complete:
        raise CacheError(f"{folder}: the capture of this part is not finished; run it again to go on, then merge")
    for entry in manifest.shards:
        Shard(folder, entry, manifest.settings)
    return manifest


def _link(source: Path, target: Path) -> None:
    if target.exists():
        if target.samefile(source):  # a merge that was killed made the link
            return
        raise CacheError(f"{target.parent}: expected a folder without shards, found {target.name}; merge to another path")
    try:
        os.link(source, target)
    except OSError as error:
        raise OSError(
            error.errno, f"cannot link {source} to {target}: {os.strerror(error.errno or 0)}; merge to a folder on the file"
            " system of the parts, which has to know hard links"
        ) from error  # fmt: skip
