"""Segments and instances of a picture from those of its overlapping windows (m2f.inference.windowed).

N instances of a picture, K of a window, H x W picture, h x w window
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from m2f.inference.bands import Size
from m2f.inference.instance import Instances
from m2f.inference.panoptic import Segments
from m2f.inference.windowed import Groups, Window, shared

_T = TypeVar("_T")

SAME_OBJECT = 0.5
"""Intersection over union, where two windows overlap, from which on two masks of one class are one object's."""

LEAST_SCORE = 0.05
"""Instances of a window that are less sure are left out: every window has about as many as it has queries."""


class SegmentMerger:
    """Panoptic segments of windows, which come strip by strip, as those of the picture."""

    def __init__(self, size: Size) -> None:
        self.pieces = np.full(size, -1, np.int32)
        self.groups = Groups([])
        self.labels: list[int] = []
        self.is_thing: list[bool] = []
        self.scores: list[float] = []
        self.stuff: dict[int, int] = {}
        self.recent: list[tuple[Window, np.ndarray]] = []
        """Windows that later ones may overlap, with their pixels' pieces."""

    def add(self, window: Window, found: Segments) -> None:
        """Add the next window's segments."""
        labels, is_thing = found.labels.tolist(), found.is_thing.tolist()
        numbers = np.full(len(labels) + 1, -1, np.int32)  # the last one is read through -1
        for place, (label, thing) in enumerate(zip(labels, is_thing, strict=True)):
            numbers[place] = self.groups.add()
            if not thing and (first := self.stuff.setdefault(label, int(numbers[place]))) != numbers[place]:
                self.groups.unite(first, int(numbers[place]))
        self.labels += labels
        self.is_thing += is_thing
        self.scores += found.scores.tolist()
        local = numbers[found.segments.cpu().numpy()]
        for earlier, pieces in self.recent:
            if (both := shared(window, earlier)) is not None:
                self._unite(_part(local, window, both), _part(pieces, earlier, both))
        own = local[window.own_top - window.top :, window.own_left - window.left :]
        down, across = window.top + window.height, window.left + window.width
        self.pieces[window.own_top : down, window.own_left : across] = own
        self.recent = [*_still_overlapped(self.recent, window, self.pieces.shape), (window, local)]

    def _unite(self, one: np.ndarray, other: np.ndarray) -> None:
        """Unite things of one class whose pixels, where two windows overlap, are mostly the same."""
        known = max(int(one.max()), int(other.max())) + 2
        pairs, counts = np.unique((one.astype(np.int64) + 1) * known + other + 1, return_counts=True)
        areas = [dict(zip(*np.unique(each, return_counts=True), strict=True)) for each in (one, other)]
        for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
            first, second = pair // known - 1, pair % known - 1
            if first < 0 or second < 0 or not self.is_thing[first] or self.labels[first] != self.labels[second]:
                continue
            if count >= SAME_OBJECT * (areas[0][first] + areas[1][second] - count):
                self.groups.unite(first, second)

    def result(self) -> Segments:
        """The picture's segments, on the CPU; those of which no pixel is left are none."""
        groups = np.array([self.groups.group(piece) for piece in range(len(self.labels))], np.int64)
        pixels = sum((np.bincount(row + 1, minlength=len(groups) + 1) for row in self.pieces), np.zeros(1, np.int64))
        kept = sorted({int(group) for group, count in zip(groups, pixels[1:], strict=True) if count})
        number = {group: place for place, group in enumerate(kept)}
        lookup = np.array([*(number.get(int(group), -1) for group in groups), -1], np.int32)
        scores = [max(self.scores[piece] for piece in np.flatnonzero(groups == group)) for group in kept]
        return Segments(
            segments=torch.from_numpy(lookup[self.pieces]),
            labels=torch.tensor([self.labels[group] for group in kept], dtype=torch.int64),
            is_thing=torch.tensor([self.is_thing[group] for group in kept], dtype=torch.bool),
            scores=torch.tensor(scores, dtype=torch.float32),
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class CroppedInstance:
    """An instance whose mask is kept only inside its box."""

    label: int
    score: float
    top: int
    left: int
    size: Size
    """(height, width) of the box."""
    packed: np.ndarray
    """The box's pixels, eight in a byte."""

    @property
    def mask(self) -> np.ndarray:
        """(height, width) bool, of the box."""
        return np.unpackbits(self.packed, count=self.size[0] * self.size[1]).reshape(self.size).astype(bool)

    def within(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """Its mask in a part of the picture, (bottom - top, right - left) bool."""
        part = np.zeros((bottom - top, right - left), bool)
        rows = max(top, self.top), min(bottom, self.top + self.size[0])
        columns = max(left, self.left), min(right, self.left + self.size[1])
        if rows[0] < rows[1] and columns[0] < columns[1]:
            inside = self.mask[rows[0] - self.top : rows[1] - self.top, columns[0] - self.left : columns[1] - self.left]
            part[rows[0] - top : rows[1] - top, columns[0] - left : columns[1] - left] = inside
        return part


class InstanceMerger:
    """Instances of windows, which come strip by strip, as those of the picture."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.groups = Groups([])
        self.pieces: list[CroppedInstance] = []
        self.recent: list[tuple[Window, range]] = []
        """Windows that later ones may overlap, with their pieces."""

    def add(self, window: Window, found: Instances) -> None:
        """Add the next window's instances of a score of LEAST_SCORE and more."""
        first = len(self.pieces)
        for score, label, mask in zip(found.scores.tolist(), found.labels.tolist(), found.masks, strict=True):
            if score >= LEAST_SCORE:
                pixels = mask.cpu().numpy()
                self.pieces.append(_cropped(pixels, label=label, score=score, top=window.top, left=window.left))
                self.groups.add()
        new = range(first, len(self.pieces))
        for earlier, old in self.recent:
            if (both := shared(window, earlier)) is not None:
                self._unite(new, old, both)
        self.recent = [*_still_overlapped(self.recent, window, self.size), (window, new)]

    def _unite(self, new: range, old: range, both: tuple[int, int, int, int]) -> None:
        """Unite instances of two windows where they overlap, each with one at most, the most alike first."""
        of = {piece: self.pieces[piece].within(*both) for piece in (*new, *old)}
        alike = []
        for one in new:
            for other in old:
                if self.pieces[one].label == self.pieces[other].label and (either := (of[one] | of[other]).sum()):
                    alike.append((float((of[one] & of[other]).sum() / either), one, other))
        taken: set[int] = set()
        for overlap, one, other in sorted(alike, key=lambda each: (-each[0], each[1], each[2])):
            if overlap >= SAME_OBJECT and not taken & {one, other}:
                taken |= {one, other}
                self.groups.unite(one, other)

    def result(self) -> list[CroppedInstance]:
        """The picture's instances, best first; one of several pieces has the best one's score."""
        members: dict[int, list[CroppedInstance]] = {}
        for place, piece in enumerate(self.pieces):
            members.setdefault(self.groups.group(place), []).append(piece)
        return sorted(map(_united, members.values()), key=lambda each: -each.score)


def dense_instances(found: Sequence[CroppedInstance], size: Size) -> Instances:
    """The same instances with masks of the whole picture, on the CPU."""
    masks = np.zeros((len(found), *size), bool)
    for mask, each in zip(masks, found, strict=True):
        mask[each.top : each.top + each.size[0], each.left : each.left + each.size[1]] = each.mask
    boxes = [(each.left, each.top, each.left + each.size[1], each.top + each.size[0]) for each in found]
    return Instances(
        scores=torch.tensor([each.score for each in found], dtype=torch.float32),
        labels=torch.tensor([each.label for each in found], dtype=torch.int64),
        masks=torch.from_numpy(masks),
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
    )


def cropped_instances(found: Instances) -> list[CroppedInstance]:
    """The same instances with masks inside their boxes alone."""
    kept = zip(found.scores.tolist(), found.labels.tolist(), found.masks.cpu().numpy(), strict=True)
    return [_cropped(mask, label=label, score=score, top=0, left=0) for score, label, mask in kept]


def _cropped(mask: np.ndarray, *, label: int, score: float, top: int, left: int) -> CroppedInstance:
    """An instance of a mask whose first pixel is at (top, left) of the picture."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    inside = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] if len(rows) else mask[:0, :0]
    return CroppedInstance(
        label=label,
        score=score,
        top=top + (int(rows[0]) if len(rows) else 0),
        left=left + (int(columns[0]) if len(rows) else 0),
        size=(inside.shape[0], inside.shape[1]),
        packed=np.packbits(inside),
    )


def _united(pieces: Sequence[CroppedInstance]) -> CroppedInstance:
    if len(pieces) == 1:
        return pieces[0]
    top, left = min(each.top for each in pieces), min(each.left for each in pieces)
    bottom = max(each.top + each.size[0] for each in pieces)
    right = max(each.left + each.size[1] for each in pieces)
    mask = np.zeros((bottom - top, right - left), bool)
    for each in pieces:
        mask |= each.within(top, bottom, left, right)
    score = max(each.score for each in pieces)
    return _cropped(mask, label=pieces[0].label, score=score, top=top, left=left)


def _part(pixels: np.ndarray, window: Window, both: tuple[int, int, int, int]) -> np.ndarray:
    """Of a window's pixels those in a part of the picture."""
    top, bottom, left, right = both
    return pixels[top - window.top : bottom - window.top, left - window.left : right - window.left]


def _still_overlapped(recent: list[tuple[Window, _T]], window: Window, size: Sequence[int]) -> list[tuple[Window, _T]]:
    """Those windows that the ones after `window` may overlap; strips follow each other along the longer side."""
    if size[1] > size[0]:
        return [each for each in recent if each[0].left + each[0].width > window.left]
    return [each for each in recent if each[0].top + each[0].height > window.top]
