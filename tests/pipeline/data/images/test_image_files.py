from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from pipeline.data.images.codecs import decode_image
from pipeline.data.images.image_files import ImageReading, image_size, stored_image
from tests.helpers.images import encoded, image

AS_STORED = [[1, 2, 3], [4, 5, 6]]

TURNED = {
    1: AS_STORED,
    2: [[3, 2, 1], [6, 5, 4]],  # mirrored
    3: [[6, 5, 4], [3, 2, 1]],  # turned by 180 degrees
    4: [[4, 5, 6], [1, 2, 3]],  # upside down
    5: [[1, 4], [2, 5], [3, 6]],  # rows become columns
    6: [[4, 1], [5, 2], [6, 3]],  # turned right: the first column, from its end, becomes the first row
    7: [[6, 3], [5, 2], [4, 1]],  # rows become columns, then turned by 180 degrees
    8: [[3, 6], [2, 5], [1, 4]],  # turned left
}
"""What an EXIF orientation makes of AS_STORED (Exif 2.3, tag 0x0112)."""


def blocks(numbers: list[list[int]], dtype: type = np.uint8) -> np.ndarray:
    """8 x 8 pixels of 40 times every number: JPEG keeps such blocks as they are."""
    return np.kron(np.array(numbers) * 40, np.ones((8, 8))).astype(dtype)


def saved(pixels: np.ndarray, image_format: str, **settings: Any) -> bytes:
    """A file as Pillow writes it."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, image_format, **settings)
    return file.getvalue()


def oriented(pixels: np.ndarray, image_format: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(pixels, image_format, exif=exif, **({"lossless": True} if image_format == "WEBP" else {}))


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_of_all_formats_are_turned_as_exif_says_or_not_at_all(image_format: str, orientation: int) -> None:
    data = oriented(np.stack([blocks(AS_STORED)] * 3, axis=-1), image_format, orientation)
    for exif, numbers in (("apply", TURNED[orientation]), ("ignore", AS_STORED)):
        reading = ImageReading(exif=exif)  # type: ignore[arg-type]
        pixels = decode_image(stored_image(data, "a", reading), "a")
        assert image_size(data, "a", reading) == pixels.shape[:2]
        assert np.abs(pixels[..., 0].astype(int) - blocks(numbers)).max() <= 1


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_values_of_many_bits_are_turned_too(dtype: type) -> None:
    data = oriented(blocks(AS_STORED, dtype), "TIFF", 6)
    for exif, numbers in (("apply", TURNED[6]), ("ignore", AS_STORED)):
        stored = stored_image(data, "a", ImageReading(exif=exif, value_range=(0, 255)))  # type: ignore[arg-type]
        np.testing.assert_array_equal(decode_image(stored, "a")[..., 1], blocks(numbers))


def test_a_broken_exif_turns_nothing() -> None:
    data = oriented(np.stack([blocks(AS_STORED)] * 3, axis=-1), "JPEG", 6)
    at = data.index(b"Exif\0\0") + 6
    torn = data[:at] + b"\xff" * 12 + data[at + 12 :]
    assert image_size(torn, "a") == (16, 24)
    assert stored_image(torn, "a") == torn
    longer = data.replace(b"\x01\x12\0\3\0\0\0\1", b"\x01\x12\0\3\xff\xff\xff\xff")  # how many values the tag has
    assert decode_image(longer, "a").shape[:2] == (24, 16)
    assert decode_image(stored_image(longer, "a"), "a").shape[:2] == image_size(longer, "a")


PALETTE = Image.fromarray(image()).quantize(16)


@pytest.mark.parametrize(
    ("picture", "image_format"),
    [
        (Image.fromarray(image()), "JPEG"),
        (Image.fromarray(image()).convert("L"), "JPEG"),
        (Image.fromarray(image()), "PNG"),
        (Image.fromarray(image()).convert("RGBA"), "PNG"),
        (Image.fromarray(image()).convert("LA"), "PNG"),
        (Image.fromarray(image()).convert("1"), "PNG"),
        (PALETTE, "PNG"),
        (PALETTE, "BMP"),
        (PALETTE, "GIF"),
        (Image.fromarray(image()), "BMP"),
        (Image.fromarray(image()), "WEBP"),
        (Image.fromarray(image()), "TIFF"),
        (Image.fromarray(image()).convert("1"), "TIFF"),
        (Image.fromarray(image()), "PPM"),
    ],
)
def test_what_the_loader_reads_well_is_stored_as_published(picture: Image.Image, image_format: str) -> None:
    file = io.BytesIO()
    picture.save(file, image_format)
    assert stored_image(file.getvalue(), "a") == file.getvalue()
    with Image.open(file) as opened:
        right = np.asarray(opened.convert("RGB"))
    np.testing.assert_array_equal(decode_image(file.getvalue(), "a"), right)


@pytest.mark.parametrize("image_format", ["JPEG", "TIFF"])
def test_colours_of_inks_are_read_as_pillow_reads_them(image_format: str) -> None:
    file = io.BytesIO()
    Image.fromarray(np.stack([blocks(AS_STORED)] * 3, axis=-1)).convert("CMYK").save(file, image_format)
    assert stored_image(file.getvalue(), "a") == file.getvalue()
    # 40 to 240, by 40: JPEG rounds
    assert np.abs(decode_image(file.getvalue(), "a")[..., 1].astype(int) - blocks(AS_STORED)).max() <= 1


def test_16_bits_of_the_full_range_are_stored_as_published() -> None:
    for suffix in (".png", ".tif"):
        data = encoded(np.array([[0, 4096, 65535]], np.uint16), suffix)
        assert stored_image(data, "a") == data
        # the higher byte: 4096 = 16 * 256
        assert decode_image(data, "a")[0, :, 0].tolist() == [0, 16, 255]


def test_what_the_loader_would_read_otherwise_is_stored_as_png() -> None:
    """A TIFF with alpha, a pixel map whose greatest value is 100, and a format that OpenCV does not know."""
    half_seen = np.full((2, 2, 4), (200, 100, 50, 128), np.uint8)
    assert decode_image(saved(half_seen, "TIFF"), "a")[0, 0].tolist() == [100, 50, 25]
    for data, pixel in (
        (saved(half_seen, "TIFF"), [200, 100, 50]),
        (b"P6 1 1 100\n" + bytes([100, 50, 0]), [255, 128, 0]),
        (saved(np.full((2, 2, 3), (1, 2, 3), np.uint8), "TGA"), [1, 2, 3]),
    ):
        stored = stored_image(data, "a")
        assert stored.startswith(b"\x89PNG")
        assert decode_image(stored, "a")[0, 0].tolist() == pixel


VALUES = np.array([[-100, 0, 1000], [2000, 4000, 5000]])


@pytest.mark.parametrize(
    ("data", "pixels"),
    [
        # -100 and 5000 are outside; 1000 and 2000 of 4000 are 63.75 and 127.5 of 255, rounded half up
        (saved(VALUES.astype(np.float32), "TIFF"), [[0, 0, 64], [128, 255, 255]]),
        (saved(VALUES.astype(np.int32), "TIFF"), [[0, 0, 64], [128, 255, 255]]),
        (encoded(VALUES.astype(np.float64), ".tif"), [[0, 0, 64], [128, 255, 255]]),
        (encoded(VALUES.astype(np.int16), ".tif"), [[0, 0, 64], [128, 255, 255]]),
        (encoded(np.maximum(VALUES, 0).astype(np.uint16), ".tif"), [[0, 0, 64], [128, 255, 255]]),
        (encoded(np.maximum(VALUES, 0).astype(np.uint16)), [[0, 0, 64], [128, 255, 255]]),
        (b"P5 3 1 4095\n" + struct.pack(">3H", 0, 1000, 4000), [[0, 64, 255]]),
    ],
)
def test_a_value_range_becomes_0_to_255(data: bytes, pixels: list[list[int]]) -> None:
    stored = stored_image(data, "a", ImageReading(value_range=(0, 4000)))
    for channel in range(3):
        assert decode_image(stored, "a")[..., channel].tolist() == pixels


@pytest.mark.parametrize("dtype", [np.uint16, np.float32, np.int32])
def test_a_value_range_is_for_colours_too(dtype: type) -> None:
    data = encoded(np.array([[[0, 2000, 4000]]], dtype), ".tif")
    stored = stored_image(data, "a", ImageReading(value_range=(0, 4000)))
    assert decode_image(stored, "a").tolist() == [[[0, 128, 255]]]


def test_a_value_range_leaves_pictures_of_8_bits_alone() -> None:
    data = encoded(image())
    assert stored_image(data, "a", ImageReading(value_range=(0, 4000))) == data


def frames(image_format: str) -> bytes:
    file = io.BytesIO()
    pages = [Image.new("RGB", (8, 8), (grey, grey, grey)) for grey in (10, 100, 200)]
    pages[0].save(file, image_format, save_all=True, append_images=pages[1:])
    return file.getvalue()


def with_smaller_copies() -> bytes:
    """A TIFF whose pages say that they are smaller copies (tag 254 is 1)."""
    file = io.BytesIO()
    copies = [Image.new("RGB", (side, side)) for side in (4, 2)]
    Image.new("RGB", (8, 8)).save(file, "TIFF", save_all=True, append_images=copies, tiffinfo={254: 1})
    return file.getvalue()


def test_previews_are_no_pages() -> None:
    for data in (with_smaller_copies(), frames("MPO")):
        with Image.open(io.BytesIO(data)) as opened:
            assert opened.n_frames > 1
        assert stored_image(data, "a") == data


GREY = encoded(image(4, 4)[..., 0])

BEFORE_HEADER = GREY[:8] + GREY[33:-12] + GREY[8:]
"""Its pixels come before the chunk IHDR (bytes 8 to 33), and once more after it."""


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (frames("TIFF"), "a.tif holds 3 images, as pages or frames; make a file of the one to be used"),
        (frames("GIF"), "a.tif holds 3 images"),
        (frames("WEBP"), "a.tif holds 3 images"),
        (frames("PNG"), "a.tif holds 3 images"),
        (
            encoded(np.full((4, 4), 4095, np.uint16)),
            "a.tif holds uint16 values from 4095 to 4095; set value_range",
        ),
        (
            saved(np.array([[0.0, 0.5]], np.float32), "TIFF"),
            "a.tif holds float32 values from 0 to 0.5; set value_",
        ),
        (encoded(np.array([[[0, 9, 1]]], np.float32), ".tif"), "a.tif holds float32 values from 0 to 9; set value_"),
        (saved(np.array([[-5, 7]], np.int32), "TIFF"), "a.tif holds int32 values from -5 to 7; set value_range"),
        (saved(np.array([[0, np.nan]], np.float32), "TIFF"), "a.tif holds 1 values that are NaN or infinite"),
        (b"", "a.tif does not decode: it is empty; fetch or copy it again"),
        (b"<html>", "a.tif does not decode .*; it is truncated or not an image"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a.tif is a pointer of Git LFS.*; run: git lfs pull"),
        (b"II*\0\x08\0\0\0", "a.tif does not decode"),
        (b"II*\0\xff\xff\xff\x7f", "a.tif does not decode"),
        (BEFORE_HEADER, "a.tif does not decode: a PNG begins with the chunk IHDR, and this one does not"),
        (encoded(image(100, 100))[:-5000], "a.tif does not decode"),
        (encoded(image(100, 100), ".jpg")[:-500], "a.tif does not decode"),
        (encoded(image(100, 100), ".tif")[:-500], "a.tif does not decode"),
        (encoded(np.full((99, 99), 60000, np.uint16))[:-30], "a.tif does not decode"),
        (encoded(image(100, 100), ".webp")[:-500], "a.tif does not decode"),
    ],
)
def test_what_cannot_be_read_is_said_in_a_sentence(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        decode_image(stored_image(data, "a.tif"), "a.tif")
    assert "\n" not in str(caught.value)


def test_values_all_outside_the_value_range_are_refused() -> None:
    data = encoded(np.array([[700, 3000]], np.uint16))
    for value_range in ((0, 1), (3001, 4000)):
        with pytest.raises(ValueError, match=r"a holds values from 700 to 3000, all outside the dataset's value_range"):
            stored_image(data, "a", ImageReading(value_range=value_range))


def grey_png(height: int, width: int) -> bytes:
    """A grey picture of any size in a small file."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows, packed = zlib.compressobj(1), b""
    for _ in range(height):
        packed += rows.compress(b"\0" * (width + 1))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", packed + rows.flush()) + chunk(b"IEND", b"")


def test_a_picture_of_more_pixels_than_the_dataset_allows_is_refused_before_it_is_decoded() -> None:
    data = grey_png(14_000, 15_000)[:200]  # torn after its header
    with pytest.raises(ValueError, match=r"a is 14000 x 15000 .*, 210,000,000 pixels, and max_pixels is 180,000,000; "):
        stored_image(data, "a")
    with pytest.raises(ValueError, match=r"a does not decode"):
        stored_image(data, "a", ImageReading(max_pixels=210_000_000))
    small = encoded(np.zeros((3, 4), np.uint16), ".tif")
    with pytest.raises(ValueError, match=r"a is 3 x 4 \(height x width\), 12 pixels, and max_pixels is 11"):
        stored_image(small, "a", ImageReading(max_pixels=11))


IN_LITTLE_MEMORY = """
import pathlib, resource, sys
import cv2, numpy
from PIL import Image
from pipeline.data.images.image_files import ImageReading
from pipeline.data.records import Labelled, Record
from pipeline.data.shards.writer import ShardJob, make_shard

cv2.setNumThreads(1)
data = open(sys.argv[1], "rb").read()
labels = numpy.zeros((1, 1), numpy.uint8)
record = Record("a", "a.png", "a.txt", lambda: Labelled(data, labels, None))
reading = ImageReading(max_pixels=2**30)
job = ShardJob("a", "a", [record], 3, frozenset(), "encoded", "stop", (), reading=reading)
folder = pathlib.Path(sys.argv[1]).parent
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]) * 2**20, resource.RLIM_INFINITY))
try:
    make_shard(job, folder)
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("free_mib", "said"),
    [(100, "a.png needs more memory than there is; scale it down"), (320, "is larger than the memory")],
)
def test_a_picture_that_the_memory_does_not_hold_is_named(tmp_path: Path, free_mib: int, said: str) -> None:
    """200 million grey pixels: Pillow takes as many bytes, OpenCV three times as many."""
    (tmp_path / "a.png").write_bytes(grey_png(10_000, 20_000))
    child = subprocess.run(
        [sys.executable, "-c", IN_LITTLE_MEMORY, str(tmp_path / "a.png"), str(free_mib)], capture_output=True, text=True
    )
    assert (child.returncode, child.stdout.count("\n")) == (0, 1), child.stderr
    assert said in child.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"], "nothing half-written"


def test_pillows_own_limit_is_as_it_was_afterwards() -> None:
    before = Image.MAX_IMAGE_PIXELS
    assert before is not None
    stored_image(encoded(image()), "a")
    assert before == Image.MAX_IMAGE_PIXELS
    assert cv2.imdecode(np.frombuffer(encoded(image()), np.uint8), cv2.IMREAD_COLOR) is not None
