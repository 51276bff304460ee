"""What somebody's labelled images are: layout, splits, classes and sizes, as far as the files say it themselves."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pipeline.data.archives import file_names, read_file
from pipeline.data.images.image_files import image_size
from pipeline.data.images.label_files import LABEL_SUFFIXES, read_colours, read_labels
from pipeline.data.records import IMAGE_SUFFIXES
from pipeline.params.schema import Task
from pipeline.params.sentences import error_shown
from pipeline.storage.progress import Progress

_LOOKED_AT = 200
"""Label files and images that are read, spread evenly over all."""

_MOST_COLOURS = 64
"""More are no classes, but a photograph."""

_MOST_IDS = 1000
"""Higher ones are no classes, but numbers of objects."""

_TRAIN = ("training", "train")
_VAL = ("validation", "val", "valid", "dev", "test", "testing")
"""Beginnings of the names of splits' folders and lists, those that are taken first first."""

_LAYOUTS = (
    "images/<split>/ with annotations/<split>/ (label maps), annotations/instances_<split>.json or "
    "annotations/panoptic_<split>.json (COCO), or ImageSets/Segmentation/<split>.txt (Pascal VOC)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnImages:
    """What was found."""

    layout: Literal["folder", "coco", "voc"]
    splits: dict[str, str]
    """Our names, train and val, and theirs."""
    task: Task
    class_names: tuple[str, ...]
    thing_classes: tuple[str, ...] = ()
    palette: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """Colour of every class, where label files hold colours."""
    named: bool
    """Whether the files name the classes; otherwise names are class_0, class_1 and so on."""
    label_suffix: str = ""
    """What names of label files have after their images'."""
    most_objects: int = 0
    """In one training image; 0: unknown."""
    annotation_files: dict[str, str] = field(default_factory=dict)
    """COCO: names other than COCO's own."""
    size: tuple[int, int]
    """(height, width): medians."""
    read: str
    """Which files it was found in."""


def look(source: Path) -> OwnImages:
    """Find out what a folder or archive holds. ValueError says what is missing, which file cannot be read, or which
    data sets there are, if there are several."""
    if not source.exists():
        raise ValueError(f"{source} does not exist; name a folder or archive of images and labels")
    names = file_names(source)
    coco, voc, maps = _coco_files(names), _voc_tops(names), _label_maps(names)
    sets = [
        *coco.sets,
        *(f"{top}ImageSets/Segmentation/" for top in voc),
        *(f"{top}annotations/<split>/" for top, files in maps.items() if files.images.keys() & files.labels.keys()),
    ]
    if len(sets) > 1:
        raise ValueError(
            f"{source} holds several data sets: {', '.join(sets[:4])}; leave one of them there, or name a folder "
            "that holds one alone"
        )
    if coco.files:
        return _coco(source, coco)
    return _voc(source, names) if voc else _folder(source, maps)


# Label maps


@dataclass(frozen=True, slots=True)
class _LabelMaps:
    """Files below images/<split>/ and annotations/<split>/, by split."""

    images: dict[str, list[str]] = field(default_factory=dict)
    labels: dict[str, list[str]] = field(default_factory=dict)


def _label_maps(names: Iterable[str]) -> dict[str, _LabelMaps]:
    """By the folder that they lie in, with its slash: "" or a top folder."""
    found: dict[str, _LabelMaps] = {}
    for name in names:
        if not (match := re.match(r"((?:[^/]+/)?)(images|annotations)/([^/]+)/.", name)):
            continue
        suffix = PurePosixPath(name).suffix.lower()
        if suffix in (IMAGE_SUFFIXES if match[2] == "images" else LABEL_SUFFIXES):
            files = found.setdefault(match[1], _LabelMaps())
            by_split = files.images if match[2] == "images" else files.labels
            by_split.setdefault(match[3], []).append(name)
    return found


def _folder(source: Path, found: Mapping[str, _LabelMaps]) -> OwnImages:
    """images/<split>/ with annotations/<split>/, also below one folder."""
    fullest = max(
        found.values(), key=lambda files: len(files.images.keys() & files.labels.keys()), default=_LabelMaps()
    )
    images, labels = fullest.images, fullest.labels
    if not images or not labels:
        raise ValueError(f"{source} has {_lacking(found.values())}, which are {_LAYOUTS}")
    splits = _splits(images.keys() & labels.keys(), f"{source}: folders in both images/ and annotations/")
    return _of_label_maps(
        source,
        "folder",
        splits,
        images=[name for folder in splits.values() for name in images[folder]],
        labels=[name for folder in splits.values() for name in labels[folder]],
    )


_VOC_LIST = re.compile(r"((?:.*/)?)ImageSets/Segmentation/([^/]+)\.txt")


def _voc_tops(names: Iterable[str]) -> list[str]:
    """The folders that hold ImageSets/, with their slashes."""
    return sorted({match[1] for name in names if (match := _VOC_LIST.fullmatch(name))})


def _voc(source: Path, names: Sequence[str]) -> OwnImages:
    lists = [match[2] for name in names if (match := _VOC_LIST.fullmatch(name))]
    splits = _splits(lists, f"{source}: lists in ImageSets/Segmentation/")
    images = [name for name in names if re.search(r"(^|/)JPEGImages/", name)]
    labels = [name for name in names if re.search(r"(^|/)SegmentationClass/", name)]
    return _of_label_maps(source, "voc", splits, images=images, labels=labels)


def _lacking(found: Collection[_LabelMaps]) -> str:
    """What keeps a source from being label maps, or anything else."""
    images, labels = any(files.images for files in found), any(files.labels for files in found)
    if labels and not images:
        half = "label files in annotations/<split>/ without images in images/<split>/: "
    elif images and not labels:
        half = "images in images/<split>/ without label files in annotations/<split>/: "
    else:
        half = ""
    return f"{half}no layout that is known"


def _of_label_maps(
    source: Path, layout: Literal["folder", "voc"], splits: dict[str, str], *, images: list[str], labels: list[str]
) -> OwnImages:
    if not labels or not images:
        raise ValueError(f"{source} has no {'label files' if images else 'images'} for {' and '.join(splits.values())}")
    sample = _spread(labels)
    progress = Progress("looking at labels", len(sample), unit="files")
    ids, colours = set[int](), set[tuple[int, int, int]]()
    for name in sample:
        found = _values(source, name)
        ids |= {value for value in found if isinstance(value, int)}
        colours |= {value for value in found if isinstance(value, tuple)}
        if len(colours) > _MOST_COLOURS:
            raise ValueError(
                f"{source.name}: {name} has more than {_MOST_COLOURS} colours; a label file has one a class"
            )
        progress.add()
    progress.done(brief=True)
    if colours and ids - {0, 255}:
        raise ValueError(f"{source.name}: some label files hold colours and some class ids; give all the same sort")
    if colours or ids == {0, 255}:
        colours |= {(value, value, value) for value in ids}
        palette = {f"class_{place}": colour for place, colour in enumerate(sorted(colours))}
        class_names = tuple(palette)
    else:
        palette, class_names = {}, tuple(f"class_{place}" for place in range(max(ids - {255}, default=-1) + 1))
    if len(class_names) > _MOST_IDS:
        raise ValueError(f"{source.name}: a label file holds the id {max(ids)}; label files are to hold class ids")
    if len(class_names) < 2:
        raise ValueError(f"{source}: its labels hold {_said(ids)} alone; two classes are needed to train")
    return OwnImages(
        layout=layout,
        splits=splits,
        task="semantic",
        class_names=class_names,
        palette=palette,
        named=False,
        label_suffix=_label_suffix(images, labels),
        size=_median([image_size(read_file(source, name), f"{source.name}: {name}") for name in _spread(images)]),
        read=f"{len(sample)} of {len(labels)} label files",
    )


def _label_suffix(images: Sequence[str], labels: Sequence[str]) -> str:
    """_L for a.jpg and a_L.png; empty: label files are called as their images, or otherwise altogether."""
    stems = {PurePosixPath(name).stem for name in labels}
    first = min(PurePosixPath(name).stem for name in images)
    endings = {stem.removeprefix(first) for stem in stems if stem.startswith(first)}
    return endings.pop() if len(endings) == 1 else ""


def _values(source: Path, name: str) -> set[int | tuple[int, int, int]]:
    """Ids of a label file, or its colours."""
    import numpy as np

    file, data = f"{source.name}: {name}", read_file(source, name)
    try:
        return {int(value) for value in np.unique(read_labels(data, file))}
    except ValueError as error:
        if "holds colours" not in str(error):  # a type of its own would change the digests of all shards
            raise
    pixels = np.unique(read_colours(data, file).reshape(-1, 3), axis=0)
    return {(int(red), int(green), int(blue)) for red, green, blue in pixels}


def _said(ids: set[int]) -> str:
    return f"the id {next(iter(ids))}" if len(ids) == 1 else f"the ids {', '.join(map(str, sorted(ids)))}"


# COCO


@dataclass(frozen=True, slots=True)
class _CocoFiles:
    """Annotation files."""

    files: dict[str, dict[str, str]] = field(default_factory=dict)
    """By sort of annotation, the files of its splits."""
    other_names: dict[str, str] = field(default_factory=dict)
    """Names other than COCO's own."""
    sets: list[str] = field(default_factory=list)
    """A file of every data set: several, if there are several of the same sort and split."""


def _coco_files(names: Sequence[str]) -> _CocoFiles:
    """annotations/{instances,panoptic}_<split>.json, or <split>/_annotations.coco.json, also below one folder."""
    for pattern, other_names in (
        (r"(?:[^/]+/)?annotations/(?P<sort>instances|panoptic)_(?P<split>[^/]+)\.json", {}),
        (r"(?:[^/]+/)?(?P<split>[^/]+)/_annotations\.coco\.json", {"instances": "{folder}/_annotations.coco.json"}),
    ):
        alike: dict[tuple[str, str], list[str]] = {}
        for name in names:
            if match := re.fullmatch(pattern, name):
                parts = match.groupdict()
                alike.setdefault((parts.get("sort", "instances"), parts["split"]), []).append(name)
        if alike:
            found = _CocoFiles({}, other_names, max(alike.values(), key=len))
            for (sort, split), (first, *_) in alike.items():
                found.files.setdefault(sort, {})[split] = first
            return found
    return _CocoFiles()


def _coco(source: Path, found: _CocoFiles) -> OwnImages:
    """A data set with COCO's annotation files."""
    files = found.files
    common = set.intersection(*({*by_split} for by_split in files.values()))
    splits = _splits(common, f"{source}: annotation files")
    trees = {sort: _json(source, by_split[splits["train"]]) for sort, by_split in files.items()}
    try:
        return _of_coco(source, splits, trees, found.other_names)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{source}: its annotation files do not hold COCO's categories, images and annotations "
            f"({type(error).__name__}: {error_shown(error)})"
        ) from None


def _of_coco(source: Path, splits: dict[str, str], trees: dict[str, Any], other_names: dict[str, str]) -> OwnImages:
    categories = {
        str(each["name"]): bool(each.get("isthing", sort == "instances"))
        for sort, tree in trees.items()
        for each in sorted(tree["categories"], key=lambda each: each["id"])
    }
    counts = dict[object, int]()
    for each in trees.get("instances", {}).get("annotations", ()):
        counts[each["image_id"]] = counts.get(each["image_id"], 0) + 1
    for each in trees.get("panoptic", {}).get("annotations", ()):
        counts[each["image_id"]] = max(counts.get(each["image_id"], 0), len(each["segments_info"]))
    images = next(iter(trees.values()))["images"]
    return OwnImages(
        layout="coco",
        splits=splits,
        task="panoptic" if "panoptic" in trees else "instance",
        class_names=tuple(categories),
        thing_classes=tuple(name for name, thing in categories.items() if thing),
        named=True,
        most_objects=max(counts.values(), default=0),
        annotation_files=other_names,
        size=_median([(int(each["height"]), int(each["width"])) for each in images]),
        read=f"the annotation files of {splits['train']}",
    )


def _json(source: Path, name: str) -> Any:
    try:
        return json.loads(read_file(source, name))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source.name}: {name} is not JSON ({error_shown(error)})") from None


# Both


def _splits(found: Iterable[str], what: str) -> dict[str, str]:
    """Which of the folders or lists is for training and which for validation. ValueError where that cannot be told."""
    names = sorted(found)
    train, val = _beginning(names, _TRAIN), _beginning(names, _VAL)
    if train is None or val is None:
        lacking = " and ".join(split for split, name in (("training", train), ("validation", val)) if name is None)
        raise ValueError(
            f"{what} are {', '.join(names) or 'none'}, none of them for {lacking}; call them training and validation"
        )
    return {"train": train, "val": val}


def _beginning(names: Sequence[str], words: Sequence[str]) -> str | None:
    fit = ((word, name) for word in words for name in names if name.lower().startswith(word) and "trainval" not in name)
    return next((name for _, name in fit), None)


def _spread(names: Sequence[str]) -> list[str]:
    """At most so many, from the first to the last."""
    count = min(_LOOKED_AT, len(names))
    return [names[place * len(names) // count] for place in range(count)]


def _median(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    heights, widths = zip(*sizes, strict=True)
    return int(statistics.median(heights)), int(statistics.median(widths))
