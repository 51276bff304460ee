"""Records, which every dataset gives, and reading files from a folder or, in place, from a zip archive."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")


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
    key = (os.getpid(), path)  # an archive opened before a fork would share its file position with the parent
    if key not in _open_archives:
        try:
            _open_archives[key] = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} is not a whole zip archive ({error}); fetch or copy it again") from None
    return _open_archives[key]


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
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            kind, ids, bands = picture.format, np.asarray(picture), len(picture.getbands())
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{file} does not decode ({error}); it is truncated or not a picture") from None
    if kind != "PNG" or bands != 1:
        raise ValueError(f"{file} is {kind} with {bands} channels; labels are PNG files with one channel of class ids")
    if ids.dtype == bool:
        return ids.astype(np.uint8)
    bits, colour_type = data[24], data[25]  # IHDR; grey values of fewer than 8 bits come stretched to 0..255
    if colour_type == 0 and bits < 8:
        return ids // np.uint8(255 // (2**bits - 1))
    return ids


def check_picture(data: bytes, file: str) -> None:
    """Decode a picture to its last byte. ValueError names `file`: OpenCV fills what a torn file lacks with grey."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{file} does not decode ({error}); it is truncated or not a picture") from None


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
