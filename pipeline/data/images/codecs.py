"""Pictures, segment maps and masks as shards store them, back into arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

IGNORE = 255
"""What segments of up to 255 ids hold where a pixel belongs to nothing."""

IGNORE_WIDE = 65535
"""What segments of more than 255 ids hold where a pixel belongs to nothing."""


def nothing_for(count: int) -> int:
    """What segments of `count` ids, or label maps of `count` classes, hold where a pixel belongs to nothing."""
    return IGNORE if count <= IGNORE else IGNORE_WIDE


def nothing_of(ids: np.ndarray) -> int:
    """What segment ids of this type, uint8 or uint16, hold where a pixel belongs to nothing."""
    return IGNORE if ids.dtype == np.uint8 else IGNORE_WIDE


def decode_image(data: Any, file: str) -> np.ndarray:
    """Picture bytes (any buffer) as (h, w, 3) uint8 RGB, turned as its EXIF tag says. ValueError names `file`."""
    import cv2

    image = decoded(data, cv2.IMREAD_COLOR_RGB)
    if image is None:
        raise ValueError(f"{file} does not decode; it is truncated or not an image")
    return image


def decode_segments(data: Any, file: str) -> np.ndarray:
    """Segment ids stored as PNG, (h, w) uint8 with 255, or uint16 with 65535, for nothing. ValueError names `file`."""
    import cv2

    ids = decoded(data, cv2.IMREAD_UNCHANGED)
    if ids is None:
        raise ValueError(f"{file}: the segments do not decode; the shard is altered")
    return ids


def encode_segments(ids: np.ndarray) -> bytes:
    """Segment ids, (h, w) uint8 or uint16, as PNG that decodes fast.

    Rows are not predicted from each other, which helps photographs only: maps decode in less than half the time of
    OpenCV's default, and take about half as much room again.
    """
    import cv2

    done, data = cv2.imencode(
        ".png", ids, [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE]
    )
    assert done
    return bytes(data.tobytes())


def decoded(data: Any, flags: int) -> np.ndarray | None:
    """Picture bytes as OpenCV decodes them with these flags; None where it cannot, or will not: it raises at absurd
    sizes."""
    import cv2

    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        return None


def raw_pixels(data: Any, shape: tuple[int, ...], dtype: type[np.uint8 | np.uint16], file: str) -> np.ndarray:
    """Stored pixels as an array of this shape and kind that lies where the bytes lie: nothing is read yet.

    ValueError names `file` when the length is wrong.
    """
    pixels, size = np.frombuffer(data, np.uint8), math.prod(shape) * np.dtype(dtype).itemsize
    if pixels.size != size:
        raise ValueError(
            f"{file}: {pixels.size:,} bytes of pixels instead of {size:,} for {' x '.join(map(str, shape))}; "
            "the shard is altered"
        )
    return pixels.view(np.dtype(dtype).newbyteorder("<")).reshape(shape)


def decode_masks(run_lengths: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> np.ndarray:
    """Masks of pycocotools' run lengths, all of `size` (height, width): (N, h, w) uint8, 0 or 1."""
    import cv2
    from pycocotools import mask

    masks = np.empty((len(run_lengths), *size), np.uint8)
    if len(run_lengths):
        by_columns = mask.decode(list(run_lengths)).transpose(2, 1, 0)  # as it lies in memory
        for place, one in enumerate(by_columns):
            cv2.transpose(one, masks[place])
    return masks


def encode_cropped_mask(mask: np.ndarray, *, top: int, left: int, size: tuple[int, int]) -> dict[str, Any]:
    """An (h, w) bool mask that lies at (top, left) of a picture of `size` as pycocotools' run lengths of that picture,
    which is never made."""
    from pycocotools import mask as coco

    columns, rows = np.nonzero(mask.T)  # run lengths go down the columns
    places = (left + columns.astype(np.int64)) * size[0] + top + rows
    if not len(places):
        runs = [size[0] * size[1]]
    else:
        breaks = np.flatnonzero(np.diff(places) != 1)
        starts, ends = places[np.r_[0, breaks + 1]], places[np.r_[breaks, len(places) - 1]] + 1
        runs = np.diff(np.r_[0, np.c_[starts, ends].ravel(), size[0] * size[1]]).tolist()
        runs = runs if runs[-1] else runs[:-1]  # the last pixel is of the mask
    encoded: dict[str, Any] = coco.frPyObjects({"size": list(size), "counts": runs}, *size)
    return encoded


def encode_masks(masks: np.ndarray) -> list[dict[str, Any]]:
    """(N, h, w) bool as pycocotools' run lengths."""
    from pycocotools import mask

    return mask.encode(np.asfortranarray(masks.transpose(1, 2, 0), np.uint8)) if len(masks) else []
