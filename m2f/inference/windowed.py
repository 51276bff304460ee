"""Predictions for a picture in windows that overlap, so that memory does not grow with the picture.

Class scores of all windows are blended before the highest is taken; a window counts less towards its edges. Segments
and instances are found in each window, and those of one class that two windows show in the same place become one:
where the windows overlap, their masks' intersection is at least half of their union.

Windows come in strips across the picture's shorter side, so that few of them have to be remembered.

C classes, K instances of a window, H x W picture, h x w window
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from m2f.inference.bands import Size
from m2f.inference.semantic import Resized, score_rows
from m2f.types import Prediction

REMEMBERED_BYTES = 1 << 30
"""Of mask logits of windows that are kept for the next strip; a window that is not kept is predicted again."""

_BAND_ELEMENTS = 1 << 22
"""Floats of the blended scores that exist at a time, about."""

_REACH = 3
"""A pixel lies in at most this many windows besides its own, along a side: where there are three or more, they begin
more than a quarter of a window apart."""


class Window(NamedTuple):
    """A part of a picture, in its pixels."""

    top: int
    left: int
    height: int
    width: int
    own_top: int
    """From this row on its segments count; above it, those of the window before."""
    own_left: int
    """The same for columns."""


class Seen(NamedTuple):
    """What the network predicts for one window."""

    prediction: Prediction
    """Of one picture."""
    valid: Size
    """Of the network's input, what is picture."""
    padded: Size
    """(height, width) of the network's input."""


class Cell(NamedTuple):
    """A window and the pixels that no later window changes."""

    window: Window
    top: int
    bottom: int
    left: int
    right: int


def window_strips(size: Size, *, window: int, overlap: int) -> list[list[Cell]]:
    """Square windows of `window` pixels that cover a picture of `size` and overlap by `overlap` pixels or more.

    They lie evenly spaced; a side that is shorter than a window makes it shorter. In strips across the shorter side.
    ValueError where windows overlap by more than half, or are of no pixel.
    """
    if window < 1 or not 0 <= overlap <= window // 2:
        raise ValueError(
            f"windows of {window} pixels cannot overlap by {overlap}; the overlap is 0 to half of the window"
        )
    down, across = (_starts(side, window, overlap) for side in size)
    height, width = (min(window, side) for side in size)
    cells = [
        [
            Cell(
                Window(top, left, height, width, _own(down, row, height), _own(across, column, width)),
                top,
                down[row + 1] if row + 1 < len(down) else size[0],
                left,
                across[column + 1] if column + 1 < len(across) else size[1],
            )
            for column, left in enumerate(across)
        ]
        for row, top in enumerate(down)
    ]
    return [list(strip) for strip in zip(*cells, strict=True)] if size[1] > size[0] else cells


def _starts(side: int, window: int, overlap: int) -> list[int]:
    """Where windows begin along a side: as few as there can be, evenly spaced."""
    if side <= window:
        return [0]
    count = -(-(side - overlap) // (window - overlap))
    return [round(place * (side - window) / (count - 1)) for place in range(count)]


def _own(starts: Sequence[int], place: int, length: int) -> int:
    """The middle of what a window shares with the one before."""
    start = starts[place]
    return start + (starts[place - 1] + length - start) // 2 if place else start


@torch.no_grad()
def windowed_labels(
    strips: Sequence[Sequence[Cell]],
    size: Size,
    see: Callable[[Window], Seen],
    *,
    overlap: int,
    resize: Resized | None = "scores",
    on_window: Callable[[Window, Seen], None] = lambda window, seen: None,
) -> Tensor | None:
    """Class with the highest blended score at every pixel, (H, W) on the CPU; uint8, or int64 beyond 255 classes.

    see: predicts a window; it may be asked again for windows that are not remembered. on_window: is told of every
    window once, in the order of the strips. resize: as for `semantic_scores`; None: only on_window is of interest.
    """
    remembered, labels = _Remembered(see), None
    for place, strip in enumerate(strips):
        for row, cell in enumerate(strip):
            seen = remembered[cell.window]
            on_window(cell.window, seen)
            if resize is None:
                continue
            if labels is None:
                classes = seen.prediction.class_logits.shape[2] - 1
                labels = torch.empty(size, dtype=torch.uint8 if classes <= 255 else torch.int64)
            covering = [
                before.window
                for earlier in strips[max(0, place - _REACH) : place + 1]
                for before in earlier[max(0, row - _REACH) : row + 1]
                if _bottom(before.window) > cell.top and _right(before.window) > cell.left
            ]
            _blend(labels, cell, covering, remembered, overlap, resize)
    return labels


class _Remembered:
    """Windows' predictions, the latest of them kept."""

    def __init__(self, see: Callable[[Window], Seen]) -> None:
        self.see = see
        self.kept: OrderedDict[Window, Seen] = OrderedDict()
        self.bytes = 0

    def __getitem__(self, window: Window) -> Seen:
        if window not in self.kept:
            self.kept[window] = self.see(window)
            self.bytes += self.kept[window].prediction.mask_logits.nbytes
            while self.bytes > REMEMBERED_BYTES and len(self.kept) > 1:
                self.bytes -= self.kept.popitem(last=False)[1].prediction.mask_logits.nbytes
        self.kept.move_to_end(window)
        return self.kept[window]


def _blend(
    labels: Tensor, cell: Cell, covering: Sequence[Window], remembered: _Remembered, overlap: int, resize: Resized
) -> None:
    """Fill in a cell's labels from all windows that cover a part of it, band by band."""
    classes = remembered[cell.window].prediction.class_logits.shape[2] - 1
    device = remembered[cell.window].prediction.class_logits.device
    rows = max(4, _BAND_ELEMENTS // (classes * (cell.right - cell.left)))
    for first in range(cell.top, cell.bottom, rows):
        last = min(first + rows, cell.bottom)
        blended_CYX = torch.zeros(classes, last - first, cell.right - cell.left, device=device)
        for window in covering:
            bottom, right = min(last, _bottom(window)), min(cell.right, _right(window))
            if bottom <= first:
                continue
            seen, inside = remembered[window], (first - window.top, bottom - window.top)
            scores_1CYw = score_rows(
                seen.prediction,
                (window.height, window.width),
                inside,
                seen.valid,
                padded_size=seen.padded,
                resize=resize,
            )
            across = slice(cell.left - window.left, right - window.left)
            weights_Y = _weights(window.height, overlap, device)[inside[0] : inside[1], None]
            weights_X = _weights(window.width, overlap, device)[across]
            blended_CYX[:, : bottom - first, : right - cell.left] += (
                scores_1CYw[0, :, :, across] * weights_Y * weights_X
            )
        labels[first:last, cell.left : cell.right] = blended_CYX.max(0).indices.to(labels.dtype).cpu()


def _weights(length: int, overlap: int, device: torch.device) -> Tensor:
    """How much a window counts at each of its pixels along one side: 1, falling to nearly 0 within `overlap` pixels of
    its ends."""
    place = torch.arange(length, device=device)
    return (torch.minimum(place, length - 1 - place) + 1).div(overlap + 1).clamp(max=1)


def _bottom(window: Window) -> int:
    return window.top + window.height


def _right(window: Window) -> int:
    return window.left + window.width


def shared(one: Window, other: Window) -> tuple[int, int, int, int] | None:
    """Top, bottom, left and right of what two windows share; None: nothing."""
    top, bottom = max(one.top, other.top), min(_bottom(one), _bottom(other))
    left, right = max(one.left, other.left), min(_right(one), _right(other))
    return (top, bottom, left, right) if top < bottom and left < right else None


@dataclass
class Groups:
    """Which pieces, numbered as they come, are one object."""

    parents: list[int]

    def add(self) -> int:
        """A new piece's number."""
        self.parents.append(len(self.parents))
        return len(self.parents) - 1

    def group(self, piece: int) -> int:
        """The first piece of the object that it belongs to."""
        while self.parents[piece] != piece:
            piece = self.parents[piece]
        return piece

    def unite(self, one: int, other: int) -> None:
        """Two pieces are of one object."""
        first, second = sorted((self.group(one), self.group(other)))
        self.parents[second] = first
