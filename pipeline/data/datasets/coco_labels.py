"""The labels of one picture in COCO's format: its annotations, which stay text until they are read, and its PNG."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.data.archives import read_file
from pipeline.data.images.codecs import nothing_for
from pipeline.data.images.image_files import ImageReading, image_size, turned_hint
from pipeline.data.images.label_files import read_colours
from pipeline.data.images.masks import OUTSIDE, Extent, mask_extent, run_lengths
from pipeline.data.records import Instance, Labelled
from pipeline.params.sentences import shown

if TYPE_CHECKING:
    import numpy as np

_FLAGS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
"""Forms of 0 and 1 as text, in lower case."""

_LARGEST = 1e9
"""Numbers of a box beyond this are no pixels."""

_LARGEST_ID = 256**3 - 1


class Place(NamedTuple):
    """A source and the name of a file in it."""

    source: Path
    name: str

    def __str__(self) -> str:
        return f"{self.source.name}: {self.name}"


class Categories(NamedTuple):
    """What an annotation file's categories are in the dataset, by id."""

    classes: dict[int, int]
    """Class ids."""
    left_out: dict[int, str]
    """Names of those that `class_names` leaves out."""


class Objects(NamedTuple):
    """A picture's part of an instance listing."""

    file: str
    """Archive and name, for messages."""
    categories: Categories
    text: str
    """JSON of its annotations, with commas between them."""


class Panoptic(NamedTuple):
    """A picture's part of a panoptic listing."""

    file: str
    categories: Categories
    text: str
    """JSON of its one annotation."""
    map: Place
    """Its PNG of segment ids."""


def read_labelled(
    image: Place,
    size: tuple[int, int],
    lister: str,
    panoptic: Panoptic | None,
    objects: Objects | None,
    reading: ImageReading,
) -> Labelled:
    """A picture of `size` (height, width) with its labels. ValueError names the file that is wrong."""
    data = read_file(*image)
    found = image_size(data, str(image), reading)
    if found != size:
        raise ValueError(
            f"{image} is {found[0]} x {found[1]} (height x width), but {lister} says {size[0]} x {size[1]}"
            f"{turned_hint(found, size, reading.exif)}"
        )
    instances, left_out = (None, set[str]()) if objects is None else _instances(objects, size)
    if panoptic is None:
        return Labelled(data, None, None, instances=instances, left_out=tuple(sorted(left_out)), size=size)
    infos, others = _segment_infos(panoptic)
    segments = _segments(panoptic, infos, size, reading.max_pixels)
    return Labelled(data, *segments, instances, tuple(sorted(left_out | others)), size)


# Values of annotations. A ValueError gives the reason only.


def whole(entry: Mapping[str, Any], key: str) -> int:
    """A whole number of an entry."""
    value = _given(entry, key)
    if type(value) is float and value.is_integer():
        return int(value)
    if type(value) is not int:  # a bool is none here
        hint = ", without quotes" if isinstance(value, str) else ""
        raise ValueError(f"its {key} is {shown(value)}; it must be a whole number{hint}")
    return value


def picture_id(entry: Mapping[str, Any], key: str) -> int | str:
    """A picture's id of an entry: a whole number, or text that is none (Mapillary Vistas)."""
    value = entry.get(key)
    return (
        words(entry, key) if isinstance(value, str) and not value.strip().lstrip("+-").isdigit() else whole(entry, key)
    )


def words(entry: Mapping[str, Any], key: str) -> str:
    """A text of an entry."""
    value = _given(entry, key)
    if not isinstance(value, str) or not value or _has_surrogate(value):
        raise ValueError(f"its {key} is {shown(value)}; it must be text")
    return value


def _has_surrogate(value: str) -> bool:
    """Whether a text holds half of a UTF-16 pair, which no file's name and no terminal can show."""
    return any("\ud800" <= character <= "\udfff" for character in value)


def flag(entry: Mapping[str, Any], key: str, *, default: bool) -> bool:
    """A 0 or 1 of an entry, as number or text."""
    value = entry.get(key, default)
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in _FLAGS:
        return _FLAGS[value.strip().lower()]
    raise ValueError(f"its {key} is {shown(value)}; it must be 0 or 1")


def _given(entry: Mapping[str, Any], key: str) -> Any:
    if key not in entry:
        raise ValueError(f"it has no {key}")
    return entry[key]


# Instances


def _instances(objects: Objects, size: tuple[int, int]) -> tuple[tuple[Instance, ...], set[str]]:
    """The instances of a picture, and the categories of those that are left out."""
    found, left_out = [], set[str]()
    for place, entry in enumerate(json.loads(f"[{objects.text}]"), 1):
        name = f"annotation {shown(entry['id'])}" if "id" in entry else f"annotation {place} of its image"
        try:
            category = whole(entry, "category_id")
            if category in objects.categories.left_out:
                left_out.add(objects.categories.left_out[category])
            else:
                found.append(_instance(entry, objects.categories, size)._replace(name=name))
        except ValueError as error:
            raise ValueError(f"{objects.file}: {name}: {error}") from None
    return tuple(found), left_out


def _instance(entry: Mapping[str, Any], categories: Categories, size: tuple[int, int]) -> Instance:
    """An annotation as instance. ValueError gives the reason only."""
    counts = run_lengths(_given(entry, "segmentation"), size)
    extent = mask_extent(counts, size)
    return Instance(
        class_id=_class_of(entry, categories),
        box=_box_of(entry, extent),
        area=_area_of(entry, extent, size),
        crowd=flag(entry, "iscrowd", default=False),  # pycocotools too does without
        counts=counts,
    )


def _class_of(entry: Mapping[str, Any], categories: Categories) -> int:
    category = whole(entry, "category_id")
    if category not in categories.classes:
        raise ValueError(f"category_id {category} is not among its `categories`")
    return categories.classes[category]


def _box_of(entry: Mapping[str, Any], extent: Extent) -> tuple[float, float, float, float]:
    """The annotated box, (x1, y1, x2, y2), or, where that cannot be the object's, its mask's.

    COCO's boxes have hundredths of pixels, and the published rules are on them. A box cannot be the object's where it
    is missing, not finite or without width or height, or where the middle of the mask's box is outside (it may be in
    other units). That of an object without pixels stays as it is: there is no other.
    """
    annotated = entry.get("bbox") or []
    if not (_are_numbers(annotated) and len(annotated) in (0, 4)):
        raise ValueError(f"its bbox is {shown(annotated)}; it must be four numbers: x, y, width, height")
    if not annotated or not all(-_LARGEST < value < _LARGEST for value in annotated):  # NaN is not
        return extent.box
    left, top, width, height = annotated
    box = (float(left), float(top), float(left + width), float(top + height))
    if not extent.pixels:
        return box if min(width, height) >= 0 else extent.box
    x, y = ((low + high) / 2 for low, high in zip(extent.box[:2], extent.box[2:], strict=True))
    holds = box[0] - OUTSIDE <= x <= box[2] + OUTSIDE and box[1] - OUTSIDE <= y <= box[3] + OUTSIDE
    return box if min(width, height) > 0 and holds else extent.box


def _area_of(entry: Mapping[str, Any], extent: Extent, size: tuple[int, int]) -> float:
    """The annotated area or, where it is missing, not above 0 or larger than the picture, the mask's pixels."""
    annotated = 0 if entry.get("area") is None else entry["area"]
    if not _are_numbers([annotated]):
        raise ValueError(f"its area is {shown(annotated)}; it must be a number of pixels")
    largest = (size[0] + 2 * OUTSIDE) * (size[1] + 2 * OUTSIDE)
    return float(annotated) if 0 < annotated <= largest else float(extent.pixels)


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) in (int, float) for value in values)


# Segments


class _Segment(NamedTuple):
    """What a panoptic annotation says of one segment."""

    id: int
    class_id: int | None
    """None: its category is left out."""
    crowd: bool


def _segment_infos(panoptic: Panoptic) -> tuple[list[_Segment], set[str]]:
    """The segments of a picture, and the categories of those that are left out."""
    infos = json.loads(panoptic.text)["segments_info"]
    if not isinstance(infos, list) or not all(isinstance(info, dict) for info in infos):
        raise ValueError(
            f"{panoptic.file}: segments_info of {panoptic.map} is {shown(infos)}; it must be a list of {{}}"
        )
    found, left_out = [], set[str]()
    for place, info in enumerate(infos, 1):
        try:
            identity, category = whole(info, "id"), whole(info, "category_id")
            if not 0 <= identity <= _LARGEST_ID:
                raise ValueError(f"its id is {identity}; it must be R + 256 G + 65536 B of the PNG")
            if category in panoptic.categories.left_out:
                left_out.add(panoptic.categories.left_out[category])
                class_id = None
            else:
                class_id = _class_of(info, panoptic.categories)
            found.append(_Segment(identity, class_id, flag(info, "iscrowd", default=False)))
        except ValueError as error:
            raise ValueError(f"{panoptic.file}: segments_info of {panoptic.map}: segment {place}: {error}") from None
    return found, left_out


def _segments(
    panoptic: Panoptic, infos: Sequence[_Segment], size: tuple[int, int], max_pixels: int
) -> tuple[np.ndarray, tuple[int, ...], tuple[bool, ...]]:
    """Segment indices (h, w) in the order of `segments_info`, with class and crowd flag of each. Pixels of segments
    that are left out belong to nothing.

    The PNG's ids are R + 256 G + 65536 B; 0 is nothing (COCO's panoptic format).
    """
    import numpy as np

    file = str(panoptic.map)
    known = np.array([0, *(info.id for info in infos)], np.int64)
    colours = read_colours(read_file(*panoptic.map), file, max_pixels)
    if colours.shape[:2] != size:
        raise ValueError(
            f"{file} is {colours.shape[0]} x {colours.shape[1]} (height x width), but {panoptic.file} says "
            f"{size[0]} x {size[1]}"
        )
    ids = colours.astype(np.int32) @ np.array([1, 256, 65536], np.int32)
    order = np.argsort(known, kind="stable")
    if (np.diff(known[order]) == 0).any():
        raise ValueError(f"{panoptic.file}: segments_info of {file} holds an id twice, or 0, which is nothing")
    place = np.minimum(np.searchsorted(known[order], ids), len(known) - 1)
    wrong = ids[known[order][place] != ids]
    if len(wrong):
        raise ValueError(
            f"{file} holds id {wrong[0]} on {(wrong == wrong[0]).sum()} pixels, which segments_info in "
            f"{panoptic.file} does not list"
        )
    index = order[place] - 1  # -1: nothing
    empty = np.flatnonzero(np.bincount(index.ravel() + 1, minlength=len(known))[1:] == 0)
    if len(empty):
        raise ValueError(f"{file} has no pixel of segment {known[1 + empty[0]]}, which {panoptic.file} lists")
    kept = [(place, info.class_id, info.crowd) for place, info in enumerate(infos) if info.class_id is not None]
    if len(kept) < len(infos):
        number = np.full(len(infos) + 1, -1)  # the last one is read through -1
        number[[place for place, _, _ in kept]] = range(len(kept))
        index = number[index]
    index[index < 0] = nothing_for(len(kept))
    crowd = tuple(crowd for _, _, crowd in kept)
    return index, tuple(class_id for _, class_id, _ in kept), crowd if any(crowd) else ()
