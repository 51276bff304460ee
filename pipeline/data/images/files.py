"""Labels as files of a dataset: read to the last byte, or refused in a sentence that names the file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.data.images.image_files import MAX_PIXELS, opened

if TYPE_CHECKING:
    import numpy as np


def read_labels(data: bytes, file: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Ids of a label PNG, (h, w) uint8, uint16 or int32; of a palette its indices. ValueError names `file`."""
    import numpy as np

    with opened(data, file, max_pixels) as image:
        image.load()
        file_format, ids, bands = image.format, np.asarray(image), len(image.getbands())
    if file_format != "PNG" or bands != 1:
        raise ValueError(
            f"{file} is {file_format} with {bands} channels; labels are PNG files with one channel of class ids"
        )
    if ids.dtype == bool:
        return ids.astype(np.uint8)
    bits, colour_type = data[24], data[25]  # IHDR; grey values of fewer than 8 bits come stretched to 0..255
    if colour_type == 0 and bits < 8:
        return ids // np.uint8(255 // (2**bits - 1))
    return ids


def read_colours(data: bytes, file: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A PNG of 8-bit red, green and blue, (h, w, 3) uint8. ValueError names `file`."""
    import numpy as np

    with opened(data, file, max_pixels) as image:
        image.load()
        file_format, mode, colours = image.format, image.mode, np.asarray(image)
    if (file_format, mode) != ("PNG", "RGB"):
        raise ValueError(f"{file} is {file_format} of mode {mode}; panoptic segment ids are PNG files of mode RGB")
    return colours


def class_ids(labels: np.ndarray, lookup: np.ndarray, file: str, *, known: str) -> np.ndarray:
    """Stored labels as class ids, (h, w) uint8 with 255 for nothing.

    lookup: (256,) int16, class id or 255 of every stored id, -1 where there is none: a ValueError then names
    the file, the id and how many pixels hold it; `known` says which ids there are.
    """
    import numpy as np

    if labels.dtype != np.uint8:
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high > 255:
            wrong = low if low < 0 else high
            raise ValueError(_unknown_id(file, wrong, int((labels == wrong).sum()), known))
        labels = labels.astype(np.uint8)
    counts = np.bincount(labels.ravel(), minlength=256)
    wrong_ids = np.flatnonzero((counts > 0) & (lookup < 0))
    if len(wrong_ids):
        raise ValueError(_unknown_id(file, int(wrong_ids[0]), int(counts[wrong_ids[0]]), known))
    return lookup.astype(np.uint8)[labels]


def _unknown_id(file: str, value: int, pixels: int, known: str) -> str:
    return f"{file} holds label {value} on {pixels} pixels, which is outside the classes: {known}"
