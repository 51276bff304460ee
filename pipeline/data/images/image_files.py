"""Images as files of a dataset: checked to the last byte, and stored so that the loader needs no setting for them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from pipeline.data.images.codecs import decode_image, decoded
from pipeline.params.sentences import error_shown

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from pipeline.params.schema import DatasetConfig

MAX_PIXELS = 180_000_000
"""Pixels of the largest image that is decoded, unless the dataset says otherwise; sharding takes 40 bytes for each."""

FULL_RANGE_16_BIT = 4096
"""16-bit images whose values all stay below this one hold 12 bits or fewer, of which a plain reading leaves 15 grey
levels or fewer."""

_READ_ALIKE = ("JPEG", "MPO", "PNG", "WEBP")
"""Formats that OpenCV reads as Pillow does. Of others some kinds come out otherwise: TIFF multiplied by its alpha."""

_LEVELS = 2
"""By how much two right decoders may differ."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageReading:
    """How a dataset's images are read: the fields of these names in DatasetConfig."""

    exif: Literal["apply", "ignore"] = "apply"
    value_range: tuple[float, float] | None = None
    max_pixels: int = MAX_PIXELS

    @classmethod
    def of(cls, config: DatasetConfig) -> ImageReading:
        """The settings of a dataset."""
        return cls(exif=config.exif, value_range=config.value_range, max_pixels=config.max_pixels)


AS_FILES_SAY = ImageReading()
"""Of a dataset that sets nothing."""


class _Header(NamedTuple):
    """What a file says about itself before its pixels are decoded."""

    format: str
    """Pillow's name."""
    size: tuple[int, int]
    """(height, width) as stored."""
    orientation: int
    """EXIF's: 1 as stored, 2 to 8 to be turned or mirrored; 0: not found in the EXIF that there is."""
    images: int
    """Pages or frames. A JPEG's previews, and smaller copies in a TIFF, do not count."""


@contextmanager
def memory_said(file: str) -> Iterator[None]:
    """ValueError names `file` where the block needs more memory than this process can have."""
    import cv2

    try:
        yield
    except (MemoryError, cv2.error) as error:
        if isinstance(error, cv2.error) and error.code != cv2.Error.StsNoMem:
            raise
        raise ValueError(
            f"{file} needs more memory than there is; scale it down, or run fewer --processes at once (max_pixels in "
            "the dataset refuses such images before they are decoded)"
        ) from None


@contextmanager
def opened(data: bytes, file: str, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """A file as Pillow opens it. Whatever a decoder raises in the block becomes a ValueError that names `file`."""
    from PIL import Image, UnidentifiedImageError

    _check_bytes(data, file)
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # `max_pixels` takes its place
    try:
        with _without_warnings(), Image.open(io.BytesIO(data)) as image:
            if wrong := _wrong_size((image.height, image.width), max_pixels):
                raise _WrongSizeError(wrong)
            yield image
    except _WrongSizeError as error:
        raise ValueError(f"{file} {error}") from None
    except UnidentifiedImageError:
        said = f"it begins with {data[:8]!r}, as no known format does"
        raise ValueError(f"{file} does not decode ({said}); it is truncated or not an image") from None
    except MemoryError:
        raise
    except Exception as error:  # decoders raise exceptions of all types
        raise ValueError(f"{file} does not decode ({error_shown(error)}); it is truncated or not an image") from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Leaves out Pillow's warnings, which name no file; what they are about is refused, or does not matter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _WrongSizeError(Exception):
    """An image without pixels, or with more than the dataset allows."""


def _check_bytes(data: bytes, file: str) -> None:
    """ValueError for a file that holds no image at all."""
    if not data:
        raise ValueError(f"{file} does not decode: it is empty; fetch or copy it again")
    if data.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file} is a pointer of Git LFS, not the file itself; run: git lfs pull")
    if data.startswith(b"\x89PNG") and data[12:16] != b"IHDR":  # Pillow looks for it, at any place
        raise ValueError(
            f"{file} does not decode: a PNG begins with the chunk IHDR, and this one does not; it is altered"
        )


def _wrong_size(size: tuple[int, int], max_pixels: int) -> str:
    """What is wrong with the size of an image; empty: nothing."""
    pixels = size[0] * size[1]
    if pixels <= max_pixels and min(size) > 0:
        return ""
    shape = f"is {size[0]} x {size[1]} (height x width)"
    if min(size) <= 0:
        return f"{shape} and has no pixel"
    return (
        f"{shape}, {pixels:,} pixels, and max_pixels is {max_pixels:,}; scale it down, or set max_pixels in the "
        "dataset (sharding takes 40 bytes of memory for every pixel)"
    )


def image_size(data: bytes, file: str, reading: ImageReading = AS_FILES_SAY) -> tuple[int, int]:
    """(height, width) of an image as it is read, without decoding it. ValueError names `file`."""
    header = _header(data, file, reading.max_pixels)
    turned = reading.exif == "apply" and header.orientation >= 5
    return header.size[::-1] if turned else header.size


def turned_hint(found: tuple[int, int], labels: tuple[int, int], exif: str) -> str:
    """What to do about an image of size `found` whose labels have the other orientation; empty: they have not."""
    if found != labels[::-1] or found == labels:
        return ""
    other = "as stored, set exif: ignore" if exif == "apply" else "turned as their EXIF tags say, set exif: apply"
    return f"; if the labels were drawn on the images {other} in the dataset"


def stored_image(data: bytes, file: str, reading: ImageReading = AS_FILES_SAY) -> bytes:
    """What a shard stores of an image file: its bytes, where the loader reads them as `reading` says; else a PNG of
    the pixels. ValueError names `file`: it is torn, has several pages, or values that need a `value_range`."""
    import cv2

    header = _header(data, file, reading.max_pixels)
    if header.images > 1:
        raise ValueError(f"{file} holds {header.images} images, as pages or frames; make a file of the one to be used")
    values = _deep_values(data, file, header, reading)
    right: np.ndarray | None
    if values is not None:
        right = _eight_bit(values, file, reading.value_range)
    elif header.format not in _READ_ALIKE:
        right = _pillow(data, file, header, reading)
    else:
        _check_end(data, file, reading.max_pixels)
        if reading.exif == "apply" and header.orientation == 1:
            return data
        right = _opencv(data, cv2.IMREAD_COLOR_RGB, header, reading)
    loaded = decoded(data, cv2.IMREAD_COLOR_RGB)
    return data if right is None or _alike(loaded, right) else _png(right)


def loaded_image(data: bytes, file: str) -> np.ndarray:
    """What the loader decodes from the bytes of `stored_image`, (h, w, 3) uint8 RGB. ValueError names `file`."""
    try:
        return decode_image(data, file)
    except ValueError:
        raise ValueError(
            f"{file} is decoded by Pillow, but not by OpenCV: it is larger than the memory or of an unusual type; "
            "scale it down, or store it as PNG"
        ) from None


def _header(data: bytes, file: str, max_pixels: int) -> _Header:
    """What a file says about itself. ValueError names `file`; of a TIFF also where Pillow does not know its pixels."""
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _tiff_header(data, file, max_pixels)
    with opened(data, file, max_pixels) as image:
        images = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        return _Header(image.format or "", (image.height, image.width), _orientation(image), images)


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation. Pillow's `getexif` looks into XMP too, which OpenCV does not."""
    from PIL import ExifTags, Image

    if not image.info.get("exif"):
        return 1
    exif = Image.Exif()
    try:
        exif.load(image.info["exif"])
        found = exif.get(ExifTags.Base.Orientation)
    except Exception:  # as decoders raise them
        return 0
    return found if isinstance(found, int) and 1 <= found <= 8 else 0


def _tiff_header(data: bytes, file: str, max_pixels: int) -> _Header:
    """A TIFF's header, from the tags of its pages."""
    from PIL import ExifTags
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    start = data[:16] if data[2:3] == b"+" or data[3:4] == b"+" else data[:8]
    pages, seen, stream = [], set[int](), io.BytesIO(data)
    try:
        with _without_warnings():
            at = ImageFileDirectory_v2(start).next
            while at and at not in seen:
                seen.add(at)
                stream.seek(at)
                pages.append(ImageFileDirectory_v2(start))
                pages[-1].load(stream)
                at = pages[-1].next
            tags = pages[0]
            size = (int(tags[ExifTags.Base.ImageLength]), int(tags[ExifTags.Base.ImageWidth]))
            orientation = tags.get(ExifTags.Base.Orientation, 1)
            smaller = sum(bool(page.get(ExifTags.Base.NewSubfileType, 0) & 5) for page in pages[1:])  # or masks
    except Exception as error:  # as decoders raise them
        raise ValueError(
            f"{file} does not decode (its tags: {error_shown(error)}); it is truncated or not an image"
        ) from None
    if wrong := _wrong_size(size, max_pixels):
        raise ValueError(f"{file} {wrong}")
    return _Header("TIFF", size, orientation if orientation in range(1, 9) else 1, len(pages) - smaller)


# Pixels


def _check_end(data: bytes, file: str, max_pixels: int) -> None:
    """Decode an image to its last byte. ValueError names `file`: OpenCV fills what a torn one lacks with grey."""
    with opened(data, file, max_pixels) as image:
        image.load()


def _opencv(data: bytes, flags: int, header: _Header, reading: ImageReading) -> np.ndarray | None:
    """An image as OpenCV decodes it, turned as `reading` says; None where it cannot."""
    import cv2

    if header.format == "TIFF":  # which it always turns
        image = decoded(data, flags)
        return image if image is None or reading.exif == "apply" else _turned(image, _BACK[header.orientation])
    image = decoded(data, flags | cv2.IMREAD_IGNORE_ORIENTATION)
    return image if image is None or reading.exif == "ignore" else _turned(image, header.orientation)


def _pillow(data: bytes, file: str, header: _Header, reading: ImageReading, mode: str = "RGB") -> np.ndarray:
    """An image as Pillow decodes it, turned as `reading` says; mode: "" leaves the values as they are."""
    import numpy as np

    with opened(data, file, reading.max_pixels) as image:
        image.load()
        pixels = np.asarray(image.convert(mode) if mode else image)
    if header.format == "TIFF":  # which it always turns
        return pixels if reading.exif == "apply" else _turned(pixels, _BACK[header.orientation])
    return pixels if reading.exif == "ignore" else _turned(pixels, header.orientation)


_BACK = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}
"""The orientation that undoes one."""


def _turned(image: np.ndarray, orientation: int) -> np.ndarray:
    """An image (h, w, ...) as stored, mirrored and turned as an EXIF orientation says (Exif 2.3, tag 0x0112)."""
    import numpy as np

    if orientation in (5, 6, 7, 8):
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def _deep_values(data: bytes, file: str, header: _Header, reading: ImageReading) -> np.ndarray | None:
    """An image's values, (h, w, 1 to 4) in the order BGRA, where they are no 8-bit ones; None: they are."""
    import cv2
    import numpy as np

    if header.format in (*_READ_ALIKE, "GIF") and not (header.format == "PNG" and data[24] == 16):  # IHDR's depth
        return None
    values = _opencv(data, cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH, header, reading)
    if values is None:
        values = _opencv(data, cv2.IMREAD_UNCHANGED, header, reading)
    if values is None:
        values = _pillow(data, file, header, reading, mode="")
    elif values.dtype != np.uint8 and header.format != "TIFF":  # of which OpenCV refuses a torn one
        _check_end(data, file, reading.max_pixels)
    return None if values.dtype in (np.uint8, np.bool_) else values.reshape(*values.shape[:2], -1)


def _eight_bit(values: np.ndarray, file: str, value_range: tuple[float, float] | None) -> np.ndarray:
    """(h, w, 3) uint8 RGB of values, (h, w, 1 to 4) in the order BGRA: `value_range` becomes 0 to 255. Without one
    16-bit values lose their lower byte, as the loader reads them."""
    import numpy as np

    values = values[..., :1] if values.shape[2] < 3 else values[..., 2::-1]
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        wrong = values.size - int(np.isfinite(values).sum())
        raise ValueError(f"{file} holds {wrong} values that are NaN or infinite; write numbers in their place")
    if value_range is None:
        if values.dtype != np.uint16 or high < FULL_RANGE_16_BIT:
            raise ValueError(
                f"{file} holds {values.dtype} values from {low:g} to {high:g}; set value_range: [low, high] in the "
                "dataset: the values that become black and white"
            )
        return _coloured((values >> 8).astype(np.uint8))
    start, end = value_range
    if high < start or low > end:
        raise ValueError(
            f"{file} holds values from {low:g} to {high:g}, all outside the dataset's value_range: [{start:g}, {end:g}]"
        )
    pixels = np.empty(values.shape, np.uint8)
    with np.errstate(over="ignore"):  # what becomes infinite is cut off too
        for row, line in enumerate(values):  # float64 of the whole image would take much memory
            scaled = (line.astype(np.float64) - start) * (255 / (end - start))
            pixels[row] = np.clip(scaled, 0, 255) + 0.5  # rounds half up
    return _coloured(pixels)


def _coloured(pixels: np.ndarray) -> np.ndarray:
    """(h, w, 1) grey or (h, w, 3) RGB as (h, w, 3) RGB."""
    import numpy as np

    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def _alike(loaded: np.ndarray | None, right: np.ndarray) -> bool:
    """Whether the loader reads the right pixels, (h, w, 3) uint8, from the file."""
    import cv2

    if loaded is None or loaded.shape != right.shape or loaded.dtype != right.dtype:
        return False
    return bool(cv2.absdiff(loaded, right).max() <= _LEVELS)


def _png(pixels: np.ndarray) -> bytes:
    """(h, w, 3) uint8 RGB as PNG."""
    import cv2
    import numpy as np

    done, data = cv2.imencode(".png", np.ascontiguousarray(pixels[..., ::-1]))
    assert done
    return bytes(data.tobytes())
