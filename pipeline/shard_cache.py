"""A host's own copies of shards, for storage roots that are slow to read at random.

M2F_SHARD_CACHE names a folder on the host's own disk; unset: shards are read where they lie. M2F_SHARD_CACHE_GIB is the
most that copies may take; unset: a tenth of the disk stays free. Any number of processes may share the folder.

<digest>.arrow is a copy. <digest>.lock says which size and modification time it had when its digest was right; it was
modified when the copy was last opened, and is held (a shared flock) by every process that has the copy open. Who copies
holds copying.lock, so that a host copies one shard at a time.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from pipeline.files import whole_file

FREE_SHARE = 0.1
"""Of the disk that stays free where no bound is set."""

_BLOCK = 1 << 22

_held: dict[Path, TextIO] = {}
"""Locks of the copies that this process, or the one that it was forked from, has opened; given back when it ends."""


def local_copy(shard: Path, digest: str) -> Path:
    """This host's copy of a shard, made now if there is none; without a cache, or room in it, the shard itself.

    The copy is verified while it is made, and made again if its size or modification time has changed since. It is not
    deleted while a process that asked for it lives. Copies that no process has open are deleted, the longest unused
    first, where the bound needs it. ValueError: the shard has not this SHA-256, M2F_SHARD_CACHE cannot be written, or
    M2F_SHARD_CACHE_GIB is no number.
    """
    setting = os.environ.get("M2F_SHARD_CACHE")
    if not setting:
        return shard
    try:
        return _copy_in(Path(setting).expanduser().absolute(), shard, digest)
    except OSError as error:
        raise ValueError(f"M2F_SHARD_CACHE is {setting}, where {shard.name} cannot be kept ({error})") from None


def _copy_in(folder: Path, shard: Path, digest: str) -> Path:
    """The copy in the cache's folder, or the shard itself where there is no room."""
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / f"{digest}.arrow"
    lock = _held.get(copy) or open(copy.with_suffix(".lock"), "a", encoding="ascii")  # noqa: SIM115 (held for good)
    fcntl.flock(lock, fcntl.LOCK_SH)  # only while one deletes a copy that nobody had open does this wait
    if not _is_whole(copy):
        with _copying(folder):
            if not _is_whole(copy):
                if not _make_room(folder, shard.stat().st_size, copy):
                    lock.close()
                    _held.pop(copy, None)
                    return shard
                _copy(shard, copy, digest)
                copy.with_suffix(".lock").write_text(_state(copy), encoding="ascii")
    os.utime(lock.fileno())
    _held[copy] = lock
    return copy


def _state(copy: Path) -> str:
    status = copy.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _is_whole(copy: Path) -> bool:
    return copy.exists() and copy.with_suffix(".lock").read_text(encoding="ascii") == _state(copy)


@contextmanager
def _copying(folder: Path) -> Iterator[None]:
    """Only one process of this host is in here; what a killed one left half copied is gone."""
    with open(folder / "copying.lock", "a", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for partial in folder.glob(".*.part"):
            partial.unlink()
        yield


def _copy(shard: Path, copy: Path, digest: str) -> None:
    found = hashlib.sha256()
    with whole_file(copy) as partial:
        with open(shard, "rb") as source, open(partial, "wb") as target:
            while block := source.read(_BLOCK):
                found.update(block)
                target.write(block)
        if found.hexdigest() != digest:
            raise ValueError(
                f"shard {shard} is truncated or altered: its sha256 is {found.hexdigest()}, the manifest says {digest}"
            )


def _room(folder: Path) -> float:
    """Bytes that may still be copied."""
    setting, disk = os.environ.get("M2F_SHARD_CACHE_GIB"), shutil.disk_usage(folder)
    if not setting:
        return disk.free - FREE_SHARE * disk.total
    try:
        bound = float(setting) * 2**30
    except ValueError:
        bound = math.nan
    if not bound >= 0:
        raise ValueError(f"M2F_SHARD_CACHE_GIB is {setting!r}; it must be a number of GiB from 0 on")
    return min(bound - sum(copy.stat().st_size for copy in folder.glob("*.arrow")), disk.free)


def _make_room(folder: Path, size: int, copy: Path) -> bool:
    """Delete `copy`, which is to be made, and as many unused copies as `size` bytes need; False: there is no room."""
    copy.unlink(missing_ok=True)
    unused = sorted(folder.glob("*.arrow"), key=_last_used)
    while _room(folder) < size:
        if not unused:
            return False
        _delete_unless_open(unused.pop(0))
    return True


def _last_used(copy: Path) -> int:
    lock = copy.with_suffix(".lock")
    return lock.stat().st_mtime_ns if lock.exists() else 0


def _delete_unless_open(copy: Path) -> None:
    with open(copy.with_suffix(".lock"), "a", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        copy.unlink()
