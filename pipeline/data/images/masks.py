"""Masks as COCO's annotations give them, checked before compiled code reads them, as compressed run lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.params.sentences import shown

if TYPE_CHECKING:
    import numpy as np

POLYGON_NUMBERS = 6
"""A polygon of fewer numbers (three points) covers no pixel; pycocotools would take four numbers for a box."""

OUTSIDE = 1.0
"""Pixels by which a polygon may leave its picture: rounding, or corners counted from pixels' centres. The mask ends at
the picture's border."""

LONGEST_OUTLINE = 2**23
"""Pixels; pycocotools takes about 100 bytes for each."""


class Extent(NamedTuple):
    """What a mask covers."""

    pixels: int
    box: tuple[float, float, float, float]
    """x1, y1, x2, y2 (exclusive); zeros where it has no pixel."""


def run_lengths(segmentation: Any, size: tuple[int, int]) -> bytes:
    """COCO's `segmentation` as pycocotools' compressed run lengths at `size` (height, width).

    A list of polygons [x, y, x, y, ...], a dict with run lengths as a list, or one with compressed run lengths.
    Polygons of fewer than three points cover nothing. Where there are no others, the mask is empty: nothing to train
    on, but still an annotated object that a detector misses. ValueError gives the reason only.
    """
    if isinstance(segmentation, list) and all(isinstance(polygon, list) for polygon in segmentation):
        return _of_polygons(segmentation, size)
    if isinstance(segmentation, dict) and {"size", "counts"} <= segmentation.keys():
        return _of_runs(segmentation, size)
    raise ValueError(
        f"its segmentation is neither a list of polygons nor run lengths with size and counts: {shown(segmentation)}"
    )


def mask_extent(counts: bytes, size: tuple[int, int]) -> Extent:
    """What compressed run lengths cover. ValueError unless they are those of a mask of `size` (height, width) exactly.

    pycocotools takes runs of no pixel into a mask's box.
    """
    import numpy as np

    lengths = _lengths(counts, size)
    inside = lengths[1::2]  # the mask's runs go down its columns
    there = inside > 0
    if not there.any():
        return Extent(0, (0.0, 0.0, 0.0, 0.0))
    after = np.cumsum(lengths)[1::2][there]
    left, top = np.divmod(after - inside[there], size[0])
    right, bottom = np.divmod(after - 1, size[0])
    if (left < right).any():  # from the bottom of a column to the top of the next
        rows = (0, size[0])
    else:
        rows = (top.min(), bottom.max() + 1)
    return Extent(int(inside.sum()), (float(left[0]), float(rows[0]), float(right[-1] + 1), float(rows[1])))


def mask_pixels(counts: bytes, size: tuple[int, int]) -> int:
    """The pixels that compressed run lengths cover. ValueError as `mask_extent`."""
    return int(_lengths(counts, size)[1::2].sum())


def _lengths(counts: bytes, size: tuple[int, int]) -> np.ndarray:
    """Compressed run lengths as numbers, checked: pycocotools leaves memory as it was where they cover less.

    The format (its maskApi.c, rleToString): numbers of 5 bits a character from 48 on, low bits first, 32 says that more
    follow, 16 in the last is the sign; from the fourth number on it is the difference to the last but one.
    """
    import numpy as np

    codes = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError("its compressed run lengths are not as pycocotools writes them")
    lasts = np.flatnonzero(codes < 32)
    starts = np.zeros_like(lasts)
    starts[1:] = lasts[:-1] + 1
    digits = lasts - starts + 1
    if digits.max() > 7:  # 5 * 7 bits are more than 32
        raise ValueError("its compressed run lengths hold a number of more than 32 bits")
    place = np.arange(len(codes)) - np.repeat(starts, digits)
    lengths = np.add.reduceat((codes & 31) << 5 * place, starts)
    lengths -= (codes[lasts] & 16) >> 4 << 5 * digits
    for first in (1, 2):
        lengths[first::2] = lengths[first::2].cumsum()
    if lengths.min() < 0 or lengths.sum() != size[0] * size[1]:
        raise ValueError(f"its run lengths do not cover {size[0]} x {size[1]} (height x width) pixels")
    return lengths


def _of_polygons(polygons: Sequence[list[Any]], size: tuple[int, int]) -> bytes:
    from pycocotools import mask

    height, width = size
    for place, polygon in enumerate(polygons):
        _check_polygon(polygon, place, size)
    large = [polygon for polygon in polygons if len(polygon) >= POLYGON_NUMBERS]
    if large:
        return bytes(mask.merge(mask.frPyObjects(large, height, width))["counts"])
    return _compressed([height * width], size)


def _check_polygon(polygon: Sequence[Any], place: int, size: tuple[int, int]) -> None:
    """ValueError unless a polygon is pairs of finite numbers in or beside the picture."""
    height, width = size
    for value in polygon:
        if type(value) not in (int, float):  # a bool is no number here
            raise ValueError(f"polygon {place} of its segmentation holds {shown(value)}, which is not a number")
    if len(polygon) % 2:
        raise ValueError(
            f"polygon {place} of its segmentation has {len(polygon)} numbers, the last {shown(polygon[-1])}; "
            "they must be pairs of x and y"
        )
    for axis, values, side in (("x", polygon[::2], width), ("y", polygon[1::2], height)):
        for value in values:
            if not -OUTSIDE <= value <= side + OUTSIDE:  # NaN is not
                raise ValueError(
                    f"polygon {place} of its segmentation has {axis} {shown(value)}, but its image is {height} x "
                    f"{width} (height x width)"
                )
    # no edge is longer than the picture and what a polygon may leave it by
    if len(polygon) // 2 * (max(size) + 2 * OUTSIDE) > LONGEST_OUTLINE and _outline(polygon) > LONGEST_OUTLINE:
        raise ValueError(
            f"polygon {place} of its segmentation has {len(polygon) // 2:,} points and an outline of more than "
            f"{LONGEST_OUTLINE:,} pixels"
        )


def _outline(polygon: Sequence[float]) -> float:
    """Length of a polygon's edges in pixels, each along the axis on which it is longer."""
    import numpy as np

    points = np.array(polygon, np.float64).reshape(-1, 2)
    return float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum())


def _of_runs(runs: Mapping[str, Any], size: tuple[int, int]) -> bytes:
    """Run lengths as a list or compressed, for `size` (height, width)."""
    sides, counts = runs["size"], runs["counts"]
    if sides != list(size):
        said = " x ".join(map(shown, sides)) if isinstance(sides, list) and len(sides) == 2 else shown(sides)
        raise ValueError(f"its run lengths are for {said} (height x width), its image is {size[0]} x {size[1]}")
    if isinstance(counts, list):
        return _compressed(counts, size)
    if not isinstance(counts, str):
        raise ValueError(f"its run lengths have the counts {shown(counts)}; they must be a list, or text if compressed")
    mask_pixels(counts.encode(), size)
    return counts.encode()


def _compressed(counts: Sequence[Any], size: tuple[int, int]) -> bytes:
    """A list of run lengths, compressed."""
    from pycocotools import mask

    height, width = size
    counts = [int(count) if type(count) is float and count.is_integer() else count for count in counts]
    for count in counts:
        if type(count) is not int or not 0 <= count <= height * width:
            raise ValueError(
                f"its run lengths hold {shown(count)}; they must be whole numbers from 0 to {height * width:,}"
            )
    if sum(counts) != height * width:
        raise ValueError(f"its run lengths do not cover {height} x {width} (height x width) pixels")
    return bytes(mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"])
