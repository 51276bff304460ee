"""Records, which every dataset gives, and reading files from a folder or, in place, from a zip archive."""

from __future__ import annotations

import io
import os
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")


class Instance(NamedTuple):
    """One annotated object; objects may overlap."""

    class_id: int
    box: tuple[float, float, float, float]
    """x1, y1, x2, y2 in pixels, as annotated."""
    area: float
    """Pixels, as annotated: decides whether it counts as small, medium or large."""
    crowd: bool
    """Stands for many objects: not trained on, and predictions on it do not count."""
    counts: bytes
    """Its mask at the picture's size: compressed run lengths of pycocotools."""


class Labelled(NamedTuple):
    """One picture as its dataset gives it."""

    image: bytes
    """The file as published."""
    segments: np.ndarray | None
    """(h, w) integers: segment ids from 0; 255 (65535 where there are more than 255 ids) is nothing. None: the dataset
    has instances only."""
    segment_classes: tuple[int, ...] | None
    """Class of every segment id; None: ids are class ids."""
    segment_crowd: tuple[bool, ...] = ()
    """Whether a segment stands for many objects, one flag per id; empty: none does."""
    instances: tuple[Instance, ...] | None = None
    """None: the dataset has no instance labels of its own, and the segments of things are the instances."""


@dataclass(frozen=True)
class Record:
    """One picture of a split, not read yet. Can be sent to another process."""

    name: str
    """Unique in its split; without suffix."""
    image_file: str
    """Where the picture lies, for messages."""
    label_file: str
    read: Callable[[], Labelled]
    """Reads both. ValueError names the file that is wrong."""


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


def read_labels(data: bytes, file: str) -> np.ndarray:
    """Ids of a label PNG, (h, w) uint8, uint16 or int32; of a palette its indices. ValueError names `file`."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            file_format, ids, bands = image.format, np.asarray(image), len(image.getbands())
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{file} does not decode ({error}); it is truncated or not a picture") from None
    if file_format != "PNG" or bands != 1:
        raise ValueError(
            f"{file} is {file_format} with {bands} channels; labels are PNG files with one channel of class ids"
        )
    if ids.dtype == bool:
        return ids.astype(np.uint8)
    bits, colour_type = data[24], data[25]  # IHDR; grey values of fewer than 8 bits come stretched to 0..255
    if colour_type == 0 and bits < 8:
        return ids // np.uint8(255 // (2**bits - 1))
    return ids


def read_colours(data: bytes, file: str) -> np.ndarray:
    """A PNG of 8-bit red, green and blue, (h, w, 3) uint8. ValueError names `file`."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            file_format, mode, colours = image.format, image.mode, np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{file} does not decode ({error}); it is truncated or not a picture") from None
    if (file_format, mode) != ("PNG", "RGB"):
        raise ValueError(f"{file} is {file_format} of mode {mode}; panoptic segment ids are PNG files of mode RGB")
    return colours


def image_size(data: bytes, file: str) -> tuple[int, int]:
    """(height, width) of a picture, turned as its EXIF tag says, without decoding it. ValueError names `file`."""
    from PIL import ExifTags, Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{file} does not decode ({error}); it is truncated or not a picture") from None
    return (width, height) if turned else (height, width)


def check_image(data: bytes, file: str) -> None:
    """Decode a picture to its last byte. ValueError names `file`: OpenCV fills what a torn file lacks with grey."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{file} does not decode ({error}); it is truncated or not a picture") from None


def check_run_lengths(counts: bytes, size: tuple[int, int]) -> None:
    """ValueError unless compressed run lengths cover a mask of `size` (height, width) exactly.

    pycocotools leaves memory as it was where they cover less. The format (its maskApi.c, rleToString): numbers of 5
    bits a character from 48 on, low bits first, 32 says that more follow, 16 in the last is the sign; from the
    fourth number on it is the difference to the last but one.
    """
    import numpy as np

    codes = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    last = codes & 32 == 0
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or not last[-1]:
        raise ValueError("its compressed run lengths are not as pycocotools writes them")
    starts = np.flatnonzero(np.concatenate([[True], last[:-1]]))
    place = np.arange(len(codes)) - np.repeat(starts, np.diff([*starts, len(codes)]))
    if place.max() > 6:  # 5 * 7 bits are more than 32
        raise ValueError("its compressed run lengths hold a number of more than 32 bits")
    lengths = np.add.reduceat((codes & 31) << 5 * place, starts)
    lengths -= np.where(codes[last] & 16, 1 << 5 * (place[last] + 1), 0)
    for first in (1, 2):
        lengths[first::2] = np.cumsum(lengths[first::2])
    if lengths.min() < 0 or lengths.sum() != size[0] * size[1]:
        raise ValueError(f"its run lengths do not cover {size[0]} x {size[1]} (height x width) pixels")


def class_ids(labels: np.ndarray, lookup: np.ndarray, file: str, *, known: str) -> np.ndarray:
    """Stored labels as class ids, (h, w) uint8 with 255 for nothing.

    lookup: (256,) int16, class id or 255 of every stored id, -1 where there is none: a ValueError then names
    the file, the id and how many pixels hold it; `known` says which ids there are.
    """
    import numpy as np

    if labels.dtype != np.uint8:
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high > 255:
            wrong = low if low < 0 else high
            raise ValueError(_unknown_id(file, wrong, int((labels == wrong).sum()), known))
        labels = labels.astype(np.uint8)
    counts = np.bincount(labels.ravel(), minlength=256)
    wrong_ids = np.flatnonzero((counts > 0) & (lookup < 0))
    if len(wrong_ids):
        raise ValueError(_unknown_id(file, int(wrong_ids[0]), int(counts[wrong_ids[0]]), known))
    return lookup.astype(np.uint8)[labels]


def _unknown_id(file: str, value: int, pixels: int, known: str) -> str:
    return f"{file} holds label {value} on {pixels} pixels, which is outside the classes: {known}"
