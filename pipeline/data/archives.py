"""Files of a folder or, in place, of a zip or tar archive.

They have plain names, whichever program made the archive: `/` between folders, composed characters (Unicode's NFC).
"""

from __future__ import annotations

import io
import os
import shutil
import stat
import struct
import tarfile
import tempfile
import unicodedata
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipeline.params.sentences import error_shown


@dataclass(frozen=True)
class _Archive:
    """An opened archive."""

    file: zipfile.ZipFile | tarfile.TarFile
    entries: Mapping[str, zipfile.ZipInfo | tarfile.TarInfo]
    """By plain name."""

    def open(self, name: str) -> IO[bytes]:
        """A file in it. KeyError: it has none of that name, or none but a link."""
        entry = self.entries[name]
        if isinstance(entry, tarfile.TarInfo):
            assert isinstance(self.file, tarfile.TarFile)
            file = self.file.extractfile(entry)  # which follows links
            if file is None:
                raise KeyError("it is a link to no file")
            return file
        assert isinstance(self.file, zipfile.ZipFile)
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise KeyError("it is a symbolic link; put the file itself into the archive")
        return self.file.open(entry)


_open_archives: dict[tuple[int, Path], _Archive] = {}

_spellings: dict[tuple[int, Path], dict[str, str]] = {}
"""Of folders with names that are not plain: the names there, by plain name."""


def _archive(path: Path) -> _Archive:
    """An opened archive. One inside another is called <archive>/<its name there>, and read in place as well."""
    key = (os.getpid(), path)  # an archive opened before a fork would share its file position with the parent
    if key not in _open_archives:
        outer = next((above for above in path.parents if above.is_file()), None)
        try:
            inner = None if outer is None else _inner_file(outer, path.relative_to(outer).as_posix())
            file, entries = _opened(path if inner is None else inner)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # the libraries' own, and what a torn header makes them raise
            raise ValueError(f"{path} is not a whole archive ({error_shown(error)}); fetch or copy it again") from None
        _open_archives[key] = _Archive(file, _by_plain_name(entries, str(path)))
    return _open_archives[key]


def _opened(file: Path | IO[bytes]) -> tuple[zipfile.ZipFile | tarfile.TarFile, list[tuple[str, Any]]]:
    """A zip or tar archive, with the name and entry of every file in it."""
    if is_zip(file):
        archive = zipfile.ZipFile(file)
        entries = (entry for entry in archive.infolist() if entry.filename[-1:] not in ("/", "\\"))
        return archive, [(_zip_name(entry), entry) for entry in entries]
    tar = opened_tar(file)
    files = (entry for entry in tar.getmembers() if entry.isreg() or entry.islnk() or entry.issym())
    return tar, [(entry.name, entry) for entry in files]


def is_zip(file: Path | IO[bytes]) -> bool:
    """Whether a file is a zip archive, whole or torn; a tar archive that ends with one is not."""
    if isinstance(file, Path):
        with open(file, "rb") as opened:
            return is_zip(opened)
    head = file.read(tarfile.BLOCKSIZE)
    found = head.startswith(b"PK") or (head[257:262] != b"ustar" and zipfile.is_zipfile(file))
    file.seek(0)
    return found


def opened_tar(file: Path | IO[bytes]) -> tarfile.TarFile:
    """A tar archive, with all its headers read. TarError where one is torn, or the zeros that end an archive are
    missing: tarfile takes both for the end."""
    tar = tarfile.open(file, "r:") if isinstance(file, Path) else tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115
    tar.getmembers()
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    end = tar.fileobj.read(tarfile.BLOCKSIZE)
    if not end:
        raise tarfile.ReadError(f"no zeros at its end, after {len(tar.getmembers())} entries")
    if end.strip(b"\0"):
        raise tarfile.ReadError(f"no header where one should be, after {len(tar.getmembers())} entries")
    return tar


def _zip_name(entry: zipfile.ZipInfo) -> str:
    """The name of an entry. Some programs write UTF-8 without saying so; zipfile takes it for the characters of DOS."""
    if not entry.flag_bits & 0x800:
        try:
            return entry.filename.encode("cp437").decode()
        except UnicodeError:
            pass
    return entry.filename


def _by_plain_name(entries: Iterable[tuple[str, Any]], where: str) -> dict[str, Any]:
    """Visible files by plain name; of those that an archive holds twice under the same name, the last, as when it is
    unpacked. ValueError: a name is not UTF-8, or two differ in their spelling only."""
    found: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for name, entry in entries:
        plain = plain_name(name)
        if _is_hidden(plain):
            continue
        try:
            plain.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where} holds a file whose name is not UTF-8, {name!r}; rename it") from None
        if spelled.setdefault(plain, name) != name:
            raise ValueError(f"{where} holds {spelled[plain]!a} and {name!a}, which are one name; keep one of them")
        found[plain] = entry
    return found


def plain_name(name: str) -> str:
    """A file's name with `/` between folders, also where Windows wrote `\\`, and composed characters."""
    parts = unicodedata.normalize("NFC", name).replace("\\", "/").split("/")
    return "/".join(part for part in parts if part not in ("", "."))


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def _inner_file(outer: Path, name: str) -> IO[bytes]:
    """An archive in an archive as a seekable file: a stretch of the outer one or, if it is compressed there, an
    anonymous temporary copy, which stays open as long as the archive."""
    entry = _archive(outer).entries[name]
    if isinstance(entry, tarfile.TarInfo):
        if entry.isreg() and not entry.issparse():
            return io.BufferedReader(_Stretch(outer, entry.offset_data, entry.size))
    elif entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1:
        with open(outer, "rb") as file:
            file.seek(entry.header_offset)
            name_bytes, extra_bytes = struct.unpack("<26x2H", file.read(30))  # local header (APPNOTE 4.3.7)
        return io.BufferedReader(_Stretch(outer, entry.header_offset + 30 + name_bytes + extra_bytes, entry.file_size))
    copy = tempfile.TemporaryFile()  # noqa: SIM115
    with _archive(outer).open(name) as packed:
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
    """Plain names of all files of a folder or archive, sorted; hidden files and macOS's copies are left out."""
    if source.is_dir():
        return sorted(_by_plain_name(((name, name) for name in folder_files(source)), str(source)))
    return sorted(_archive(source).entries)


def folder_files(folder: Path) -> list[str]:
    """All files of a folder as they are spelled there, sorted, relative with `/`; hidden ones are left out.

    ValueError names a link that leads nowhere or back to a folder above it, what is no file, and what cannot be read.
    """
    return sorted(name for name in _files_below(folder, "", ()) if not _is_hidden(name))


def _files_below(folder: Path, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Files in `folder`/`prefix` and below. above: device and inode of the folders that it lies in."""
    here = folder / prefix
    try:
        status = here.stat()
        if (status.st_dev, status.st_ino) in above:
            raise ValueError(f"{here} is a link to a folder in which it lies; remove the link")
        for entry in os.scandir(here):
            name = f"{prefix}{entry.name}"
            if _is_hidden(entry.name):
                continue
            if entry.is_dir():
                yield from _files_below(folder, f"{name}/", (*above, (status.st_dev, status.st_ino)))
            elif entry.is_file():
                yield name
            else:
                kind = "a link that leads nowhere" if entry.is_symlink() else "no regular file"
                raise ValueError(f"{folder / name} is {kind}; remove it, or put the file there")
    except OSError as error:
        raise ValueError(f"{error.filename or here} cannot be read ({error.strerror}); mend or remove it") from None


def read_file(source: Path, name: str) -> bytes:
    """One file of a folder or archive, by its plain name. ValueError names it when it is gone or torn."""
    archive = None if source.is_dir() else _archive(source)
    try:
        if archive is None:
            return in_folder(source, name).read_bytes()
        with archive.open(name) as file:
            return file.read()
    except (OSError, KeyError) as error:
        said = error.args[0] if isinstance(error, KeyError) else error_shown(error)
        raise ValueError(f"{source.name}: {name} cannot be read ({said})") from None
    except MemoryError:
        raise
    except Exception as error:  # torn, encrypted, odd method: the libraries' own, and zlib.error
        raise ValueError(
            f"{source.name}: {name} cannot be read ({error_shown(error)}); copy the archive again"
        ) from None


def in_folder(folder: Path, name: str) -> Path:
    """The path of a file of a folder, which it may spell in another way, by its plain name."""
    if (folder / name).exists():
        return folder / name
    key = (os.getpid(), folder)
    if key not in _spellings:
        _spellings[key] = _by_plain_name(((each, each) for each in folder_files(folder)), str(folder))
    return folder / _spellings[key].get(name, name)


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
