"""Label maps as tables of ids: counting them, and putting others in their place."""

from __future__ import annotations

import cv2
import numpy as np
from albucore import sz_lut  # type: ignore[import-untyped]

from pipeline.data.images.codecs import nothing_of


def look_up(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """table[values] of uint8 values and a table of 256 uint8; faster than cv2.LUT."""
    found: np.ndarray = sz_lut(values, table, inplace=False)
    return found


def look_up_in_place(values: np.ndarray, table: np.ndarray) -> None:
    """The same, in the place of the values."""
    if values.flags.c_contiguous:
        sz_lut(values, table, inplace=True)
    else:
        values[:] = look_up(values, table)


def label_counts(ids: np.ndarray) -> np.ndarray:
    """Pixels of every id from 0 on, (ids,) int64; those of nothing are left out."""
    values = nothing_of(ids) + 1
    return cv2.calcHist([ids], [0], None, [values], [0, values]).ravel()[:-1].astype(np.int64)
