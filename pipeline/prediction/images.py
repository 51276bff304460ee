"""The pictures that somebody names: one file, a folder, an archive, a glob or a video."""

from __future__ import annotations

import glob
import hashlib
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from pipeline.data.archives import file_names, in_folder, is_zip, read_file
from pipeline.data.images.codecs import decode_image
from pipeline.data.images.image_files import stored_image
from pipeline.data.records import IMAGE_SUFFIXES
from pipeline.params.sentences import shown
from pipeline.prediction.video import VIDEO_SUFFIXES, frames

if TYPE_CHECKING:
    import numpy as np

    from pipeline.data.images.image_files import ImageReading

AHEAD = 4
"""Pictures that are read while others are predicted."""

_ARCHIVES = (".zip", ".tar")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")

LONGEST_NAME = 200
"""Bytes of a file's or folder's name without its suffix; file systems take 255, and suffixes are added."""


@dataclass(frozen=True)
class Found:
    """A picture or a video, not read yet. Can be sent to another process."""

    name: str
    """Of what is written of it: its path without suffix below the place that was named; no two have the same."""
    where: Path
    """The folder or archive that it lies in."""
    file: str
    """Its plain name there."""

    @property
    def is_video(self) -> bool:
        """Whether it is a video, by its suffix."""
        return self.file.lower().endswith(VIDEO_SUFFIXES)

    @property
    def path(self) -> Path:
        """Where it lies; in an archive no file does."""
        return in_folder(self.where, self.file) if self.where.is_dir() else self.where / self.file


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture, or one frame of a video."""

    name: str
    """Of what is written of it."""
    file: str
    """What it is called in tables and messages."""
    digest: str = ""
    """SHA-256 of its file, or of a frame's pixels; empty: it cannot be read."""
    pixels: np.ndarray | None = None
    """(h, w, 3) uint8 RGB; None: it was not asked for, or cannot be read."""
    error: str = ""
    """Why it cannot be read, in a sentence."""


def find_images(source: str, *, without: Path) -> list[Found]:
    """The pictures and videos that `source` names, in the order of their names; those below `without` are left out.

    A folder or an archive (zip, or uncompressed tar) is searched with all its folders, for files that end like pictures
    or videos. ValueError where there is none.
    """
    if not source:
        raise ValueError("IMAGES is empty; name an image, a video, a folder, an archive or a glob")
    path = Path(source)
    if path.is_dir():
        found = [(path, name) for name in file_names(path) if _looks_right(name)]
    elif path.is_file():
        if path.name.lower().endswith(_COMPRESSED):
            raise ValueError(
                f"{source} is a compressed tar archive, which must be read from its start; unpack it first"
            )
        is_archive = path.suffix.lower() in _ARCHIVES or is_zip(path)
        files = [name for name in file_names(path) if _looks_right(name)] if is_archive else [path.name]
        found = [(path if is_archive else path.parent, name) for name in files]
    elif matched := sorted(each for each in glob.glob(source, recursive=True) if os.path.isfile(each)):
        top = Path(os.path.commonpath([Path(each).parent for each in matched]))
        found = [(top, Path(each).relative_to(top).as_posix()) for each in matched if _looks_right(each)]
    else:
        raise ValueError(f"{source} is no file or folder, and no file matches it; give images that are there")
    inside = cache(lambda folder: folder.resolve().is_relative_to(without.resolve()))
    outside = [(where, file) for where, file in found if not inside((where / file).parent)]
    if found and not outside:
        raise ValueError(f"{source} lies in {without}, where the results would go; give another folder with --out")
    if not outside:
        wanted = ", ".join((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))
        raise ValueError(f"{source} holds no image: no file in it ends with one of {wanted}")
    names = _names([file for _, file in outside])
    return [Found(name, where.absolute(), file) for name, (where, file) in zip(names, outside, strict=True)]


def _looks_right(name: str) -> bool:
    return name.lower().endswith((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))


def _names(files: Sequence[str]) -> list[str]:
    """A name for each file: without its suffix or, where others would have the same, with it. A video's name is that of
    the folder of its frames, too."""
    names = [str(PurePosixPath(file).with_suffix("")) for file in files]
    folders = {str(folder) for name in names for folder in PurePosixPath(name).parents}
    names = [
        file if name in folders and file.lower().endswith(VIDEO_SUFFIXES) else name
        for file, name in zip(files, names, strict=True)
    ]
    while twice := {name for name, count in Counter(names).items() if count > 1}:
        names = [file if name in twice else name for file, name in zip(files, names, strict=True)]
    return names


def read_images(
    found: Sequence[Found], reading: ImageReading, *, is_done: Callable[[str, str], bool]
) -> Iterator[Picture]:
    """Every picture and every frame in turn, read ahead by a thread: one, as archives and Pillow's settings are shared.

    is_done: whether the picture of a name and a digest is finished already; its pixels are then not decoded. A file
    that cannot be read gives a Picture with its `error`.
    """
    ahead: deque[Future[Picture] | Found] = deque()
    with ThreadPoolExecutor(1) as thread:
        waiting = iter(found)
        while True:
            while len(ahead) < AHEAD and (one := next(waiting, None)) is not None:
                ahead.append(one if one.is_video else thread.submit(_image, one, reading, is_done))
            if not ahead:
                return
            first = ahead.popleft()
            if isinstance(first, Found):
                yield from _frames(first, is_done)
            else:
                yield first.result()


def _image(found: Found, reading: ImageReading, is_done: Callable[[str, str], bool]) -> Picture:
    """A picture as the loader delivers it: turned by its EXIF tag, without alpha, in 8 bits."""
    if why := _refused(found):
        return Picture(found.name, found.file, error=why)
    try:
        data = read_file(found.where, found.file)
        digest = hashlib.sha256(data).hexdigest()
        if is_done(found.name, digest):
            return Picture(found.name, found.file, digest)
        return Picture(
            found.name, found.file, digest, decode_image(stored_image(data, found.file, reading), found.file)
        )
    except ValueError as error:
        return Picture(found.name, found.file, error=str(error))


def _refused(found: Found) -> str:
    """Why no file can be called like it, in a sentence; empty: one can."""
    longest = max(len(part.encode()) for part in found.name.split("/"))
    if longest <= LONGEST_NAME:
        return ""
    return f"{shown(found.file)} has a name of {longest} bytes; rename it to {LONGEST_NAME} or less"


def _frames(found: Found, is_done: Callable[[str, str], bool]) -> Iterator[Picture]:
    """The frames of a video, as pictures of the names <video>/<number from 1 on>."""
    why = "" if found.where.is_dir() else f"{found.file} is a video in an archive; unpack it first"
    if why := why or _refused(found):
        yield Picture(found.name, found.file, error=why)
        return
    try:
        for number, pixels in enumerate(frames(found.path), start=1):
            name, file = f"{found.name}/{number:06d}", f"{found.file}, frame {number}"
            digest = hashlib.sha256(pixels.tobytes()).hexdigest()
            yield Picture(name, file, digest, None if is_done(name, digest) else pixels)
    except ValueError as error:
        yield Picture(found.name, found.file, error=str(error))
