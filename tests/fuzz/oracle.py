"""What the right targets are, worked out anew with numpy: none of the project's code, nor of its decoders."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tests.fuzz.changes import png_chunks

# Masks


class Mask(NamedTuple):
    """A mask as far as its annotation decides it: pixels that a polygon's outline crosses may be in or out."""

    least: np.ndarray
    most: np.ndarray


def mask_of(segmentation: Any, size: tuple[int, int]) -> Mask:
    """The mask of an annotation in any of COCO's three forms."""
    if isinstance(segmentation, list):
        return _of_polygons(segmentation, size)
    assert segmentation["size"] == list(size)
    counts = segmentation["counts"]
    mask = of_run_lengths(counts if isinstance(counts, list) else run_lengths(counts.encode()), size)
    return Mask(mask, mask)


def of_run_lengths(counts: Sequence[float], size: tuple[int, int]) -> np.ndarray:
    """(h, w) bool of run lengths down the columns, of which every second is inside."""
    assert all(count >= 0 and count == int(count) for count in counts) and sum(counts) == size[0] * size[1]
    inside = np.arange(len(counts)) % 2 == 1
    return np.repeat(inside, [int(count) for count in counts]).reshape(size[::-1]).T


def run_lengths(text: bytes) -> list[int]:
    """Compressed run lengths as numbers: 5 bits in each character from 48 on, lowest first, 32 where more follow;
    negative ones in two's complement; from the fourth on the difference to the last but one."""
    found: list[int] = []
    value = shift = 0
    for character in text:
        bits = character - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << 1 << (shift - 5)
            found.append(value + (found[-2] if len(found) > 2 else 0))
            value = shift = 0
    assert shift == 0
    return found


def _of_polygons(polygons: Sequence[Sequence[float]], size: tuple[int, int]) -> Mask:
    least, most = np.zeros(size, bool), np.zeros(size, bool)
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    for polygon in polygons:
        assert len(polygon) % 2 == 0 and all(math.isfinite(value) for value in polygon)
        if len(polygon) < 6:
            continue
        corners = np.array(polygon, float).reshape(-1, 2)
        inside, near = np.zeros(size, bool), np.zeros(size, bool)
        for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
            if y1 != y2:  # a ray to the right crosses the edge
                inside ^= ((y1 > y) != (y2 > y)) & (x < x1 + (y - y1) * (x2 - x1) / (y2 - y1))
            length = (x2 - x1) ** 2 + (y2 - y1) ** 2
            along = np.clip(((x - x1) * (x2 - x1) + (y - y1) * (y2 - y1)) / length, 0, 1) if length else 0.0
            near |= np.hypot(x1 + along * (x2 - x1) - x, y1 + along * (y2 - y1) - y) <= 1.0
        least |= inside & ~near
        most |= inside | near
    return Mask(least, most)


# COCO's annotations

_TRUE, _FALSE = ("1", "1.0", "true"), ("0", "0.0", "false")


def check_instance(stored: Mapping[str, Any], annotation: Mapping[str, Any], size: tuple[int, int]) -> None:
    """AssertionError unless mask, box, area and crowd flag of a stored instance are those of its annotation."""
    mask = of_run_lengths(run_lengths(stored["counts"]), size)
    right = mask_of(annotation["segmentation"], size)
    assert (right.least <= mask).all() and (mask <= right.most).all(), (right, mask)
    flag = str(annotation.get("iscrowd", 0)).strip().lower()
    assert flag in _TRUE + _FALSE and stored["crowd"] == (flag in _TRUE), annotation.get("iscrowd")
    pixels = int(mask.sum())
    area, largest = annotation.get("area"), (size[0] + 2) * (size[1] + 2)
    assert stored["area"] == (area if area is not None and 0 < area <= largest else pixels), (area, stored["area"])
    np.testing.assert_array_equal(np.float32(stored["box"]), np.float32(_box(annotation.get("bbox") or [], mask)))


def _box(annotated: Sequence[float], mask: np.ndarray) -> Sequence[float]:
    """x1, y1, x2, y2 as annotated, where they may be those of the mask; else the mask's."""
    rows, columns = np.nonzero(mask)
    around = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) if len(rows) else (0, 0, 0, 0)
    if len(annotated) != 4 or not all(abs(value) < 1e9 for value in annotated):
        return around
    x, y, width, height = annotated
    middle = (around[0] + around[2]) / 2, (around[1] + around[3]) / 2
    beside = not (x - 1 <= middle[0] <= x + width + 1 and y - 1 <= middle[1] <= y + height + 1)
    if min(width, height) < 0 or (len(rows) and (min(width, height) == 0 or beside)):
        return around
    return x, y, x + width, y + height


# PNG


class UnknownPngError(Exception):
    """A kind of PNG that is not worked out here."""


def png_values(data: bytes) -> np.ndarray:
    """The numbers in a PNG, (h, w, channels): grey values, palette indices or colours, of 1 to 16 bits, as stored."""
    chunks = png_chunks(data)
    width, height, bits, colour_type, _, _, interlaced = struct.unpack(">IIBBBBB", chunks[0][1])
    if interlaced or colour_type not in _CHANNELS:
        raise UnknownPngError
    channels = _CHANNELS[colour_type]
    packed = zlib.decompressobj().decompress(b"".join(body for kind, body in chunks if kind == b"IDAT"))
    stride, step = (width * channels * bits + 7) // 8, max(1, channels * bits // 8)
    above = [0] * stride
    rows = []
    for row in range(height):
        line = packed[row * (stride + 1) : (row + 1) * (stride + 1)]
        above = _unfiltered(line[0], list(line[1:]), above, step)
        rows.append(above)
    values = np.array(rows, np.uint8)
    if bits == 16:
        values = values.view(">u2").astype(np.int64)
    elif bits < 8:
        singles = np.unpackbits(values, axis=1).reshape(height, -1, bits)
        values = (singles << np.arange(bits - 1, -1, -1)).sum(axis=2)
    return values[:, : width * channels].reshape(height, width, channels)


_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""By colour type."""


def _unfiltered(kind: int, line: list[int], above: Sequence[int], step: int) -> list[int]:
    for place, value in enumerate(line):
        left = line[place - step] if place >= step else 0
        up, corner = above[place], above[place - step] if place >= step else 0
        line[place] = (value + (0, left, up, (left + up) // 2, _paeth(left, up, corner))[kind]) % 256
    return line


def _paeth(left: int, up: int, corner: int) -> int:
    guess = left + up - corner
    return min((left, up, corner), key=lambda value: abs(guess - value))
