"""Caches at URLs (`s3://bucket/cache`, anything fsspec knows): copied once to a local folder and read there."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kdfast.cache.format import MANIFEST, CacheError, CorruptCache
from kdfast.cache.manifest import Manifest, ShardEntry, digest, read_manifest, write_atomically

_BLOCK = 4 << 20


def is_url(path: str | os.PathLike[str]) -> bool:
    return isinstance(path, str) and "://" in path


def copies_folder() -> Path:
    """Where copies are kept: KDFAST_CACHE_DIR, or `~/.cache/kdfast`."""
    return Path(os.environ.get("KDFAST_CACHE_DIR") or "~/.cache/kdfast").expanduser()


def local_copy(path: str | os.PathLike[str]) -> Path:
    """A path as it is; for a URL the folder of its copy, which is made first. Raises as `Remote` and its `copy` do."""
    return Remote(str(path)).copy() if is_url(path) else Path(path)


def manifest_of(path: str | os.PathLike[str]) -> tuple[Manifest, int]:
    """`read_manifest` of a folder or a URL; of a URL nothing else is fetched."""
    if not is_url(path):
        return read_manifest(Path(path))
    remote = Remote(str(path))
    return remote.manifest, len(remote.data)


def writable(path: str | os.PathLike[str], argument: str = "path") -> Path:
    """The folder to write a cache to.

    Raises:
        CacheError: it is a URL. A cache is written with locks, syncs and renames, which remote stores do not have.
    """
    if is_url(path):
        raise CacheError(f"{argument}: expected a local folder, got {path}; write locally and copy the folder there")
    return Path(path)


class Remote:
    """A cache at a URL whose manifest has been fetched and checked.

    Its `folder` is named by the URL and the manifest, so a cache that changed is copied anew, beside the old copy; that one
    stays until somebody deletes it.

    Raises:
        CacheError: fsspec or a part of it is not installed, the URL cannot be read, or there is no cache.
        CorruptCache: the manifest is not what was written.
    """

    def __init__(self, url: str) -> None:
        self._files, root = _file_system(url)
        self.url, self._root = _without_credentials(url).rstrip("/"), root.rstrip("/")
        self.data = self._manifest_bytes()
        self.manifest = Manifest.from_bytes(self.data, f"{self.url}/{MANIFEST}")
        name = re.sub(r"[^\w.-]+", "-", self._root.rsplit("/", 1)[-1])[-48:]
        self.folder = copies_folder() / f"{name or 'cache'}-{digest(self.url.encode(), self.data)}"

    @property
    def shard_bytes(self) -> int:
        return sum(entry.bytes for entry in self.manifest.shards)

    def copy(self, progress: Callable[[int, int], None] | None = None) -> Path:
        """Makes the local copy, or what is missing of it, and returns its folder.

        A shard that is there with the size that the manifest lists is not copied again; whether its bytes are right is
        checked where every cache is: its index at opening, each record when it is read (the remedy is to delete the copy).
        Processes of one machine wait for the one that copies. Interrupted, a later call goes on with the shard that was not
        finished.

        Args:
            progress: called as progress(bytes_done, bytes_total).

        Raises:
            CacheError: the capture is not finished, or the URL cannot be read. CorruptCache: a shard has another size than
            the manifest lists. OSError: the folder cannot be written to.
        """
        if not self.manifest.complete:
            raise CacheError(f"{self.url}: the capture is not finished; finish it where it was begun and copy the folder again")
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder, os.O_RDONLY)  # on the folder itself: it leaves no file and dies with the process
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._copy_missing(progress or (lambda done, total: None))
        finally:
            os.close(lock)
        return self.folder

    def _copy_missing(self, progress: Callable[[int, int], None]) -> None:
        done, total = 0, self.shard_bytes

        def counted(blocks: Iterator[bytes]) -> Iterator[bytes]:
            nonlocal done
            for block in blocks:
                yield block
                done += len(block)
                progress(done, total)

        for entry in self.manifest.shards:
            path = self.folder / entry.name
            if path.is_file() and path.stat().st_size == entry.bytes:
                done += entry.bytes
            else:
                write_atomically(path, counted(self._blocks(entry)))
        manifest = self.folder / MANIFEST
        if not (manifest.is_file() and manifest.read_bytes() == self.data):
            write_atomically(manifest, [self.data])  # last: a folder that has it is a whole cache for everybody
        progress(total, total)

    def _blocks(self, entry: ShardEntry) -> Iterator[bytes]:
        """A shard's bytes; ends in CorruptCache unless there are as many as the manifest lists."""
        size, name = 0, f"{self.url}/{entry.name}"
        try:
            with self._files.open(f"{self._root}/{entry.name}", "rb") as file:
                while size <= entry.bytes and (block := file.read(_BLOCK)):
                    size += len(block)
                    yield block
        except FileNotFoundError:
            raise CorruptCache(f"{name}: the manifest lists this shard, but it is gone; copy the folder there again") from None
        except Exception as error:
            raise _unreadable(name, error) from error
        if size != entry.bytes:
            got = size if size < entry.bytes else "more"
            raise CorruptCache(f"{name}: expected {entry.bytes} bytes, got {got}; copy the folder there again")

    def _manifest_bytes(self) -> bytes:
        try:
            data: bytes = self._files.cat_file(f"{self._root}/{MANIFEST}")
        except (FileNotFoundError, NotADirectoryError):
            raise CacheError(f"{self.url}: no teacher cache here (it has no {MANIFEST}); check the URL") from None
        except Exception as error:
            raise _unreadable(self.url, error) from error
        return data


def _file_system(url: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ImportError as error:
        raise CacheError(f"{_without_credentials(url)}: a cache at a URL needs fsspec: pip install 'kdfast[remote]'") from error
    try:
        files, root = fsspec.core.url_to_fs(url)
    except Exception as error:  # a missing package is named in the message, an unknown protocol too
        raise _unreadable(_without_credentials(url), error) from error
    return files, str(root)


def _without_credentials(url: str) -> str:
    """For messages and the copy's name: `ftp://user:password@host/cache` is the cache at `ftp://host/cache`."""
    return re.sub(r"://[^/@]*@", "://", url)


def _unreadable(name: str, error: Exception) -> CacheError:
    """Every store has errors of its own; what they share is a message."""
    said = " ".join(str(error).split()) or type(error).__name__
    return CacheError(f"{name}: cannot be read ({said}); check the URL, the package for its protocol, credentials and network")
