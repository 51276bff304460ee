"""Pictures and segment maps as shards store them, back into arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

IGNORE = 255
"""What segments of up to 255 ids hold where a pixel belongs to nothing."""

IGNORE_WIDE = 65535
"""What segments of more than 255 ids hold where a pixel belongs to nothing."""


def decode_image(data: Any, file: str) -> np.ndarray:
    """Picture bytes (any buffer) as (h, w, 3) uint8 RGB, turned as its EXIF tag says. ValueError names `file`."""
    import cv2

    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    if image is None:
        raise ValueError(f"{file} does not decode; it is truncated or not a picture")
    return image


def decode_segments(data: Any, file: str) -> np.ndarray:
    """Stored segment ids, (h, w): uint8 with 255, or int32 with -1, for nothing. ValueError names `file`."""
    import cv2

    ids = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if ids is None:
        raise ValueError(f"{file} does not decode; the shard is altered")
    if ids.dtype == np.uint16:
        ids = ids.astype(np.int32)
        ids[ids == IGNORE_WIDE] = -1
    return ids
