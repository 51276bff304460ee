"""ADE20K with objects: images/<split>/*.jpg and annotations/<split>/*.png, as ADEChallengeData2016.zip has them, and
annotations_instance/<split>/*.png, as annotations_instance.tar has them. They may be in one source or in several.

Red of an instance file is the object's category, 1 to 100: its place among the things, in the order of the 150 classes.
Green is its number in the image, 0 for none. By the rules of facebookresearch/Mask2Former's
datasets/prepare_ade20k_pan_seg.py, objects lie over the stuff of the semantic labels, and things of the semantic labels
without an object are nothing; to the metrics that count pixels, classes stay those of the semantic labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.data.archives import read_file
from pipeline.data.datasets.label_maps import by_stem, holder
from pipeline.data.images.codecs import IGNORE, nothing_for
from pipeline.data.images.label_files import class_ids, read_colours, read_labels
from pipeline.data.records import IMAGE_SUFFIXES, Labelled, Record

if TYPE_CHECKING:
    from pipeline.params.schema import DatasetConfig

_SUFFIXES = (".png",)
"""Of label files."""


def records(config: DatasetConfig, sources: Sequence[Path], split: str) -> list[Record]:
    """The split's records by name. ValueError names the first image that lacks one of its two label files, or label
    file without image."""
    if not config.thing_classes or len(config.class_names) >= IGNORE:
        raise ValueError(
            f"layout ade20k has objects of `thing_classes` among less than {IGNORE} classes; thing_classes lists "
            f"{len(config.thing_classes)} of {len(config.class_names)} (without objects, use layout folder)"
        )
    folder = config.splits[split]
    image_source, images = _find(sources, "images", folder, IMAGE_SUFFIXES)
    if not images:
        raise ValueError(f"{image_source} has no images in images/{folder}/ (`splits` in params.yaml names it)")
    found = {top: _find(sources, top, folder, _SUFFIXES) for top in ("annotations", "annotations_instance")}
    for top, (source, labels) in found.items():
        for stem in sorted(images.keys() - labels.keys()):
            raise ValueError(f"{image_source.name}: {images[stem]} has no label {top}/{folder}/{stem}.png")
        for stem in sorted(labels.keys() - images.keys()):
            raise ValueError(f"{source.name}: {labels[stem]} has no image in images/{folder}/")
    (semantic_source, semantic), (object_source, objects) = found.values()
    return [
        Record(
            name=stem,
            image_file=f"{image_source.name}: {images[stem]}",
            label_file=f"{object_source.name}: {objects[stem]}",
            read=partial(
                _read,
                config,
                (image_source, images[stem]),
                (semantic_source, semantic[stem]),
                (object_source, objects[stem]),
            ),
        )
        for stem in sorted(images)
    ]


def _find(sources: Sequence[Path], top: str, folder: str, suffixes: tuple[str, ...]) -> tuple[Path, dict[str, str]]:
    """The source that holds the folder `top`, and its split's files by their names without suffix."""
    source, prefix, names = holder(sources, top, "ade20k")
    return source, by_stem(names, f"{prefix}{folder}/", suffixes, source)


_File = tuple[Path, str]
"""A source and the name of a file in it."""


def _read(config: DatasetConfig, image: _File, semantic: _File, objects: _File) -> Labelled:
    things = [class_id for class_id, name in enumerate(config.class_names) if name in config.thing_classes]
    label_map = _semantic(config, semantic)
    file = f"{objects[0].name}: {objects[1]}"
    colours = read_colours(read_file(*objects), file, config.max_pixels)
    if colours.shape[:2] != label_map.shape:
        sizes = [" x ".join(map(str, each.shape[:2])) for each in (colours, label_map)]
        raise ValueError(f"{file} is {sizes[0]} (height x width), but {semantic[0].name}: {semantic[1]} is {sizes[1]}")
    if colours.any() and (colours == colours[..., :1]).all():
        raise ValueError(
            f"{file} holds grey values; an object has its category as red and its number as green, as in "
            "annotations_instance.tar"
        )
    stuff = sorted({*np.unique(label_map).tolist()} - {*things, IGNORE})
    numbers = np.flatnonzero(np.bincount(colours[..., 1].ravel()))
    numbers = numbers[numbers > 0]
    classes = [*stuff, *(things[_category(colours, number, len(things), file) - 1] for number in numbers.tolist())]
    nothing = nothing_for(len(classes))
    dtype = np.uint8 if nothing == IGNORE else np.uint16
    of_stuff, of_number = np.full(IGNORE + 1, nothing, dtype), np.full(256, nothing, dtype)
    of_stuff[stuff] = range(len(stuff))
    of_number[numbers] = range(len(stuff), len(classes))
    segments = np.where(colours[..., 1] > 0, of_number[colours[..., 1]], of_stuff[label_map])
    return Labelled(read_file(*image), segments, tuple(classes), label_map=label_map)


def _semantic(config: DatasetConfig, semantic: _File) -> np.ndarray:
    """Classes of the semantic labels, (h, w) uint8: stored from 1 on, 0 is nothing."""
    file, classes = f"{semantic[0].name}: {semantic[1]}", len(config.class_names)

    def class_of(stored: int) -> int | None:
        return IGNORE if stored == 0 else stored - 1 if stored <= classes else None

    labels = read_labels(read_file(*semantic), file, config.max_pixels)
    return class_ids(labels, class_of, file, nothing=IGNORE, known=lambda _: f"which is no class: 0 to {classes}")


def _category(colours: np.ndarray, number: int, categories: int, file: str) -> int:
    """The category of an object, 1 to `categories`. ValueError unless it has one that there is."""
    red = np.unique(colours[..., 0][colours[..., 1] == number]).tolist()
    if len(red) > 1 or not 1 <= red[0] <= categories:
        raise ValueError(
            f"{file}: the object with green {number} has red {' and '.join(map(str, red))}; it must be one category, 1 "
            f"to {categories}"
        )
    category: int = red[0]
    return category
