"""The loops of pixels.c: what OpenCV computes, to the bit, with fewer passes over memory.

They are used where there is a C compiler and a comparison with OpenCV on this machine finds them equal: how OpenCV
rounds depends on the processor. Everywhere else, and for what they do not take, OpenCV does the work.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import cv2
import numpy as np

from m2f.kernels.build import shared_library, source_digest
from pipeline.data.images.codecs import IGNORE
from pipeline.data.images.label_maps import label_counts as label_counts_of_opencv

LOOPS = "b9658f972d144878249387768a2343eee6e6fa066efcaafa357ca60c134d8d50"
"""`m2f.kernels.build.source_digest` of pixels.c, by which the loops count in digests of the code; a test holds it."""

SOURCE = Path(__file__).with_name("pixels.c")

_FLAGS = ("-ffp-contract=off", "-fno-trapping-math")
"""The first: as OpenCV and numpy, which round a product before they add to it."""

_WIDTH = 64
"""OpenCV rounds the last pixels of a row in another way, those beyond a multiple of its vectors' length: at most 64."""


def distort_planes(planes: np.ndarray, *, saturation: float | None, hue: int | None) -> bool:
    """Red, green and blue, (3, h, w) uint8, changed in place: in HSV the saturation is multiplied and truncated, then,
    from RGB again, the hue, of 180, turned. None: left out. False: nothing is changed, and OpenCV is to do it."""
    library = _loops()
    width = planes.shape[2]
    if library is None or width % _WIDTH or planes.strides[2] != 1 or not width:
        return False
    _distort(library, planes, saturation, hue)
    return True


def _distort(library: ctypes.CDLL, planes: np.ndarray, saturation: float | None, hue: int | None) -> None:
    numbers = [ctypes.c_int64(each) for each in (*planes.shape[1:], *planes.strides[:2], saturation is not None)]
    turn = [ctypes.c_int64(each) for each in (hue is not None, (hue or 0) % 180)]
    library.distort(ctypes.c_void_p(planes.ctypes.data), *numbers, ctypes.c_float(saturation or 0.0), *turn)


def label_counts(ids: np.ndarray) -> np.ndarray:
    """Pixels of every id from 0 on of (h, w) uint8 or uint16, (ids,) int64; those of nothing are left out."""
    library = _loops()
    if library is None or ids.dtype != np.uint8 or ids.ndim != 2 or ids.strides[1] != 1 or not ids.size:
        return label_counts_of_opencv(ids)
    counts = np.empty(256, np.int64)
    numbers = [ctypes.c_int64(each) for each in (*ids.shape, ids.strides[0])]
    library.count(ctypes.c_void_p(ids.ctypes.data), ctypes.c_void_p(counts.ctypes.data), *numbers)
    return counts[:IGNORE]


@cache
def _loops() -> ctypes.CDLL | None:
    """The library; None where it is altered, cannot be had, or differs from OpenCV."""
    if source_digest(SOURCE) != LOOPS:  # altered: their digest would say of batches what is not so
        return None
    try:
        library = shared_library(SOURCE, flags=_FLAGS)
    except OSError:  # slower, and the same: nothing to tell
        return None
    return library if _equal(library) else None


def _equal(library: ctypes.CDLL) -> bool:
    """Whether colours go to HSV and back as OpenCV takes them: all hues and saturations, some values."""
    hues, saturations, values = np.meshgrid(np.arange(180), np.arange(256), (1, 90, 173, 255), indexing="ij")
    hsv = np.stack([hues, saturations, values], axis=-1).astype(np.uint8).reshape(-1, 256, 3)
    image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    again = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), cv2.COLOR_HSV2RGB)
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))
    _distort(library, planes, None, 0)
    return bool((planes == again.transpose(2, 0, 1)).all())
