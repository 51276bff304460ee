"""Label maps as files of a dataset: ids or colours of every pixel, or a sentence that names the file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pipeline.data.images.codecs import IGNORE
from pipeline.data.images.image_files import MAX_PIXELS, opened

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".pgm", ".ppm")
"""Of files that keep every id."""

_FORMATS = ("PNG", "TIFF", "BMP", "WEBP", "GIF", "PPM")
"""What Pillow calls them."""

_LOSSLESS = "labels are PNG, TIFF, BMP, GIF, PGM or lossless WebP files"

_WHITE_IS_ZERO = 0
"""TIFF's photometric interpretation of grey values that get darker; Pillow inverts them."""

_MANY_COLOURS = 20
"""Unknown ones in a file, above which they are no slips."""

_MOST = 2**31
"""Ids of an int32 are below."""


def read_labels(data: bytes, file: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Ids of a label file, (h, w) uint8, uint16 or int32; of a palette its indices. ValueError names `file`.

    Of a GIF its grey values: programs number the colours of its palette anew.
    """
    import numpy as np

    image = _read(data, file, max_pixels)
    values = np.asarray(image.convert("RGB") if image.format == "GIF" else image)
    if values.ndim == 3:
        values = _opaque(values, image, file)
        if (values != values[..., :1]).any():
            raise ValueError(
                f"{file} holds colours, not class ids; give every class its colour in the dataset's `palette`"
            )
        return values[..., 0]
    if values.dtype == bool:
        return values.astype(np.uint8)
    if values.dtype.kind == "f":
        return _whole(values, file)
    return _unstretched(values, image, data)


def read_colours(data: bytes, file: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Red, green and blue of a label file, (h, w, 3) uint8; of a palette its colours. ValueError names `file`."""
    import numpy as np

    image = _read(data, file, max_pixels)
    if image.mode in ("1", "L", "P"):
        return np.asarray(image.convert("RGB"))
    values = np.asarray(image)
    if values.ndim != 3:
        raise ValueError(f"{file} holds grey values of more than 8 bits; colours have 8 bits of red, green and blue")
    values = _opaque(values, image, file)
    return np.repeat(values, 3, axis=2) if values.shape[2] == 1 else values


def _read(data: bytes, file: str, max_pixels: int) -> Image:
    """The pixels of a label file. ValueError where they are not those that were saved, or there are several pages."""
    with opened(data, file, max_pixels) as image:
        wrong = _wrong(image, data)
        if not wrong:
            image.load()
    if wrong:
        raise ValueError(f"{file} {wrong}")
    return image


def _wrong(image: Image, data: bytes) -> str:
    """What keeps a file's ids or colours from being read as they were saved, or from being one map; empty: nothing."""
    from PIL import ExifTags

    if image.format not in _FORMATS:
        return f"is {image.format}; {_LOSSLESS}: others change ids"
    if (pages := getattr(image, "n_frames", 1)) > 1:
        return f"has {pages} pages; a label file has one"
    packed = str(image.info.get("compression", "")) if image.format == "TIFF" else ""
    if packed.endswith(("jpeg", "webp")) or (image.format == "WEBP" and _is_lossy(data)):
        return f"is {packed or 'lossy'} {image.format}; {_LOSSLESS}: others change ids"
    if _tags(image).get(262) == _WHITE_IS_ZERO:
        return "is a TIFF in which 0 is white (photometric 0); save it with 0 as black"
    if data[:2] in (b"P1", b"P4"):
        return "is a PBM, in which 1 is black; save it as PNG"
    if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "F", "LA", "La", "PA", "RGB", "RGBA", "RGBa"):
        return f"is {image.format} of mode {image.mode}; labels are ids, or red, green and blue"
    if len(image.getbands()) > 1 and (_bits(image, data) != 8 or _maxval(data, 255) != 255):
        return "has colours that are not of 8 bits; save them with 8 bits"
    if (turned := image.getexif().get(ExifTags.Base.Orientation, 1)) != 1:
        return f"has the orientation tag {turned}, so that its pixels lie in two ways; save it without the tag"
    return ""


def _is_lossy(data: bytes) -> bool:
    """Whether a WebP file holds a lossy picture: its chunks (4 letters, length, content) begin at byte 12."""
    at = 12
    while at + 8 <= len(data):
        if data[at : at + 4] in (b"VP8 ", b"VP8L"):
            return data[at : at + 4] == b"VP8 "
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8 + size + size % 2
    return True


def _tags(image: Image) -> Mapping[int, Any]:
    """What a TIFF says of itself, by TIFF's numbers; of other files nothing."""
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    return tags


def _bits(image: Image, data: bytes) -> int:
    """Bits of a pixel's value, or of one of its colours."""
    if image.format == "PNG":
        return data[24]  # in IHDR, the first chunk
    return max(_tags(image).get(258, (1,))) if image.format == "TIFF" else 8


def _maxval(data: bytes, other: int) -> int:
    """The largest value that a PGM or PPM file says it may hold; `other` of all other files."""
    if data[:2] not in (b"P2", b"P3", b"P5", b"P6"):
        return other
    return int(re.sub(rb"#[^\r\n]*", b"", data[:4096]).split()[3])


def _opaque(values: np.ndarray, image: Image, file: str) -> np.ndarray:
    """(h, w, c) without the transparency that all pixels lack. ValueError where one has it."""
    if image.mode not in ("LA", "La", "PA", "RGBA", "RGBa"):
        return values
    clear = int((values[..., -1] != 255).sum())
    if clear:
        raise ValueError(f"{file} has {clear} transparent pixels; save labels without transparency")
    return values[..., :-1]


def _whole(values: np.ndarray, file: str) -> np.ndarray:
    """Ids of floats, (h, w) int32. ValueError where one is no whole number."""
    import numpy as np

    wrong = values[~((np.abs(values) < _MOST) & (values == np.rint(values)))]
    if len(wrong):
        raise ValueError(f"{file} holds {len(wrong)} values that are no ids, such as {wrong[0]:g}: whole numbers are")
    return values.astype(np.int32)


def _unstretched(values: np.ndarray, image: Image, data: bytes) -> np.ndarray:
    """Grey values and indices as they are in the file: Pillow stretches values of few bits to 0..255, those of PGM
    from its largest value to 255 or 65535, and takes int8 for uint8."""
    import numpy as np

    tags = _tags(image)
    if image.mode == "L" and tags.get(339) == (2,):
        return values.view(np.int8).astype(np.int32)
    if image.mode == "L" and (bits := _bits(image, data)) < 8:
        return values // np.uint8(255 // (2**bits - 1))
    if image.format == "PPM":
        dtype, largest = (np.uint8, 255) if image.mode == "L" else (np.uint16, 65535)
        return np.rint(values * (_maxval(data, largest) / largest)).astype(dtype)
    return values.astype(np.uint16) if image.mode.startswith("I;16") else values


# What ids and colours mean


def class_ids(
    labels: np.ndarray, class_of: Callable[[int], int | None], file: str, *, nothing: int, known: Callable[[int], str]
) -> np.ndarray:
    """Stored labels as class ids, (h, w) uint8, or uint16 where `nothing` is 65535.

    class_of: class, or nothing, of a stored id; None where there is none: a ValueError then names the file, the id
    and how many pixels hold it; `known`, of the id, says what ids there are.
    """
    import numpy as np

    values = np.arange(256 if labels.dtype == np.uint8 else 65536)
    if labels.dtype.kind != "u":
        values = np.unique(labels)
        labels = np.searchsorted(values, labels)
    counts = np.bincount(labels.ravel(), minlength=len(values))
    table = np.full(len(values), nothing, np.uint8 if nothing == IGNORE else np.uint16)
    wrong: list[int] = []
    for place in np.flatnonzero(counts).tolist():
        class_id = class_of(int(values[place]))
        if class_id is None:
            wrong.append(place)
        else:
            table[place] = class_id
    if wrong:
        place = max(wrong, key=lambda at: int(counts[at]))
        more = f" (and {len(wrong) - 1} other ids that are none)" if len(wrong) > 1 else ""
        value = int(values[place])
        raise ValueError(f"{file} holds label {value} on {counts[place]} pixels{more}, {known(value)}")
    return table[labels]


def colour_ids(
    colours: np.ndarray, class_of: Mapping[tuple[int, int, int], int], file: str, *, nothing: int
) -> np.ndarray:
    """Colours, (h, w, 3) uint8, as class ids like those of `class_ids`.

    class_of: class, or nothing, of every colour. ValueError names the file, a colour that is not among them, and how
    many pixels hold it.
    """
    import numpy as np

    packed = np.zeros(colours.shape[:2], np.int32)
    for channel in range(3):  # in place: pictures are large
        packed <<= 8
        packed |= colours[..., channel]
    table = sorted((red << 16 | green << 8 | blue, class_id) for (red, green, blue), class_id in class_of.items())
    known, ids = np.array(table, np.int32).T
    place = np.minimum(np.searchsorted(known, packed), len(known) - 1)
    wrong = packed[known[place] != packed]
    if len(wrong):
        values, counts = np.unique(wrong, return_counts=True)
        value, pixels = int(values[counts.argmax()]), int(counts.max())
        more = f" (and {len(values) - 1} other unknown colours)" if len(values) > 1 else ""
        colour = [value >> 16, value >> 8 & 255, value & 255]
        remedy = "give it to a class there, or to `ignore`"
        if len(values) > _MANY_COLOURS:
            remedy = "colours were blended; resize and save labels without interpolation and loss"
        raise ValueError(
            f"{file} holds the colour {colour} on {pixels} pixels{more}, which `palette` does not name; {remedy}"
        )
    return ids.astype(np.uint8 if nothing == IGNORE else np.uint16)[place]
