"""Archives as files: checked to their last byte, and compressed tar archives decompressed, so that files in them can be
found."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.data.archives import is_zip, opened_tar
from pipeline.params.sentences import error_shown
from pipeline.storage.progress import Progress
from pipeline.storage.stores import StoredPath

_BLOCK, _MIB = 1 << 20, 2.0**-20

_COMPRESSIONS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}
"""What opens a compressed tar archive, by the first bytes of the file."""

_OTHERS = {
    b"7z\xbc\xaf": "7z",
    b"Rar!": "RAR",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x1f\x9d": "compress",
    b"<": "HTML or XML",
}
"""Formats that are not read, by their first bytes."""

_ADVICE = "it is truncated or altered: get it again"


def _first_bytes(path: StoredPath) -> bytes:
    with path.open("rb") as file:
        return bytes(file.read(512))


def _decompressor(path: StoredPath) -> Callable[[Any], Any] | None:
    """What decompresses a file; None: it is not compressed as a whole."""
    head = _first_bytes(path)
    return next((opener for magic, opener in _COMPRESSIONS.items() if head.startswith(magic)), None)


def archive_stem(name: str) -> str:
    """An archive's name without the suffixes that say what it is: images.tar.gz -> images."""
    return re.sub(r"(\.tar)?\.(gz|bz2|xz)$|\.(zip|tar|tgz|tbz2?|txz)$", "", name, flags=re.IGNORECASE)


def decompressed_name(path: StoredPath) -> str:
    """The name of a compressed archive when it is decompressed; empty: it is none."""
    return "" if _decompressor(path) is None else f"{archive_stem(path.name)}.decompressed.tar"


def decompress(path: Path, target: Path, name: str) -> None:
    """Write a compressed tar archive, called `name` in messages, as a plain one. ValueError: it is torn, or no tar."""
    opener = _decompressor(path)
    assert opener is not None
    with open(target, "wb") as file:
        for block in _blocks(path, opener, name):
            file.write(block)
    _check_tar(target, name)


def check_archive(path: Path, name: str) -> None:
    """ValueError when an archive, called `name`, is none, or an entry of it does not match its checksum. A plain tar
    archive has checksums of its headers only."""
    head, opener = _first_bytes(path), _decompressor(path)
    if opener is not None:
        for _ in _blocks(path, opener, name):
            pass
    elif is_zip(path):
        _check_zip(path, name)
    elif tarfile.is_tarfile(path):
        _check_tar(path, name)
    elif not head:
        raise ValueError(f"{name} is empty; get it again")
    else:
        found = next((said for magic, said in _OTHERS.items() if head.lstrip().startswith(magic)), f"{head[:8]!r}")
        raise ValueError(
            f"{name} is neither a zip nor a tar archive (it begins as {found}); give one of these, which may be "
            "compressed as .tar.gz, .tar.bz2 or .tar.xz, or a folder"
        )


def _blocks(path: Path, opener: Callable[[Any], Any], name: str) -> Iterator[bytes]:
    """A compressed file's contents. ValueError: it is torn."""
    progress = Progress(f"decompressing {Path(name).name}", path.stat().st_size, unit="MiB", scale=_MIB)
    try:
        with open(path, "rb") as packed, opener(packed) as stream:
            while block := stream.read(_BLOCK):
                yield block
                progress.add(packed.tell() - progress.count)
    except Exception as error:  # zlib.error has no public base class
        raise ValueError(f"{name} does not decompress ({error_shown(error)}); {_ADVICE}") from None
    progress.done(brief=True)


def _check_tar(path: Path, name: str) -> None:
    try:
        opened_tar(path).close()
    except tarfile.TarError as error:
        raise ValueError(f"{name} is not a whole tar archive ({error_shown(error)}); {_ADVICE}") from None


def _check_zip(path: Path, name: str) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            progress = Progress(
                f"checking {Path(name).name}", sum(e.file_size for e in entries), unit="MiB", scale=_MIB
            )
            for entry in entries:
                with archive.open(entry) as file:
                    while block := file.read(_BLOCK):
                        progress.add(len(block))
            progress.done(brief=True)
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise ValueError(f"{name} is not a whole zip archive ({error_shown(error)}); {_ADVICE}") from None
    except (RuntimeError, NotImplementedError) as error:  # encrypted, unknown compression
        raise ValueError(
            f"{name} cannot be read ({error_shown(error)}); give a plain zip archive or a folder"
        ) from None
    except Exception as error:  # zlib.error has no public base class
        raise ValueError(f"{name} does not decompress ({error_shown(error)}); {_ADVICE}") from None
