"""Pictures resized by the recipes' rule, whole or only the part that is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from pipeline.params.schema import TestConfig

Part = tuple[slice, slice]
"""Rows and columns of a picture."""

WHOLE: Part = (slice(None), slice(None))

OFF_PX = 1 / 150
"""Source pixels by which a part's samples may lie beside the whole picture's, over both axes: less than 2 grey levels
from black to white (255 / 150), rounding included."""


def network_image(image: np.ndarray, test: TestConfig) -> Tensor:
    """An (h, w, 3) uint8 RGB picture at the size that a row is tested at, (3, H, W) uint8, not padded."""
    size = resized_size(*image.shape[:2], short_side=test.short_side, long_side_max=test.long_side_max)
    return torch.from_numpy(resize_image(image, size).transpose(2, 0, 1).copy())


def resized_size(height: int, width: int, *, short_side: int, long_side_max: int) -> tuple[int, int]:
    """(height, width) whose short side is `short_side`, or less where the long side would exceed its maximum.

    Both are rounded half up, as in the published implementation.
    """
    scale = min(short_side / min(height, width), long_side_max / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize_image(image: np.ndarray, size: tuple[int, int], part: Part = WHOLE, *, mirrored: bool = False) -> np.ndarray:
    """`part` (rows, columns) of an (h, w, 3) uint8 picture resized to `size` (height, width), bilinear.

    mirrored: of the picture whose left is right. Equals the same part of OpenCV's resized whole within 2 grey levels,
    and only the part's rows are read. cv2.resize cannot begin at a fraction of a pixel, so it begins some resized
    pixels before the part, where a resized pixel begins with a source pixel (but for OFF_PX). What it makes there is
    thrown away. cv2.warpAffine and cv2.remap begin anywhere, but take longer.
    """
    height, width = image.shape[:2]
    across = _run(width, size[1], part[1], OFF_PX / 2)
    down = _run(height, size[0], part[0], OFF_PX - across.off)
    source = np.empty((down.end - down.origin, across.end - across.origin, 3), np.uint8)
    read = source[down.first - down.origin :]  # the rows above count for nothing
    if mirrored:
        cv2.flip(image[down.first : down.end, width - across.end : width - across.origin], 1, dst=read)
    else:
        read[:] = image[down.first : down.end, across.origin : across.end]
    # by factors, so that it is the whole picture's scale to the last bit
    resized = cv2.resize(source, None, fx=size[1] / width, fy=size[0] / height, interpolation=cv2.INTER_LINEAR)
    return resized[down.skip : down.skip + down.length, across.skip : across.skip + across.length]


class _Run(NamedTuple):
    """How to make `length` neighbouring pixels of a resized line with cv2.resize, in pixels of the line before."""

    origin: int
    """Where resizing begins."""
    first: int
    """From here on, pixels count."""
    end: int
    """The first pixel after those needed."""
    skip: int
    """Resized pixels to throw away."""
    length: int
    off: float
    """How far the samples lie beside the whole line's."""


def _run(pixels: int, resized: int, part: slice, most_off: float) -> _Run:
    """The run for a part of a line of `pixels` that becomes `resized`; samples may lie `most_off` beside the whole's.

    Resized pixel i shows the line at (i + 0.5) * scale - 0.5. Resizing that begins with resized pixel k shows the same
    if k * scale is a whole number, as it is for k = 0.
    """
    start, stop, _ = part.indices(resized)
    scale = pixels / resized
    places = np.arange(start, -1, -1) * scale
    origins = np.rint(places)
    off = np.abs(places - origins)
    # before its first pixel's middle, cv2.resize shows that pixel alone, which is right only where the line begins
    inside = (np.arange(start + 1) + 0.5) * scale >= 0.5
    skip = int(np.argmax((off <= min(most_off, scale / 4)) & (inside | (origins == 0))))
    origin = int(origins[skip])
    shown = [origin + (at + 0.5) * scale - 0.5 for at in (skip, skip + stop - start - 1)]
    end = max(int(shown[1] + 1e-3) + 2, int(np.ceil(stop * scale)))  # also enough that `stop` pixels are made of them
    return _Run(
        origin=origin,
        first=max(origin, int(np.floor(shown[0] - 1e-3))),
        end=min(end, pixels),
        skip=skip,
        length=stop - start,
        off=float(off[skip]),
    )
