"""Cityscapes in two archives: leftImg8bit/<split>/<city>/*_leftImg8bit.png, gtFine/.../*_gtFine_labelIds.png.

With `thing_classes`, labels are panoptic, of *_gtFine_instanceIds.png, by the rules of cityscapesScripts'
preparation/createPanopticImgs.py: an id from 1000 on is 1000 times the label id of an object, and a number; a smaller
one is a label id, where a class has objects that of a group of them, a crowd. Objects of labels that are not evaluated
(caravans, trailers) are nothing, except to Cityscapes' AP, whose void are label ids alone: label maps have them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.data.archives import read_file
from pipeline.data.datasets.label_maps import holder
from pipeline.data.images.codecs import IGNORE, nothing_for
from pipeline.data.images.label_files import class_ids, read_labels
from pipeline.data.records import Labelled, Record

if TYPE_CHECKING:
    from pipeline.params.schema import DatasetConfig

TRAIN_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Label id of the 19 evaluated classes, by train id (the data set's own definition); every other id is ignored."""

THINGS = range(11, 19)
"""Classes whose objects have ids of their own: person to bicycle."""

LAST_LABEL, PER_LABEL = 33, 1000
"""The largest label id, and how many instance ids each has."""

IMAGE_SUFFIX, LABEL_SUFFIX, INSTANCE_SUFFIX = "_leftImg8bit.png", "_gtFine_labelIds.png", "_gtFine_instanceIds.png"


def records(config: DatasetConfig, sources: Sequence[Path], split: str) -> list[Record]:
    """The split's records by city and name, from two zip archives or folders, in either order, or one with both.

    ValueError names the first picture without label or label without picture.
    """
    _check_classes(config)
    folder, suffix = config.splits[split], INSTANCE_SUFFIX if config.thing_classes else LABEL_SUFFIX
    image_source, images = _find(sources, "leftImg8bit", folder, IMAGE_SUFFIX)
    label_source, labels = _find(sources, "gtFine", folder, suffix)
    if not images:
        raise ValueError(f"{image_source} has no images leftImg8bit/{folder}/<city>/*{IMAGE_SUFFIX}")
    for name in sorted(images.keys() - labels.keys()):
        raise ValueError(f"{image_source.name}: {images[name]} has no label gtFine/{folder}/{name}{suffix}")
    for name in sorted(labels.keys() - images.keys()):
        raise ValueError(f"{label_source.name}: {labels[name]} has no image leftImg8bit/{folder}/{name}{IMAGE_SUFFIX}")
    read = _read_segments if config.thing_classes else _read
    return [
        Record(
            name=name,
            image_file=f"{image_source.name}: {images[name]}",
            label_file=f"{label_source.name}: {labels[name]}",
            read=partial(read, image_source, images[name], label_source, labels[name], config.max_pixels),
        )
        for name in sorted(images)
    ]


def _check_classes(config: DatasetConfig) -> None:
    """ValueError unless the classes are as many as the data set has, and things those that have objects."""
    if len(config.class_names) != len(TRAIN_IDS):
        raise ValueError(f"layout cityscapes has {len(TRAIN_IDS)} classes; class_names lists {len(config.class_names)}")
    things = config.class_names[THINGS.start : THINGS.stop]
    if config.thing_classes and {*config.thing_classes} != {*things}:
        raise ValueError(
            f"layout cityscapes has objects of {', '.join(things)}; thing_classes lists "
            f"{', '.join(config.thing_classes)}: list the former, or none for semantic labels alone"
        )


def _find(sources: Sequence[Path], top: str, folder: str, suffix: str) -> tuple[Path, dict[str, str]]:
    """The source that holds the folder `top`, and its split's files by "<city>/<name>"."""
    source, prefix, names = holder(sources, top, "cityscapes")
    prefix = f"{prefix}{folder}/"
    files = [name for name in names if name.startswith(prefix) and name.endswith(suffix)]
    return source, {name[len(prefix) : -len(suffix)]: name for name in files}


def _read(image_source: Path, image: str, label_source: Path, label: str, max_pixels: int) -> Labelled:
    file = f"{label_source.name}: {label}"
    labels = read_labels(read_file(label_source, label), file, max_pixels)
    ids = class_ids(labels, _class_of, file, nothing=IGNORE, known=lambda _: "which is no label id: 0 to 255")
    return Labelled(read_file(image_source, image), ids, None)


def _class_of(label: int) -> int | None:
    """The class of a label id; None: there is no such id."""
    return (TRAIN_IDS.index(label) if label in TRAIN_IDS else IGNORE) if 0 <= label <= 255 else None


def _read_segments(image_source: Path, image: str, label_source: Path, label: str, max_pixels: int) -> Labelled:
    """A picture with the segments of its instanceIds.png, by rising id."""
    file = f"{label_source.name}: {label}"
    ids = read_labels(read_file(label_source, label), file, max_pixels)
    smallest, largest = int(ids.min()), int(ids.max())
    if smallest < 0 or largest >= PER_LABEL * (LAST_LABEL + 1):
        raise ValueError(f"{file} holds {smallest if smallest < 0 else largest}, {_NO_ID}")
    found = [_segment_of(int(value), file) for value in np.flatnonzero(np.bincount(ids.ravel()))]
    kept = [segment for segment in found if segment.class_id < len(TRAIN_IDS)]
    nothing = nothing_for(len(kept))
    number = np.full(largest + 1, nothing, np.uint8 if nothing == IGNORE else np.uint16)
    number[[segment.id for segment in kept]] = range(len(kept))
    label_map = None
    if any(segment.class_id == len(TRAIN_IDS) for segment in found):
        class_of = np.full(largest + 1, IGNORE, np.uint8)
        class_of[[segment.id for segment in found]] = [segment.class_id for segment in found]
        label_map = class_of.take(ids)
    crowd = tuple(segment.crowd for segment in kept)
    return Labelled(
        read_file(image_source, image),
        number.take(ids),
        tuple(segment.class_id for segment in kept),
        crowd if any(crowd) else (),
        label_map=label_map,
    )


_NO_ID = f"which is no instance id: a label id, 0 to {LAST_LABEL}, or {PER_LABEL} times one and a number below that"


class _Segment(NamedTuple):
    """What an instance id says."""

    id: int
    class_id: int
    """IGNORE: nothing. The number of classes: an object of a label that is not evaluated."""
    crowd: bool


def _segment_of(value: int, file: str) -> _Segment:
    """What the pixels of an instance id are. ValueError names `file` where there is no such id."""
    label = value if value < PER_LABEL else value // PER_LABEL
    if label > LAST_LABEL:
        raise ValueError(f"{file} holds {value}, {_NO_ID}")
    if label not in TRAIN_IDS:
        return _Segment(value, IGNORE if value < PER_LABEL else len(TRAIN_IDS), crowd=False)
    class_id = TRAIN_IDS.index(label)
    return _Segment(value, class_id, crowd=value < PER_LABEL and class_id in THINGS)
