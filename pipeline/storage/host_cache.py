"""A host's own copies of stored files: of shards, for storage roots that are slow to read at random; and, where the
storage root is a URL, of everything that is read by its digest, since nothing can be mapped or searched there in place.

M2F_SHARD_CACHE names a folder on the host's own disk; unset: shards are read where they lie, or, from a URL, copied to
the user's cache folder. M2F_SHARD_CACHE_GIB is the most that copies may take; unset: a tenth of the disk stays free.
Any number of processes may share the folder.

<digest>/<name> is a copy. <digest>/<name>.lock says which size and modification time it had when its digest was right;
it was modified when the copy was last opened, and is held (a shared flock) by every process that has the copy open. Who
copies holds copying.lock, so that a host copies one file at a time.
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from pipeline.storage.disk import written_whole

FREE_SHARE = 0.1
"""Of the disk that stays free where no bound is set."""

_held: dict[Path, TextIO] = {}
"""Locks of the copies that this process, or the one that it was forked from, has opened; given back when it ends."""


def cache_folder() -> Path:
    """M2F_SHARD_CACHE, or this user's cache folder; absolute."""
    setting = os.environ.get("M2F_SHARD_CACHE")
    if setting:
        return Path(setting).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "m2f"


def cache_is_set() -> bool:
    """Whether M2F_SHARD_CACHE asks for copies also of what could be read where it lies."""
    return bool(os.environ.get("M2F_SHARD_CACHE"))


def kept_copy(name: str, digest: str, *, size: Callable[[], int], fill: Callable[[Path], None]) -> Path | None:
    """This host's copy of a file, made now if there is none; None where it has no room.

    size(): the file's bytes. fill(path): writes the copy there, an error unless it has the SHA-256 `digest`. Both are
    called only where a copy is to be made, which it is again if its size or modification time has changed since. It is
    not deleted while a process that asked for it lives. Copies that no process has open are deleted, the longest unused
    first, where the bound needs it. ValueError: the cache cannot be written, or M2F_SHARD_CACHE_GIB is no number.
    """
    folder = cache_folder()
    try:
        return _copy_in(folder, folder / digest / name, size, fill)
    except OSError as error:
        raise ValueError(f"M2F_SHARD_CACHE is {folder}, where {name} cannot be kept ({error})") from None


def bytes_left() -> int:
    """Bytes that may still be copied."""
    return max(0, int(_room(cache_folder())))


def _copy_in(folder: Path, copy: Path, size: Callable[[], int], fill: Callable[[Path], None]) -> Path | None:
    """The copy in the cache's folder; None: there is no room."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    lock = _held.get(copy) or open(_lock(copy), "a", encoding="ascii")  # noqa: SIM115 (held for good)
    fcntl.flock(lock, fcntl.LOCK_SH)  # only while one deletes a copy that nobody had open does this wait
    if not _is_whole(copy):
        with _copying(folder):
            if not _is_whole(copy):
                if not _make_room(folder, size(), copy):
                    lock.close()
                    _held.pop(copy, None)
                    return None
                _copy(copy, fill)
                _lock(copy).write_text(_state(copy), encoding="ascii")
    os.utime(lock.fileno())
    _held[copy] = lock
    return copy


def _lock(copy: Path) -> Path:
    return copy.with_name(f"{copy.name}.lock")


def _copies(folder: Path) -> list[Path]:
    """All copies, whole or not."""
    return [path for path in folder.glob("*/*") if path.is_file() and path.suffix not in (".lock", ".part")]


def _state(copy: Path) -> str:
    status = copy.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _is_whole(copy: Path) -> bool:
    return copy.exists() and _lock(copy).read_text(encoding="ascii") == _state(copy)


@contextmanager
def _copying(folder: Path) -> Iterator[None]:
    """Only one process of this host is in here; what a killed one left half copied is gone."""
    with open(folder / "copying.lock", "a", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for partial in folder.glob("*/.*.part"):
            partial.unlink()
        yield


def _copy(copy: Path, fill: Callable[[Path], None]) -> None:
    with written_whole(copy) as partial:
        fill(partial)


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
    return min(bound - sum(copy.stat().st_size for copy in _copies(folder)), disk.free)


def _make_room(folder: Path, size: int, copy: Path) -> bool:
    """Delete `copy`, which is to be made, and as many unused copies as `size` bytes need; False: there is no room."""
    copy.unlink(missing_ok=True)
    unused = sorted(_copies(folder), key=_last_used)
    while _room(folder) < size:
        if not unused:
            return False
        _delete_unless_open(unused.pop(0))
    return True


def _last_used(copy: Path) -> int:
    lock = _lock(copy)
    return lock.stat().st_mtime_ns if lock.exists() else 0


def _delete_unless_open(copy: Path) -> None:
    with open(_lock(copy), "a", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        copy.unlink()
