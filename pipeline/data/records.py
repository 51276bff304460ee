"""Records: what every dataset gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")


class Instance(NamedTuple):
    """One annotated object; objects may overlap."""

    class_id: int
    box: tuple[float, float, float, float]
    """x1, y1, x2, y2 in pixels, as annotated; of its mask where the annotation's cannot be right."""
    area: float
    """Pixels, as annotated or of its mask: decides whether it counts as small, medium or large."""
    crowd: bool
    """Stands for many objects: not trained on, and predictions on it do not count."""
    counts: bytes
    """Its mask at the picture's size: compressed run lengths of pycocotools."""
    name: str = ""
    """What its annotation is called in messages; empty: nothing."""


class Labelled(NamedTuple):
    """One picture as its dataset gives it."""

    image: bytes
    """The file as published."""
    segments: np.ndarray | None
    """(h, w) integers: segment ids, or class ids, from 0; 255, or 65535 where there are more than 255 segments or
    classes, is nothing. None: the dataset has instances only."""
    segment_classes: tuple[int, ...] | None
    """Class of every segment id; None: ids are class ids."""
    segment_crowd: tuple[bool, ...] = ()
    """Whether a segment stands for many objects, one flag per id; empty: none does."""
    instances: tuple[Instance, ...] | None = None
    """None: the dataset has no instance labels of its own, and the segments of things are the instances."""
    left_out: tuple[str, ...] = ()
    """Categories of its objects and segments that `class_names` leaves out, sorted."""
    size: tuple[int, int] | None = None
    """(height, width) of the picture that masks were made for; None: the segments show it."""
    label_map: np.ndarray | None = None
    """(h, w) class of every pixel to the metrics that count pixels, where segments do not say it (own_label_maps);
    nothing as in `segments`. As many as there are classes: an object of none of them. None: segments say it all."""


@dataclass(frozen=True)
class Record:
    """One picture of a split, not read yet. Can be sent to another process."""

    name: str
    """Unique in its split; without suffix."""
    image_file: str
    """Where the picture lies, for messages."""
    label_file: str
    read: Callable[[], Labelled]
    """Reads both. ValueError names the file that is wrong."""
