"""Files that others read are written whole or not at all, wherever the storage root lies.

On a file system a file gets a temporary name in the same folder, and then its own (pipeline.storage.disk). Where the
storage root is a URL, paths are universal-pathlib's, and a file is uploaded when it is whole (pipeline.storage.stores).
"""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from pipeline.storage.disk import full_disk_said
from pipeline.storage.stores import StoredPath, store_of

_BLOCK = 1 << 20


def whole_file(path: str | StoredPath) -> AbstractContextManager[Path]:
    """Yields a temporary local file; its contents become `path` if the block ends without an error.

    ValueError where the disk is full.
    """
    return store_of(Path(path) if isinstance(path, str) else path).written_whole()


def copy_file(source: StoredPath, target: StoredPath) -> None:
    """Copy a file, here or in a store, to another place; within a store it does not pass through this host."""
    store_of(source).copy_to(target)


def link_or_copy(source: StoredPath, target: StoredPath) -> None:
    """Put a file at another place too: a hard link where the file system allows it, else a copy. Replaces `target`."""
    store_of(source).copy_to(target, link=True)


def delete(path: StoredPath) -> None:
    """Delete a file or a folder with all that is in it."""
    store_of(path).delete()


def files_below(folder: StoredPath) -> dict[str, int]:
    """Bytes of every file in a folder and the folders in it, by its relative name with `/`; none without the folder."""
    return store_of(folder).files_below()


def matching(folder: StoredPath, pattern: str) -> list[StoredPath]:
    """The files below a folder whose names match a glob pattern, sorted; none without the folder."""
    found: list[StoredPath] = sorted(folder.glob(pattern))
    return found


def local_file(path: StoredPath, digest: str | None = None) -> AbstractContextManager[Path]:
    """A stored file as one of this host's, to be mapped or searched: the file itself on a file system.

    From a URL it is the host's verified copy if its SHA-256 is given (pipeline.storage.host_cache), else a temporary
    one.
    """
    return store_of(path).lent() if digest is None else nullcontext(store_of(path).local(digest))


def local_copy(path: StoredPath, digest: str) -> Path:
    """A stored file as one of this host's own disk, by its SHA-256; the file itself where it lies on a file system and
    there is no cache (M2F_SHARD_CACHE), or no room in it.

    ValueError: the file has not this SHA-256, the cache does not work, or has no room for a file from a URL.
    """
    return store_of(path).local_copy(digest)


class Lines:
    """A text file that grows line by line. One below a URL, which cannot be appended to, grows in a local file, and is
    uploaded by `save` and `close`."""

    def __init__(self, path: StoredPath, text: str) -> None:
        """Replaces what is at `path`."""
        write_text(path, text)
        self.path = path
        self.file = store_of(path).growing(text)
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
        with full_disk_said(self.path):
            self.file.write(line + "\n")
            self.file.flush()
        self.saved = False

    def save(self) -> None:
        """What has been added is at `path` when this returns."""
        if not self.saved:
            store_of(self.path).save(self.file)
        self.saved = True

    def close(self) -> None:
        """Save and end."""
        self.save()
        self.file.close()


def write_text(path: str | StoredPath, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | StoredPath, value: Any) -> None:
    """Write indented JSON, whole or not at all. NaN and infinities are a ValueError: they are not JSON."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | StoredPath, *, made_by: str) -> Any:
    """Read a JSON file; ValueError with the command that makes it (`made_by`) when it is missing, torn or has NaN."""
    try:
        path = Path(path) if isinstance(path, str) else path
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number, parse_float=_finite)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; make it with: {made_by}") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder, not a file; delete it and make it again with: {made_by}") from None
    except (ValueError, RecursionError) as error:  # of json's, of UTF-8, of _no_number
        raise ValueError(f"{path} is not JSON ({error}); make it again with: {made_by}") from None


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large a number")
    return value


def _no_number(name: str) -> None:
    """What Python's json would take for a float: NaN, Infinity, -Infinity."""
    raise ValueError(f"it holds {name}")


def sha256(path: str | StoredPath) -> str:
    """SHA-256 of a file, hexadecimal."""
    path = Path(path) if isinstance(path, str) else path
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
