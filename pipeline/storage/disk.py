"""Files on this host's own file systems: written whole or not at all, and what is said where there is no room.

Nothing here knows the storage root; pipeline.storage.stores does the same for every place that the root may be.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO


@contextmanager
def locked(lock: Path, *, wait_s: float = 0.0) -> Iterator[None]:
    """This process alone is in the block; BlockingIOError when another one has been for `wait_s`.

    `lock`: a file that is made with its folder, and deleted at the end. What a process held that has died is free, once
    the processes that it has forked have ended too. Nothing is locked where the file system has no locks.
    """
    handle = _open_locked(lock, time.monotonic() + wait_s)
    try:
        yield
    finally:
        if _is_at(lock, handle):
            lock.unlink()
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # closing is not enough: a forked process may have it open too
        handle.close()


def _open_locked(lock: Path, until_s: float) -> IO[str]:
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = open(lock, "a")  # noqa: SIM115
        except FileNotFoundError:  # another process has just finished and moved the folder
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            if time.monotonic() >= until_s:
                raise
            time.sleep(0.05)
            continue
        except OSError:
            return handle
        if _is_at(lock, handle):
            return handle
        handle.close()  # the one before has deleted it


def _is_at(path: Path, handle: IO[str]) -> bool:
    """Whether an open file is the one that a path leads to."""
    with suppress(OSError):
        return os.path.samestat(os.fstat(handle.fileno()), os.stat(path))
    return False


def is_special(path: Path) -> bool:
    """Whether a path is there and neither a file nor a folder."""
    return path.exists() and not path.is_file() and not path.is_dir()


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yields a temporary file in the same folder, which becomes `path` if the block ends without an error.

    ValueError where the disk is full; OSError for a device, a pipe or a socket: root could replace /dev/null.
    """
    if is_special(path):
        raise OSError(errno.EINVAL, "it is a device, a pipe or a socket, which no file replaces", str(path))
    with full_disk_said(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
        partial = Path(name)
        try:
            yield partial
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            mask = os.umask(0)
            os.umask(mask)
            partial.chmod(0o666 & ~mask)  # mkstemp's 0600 would hide shared results from other users
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def partial_files(folder: Path, name: str = "*") -> Iterator[Path]:
    """The temporary files of `written_whole` in a folder, or those of one file: being written, or left by a kill."""
    return folder.glob(f".{name}.*.part")


def is_partial(name: str) -> bool:
    """Whether a file, by its name or path, is one that is being written, or was left by a kill."""
    return name.rpartition("/")[2].startswith(".") and name.endswith(".part")


@contextmanager
def full_disk_said(path: object) -> Iterator[None]:
    """A full disk is something to be mended, not a fault to be tried again: a ValueError that says how."""
    try:
        yield
    except Exception as error:
        if not _is_full(error):
            raise
        raise ValueError(
            f"{path} could not be written, for its disk is full; make room (python -m stages.storage list shows what "
            f"lies under the storage root) and run the same again: it goes on where it was"
        ) from error


def _is_full(error: Exception) -> bool:
    """Whether an error says that there is no space left, or none that this user may take."""
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in full
    return any(f"(os error {number})" in str(error) for number in full)  # as Rust's libraries say it: safetensors


def in_gib(count: int) -> str:
    """Bytes for people: 18.01 GiB, 0.3 MiB."""
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:,.1f} MiB"


@dataclass(frozen=True)
class Room:
    """A folder where files grow before they have their place."""

    folder: Path
    what: str
    """The folder in a message: the storage root."""
    setting: str
    """The environment variable that names the folder."""

    def check(self, purpose: str, needed: int) -> None:
        """ValueError unless there is space for `needed` more bytes; purpose: "downloading coco"."""
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"{purpose} takes {in_gib(needed)} more, but only {in_gib(free)} are free under {self.what} "
                f"{self.folder}; make room, or set {self.setting} to a folder on another file system"
            )
