"""Files of a folder or, in place, of a zip archive."""

from __future__ import annotations

import io
import os
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

_open_archives: dict[tuple[int, Path], zipfile.ZipFile] = {}


def _archive(path: Path) -> zipfile.ZipFile:
    """An opened archive. One inside another is called <archive>/<its name there>, and read in place as well."""
    key = (os.getpid(), path)  # an archive opened before a fork would share its file position with the parent
    if key not in _open_archives:
        outer = next((above for above in path.parents if above.is_file()), None)
        try:
            inner = None if outer is None else _inner_file(outer, path.relative_to(outer).as_posix())
            _open_archives[key] = zipfile.ZipFile(path if inner is None else inner)
        except (zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError) as error:
            raise ValueError(f"{path} is not a whole zip archive ({error}); fetch or copy it again") from None
    return _open_archives[key]


def _inner_file(outer: Path, name: str) -> IO[bytes]:
    """An archive in an archive as a seekable file: a stretch of the outer one or, if it is compressed there, an
    anonymous temporary copy, which stays open as long as the archive."""
    entry = _archive(outer).getinfo(name)
    if entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1:
        with open(outer, "rb") as file:
            file.seek(entry.header_offset)
            name_bytes, extra_bytes = struct.unpack("<26x2H", file.read(30))  # local header (APPNOTE 4.3.7)
        return io.BufferedReader(_Stretch(outer, entry.header_offset + 30 + name_bytes + extra_bytes, entry.file_size))
    copy = tempfile.TemporaryFile()  # noqa: SIM115
    with _archive(outer).open(entry) as packed:
        shutil.copyfileobj(packed, copy, 1 << 20)
    return copy


class _Stretch(io.RawIOBase):
    """`size` bytes of a file from `start` on, as a file."""

    def __init__(self, path: Path, start: int, size: int) -> None:
        self.file, self.start, self.size, self.at = open(path, "rb", buffering=0), start, size, 0  # noqa: SIM115

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence])
        return self.at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(0, self.size - self.at))
        self.file.seek(self.start + self.at)
        count = self.file.readinto(memoryview(buffer)[:wanted])
        self.at += count
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


def file_names(source: Path) -> list[str]:
    """All files of a folder or zip archive, sorted, relative with `/`; hidden files and macOS's copies are left out."""
    if source.is_dir():
        names = [
            Path(folder, file).relative_to(source).as_posix()
            for folder, _, files in os.walk(source, followlinks=True)
            for file in files
        ]
    else:
        names = [name for name in _archive(source).namelist() if not name.endswith("/")]
    visible = (name for name in names if not any(part.startswith((".", "__MACOSX")) for part in name.split("/")))
    return sorted(visible)


def read_file(source: Path, name: str) -> bytes:
    """One file of a folder or zip archive. ValueError names it when it is gone or torn."""
    try:
        return (source / name).read_bytes() if source.is_dir() else _archive(source).read(name)
    except (zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError) as error:  # torn, encrypted, odd method
        raise ValueError(f"{source.name}: {name} cannot be read ({error}); fetch or copy the archive again") from None
    except (OSError, KeyError) as error:
        raise ValueError(f"{source.name}: {name} cannot be read ({error})") from None


def below(names: Sequence[str], top: str, source: Path) -> str:
    """Prefix of `source` that holds the folder `top`: "" or a single top-level folder, with its slash."""
    if any(name.startswith(f"{top}/") for name in names):
        return ""
    tops = sorted({name.split("/")[0] for name in names if name.count("/") >= 1})
    holders = [folder for folder in tops if any(name.startswith(f"{folder}/{top}/") for name in names)]
    if len(holders) != 1:
        found = ", ".join(tops[:5]) or "no folders"
        raise ValueError(f"{source} has no folder {top}/ (found {found}); see docs/own-data.md for the layout")
    return f"{holders[0]}/"
