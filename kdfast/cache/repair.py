"""`repair`: a damaged cache to one that holds what is still sound."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kdfast.cache import codec, shard
from kdfast.cache.format import MANIFEST, CorruptCache
from kdfast.cache.manifest import Manifest, ShardEntry, read_manifest, write_atomically
from kdfast.cache.remote import writable
from kdfast.cache.writer import lock_folder


class Repaired(NamedTuple):
    """What `repair` found: records that stay, records and tokens that were lost, shards written anew or dropped."""

    records: int
    records_lost: int
    tokens_lost: int
    shards_changed: int


def repair(path: str | os.PathLike[str], dry_run: bool = False) -> Repaired:
    """Drops the records that are not what was written and keeps all others; sound shards are not touched.

    A damaged shard is replaced by one with its sound records; one whose index is damaged is lost as a whole. An unfinished
    cache is cut before the first damaged shard instead, so that the capture goes on there and makes the rest again. The KL
    error of a rewritten shard is taken in proportion to its tokens. Without dry_run the damaged files are removed.

    Raises:
        CacheError: there is no cache, or a writer has it open.
        CorruptCache: the manifest is damaged; it cannot be made again from the shards.
    """
    folder = writable(path)
    read_manifest(folder)
    lock = lock_folder(folder)
    try:
        return _repair(folder, dry_run)
    finally:
        os.close(lock)


def _repair(folder: Path, dry_run: bool) -> Repaired:
    manifest, _ = read_manifest(folder)
    kept: list[ShardEntry] = []
    removed: list[str] = []
    lost_records = lost_tokens = 0
    number = 1 + max((int(e.name[6:-12]) for e in manifest.shards), default=-1)
    for i, entry in enumerate(manifest.shards):
        sound = _sound_records(folder, entry, manifest)
        if len(sound) == entry.records:
            kept.append(entry)
            continue
        if not manifest.complete:
            gone = manifest.shards[i:]
            removed += [e.name for e in gone]
            lost_records, lost_tokens = sum(e.records for e in gone), sum(e.tokens for e in gone)
            break
        removed.append(entry.name)
        lost_records += entry.records - len(sound)
        lost_tokens += entry.tokens - sum(r.tokens for r in sound)
        if sound:
            name = f"shard-{number:05d}.safetensors"
            number += 1
            kept.append(_rewrite(folder, name, entry, manifest, sound, dry_run))
    if removed and not dry_run:
        groups = manifest.group_size if not manifest.complete else None
        changed = dataclasses.replace(manifest, shards=tuple(kept), group_size=groups)
        write_atomically(folder / MANIFEST, [changed.to_bytes()])
        for name in removed:
            (folder / name).unlink(missing_ok=True)
    return Repaired(sum(e.records for e in kept), lost_records, lost_tokens, len(removed))


def _sound_records(folder: Path, entry: ShardEntry, manifest: Manifest) -> list[shard.Pending]:
    try:
        opened = shard.Shard(folder, entry, manifest.settings)
    except CorruptCache:
        return []
    layout, sound = codec.layout_of(manifest.settings), []
    for i, job in enumerate(opened.jobs()):
        tokens, contexts = int(opened.tokens[i]), int(opened.contexts[i])
        job[codec.JOB.index("room")] = tokens
        ids = np.empty((1, tokens), np.int64)
        flags = (np.empty((1, tokens), bool), np.empty((1, tokens), bool))
        out = codec.Collated(ids, np.empty((1, tokens), np.int64), *flags, None, None)
        try:
            codec.decode_batch(layout, job[None], False, codec.empty_rows(layout, (1, tokens)), out, 1)
        except CorruptCache:
            continue
        exact = codec.count_exact(layout, job[None])
        # The keys are made anew: a damaged index does not get here, a wrong key in a sound one might.
        keys = shard.content_keys(ids[0])
        sound.append(shard.Pending(opened.read(i).tobytes(), tokens, contexts, keys, exact))
    return sound


def _rewrite(
    folder: Path, name: str, entry: ShardEntry, manifest: Manifest, sound: list[shard.Pending], dry_run: bool
) -> ShardEntry:
    tokens = sum(r.tokens for r in sound)
    size, index_digest = (0, "") if dry_run else shard.write_shard(folder / name, manifest.settings, sound)
    histogram = np.array(entry.kl_histogram) * tokens // entry.tokens
    histogram[int(np.argmax(histogram))] += tokens - histogram.sum()
    return ShardEntry(
        name,
        len(sound),
        tokens,
        size,
        index_digest,
        entry.kl_sum * tokens / entry.tokens,
        entry.kl_max,
        tuple(histogram.tolist()),
        sum(r.exact_rows for r in sound),
    )
