"""Files that others read are written whole or not at all.

On a file system a file gets a temporary name in the same folder, and then its own. Where the storage root is a URL,
paths are universal-pathlib's, and a file is uploaded when it is whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


def store_of(path: Any) -> Any:
    """The fsspec file system of a path below a URL (universal-pathlib's UPath); None: a path of this host's files."""
    return None if isinstance(path, Path) else path.fs


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary local file; its contents become `path` if the block ends without an error.

    ValueError where the disk is full.
    """
    path = Path(path) if isinstance(path, str) else path
    if store_of(path) is not None:
        with tempfile.TemporaryDirectory(prefix="m2f-") as folder:
            partial = Path(folder, path.name)
            partial.touch()
            yield partial
            move(partial, path)
        return
    with _room_for(path):
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


@contextmanager
def _room_for(path: Path) -> Iterator[None]:
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


def move(source: Path, target: Path) -> None:
    """Put a local file in its place, and not half of it: renamed on its own file system, or uploaded to a URL."""
    if store_of(target) is None:
        source.replace(target)
    else:
        upload(source, target)
        source.unlink()


def upload(source: Path, target: Any) -> None:
    """Copy a local file to a path below a URL; a store shows it when the last byte has come."""
    target.fs.put_file(str(source), target.path)


def download(source: Any, target: Path) -> None:
    """Copy a file below a URL to a local path."""
    source.fs.get_file(source.path, str(target))


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, here or in a store, to another place; within a store it does not pass through this host."""
    here, there = store_of(source), store_of(target)
    if there is None or (here is not None and here != there):
        with whole_file(target) as partial:
            shutil.copyfile(source, partial) if here is None else download(source, partial)
    elif here is None:
        upload(source, target)
    else:
        there.copy(str(source), str(target))


def link_or_copy(source: Path, target: Path) -> None:
    """Put a file at another place too: a hard link where the file system allows it, else a copy. Replaces `target`."""
    if store_of(source) is None and store_of(target) is None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        with suppress(OSError):
            os.link(source, target)
            return
    copy_file(source, target)


def delete(path: Any) -> None:
    """Delete a file or a folder with all that is in it."""
    store = store_of(path)
    if store is not None:
        store.rm(path.path, recursive=True)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def files_below(folder: Any) -> dict[str, int]:
    """Bytes of every file in a folder and the folders in it, by its relative name with `/`; none without the folder."""
    store = store_of(folder)
    if store is None:
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    found = store.find(folder.path, detail=True)
    return {name.removeprefix(folder.path).lstrip("/"): found[name]["size"] for name in sorted(found)}


class Lines:
    """A text file that grows line by line. One below a URL, which cannot be appended to, grows in a local file, and is
    uploaded by `save` and `close`."""

    def __init__(self, path: Path, text: str) -> None:
        """Replaces what is at `path`."""
        write_text(path, text)
        self.path = path
        if store_of(path) is None:
            self.file: IO[str] = open(path, "a", encoding="utf-8")  # noqa: SIM115  (open as long as this)
        else:
            self.file = tempfile.NamedTemporaryFile("w", prefix="m2f-", suffix=".jsonl", encoding="utf-8")  # noqa: SIM115
            self.file.write(text)
        self.saved = True

    @property
    def local(self) -> Path:
        """Where its lines are at once; for a file below a URL only until it is closed."""
        return Path(self.file.name)

    @property
    def closed(self) -> bool:
        """Whether it can grow no more."""
        return self.file.closed

    def add(self, line: str) -> None:
        """Append a line. ValueError where the disk is full."""
        with _room_for(self.path):
            self.file.write(line + "\n")
            self.file.flush()
        self.saved = False

    def save(self) -> None:
        """What has been added is at `path` when this returns."""
        if not self.saved and store_of(self.path) is not None:
            upload(Path(self.file.name), self.path)
        self.saved = True

    def close(self) -> None:
        """Save and end."""
        self.save()
        self.file.close()


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON, whole or not at all. NaN and infinities are a ValueError: they are not JSON."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path, *, made_by: str) -> Any:
    """Read a JSON file; ValueError with the command that makes it (`made_by`) when it is missing, torn or has NaN."""
    try:
        path = Path(path) if isinstance(path, str) else path
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; make it with: {made_by}") from None
    except ValueError as error:  # of json's, of UTF-8, of _no_number
        raise ValueError(f"{path} is not JSON ({error}); make it again with: {made_by}") from None


def _no_number(name: str) -> None:
    """What Python's json would take for a float: NaN, Infinity, -Infinity."""
    raise ValueError(f"it holds {name}")


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    path = Path(path) if isinstance(path, str) else path
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def in_gib(count: int) -> str:
    """Bytes for people: 18.01 GiB, 0.3 MiB."""
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:,.1f} MiB"
