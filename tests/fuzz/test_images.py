"""Image files of all formats, whole and changed: the pixels that were saved, or one sentence."""

from __future__ import annotations

import io
import struct
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from PIL import Image

from tests.fuzz import runs
from tests.fuzz.changes import changed_bytes, changed_png, inputs
from tests.fuzz.child import Child, Sentence

FORMATS = {
    "PNG": ("1", "L", "P", "RGB", "RGBA", "LA"),
    "JPEG": ("L", "RGB", "CMYK"),
    "BMP": ("1", "L", "P", "RGB"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("1", "L", "P", "RGB", "CMYK"),
    "PPM": ("1", "L", "RGB"),
}
"""Pillow's names, and modes in which it saves them."""

TURNED = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels),
}
"""How pixels as stored are shown, by EXIF's orientation."""


class ImageFile(NamedTuple):
    """An image file."""

    format: str
    data: bytes
    exif: str
    """The setting."""
    right: np.ndarray | None
    """(h, w, 3); None: the file is changed."""


@st.composite
def image_files(draw: st.DrawFn) -> ImageFile:
    """Files of all formats, with all orientations where the format has one."""
    kind = draw(st.sampled_from(sorted(FORMATS)))
    mode = draw(st.sampled_from(FORMATS[kind]))
    height, width = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    ramp = np.add.outer(np.arange(height) * draw(st.integers(0, 12)), np.arange(width) * draw(st.integers(0, 12)))
    colours = np.stack([ramp % 256, 255 - ramp % 256, np.full_like(ramp, draw(st.integers(0, 255)))], -1)
    image = Image.fromarray(colours.astype(np.uint8)).convert(mode)
    right = np.asarray(image.convert("RGB"))
    orientation = draw(st.integers(1, 8)) if kind in ("PNG", "JPEG", "WEBP", "TIFF") else 1
    options: dict[str, Any] = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True, "exact": True}}.get(kind, {})
    if orientation > 1:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    file = io.BytesIO()
    image.save(file, kind, **options)
    if kind == "JPEG":
        right = np.asarray(Image.open(io.BytesIO(file.getvalue())).convert("RGB"))
    exif = draw(st.sampled_from(("apply", "ignore")))
    return ImageFile(kind, file.getvalue(), exif, TURNED[orientation](right) if exif == "apply" else right)


@st.composite
def changed_image_files(draw: st.DrawFn) -> ImageFile:
    """Files with changed bytes."""
    file = draw(image_files())
    if file.format == "PNG" and draw(st.booleans()):
        data = draw(changed_png(file.data))
    else:
        data = draw(changed_bytes(file.data))
    return file._replace(data=data, right=None)


def ends_well(child: Child, file: ImageFile) -> None:
    """AssertionError unless an image ends in the right pixels, or in a sentence where the file is changed."""
    found = child.run(runs.image, file.data, file.exif)
    event(f"{file.format}: {'a sentence' if isinstance(found, Sentence) else 'pixels'}")
    if isinstance(found, Sentence):
        runs.check_sentence(found, ["mine.jpg"])
        assert file.right is None, found
        return
    assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3 and found.size
    right = as_pillow(file) if file.right is None else file.right
    np.testing.assert_allclose(found.astype(int), right.astype(int), atol=3)


def as_pillow(file: ImageFile) -> np.ndarray:
    """What a changed file holds, as another decoder than the loader's reads it."""
    with Image.open(io.BytesIO(file.data)) as image:
        try:
            orientation = image.getexif().get(0x0112, 1)
        except (SyntaxError, ValueError, struct.error):  # what it raises where the tags are changed
            orientation = 1
        pixels = np.asarray(image.convert("RGB"))
    if file.format == "TIFF":  # which Pillow turns
        orientation = {6: 8, 8: 6}.get(orientation, orientation) if file.exif == "ignore" else 1
    elif file.exif == "ignore":
        orientation = 1
    return TURNED.get(orientation, TURNED[1])(pixels)


@inputs(200)
@given(file=image_files())
def test_images_of_every_format_mode_and_orientation_are_read_as_they_were_saved(child: Child, file: ImageFile) -> None:
    ends_well(child, file)


@inputs(500)
@given(file=changed_image_files())
def test_changed_image_files_give_an_image_or_a_sentence(child: Child, file: ImageFile) -> None:
    ends_well(child, file)


@pytest.mark.full
@inputs(500)
@given(file=image_files())
def test_many_images_of_every_format_mode_and_orientation_are_read_as_they_were_saved(
    child: Child, file: ImageFile
) -> None:
    ends_well(child, file)


@pytest.mark.full
@inputs(1500)
@given(file=changed_image_files())
def test_many_changed_image_files_give_an_image_or_a_sentence(child: Child, file: ImageFile) -> None:
    ends_well(child, file)
