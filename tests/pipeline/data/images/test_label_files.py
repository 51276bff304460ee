from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from pipeline.data.images.label_files import class_ids, colour_ids, read_colours, read_labels

IDS = np.array([[0, 1, 2], [3, 7, 255]], np.uint8)
RGB = np.stack([IDS, IDS, IDS], -1)
RED = np.array([[[200, 0, 0], [0, 0, 9]]], np.uint8)


def saved(values: np.ndarray | Image.Image, picture_format: str, **options: Any) -> bytes:
    """A file that Pillow writes."""
    buffer = io.BytesIO()
    (values if isinstance(values, Image.Image) else Image.fromarray(values)).save(buffer, picture_format, **options)
    return buffer.getvalue()


def by_opencv(suffix: str, values: np.ndarray) -> bytes:
    return bytes(cv2.imencode(suffix, values)[1].tobytes())


def with_palette(ids: np.ndarray, colours: list[int]) -> Image.Image:
    image = Image.frombytes("P", ids.shape[::-1], ids.tobytes())
    image.putpalette(colours)
    return image


def with_alpha(values: np.ndarray, alpha: int) -> np.ndarray:
    """The last pixel has this alpha, all others have 255."""
    opaque = np.full((*values.shape[:2], 1), 255, np.uint8)
    opaque[-1, -1] = alpha
    return np.concatenate([values.reshape(*values.shape[:2], -1), opaque], axis=2)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


LOSSLESS = {
    **{name: saved(IDS, name) for name in ("PNG", "TIFF", "BMP", "GIF", "PPM")},
    **{f"TIFF {name}": saved(IDS, "TIFF", compression=name) for name in ("tiff_lzw", "packbits", "tiff_adobe_deflate")},
    "WebP": saved(RGB, "WEBP", lossless=True),
    "WebP with alpha": saved(with_alpha(RGB, 255), "WEBP", lossless=True, exact=True),
    "TIFF of OpenCV": by_opencv(".tiff", IDS),
    "TIFF of whole floats": saved(IDS.astype(np.float32), "TIFF"),
    "grey as three equal colours": saved(RGB, "BMP"),
    "grey as RGBA": saved(with_alpha(RGB, 255), "PNG"),
    "grey with alpha": saved(with_alpha(IDS, 255), "PNG"),
    "a palette": saved(with_palette(IDS, [9, 8, 7] * 256), "PNG"),
    "a palette in TIFF": saved(with_palette(IDS, [9, 8, 7] * 256), "TIFF"),
    "an EXIF tag that turns nothing": saved(IDS, "PNG", exif=turned(1)),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_ids_come_back_from_every_lossless_format(name: str) -> None:
    assert read_labels(LOSSLESS[name], "a").tolist() == IDS.tolist()


@pytest.mark.parametrize(
    ("data", "ids"),
    [
        (saved(IDS.astype(np.uint16) * 257, "PNG"), [[0, 257, 514], [771, 1799, 65535]]),
        (saved(IDS.astype(np.uint16) * 257, "TIFF"), [[0, 257, 514], [771, 1799, 65535]]),
        (saved(IDS.astype(np.int32) - 1, "TIFF"), [[-1, 0, 1], [2, 6, 254]]),
        (by_opencv(".tiff", IDS.astype(np.int16) - 5), [[-5, -4, -3], [-2, 2, 250]]),
        (by_opencv(".tiff", IDS.view(np.int8)), [[0, 1, 2], [3, 7, -1]]),
        (saved(IDS > 2, "TIFF"), [[0, 0, 0], [1, 1, 1]]),
        (saved(IDS > 2, "BMP"), [[0, 0, 0], [1, 1, 1]]),
        # the third number is the largest value, to which readers stretch the others
        (b"P5\n# one line\n3 1\n10\n\x00\x07\x0a", [[0, 7, 10]]),
        (b"P5\n3 1\n1000\n" + struct.pack(">3H", 0, 7, 1000), [[0, 7, 1000]]),
        (b"P5\n3 1\n65535\n" + struct.pack(">3H", 0, 7, 65535), [[0, 7, 65535]]),
        (b"P2\n3 1\n7\n0 1 7\n", [[0, 1, 7]]),
    ],
)
def test_ids_of_any_depth_are_those_that_were_saved(data: bytes, ids: list[list[int]]) -> None:
    assert read_labels(data, "a").tolist() == ids


def test_a_gif_gives_its_grey_values_because_programs_number_its_colours_anew() -> None:
    data = saved(IDS, "GIF")
    with Image.open(io.BytesIO(data)) as image:
        assert np.asarray(image).max() < 255  # the index of grey 255
    with pytest.raises(ValueError, match="^a holds colours, not class ids; .* `palette`"):
        read_labels(saved(with_palette(IDS, [9, 8, 7] * 256), "GIF"), "a")


def too_large() -> bytes:
    """The head of a PNG of 20,000 x 20,000 pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n\0\0\0\x0d" + head + struct.pack(">I", zlib.crc32(head)) + b"\0\0\0\0IDAT"


NOISE = np.random.default_rng(0).integers(0, 9, (90, 90), np.uint8)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (saved(IDS, "JPEG"), "is JPEG; labels are PNG, TIFF, BMP, GIF, PGM or lossless WebP files"),
        (saved(IDS, "JPEG2000"), "is JPEG2000; labels are PNG"),
        (saved(RGB, "WEBP"), "is lossy WEBP; labels are PNG"),
        (saved(IDS, "TIFF", compression="jpeg"), "is jpeg TIFF; labels are PNG"),
        (saved(IDS, "TIFF", tiffinfo={262: 0}), "is a TIFF in which 0 is white"),
        (saved(IDS > 2, "PPM"), "is a PBM, in which 1 is black"),
        (saved(Image.fromarray(RGB).convert("CMYK"), "TIFF"), "is TIFF of mode CMYK"),
        (saved(IDS, "TIFF", save_all=True, append_images=[Image.fromarray(IDS)]), "has 2 pages; a label file has one"),
        (saved(IDS, "GIF", save_all=True, append_images=[Image.fromarray(255 - IDS)]), "has 2 pages"),
        (saved(IDS, "PNG", save_all=True, append_images=[Image.fromarray(255 - IDS)]), "has 2 pages"),
        (saved(IDS, "PNG", exif=turned(6)), "has the orientation tag 6"),
        (saved(IDS, "TIFF", exif=turned(3)), "has the orientation tag 3"),
        (saved(with_alpha(RGB, 254), "PNG"), "has 1 transparent pixels; save labels without transparency"),
        (saved(with_alpha(IDS, 0), "PNG"), "has 1 transparent pixels"),
        (saved(RED, "PNG"), "holds colours, not class ids; give every class its colour in the dataset's `palette`"),
        (by_opencv(".png", RGB.astype(np.uint16) * 257), "has colours that are not of 8 bits"),
        (
            by_opencv(".tiff", RGB.astype(np.uint16) * 257),
            "has colours that are not of 8 bits",
        ),
        (b"P6\n1 1\n10\n\1\2\3", "has colours that are not of 8 bits"),  # readers stretch 10 to 255
        (saved(IDS.astype(np.float32) / 2, "TIFF"), "holds 4 values that are no ids, such as 0.5: whole numbers are"),
        (saved(np.array([[0, np.nan]], np.float32), "TIFF"), "holds 1 values that are no ids, such as nan"),
        (saved(np.array([[0, 1e20]], np.float32), "TIFF"), r"holds 1 values that are no ids, such as 1e\+20"),
        (by_opencv(".tiff", IDS.astype(np.float64)), "does not decode"),
        (b"", "does not decode: it is empty"),
        (b"<html>", "does not decode"),
        (saved(NOISE, "PNG")[:900], "does not decode .* truncated"),
        (saved(NOISE, "TIFF")[:900], "does not decode .* truncated"),
        (too_large(), r"is 20000 x 20000 .* max_pixels is 180,000,000; scale it down"),
    ],
)
def test_a_file_that_does_not_hold_one_map_of_unchanged_ids_is_named(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=f"^b/a {message}") as caught:
        read_labels(data, "b/a")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "colours"),
    [
        (saved(RED, "PNG"), [[[200, 0, 0], [0, 0, 9]]]),
        (saved(with_alpha(RED, 255), "TIFF"), [[[200, 0, 0], [0, 0, 9]]]),
        (saved(with_palette(np.array([[1, 0]], np.uint8), [0, 0, 9, 200, 0, 0]), "PNG"), [[[200, 0, 0], [0, 0, 9]]]),
        (saved(np.array([[0, 255]], np.uint8), "PNG"), [[[0, 0, 0], [255, 255, 255]]]),
        (saved(np.array([[False, True]]), "PNG"), [[[0, 0, 0], [255, 255, 255]]]),
        (saved(with_alpha(np.array([[0, 7]], np.uint8), 255), "PNG"), [[[0, 0, 0], [7, 7, 7]]]),
    ],
)
def test_colours_come_back_from_colours_palettes_and_grey_values(data: bytes, colours: list[Any]) -> None:
    assert read_colours(data, "a").tolist() == colours


def test_grey_values_of_16_bits_are_no_colours() -> None:
    with pytest.raises(ValueError, match="^a holds grey values of more than 8 bits"):
        read_colours(saved(IDS.astype(np.uint16), "PNG"), "a")


# What ids and colours mean


def below_four(stored: int) -> int | None:
    """0 to 3 are the classes, -1 is nothing."""
    return 65535 if stored == -1 else stored if 0 <= stored < 4 else None


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_ids_become_classes_whatever_their_type(dtype: type) -> None:
    ids = np.array([[3, 0], [1, 2]], dtype)
    found = class_ids(ids, below_four, "a", nothing=65535, known=str)
    assert (found.tolist(), found.dtype) == ([[3, 0], [1, 2]], np.uint16)
    assert class_ids(ids, below_four, "a", nothing=255, known=str).dtype == np.uint8


def test_a_negative_id_may_be_nothing() -> None:
    assert class_ids(np.array([[-1, 2]], np.int32), below_four, "a", nothing=65535, known=str).tolist() == [[65535, 2]]


def test_the_commonest_id_that_is_no_class_is_named_with_its_pixels() -> None:
    ids = np.array([[0, 4, 300, 300, -2]], np.int32)
    with pytest.raises(
        ValueError, match=r"^a holds label 300 on 2 pixels \(and 2 other ids that are none\), not of 300"
    ):
        class_ids(ids, below_four, "a", nothing=255, known=lambda value: f"not of {value}")


def test_many_unknown_colours_are_said_to_be_blended() -> None:
    colours = np.zeros((1, 30, 3), np.uint8)
    colours[0, :, 1] = np.arange(30)
    with pytest.raises(
        ValueError, match=r"\(and 28 other unknown colours\), .*; colours were blended; resize and save"
    ):
        colour_ids(colours, {(0, 0, 0): 0}, "a", nothing=255)


def test_colours_become_classes_and_an_unknown_one_is_named_with_its_pixels() -> None:
    class_of = {(200, 0, 0): 1, (0, 0, 9): 0, (0, 0, 0): 255}
    assert colour_ids(RED, class_of, "a", nothing=255).tolist() == [[1, 0]]
    assert colour_ids(RED * 0, class_of, "a", nothing=255).tolist() == [[255, 255]]
    colours = np.array([[[200, 0, 1], [200, 0, 0], [0, 1, 9], [200, 0, 1]]], np.uint8)
    with pytest.raises(
        ValueError,
        match=r"^a holds the colour \[200, 0, 1\] on 2 pixels \(and 1 other unknown colours\), which `palette`",
    ):
        colour_ids(colours, class_of, "a", nothing=255)


def test_a_png_whose_pixels_come_before_its_header_is_refused() -> None:
    data = saved(IDS, "PNG")  # after 8 bytes of signature, 25 of IHDR
    with pytest.raises(
        ValueError, match="^a.png does not decode: a PNG begins with the chunk IHDR, and this one does not"
    ):
        read_labels(data[:8] + data[33:-12] + data[8:], "a.png")
