"""Objects painted over a picture, each with the name of its class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data.images.draw import class_colours, painted, segment_colours

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

    from pipeline.prediction.annotations import Objects

MOST_SIDE = 4096
"""Pixels of an overlay's longer side; that of a larger picture is scaled down."""

_LEAST_SHARE = 0.0004
"""Of the picture: smaller objects are painted, but not named."""

_Box = tuple[float, float, float, float]


def overlay(image: np.ndarray, objects: Objects, class_names: Sequence[str], *, borders: bool) -> np.ndarray:
    """An (h, w, 3) uint8 RGB picture with its objects painted over it and named; as it is without objects.

    Every class has the colour of `class_colours`, objects of one class shades of it. borders: white lines around them.
    A picture with a side over MOST_SIDE comes out smaller.
    """
    import cv2
    from PIL import Image, ImageDraw

    ids = objects.ids
    if (scale := MOST_SIDE / max(ids.shape)) < 1:
        size = max(1, round(ids.shape[1] * scale)), max(1, round(ids.shape[0] * scale))
        image = cv2.resize(np.ascontiguousarray(image), size, interpolation=cv2.INTER_AREA)
        ids = cv2.resize(ids, size, interpolation=cv2.INTER_NEAREST)
    if not objects.labels:
        return image
    count = len(class_names)
    colours = segment_colours(objects.labels, count) if borders else class_colours(count)[objects.labels]
    mixed = painted(np.ascontiguousarray(image), ids, colours, borders=borders, strength=0.5)
    drawn = Image.fromarray(mixed)
    names = [class_names[label] for label in objects.labels]
    _write_names(ImageDraw.Draw(drawn, "RGBA"), ids, names, colours)
    return np.asarray(drawn)


def _write_names(draw: ImageDraw, ids: np.ndarray, names: Sequence[str], colours: np.ndarray) -> None:
    """Write each object's name at its thickest place, the largest object's first; one that finds no room is left out.

    White on a dark box beside the object's colour: legible on dark and on light pictures.
    """
    from PIL import ImageFont

    height, width = ids.shape
    font = ImageFont.load_default(size=min(32, max(10, round(max(height, width) / 45))))
    areas = np.bincount(ids[ids >= 0].ravel(), minlength=len(names))
    taken: list[_Box] = []
    for index in np.argsort(-areas, kind="stable").tolist():
        if areas[index] < max(1, _LEAST_SHARE * ids.size):
            break
        x, y = _thickest(ids, index)
        box = _free_place(draw.textbbox((0, 0), names[index], font), (x, y), (width, height), taken)
        if box is not None:
            taken.append(box)
            _write(draw, box, names[index], tuple(colours[index].tolist()), font)


def _thickest(ids: np.ndarray, index: int) -> tuple[int, int]:
    """(x, y): the pixel of an object that is farthest from its edge."""
    import cv2

    rows, columns = np.flatnonzero((ids == index).any(1)), np.flatnonzero((ids == index).any(0))
    part = ids[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] == index
    inside = cv2.distanceTransform(np.pad(part.astype(np.uint8), 1), cv2.DIST_L2, 3)
    y, x = np.unravel_index(int(inside.argmax()), inside.shape)
    return int(columns[0] + x - 1), int(rows[0] + y - 1)


def _free_place(
    text: tuple[float, float, float, float], at: tuple[int, int], size: tuple[int, int], taken: Sequence[_Box]
) -> _Box | None:
    """A box for a text, at a point or a line or two above or below it, that covers no other; None: there is none."""
    pad = 3
    across, down = text[2] + text[3] + 3 * pad, text[3] + 2 * pad  # a square of the colour stands before it
    if across > size[0] or down > size[1]:
        return None
    left = min(max(0.0, at[0] - across / 2), size[0] - across)
    for lines in (0, -1, 1, -2, 2):
        top = min(max(0.0, at[1] - down / 2 + lines * down), size[1] - down)
        box = (left, top, left + across, top + down)
        if not any(box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in taken):
            return box
    return None


def _write(draw: ImageDraw, box: _Box, name: str, colour: Any, font: Any) -> None:
    left, top, right, bottom = box
    side = bottom - top - 6
    draw.rectangle((left, top, right, bottom), fill=(15, 15, 15, 190))
    draw.rectangle((left + 3, top + 3, left + 3 + side, bottom - 3), fill=(*colour, 255))
    draw.text((left + side + 6, top + 3), name, fill=(255, 255, 255, 255), font=font)
