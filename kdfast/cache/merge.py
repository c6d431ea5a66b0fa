"""Several finished caches as one: parts that ranks captured side by side, joined without copying."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

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
    folders = parts_of(target) if parts is None else [writable(p, "parts") for p in parts]
    manifests = [_finished(folder) for folder in folders]
    for folder, manifest in zip(folders[1:], manifests[1:], strict=True):
        different = manifests[0].settings.differences(manifest.settings)
        if different:
            raise CacheMismatch(f"{folder}: made with other settings than {folders[0]} ({'; '.join(different)})")
    merged = _joined(manifests)
    data = merged.to_bytes()
    if not (target / MANIFEST).exists():
        target.mkdir(parents=True, exist_ok=True)
        sources = [folder / e.name for folder, m in zip(folders, manifests, strict=True) for e in m.shards]
        for source, entry in zip(sources, merged.shards, strict=True):
            _link(source, target / entry.name)
        sync_folder(target)
        write_atomically(target / MANIFEST, [data])
    elif parts is not None or (target / MANIFEST).read_bytes() != data:
        raise CacheError(f"{target}: expected a folder without a cache, found {MANIFEST}; merge to another path")
    if parts is None:  # also those of a merge that was killed before it removed them
        for folder in folders:
            shutil.rmtree(folder)
    return CacheInfo.of(merged, len(data))


def _joined(manifests: list[Manifest]) -> Manifest:
    entries: list[ShardEntry] = []
    for manifest in manifests:
        entries += [
            dataclasses.replace(e, name=f"shard-{len(entries) + i:05d}.safetensors") for i, e in enumerate(manifest.shards)
        ]
    groups = {m.group_size for m in manifests}
    whole = all(_whole_groups(m) for m in manifests[:-1])
    return Manifest(manifests[0].settings, tuple(entries), True, groups.pop() if len(groups) == 1 and whole else None)


def _finished(folder: Path) -> Manifest:
    manifest, _ = read_manifest(folder)
    if not manifest.complete:
        raise CacheError(f"{folder}: the capture of this part is not finished; run it again to go on, then merge")
    for entry in manifest.shards:
        Shard(folder, entry, manifest.settings)
    return manifest


def _whole_groups(manifest: Manifest) -> bool:
    def whole(entry: ShardEntry) -> bool:
        return entry.records % (manifest.group_size or 1) == 0

    return all(map(whole, manifest.shards))


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
