"""What a picture's segments and masks become as targets: numbered again without gaps, merged, padded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.data.images.codecs import (
    IGNORE,
    nothing_of,
)
from pipeline.data.images.label_maps import look_up
from pipeline.data.loader.pixels import label_counts
from pipeline.data.shards.reader import Segments


def renumber(ids: np.ndarray, new: np.ndarray, count: int) -> np.ndarray:
    """Ids of S segments, uint8 or uint16, with new[id], (S,), -1 for nothing, in their place.

    Gives uint8 with 255 or, where there are over 255 (`count`) new ids, int32 with -1, for nothing.
    """
    dtype, nothing = (np.uint8, IGNORE) if count <= IGNORE else (np.int32, -1)
    lookup = np.full(nothing_of(ids) + 1, nothing, dtype)
    lookup[: len(new)] = np.where(new < 0, nothing, new)
    return look_up(ids, lookup) if ids.dtype == dtype == np.uint8 else lookup.take(ids)


def close_gaps(
    ids: np.ndarray,
    new: np.ndarray,
    count: int,
    *,
    where: str,
    counts: np.ndarray | None = None,
    kept: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of S segments as those of `count` others, new[id], -1 for none, and these numbered again without gaps.

    Gives (h, w) uint8 or int32, and which of the `count` are left, (T,), by rising number. counts: label_counts of the
    ids, where they are known. kept: (count,) bool, those that have a number also without pixels. ValueError names
    `where` there is an id that is no segment's.
    """
    held = np.flatnonzero(label_counts(ids) if counts is None else counts)
    if len(held) and held[-1] >= len(new):
        raise ValueError(f"{where} holds segment {held[-1]}, but has {len(new)}; the shard is altered")
    there = np.zeros(count + 1, bool)  # the last one is read through -1
    if kept is not None:
        there[:-1] = kept
    there[new[held]] = True
    present = np.flatnonzero(there[:-1])
    number = np.full(count + 1, -1)
    number[present] = np.arange(len(present))
    return renumber(ids, number[new], len(present)), present


def merge_stuff(segments: Segments, thing_index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Panoptic segments: none for crowds, and one for all stuff of a class, in the place of its first.

    Gives the new id of every segment, (S,), -1: none, and the first segment of every new one, (M,).
    """
    new, firsts, stuff = np.full(len(segments.classes), -1), list[int](), dict[int, int]()
    for segment, (class_id, crowd) in enumerate(zip(segments.classes.tolist(), segments.crowd.tolist(), strict=True)):
        if crowd:
            continue
        if class_id in stuff:
            new[segment] = stuff[class_id]
            continue
        new[segment] = len(firsts)
        firsts.append(segment)
        if thing_index[class_id] < 0:
            stuff[class_id] = new[segment]
    return new, np.array(firsts, np.int64)


def large_enough(boxes: np.ndarray) -> np.ndarray:
    """(N,) bool: annotated boxes of at least a pixel's width and height; others are no targets.

    Boxes are stored in float32, so that a side of 1 may have become a little less (COCO gives hundredths of pixels).
    """
    return np.asarray((boxes[:, 2:] - boxes[:, :2] >= 0.999).all(axis=1))


def pad_masks(masks: np.ndarray, crop: tuple[int, int]) -> Tensor:
    """(T, h, w) uint8 masks padded to the crop, (T, H, W) bool."""
    padded = torch.zeros(len(masks), *crop, dtype=torch.bool)
    padded.numpy()[:, : masks.shape[1], : masks.shape[2]] = masks
    return padded


def stack_segments(maps: Sequence[np.ndarray], crop: tuple[int, int]) -> Tensor:
    """Segment maps padded to the crop, (B, H, W): uint8 with 255, or int32 with -1 as soon as one needs it."""
    wide = any(segments.dtype != np.uint8 for segments in maps)
    stacked = np.full((len(maps), *crop), -1 if wide else IGNORE, np.int32 if wide else np.uint8)
    for place, segments in enumerate(maps):
        part = stacked[place, : segments.shape[0], : segments.shape[1]]
        part[:] = segments
        if wide and segments.dtype == np.uint8:
            part[segments == IGNORE] = -1
    return torch.from_numpy(stacked)
