"""What the storage root may be: a file system, or an object store behind a URL. Two classes have the same operations.

Whatever differs between the two is in here, so that no caller asks where a path lies. An operation is a method of both
classes, with the same arguments; `store_of(path)` gives the one that it takes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeAlias

from pipeline.storage.disk import Room, in_gib, locked, partial_files, written_whole
from pipeline.storage.host_cache import bytes_left, cache_folder, cache_is_set, kept_copy
from pipeline.storage.progress import Progress

if TYPE_CHECKING:
    from upath import UPath

StoredPath: TypeAlias = "Path | UPath"
"""A path of this host's files or one below a URL. Both have /, name, parent, exists, stat, open, read_text, glob and so
on; what they do not share is an operation of their stores."""

_BLOCK = 1 << 22


class Expected(NamedTuple):
    """What a stored file should be."""

    bytes: int
    sha256: str


def store_of(path: StoredPath) -> FileStore | ObjectStore:
    """The operations on a path."""
    return FileStore(path) if isinstance(path, Path) else ObjectStore(path)


@dataclass(frozen=True)
class FileStore:
    """Operations on a path of a file system, which every host that works on a row sees under the same path."""

    path: Path

    # One file

    @contextmanager
    def written_whole(self) -> Iterator[Path]:
        """Yields a temporary local file, which becomes this one if the block ends without an error."""
        with written_whole(self.path) as partial:
            yield partial

    def take(self, source: Path) -> None:
        """Move a local file, which lies where `incoming` says, to this place."""
        source.replace(self.path)

    def put(self, source: Path, *, link: bool = False) -> None:
        """Copy a local file to this place. link: a hard link will do, where the file system allows it."""
        if link:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.unlink(missing_ok=True)
            with suppress(OSError):
                os.link(source, self.path)
                return
        with written_whole(self.path) as partial:
            shutil.copyfile(source, partial)

    def copy_to(self, target: StoredPath, *, link: bool = False) -> None:
        """Copy this file to another place. link: a hard link will do, where a file system allows it between the two."""
        store_of(target).put(self.path, link=link)

    def delete(self) -> None:
        """Delete the file, or the folder with all that is in it."""
        if self.path.is_dir():
            shutil.rmtree(self.path)
        else:
            self.path.unlink()

    def rename(self, name: str) -> None:
        """Give the file another name in its folder."""
        self.path.rename(self.path.with_name(name))

    def is_same_file(self, other: Path) -> bool:
        """Whether a local file is this one under another name."""
        return self.path.samefile(other)

    # A file that grows

    def growing(self, text: str) -> IO[str]:
        """A local file of this text, to be added to: the stored one itself, which holds the text."""
        return open(self.path, "a", encoding="utf-8")

    def save(self, file: IO[str]) -> None:
        """What has been added to the growing file is stored when this returns."""

    def bytes_so_far(self) -> int:
        """Bytes of the file that another process is writing whole, here; 0 if none is."""
        written = 0
        for partial in partial_files(self.path.parent, self.path.name):
            with suppress(FileNotFoundError):
                written = max(written, partial.stat().st_size)
        return written

    # A file as one of this host's, to be mapped or searched

    def local(self, digest: str) -> Path:
        """The file on this host: itself."""
        return self.path

    def local_copy(self, digest: str) -> Path:
        """The file on this host's own disk: its copy in M2F_SHARD_CACHE, verified when it was made; the file itself
        where that is not set, or has no room. ValueError: the file has not this SHA-256, or the cache does not work."""
        if not cache_is_set():
            return self.path

        def fill(copy: Path) -> None:
            found = hashlib.sha256()
            with open(self.path, "rb") as source, open(copy, "wb") as target:
                while block := source.read(_BLOCK):
                    found.update(block)
                    target.write(block)
            _check_digest(self.path, found.hexdigest(), digest)

        copy = kept_copy(self.path.name, digest, size=lambda: self.path.stat().st_size, fill=fill)
        return copy or self.path

    @contextmanager
    def lent(self) -> Iterator[Path]:
        """The file on this host, for as long as the block takes: itself."""
        yield self.path

    def local_and_digest(self, digest: str, read: Callable[[Path], str]) -> tuple[Path, str]:
        """The file on this host, and the SHA-256 that it has now, as `read` finds it."""
        return self.path, read(self.path)

    # A folder

    def files_below(self) -> dict[str, int]:
        """Bytes of every file in this folder and those in it, by its relative name with `/`; none without it."""
        files = (path for path in sorted(self.path.rglob("*")) if path.is_file())
        return {path.relative_to(self.path).as_posix(): path.stat().st_size for path in files}

    def is_visible(self) -> bool:
        """Whether this host sees the file or folder."""
        return self.path.exists()

    def delete_partial_files(self) -> None:
        """Delete what killed processes had begun to write in this folder."""
        for partial in partial_files(self.path):
            partial.unlink(missing_ok=True)

    @contextmanager
    def held_alone(self, refusal: str, *, wait_s: float = 0.0) -> Iterator[None]:
        """This folder belongs to this process alone, with whole files only; ValueError(refusal): another has it, and
        still does after `wait_s`.

        It is made if it is not there, and deleted in the end if nothing was put into it.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self.path / _LOCK, wait_s=wait_s))
            except BlockingIOError:
                raise ValueError(refusal) from None
            try:
                self.delete_partial_files()
                yield
            finally:
                self.delete_partial_files()
                if self.path.is_dir() and [path.name for path in self.path.iterdir()] == [_LOCK]:
                    shutil.rmtree(self.path)

    def is_held(self) -> bool:
        """Whether another process has the folder alone. Nothing is written to find out."""
        with suppress(FileNotFoundError), open(self.path / _LOCK) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def move_folder_to(self, target: StoredPath, *, last: str) -> None:
        """Move this folder, which is held alone, to another place in the same store, where `last`, a file in it, tells
        that all is there. Files of an earlier one with the same contents are replaced by themselves."""
        assert isinstance(target, Path)
        self.delete_partial_files()  # of tasks that were lost
        try:
            self.path.rename(target)
        except OSError:
            if not target.is_dir():
                raise
            for path in self.path.iterdir():
                if path.name != _LOCK:
                    path.replace(target / path.name)
            shutil.rmtree(self.path)
        (target / _LOCK).unlink(missing_ok=True)

    def first_wrong(
        self, files: Mapping[str, Expected], *, note: str, digest: Callable[[Path], str], doing: str
    ) -> tuple[str, str] | None:
        """Check some files below this folder before they are read: the first that is wrong, and what is; None: all are
        right.

        They are read once per host: `verified/<host>/<note>.json` in this folder says what was checked, and a file of
        the size and modification time there is not read again. doing: what the progress says.
        """
        noted = self.notes_of_host() / f"{note}.json"
        try:
            known = json.loads(noted.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = {}
        seen: dict[str, list[Any]] = {}
        progress = Progress(doing, sum(expected.bytes for expected in files.values()), unit="MiB", scale=2.0**-20)
        for name, expected in files.items():
            path = self.path / name
            if not path.exists():
                return name, "it is missing"
            status = path.stat()
            seen[name] = [status.st_size, status.st_mtime_ns, expected.sha256]
            if known.get(name) != seen[name]:
                found = digest(path)
                if found != expected.sha256:
                    return name, (
                        f"its sha256 is {found}, the manifest says {expected.sha256} ({status.st_size:,} of "
                        f"{expected.bytes:,} bytes)"
                    )
            progress.add(expected.bytes)
        if seen != known:
            with suppress(OSError), written_whole(noted) as partial:  # where nothing can be written: checked again
                partial.write_text(json.dumps(seen, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return None

    # The storage root

    def notes_of_host(self) -> Path:
        """The folder in which this host notes what it has read and found right."""
        return self.path / "verified" / socket.gethostname()

    def check_space(self, purpose: str, needed: int) -> None:
        """ValueError unless there is room for `needed` more bytes; purpose: "sharding coco"."""
        self.room_for_downloads().check(purpose, needed)

    def room_for_downloads(self) -> Room:
        """Where there must be room for a download that grows."""
        return Room(self.path, "the storage root", "M2F_STORAGE")

    def incoming(self) -> Path:
        """The folder, on a disk, where downloads grow."""
        return self.path / "archives" / "incoming"

    def say_not_copied(self, folder: Path) -> None:
        """Say what it means for a folder outside the root that it is read where it is. Nothing: as the root is."""

    # As libraries want it

    def for_arrow(self) -> tuple[str, Any]:
        """The path and the pyarrow file system that it belongs to; None: pyarrow's own."""
        return str(self.path), None

    def settings_of_workers(self) -> dict[str, str]:
        """Environment variables with which processes on other hosts find the same files."""
        return {}


_LOCK = ".lock"

RIGHTS = (
    "the credentials need the right to list, read, write and delete objects (for s3://: s3:ListBucket, s3:GetObject, "
    "s3:PutObject and s3:DeleteObject)"
)


@contextmanager
def _permitted(path: UPath, doing: str) -> Iterator[None]:
    """A store's refusal as a ValueError that says where and of what; doing: "read".

    Drivers say "Access Denied" alone. What they say besides is in the error's cause, which is lost between processes.
    """
    try:
        yield
    except PermissionError as error:
        raise ValueError(f"{path} may not be {doing} ({error.__cause__ or error}); {RIGHTS}") from error


@dataclass(frozen=True)
class ObjectStore:
    """Operations on a path below a URL, through fsspec's driver for it.

    A file is there when its last byte has come; it cannot grow, and there are no locks and no folders, only names with
    `/`. Nothing can be mapped or searched in place, so every host reads copies of its own.
    """

    path: UPath

    # One file

    @contextmanager
    def written_whole(self) -> Iterator[Path]:
        """Yields a temporary local file, which is uploaded if the block ends without an error."""
        with tempfile.TemporaryDirectory(prefix="m2f-") as folder:
            partial = Path(folder, self.path.name)
            partial.touch()
            yield partial
            self.put(partial)

    def take(self, source: Path) -> None:
        """Upload a local file, and delete it."""
        print(f"uploading {self.path.name} to {self.path.parent}", file=sys.stderr)
        self.put(source)
        source.unlink()

    def put(self, source: Path, *, link: bool = False) -> None:
        """Upload a local file."""
        with _permitted(self.path, "written"):
            self.path.fs.put_file(str(source), self.path.path)

    def copy_to(self, target: StoredPath, *, link: bool = False) -> None:
        """Copy this file to another place; within the store it does not pass through this host."""
        other = store_of(target)
        if isinstance(other, ObjectStore) and other.path.fs == self.path.fs:
            with _permitted(self.path, f"copied to {target}"):
                self.path.fs.copy(str(self.path), str(target))
        else:
            with other.written_whole() as partial:
                self._download(partial)

    def _download(self, target: Path) -> None:
        with _permitted(self.path, "read"):
            self.path.fs.get_file(self.path.path, str(target))

    def delete(self) -> None:
        """Delete the file, or all files below the path."""
        with _permitted(self.path, "deleted"):
            self.path.fs.rm(self.path.path, recursive=True)

    def rename(self, name: str) -> None:
        """Give the file another name in its folder: a copy within the store, and the old one is deleted."""
        with _permitted(self.path, f"renamed {name}"):
            self.path.rename(self.path.with_name(name))

    def is_same_file(self, other: Path) -> bool:
        """No local file is one of the store's."""
        return False

    # A file that grows

    def growing(self, text: str) -> IO[str]:
        """A temporary local file of this text, to be added to."""
        file = tempfile.NamedTemporaryFile("w", prefix="m2f-", suffix=".jsonl", encoding="utf-8")  # noqa: SIM115
        file.write(text)
        return file

    def save(self, file: IO[str]) -> None:
        """Upload the growing file as it is now."""
        self.put(Path(file.name))

    def bytes_so_far(self) -> int:
        """0: of an upload nothing is seen before its end."""
        return 0

    # A file as one of this host's, to be mapped or searched

    def local(self, digest: str) -> Path:
        """The file on this host: its copy in the cache, verified when it was made.

        ValueError: the file has not this SHA-256, the cache does not work, or has no room.
        """
        name, parent = self.path.name, self.path.parent

        def fill(copy: Path) -> None:
            try:
                self._download(copy)
            except ValueError:
                raise
            except Exception as error:  # drivers have errors of their own
                raise ValueError(f"{self.path} cannot be read ({error})") from error
            with open(copy, "rb") as file:
                _check_digest(self.path, hashlib.file_digest(file, "sha256").hexdigest(), digest)

        copy = kept_copy(name, digest, size=lambda: self.path.stat().st_size, fill=fill)
        if copy is None:
            raise ValueError(
                f"{name} ({in_gib(self.path.stat().st_size)}) has no room in {cache_folder()}, where files from "
                f"{parent} are copied to be read ({in_gib(bytes_left())} are left, and no copy there is unused); set "
                "M2F_SHARD_CACHE to a folder on a larger disk of this host, or raise M2F_SHARD_CACHE_GIB"
            )
        return copy

    def local_copy(self, digest: str) -> Path:
        """As `local`."""
        return self.local(digest)

    @contextmanager
    def lent(self) -> Iterator[Path]:
        """A temporary copy on this host, for as long as the block takes."""
        with tempfile.TemporaryDirectory(prefix="m2f-") as folder:
            copy = Path(folder, self.path.name)
            self._download(copy)
            yield copy

    def local_and_digest(self, digest: str, read: Callable[[Path], str]) -> tuple[Path, str]:
        """The file on this host, and its SHA-256, which was found when the copy was made."""
        return self.local(digest), digest

    # A folder

    def files_below(self) -> dict[str, int]:
        """Bytes of every file below the path, by its relative name with `/`."""
        top = self.path.path
        with _permitted(self.path, "listed"):
            found = self.path.fs.find(top, detail=True)
        return {name.removeprefix(top).lstrip("/"): found[name]["size"] for name in sorted(found)}

    def is_visible(self) -> bool:
        """True: whoever reaches the store sees all of it, and no folder has to be there."""
        return True

    def delete_partial_files(self) -> None:
        """Nothing: there are no half-written files."""

    @contextmanager
    def held_alone(self, refusal: str, *, wait_s: float = 0.0) -> Iterator[None]:
        """Nothing: there are no locks. Two processes do the same work twice, and write the same."""
        yield

    def is_held(self) -> bool:
        """False: there are no locks."""
        return False

    def move_folder_to(self, target: StoredPath, *, last: str) -> None:
        """Copy all files below the path, within the store, the one called `last` at the end; then delete them here."""
        for name in sorted(self.files_below(), key=lambda name: name == last):
            ObjectStore(self.path / name).copy_to(target / name)
        self.delete()

    def first_wrong(
        self, files: Mapping[str, Expected], *, note: str, digest: Callable[[Path], str], doing: str
    ) -> tuple[str, str] | None:
        """Check that some files are there in their lengths: the first that is wrong, and what is; None: all are right.

        Their digests are found when they are copied to be read. One question for each of their folders.
        """
        folders = {name.rpartition("/")[0] for name in files}
        found = {
            f"{folder}/{name}": size
            for folder in folders
            for name, size in ObjectStore(self.path / folder).files_below().items()
        }
        for name, expected in files.items():
            if name not in found:
                return name, "it is missing"
            if found[name] != expected.bytes:
                return name, f"{found[name]:,} of {expected.bytes:,} bytes"
        return None

    # The storage root

    def notes_of_host(self) -> Path:
        """The folder, on a disk of this host, in which it notes what it has read and found right."""
        return cache_folder() / "verified"

    def check_space(self, purpose: str, needed: int) -> None:
        """A store has room. ValueError where nothing may be written to it, before the work instead of after it."""
        probe = self.path / f".probe-{socket.gethostname()}-{os.getpid()}"
        with _permitted(self.path, "written"):
            probe.fs.pipe_file(probe.path, b"")
            probe.fs.rm_file(probe.path)

    def room_for_downloads(self) -> Room:
        """Where there must be room for a download that grows: on a disk of this host. ValueError as `check_space`'s."""
        self.check_space("", 0)
        return Room(cache_folder(), "this host's copies", "M2F_SHARD_CACHE")

    def incoming(self) -> Path:
        """The folder, on a disk of this host, where downloads grow."""
        return cache_folder() / "incoming"

    def say_not_copied(self, folder: Path) -> None:
        """Say that a folder of this host is not in the store."""
        print(
            f"{folder} is read where it is, and not copied to {self.path}: only hosts that see it there can make "
            "shards of it; list an archive of it instead to have it copied",
            file=sys.stderr,
        )

    # As libraries want it

    def for_arrow(self) -> tuple[str, Any]:
        """The path and the pyarrow file system that it belongs to."""
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        return self.path.path, PyFileSystem(FSSpecHandler(self.path.fs))

    def settings_of_workers(self) -> dict[str, str]:
        """Environment variables with which a host's copy of an archive has the same path on all of them."""
        return {"M2F_SHARD_CACHE": str(cache_folder())}


def _check_digest(path: StoredPath, found: str, expected: str) -> None:
    if found != expected:
        raise ValueError(
            f"{path} is truncated or altered: its sha256 is {found}, results/ says {expected}; make it again"
        )
