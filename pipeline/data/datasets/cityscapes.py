"""Cityscapes in two archives: leftImg8bit/<split>/<city>/*_leftImg8bit.png, gtFine/.../*_gtFine_labelIds.png."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.data.archives import below, file_names, read_file
from pipeline.data.images.codecs import IGNORE
from pipeline.data.images.label_files import class_ids, read_labels
from pipeline.data.records import Labelled, Record

if TYPE_CHECKING:
    from pipeline.params.schema import DatasetConfig

TRAIN_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Label id of the 19 evaluated classes, by train id (the data set's own definition); every other id is ignored."""

IMAGE_SUFFIX, LABEL_SUFFIX = "_leftImg8bit.png", "_gtFine_labelIds.png"


def records(config: DatasetConfig, sources: Sequence[Path], split: str) -> list[Record]:
    """The split's records by city and name, from two zip archives or folders, in either order, or one with both.

    ValueError names the first picture without label or label without picture.
    """
    if len(config.class_names) != len(TRAIN_IDS):
        raise ValueError(f"layout cityscapes has {len(TRAIN_IDS)} classes; class_names lists {len(config.class_names)}")
    folder = config.splits[split]
    image_source, images = _find(sources, "leftImg8bit", folder, IMAGE_SUFFIX)
    label_source, labels = _find(sources, "gtFine", folder, LABEL_SUFFIX)
    if not images:
        raise ValueError(f"{image_source} has no images leftImg8bit/{folder}/<city>/*{IMAGE_SUFFIX}")
    for name in sorted(images.keys() - labels.keys()):
        raise ValueError(f"{image_source.name}: {images[name]} has no label gtFine/{folder}/{name}{LABEL_SUFFIX}")
    for name in sorted(labels.keys() - images.keys()):
        raise ValueError(f"{label_source.name}: {labels[name]} has no image leftImg8bit/{folder}/{name}{IMAGE_SUFFIX}")
    return [
        Record(
            name=name,
            image_file=f"{image_source.name}: {images[name]}",
            label_file=f"{label_source.name}: {labels[name]}",
            read=partial(_read, image_source, images[name], label_source, labels[name], config.max_pixels),
        )
        for name in sorted(images)
    ]


def _find(sources: Sequence[Path], top: str, folder: str, suffix: str) -> tuple[Path, dict[str, str]]:
    """The source that holds the folder `top`, and its split's files by "<city>/<name>"."""
    problem = ValueError(f"layout cityscapes needs an archive or folder with {top}/; `sources` lists none")
    for source in sources:
        names = file_names(source)
        try:
            prefix = f"{below(names, top, source)}{top}/{folder}/"
        except ValueError as error:
            problem = error
            continue
        files = [name for name in names if name.startswith(prefix) and name.endswith(suffix)]
        return source, {name[len(prefix) : -len(suffix)]: name for name in files}
    raise problem


def _read(image_source: Path, image: str, label_source: Path, label: str, max_pixels: int) -> Labelled:
    file = f"{label_source.name}: {label}"
    labels = read_labels(read_file(label_source, label), file, max_pixels)
    ids = class_ids(labels, _class_of, file, nothing=IGNORE, known=lambda _: "which is no label id: 0 to 255")
    return Labelled(read_file(image_source, image), ids, None)


def _class_of(label: int) -> int | None:
    """The class of a label id; None: there is no such id."""
    return (TRAIN_IDS.index(label) if label in TRAIN_IDS else IGNORE) if 0 <= label <= 255 else None
