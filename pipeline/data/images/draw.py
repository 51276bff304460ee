"""Colours, and maps of ids painted over pictures."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np

_GOLDEN_ANGLE = 0.618034


def class_colours(count: int) -> np.ndarray:
    """One RGB colour per class, (count, 3) uint8: hues a golden angle apart, in three lightnesses."""
    colours = [colorsys.hls_to_rgb(i * _GOLDEN_ANGLE % 1, (0.45, 0.6, 0.32)[i % 3], 0.75) for i in range(count)]
    return (np.array(colours).reshape(-1, 3) * 255).astype(np.uint8)


def segment_colours(labels: Sequence[int], num_classes: int) -> np.ndarray:
    """(S, 3) uint8: the class's colour, every further segment of a class in another shade."""
    of_class, seen = class_colours(num_classes), np.zeros(num_classes, np.int64)
    colours = np.zeros((len(labels), 3), np.uint8)
    for segment, label in enumerate(labels):
        shade = (1.0, 1.3, 0.7, 1.15, 0.85)[seen[label] % 5]
        colours[segment] = np.clip(of_class[label] * shade, 0, 255)
        seen[label] += 1
    return colours


def stacked(masks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(N, h, w) masks as one map of indices, the first on top; -1 where there is none."""
    ids = np.full(size, -1, np.int32)
    for index in reversed(range(len(masks))):
        ids[masks[index] > 0] = index
    return ids


def painted(
    image: np.ndarray, ids: np.ndarray, colours: np.ndarray, *, borders: bool = True, strength: float = 0.65
) -> np.ndarray:
    """The picture, (h, w, 3) uint8, with every pixel of id i tinted in colours[i] by `strength`; other ids stay as they
    are. Borders are white lines."""
    inside = (ids >= 0) & (ids < len(colours))
    if not inside.any():
        return image
    tint = colours[np.where(inside, ids, 0)]
    mixed = np.where(inside[..., None], ((1 - strength) * image + strength * tint).astype(np.uint8), image)
    if borders:
        edge = np.zeros(ids.shape, bool)
        edge[:, 1:] |= ids[:, 1:] != ids[:, :-1]
        edge[1:] |= ids[1:] != ids[:-1]
        mixed[edge] = 255
    return mixed
