"""Digests of large files, read once per host."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pipeline.storage.files import sha256, write_json
from pipeline.storage.progress import Progress
from pipeline.storage.root import storage_root
from pipeline.storage.stores import FileStore, StoredPath, store_of

_BLOCK = 1 << 20


def file_digest(path: StoredPath, name: str = "") -> str:
    """SHA-256 of a file, hexadecimal; reading a large one shows how far it is."""
    digest = hashlib.sha256()
    progress = Progress(f"reading {name or path.name}", path.stat().st_size, unit="MiB", scale=2.0**-20)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            progress.add(len(block))
    progress.done(brief=True)
    return digest.hexdigest()


def checkpoint_digest(path: Path) -> str:
    """SHA-256 of a checkpoint's file; of a folder or an index, that of the names and digests of the folder's files."""
    if path.is_file() and path.suffix != ".json":
        return sha256(path)
    folder = path if path.is_dir() else path.parent
    files = sorted(each for each in folder.iterdir() if each.is_file())
    return hashlib.sha256("".join(f"{each.name} {sha256(each)}\n" for each in files).encode()).hexdigest()


def known_digest(path: StoredPath, digest: Callable[[StoredPath], str] = file_digest, *, state: str = "") -> str:
    """The digest of a file or folder, read once per host: while its state stays, what was found before is given.

    state: by default a file's size and modification time; a file in an object store that comes without one is read.
    """
    if not state:
        if not isinstance(store_of(path), FileStore):
            return digest(path)
        status = path.stat()
        state = f"{status.st_size} {status.st_mtime_ns}"
    noted = (
        store_of(storage_root()).notes_of_host() / "sources" / f"{hashlib.sha256(str(path).encode()).hexdigest()}.json"
    )
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(noted.read_text(encoding="utf-8"))
        if (known["path"], known["state"]) == (str(path), state):
            return str(known["digest"])
    found = digest(path)
    with suppress(OSError):  # where nothing can be written, it is read again
        write_json(noted, {"path": str(path), "state": state, "digest": found})
    return found
