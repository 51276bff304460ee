"""COCO's layout: <folder>/*.jpg, annotations/{instances,panoptic}_<folder>.json, annotations/panoptic_<folder>/*.png.

One kind of annotation is enough; with both a record carries both. Everything may be spread over several archives or
folders, as COCO publishes it, and lie below a single top folder in each. The panoptic PNGs may also be in
annotations/panoptic_<folder>.zip: COCO publishes an archive of archives.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.data.archives import file_names, read_file
from pipeline.data.images.codecs import IGNORE, IGNORE_WIDE
from pipeline.data.images.files import image_size, read_colours
from pipeline.data.images.masks import check_run_lengths
from pipeline.data.records import Instance, Labelled, Record

if TYPE_CHECKING:
    import numpy as np

    from pipeline.params.schema import DatasetConfig

POLYGON_NUMBERS = 6
"""A polygon of fewer numbers (three points) covers no pixel; pycocotools would take four numbers for a box."""


class _Place(NamedTuple):
    """A source and the name of a file in it."""

    source: Path
    name: str

    def __str__(self) -> str:
        return f"{self.source.name}: {self.name}"


class _Listing(NamedTuple):
    """One annotation file, by picture id. Annotations stay text until their picture is read: parsed, COCO's 860,000
    take many times the memory, and a record is sent to other processes."""

    file: str
    """Archive and name, for messages."""
    classes: dict[int, int]
    """Class by category id."""
    images: dict[int, tuple[str, int, int]]
    """File name, height, width."""
    annotations: dict[int, list[str]]
    maps: dict[int, str]
    """File name of the panoptic PNG; empty for instances."""


class _Objects(NamedTuple):
    """A picture's part of an instance listing."""

    file: str
    classes: dict[int, int]
    text: str
    """JSON of its annotations, with commas between them."""


class _Panoptic(NamedTuple):
    """A picture's part of a panoptic listing."""

    file: str
    classes: dict[int, int]
    text: str
    """JSON of its one annotation."""
    map: _Place
    """Its PNG of segment ids."""


def records(config: DatasetConfig, sources: Sequence[Path], split: str) -> list[Record]:
    """One record per entry of the annotation files' `images`, by id; files that they do not list are left alone.

    Where several sources hold the same file, the first is read. A picture that only the panoptic file lists has no
    instances of its own. ValueError names the first file that is missing, category that is not among `class_names`,
    or disagreement with `thing_classes` or between the two annotation files.
    """
    folder = config.splits[split]
    listed = {source: file_names(source) for source in sources}
    files = _files(listed, "annotations")
    names = [f"{label_type}_{folder}.json" for label_type in ("panoptic", "instances")]
    panoptic, instances = (_listing(*files[name], config) if name in files else None for name in names)
    listings = [listing for listing in (panoptic, instances) if listing is not None]
    if not listings:
        raise ValueError(
            f"split {split} has neither annotations/{names[0]} nor annotations/{names[1]} in "
            f"{', '.join(source.name for source in sources) or 'any source: none is listed'} "
            "(`splits` in params.yaml names the folders; leave out a split that is not there)"
        )
    images = _files(listed, folder)
    maps = _files(listed, f"annotations/panoptic_{folder}")
    if not maps and f"panoptic_{folder}.zip" in files:
        inner = Path(*files[f"panoptic_{folder}.zip"])
        maps = _files({inner: file_names(inner)}, f"panoptic_{folder}")
    found: dict[str, Record] = {}
    for identity in sorted({identity for listing in listings for identity in listing.images}):
        entries = {listing.file: listing.images[identity] for listing in listings if identity in listing.images}
        lister, (file_name, height, width) = next(iter(entries.items()))
        if len(set(entries.values())) > 1:
            said = " and ".join(f"{file} has {' '.join(map(str, entry))}" for file, entry in entries.items())
            raise ValueError(f"picture {identity} differs (name, height, width): {said}")
        if file_name not in images:
            raise ValueError(f"{lister} lists {file_name}, but no source has {folder}/{file_name}")
        name = file_name.rpartition(".")[0] or file_name
        if name in found:
            raise ValueError(f"{lister} lists two pictures called {name}; keep one of them")
        segments = objects = None
        if instances is not None and identity in instances.images:
            text = ",".join(instances.annotations.pop(identity, []))
            objects = _Objects(instances.file, instances.classes, text)
        if panoptic is not None and identity in panoptic.images:
            segments = _panoptic(panoptic, identity, maps, folder)
        label_files = [*([str(segments.map)] if segments else []), *([objects.file] if objects else [])]
        found[name] = Record(
            name=name,
            image_file=str(images[file_name]),
            label_file=" and ".join(label_files),
            read=partial(_read, images[file_name], (height, width), lister, segments, objects),
        )
    if not found:
        raise ValueError(f"{listings[0].file} lists no pictures")
    return list(found.values())


def _files(listed: Mapping[Path, Sequence[str]], folder: str) -> dict[str, _Place]:
    """Files below `folder`, which may be in a top folder, in all sources: by their path below it."""
    pattern = re.compile(rf"(?:[^/]+/)?{re.escape(folder)}/(.+)")
    found: dict[str, _Place] = {}
    for source, names in listed.items():
        for name in names:
            if match := pattern.fullmatch(name):
                found.setdefault(match[1], _Place(source, name))
    return found


def _panoptic(listing: _Listing, identity: int, maps: Mapping[str, _Place], folder: str) -> _Panoptic:
    """What a record needs of a panoptic listing."""
    file_name = listing.images[identity][0]
    texts = listing.annotations.pop(identity, [])
    if len(texts) != 1 or identity not in listing.maps:
        raise ValueError(
            f"{listing.file} has {len(texts)} annotations of {file_name}; panoptic pictures have one with segments_info"
        )
    png = listing.maps[identity]
    if png not in maps:
        raise ValueError(f"{listing.file} lists {png}, but no source has annotations/panoptic_{folder}/{png}")
    return _Panoptic(listing.file, listing.classes, texts[0], maps[png])


# Annotation files


def _listing(source: Path, name: str, config: DatasetConfig) -> _Listing:
    """An annotation file, instances or panoptic. ValueError says what is wrong with it."""
    listing = _Listing(f"{source.name}: {name}", {}, {}, defaultdict(list), {})
    categories: list[tuple[int, str, bool]] = []
    try:
        text = read_file(source, name).decode("utf-8-sig")
        for key, entry, entry_text in _elements(text):
            if key == "categories":
                # the categories of instances do not say so, but all are things
                categories.append((entry["id"], entry["name"], bool(entry.get("isthing", True))))
            elif key == "images":
                if not isinstance(entry["id"], int):
                    raise TypeError(f"id {entry['id']!r} is not a number")
                if entry["id"] in listing.images:
                    raise ValueError(f"{listing.file} lists two pictures with id {entry['id']}")
                listing.images[entry["id"]] = (entry["file_name"], entry["height"], entry["width"])
            elif key == "annotations":
                listing.annotations[entry["image_id"]].append(entry_text)
                if "segments_info" in entry:
                    listing.maps[entry["image_id"]] = entry["file_name"]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{listing.file} is not JSON ({error}); fetch or copy it again") from None
    except (KeyError, TypeError) as error:
        raise ValueError(f"{listing.file} is not as COCO writes it: {key}, {error!r}") from None
    listing.classes.update(_classes(categories, listing.file, config))
    unknown = listing.annotations.keys() - listing.images.keys()
    if unknown:
        raise ValueError(f"{listing.file} has annotations of picture {min(unknown)}, which its `images` do not list")
    return listing


def _elements(text: str) -> Iterator[tuple[str, Any, str]]:
    """Every element of the lists in a JSON object: key of the list, element, the element's own text.

    One at a time: the whole of COCO's instances would be gigabytes of Python objects.
    """
    decode, space = json.JSONDecoder().raw_decode, re.compile(r"[ \t\n\r]*")

    def skip(at: int) -> int:
        blank = space.match(text, at)
        return blank.end() if blank else at

    def past(at: int, marks: str) -> tuple[str, int]:
        """The mark that comes next, and where the token after it begins."""
        at = skip(at)
        if text[at : at + 1] not in tuple(marks):
            raise json.JSONDecodeError(f"Expecting {' or '.join(marks)}", text, at)
        return text[at], skip(at + 1)

    mark, at = past(0, "{")
    while mark != "}":
        key, at = decode(text, at)
        at = past(at, ":")[1]
        if not text.startswith("[", at):
            at = decode(text, at)[1]
        else:
            mark, at = past(at, "[")
            if text.startswith("]", at):
                mark, at = past(at, "]")
            while mark != "]":
                start = at
                entry, at = decode(text, start)
                yield key, entry, text[start:at]
                mark, at = past(at, ",]")
        mark, at = past(at, ",}")


def _classes(categories: Sequence[tuple[int, str, bool]], file: str, config: DatasetConfig) -> dict[int, int]:
    """Class by category id, from id, name and thing flag of every category. A class without category is fine."""
    for _, name, thing in categories:
        if name not in config.class_names:
            raise ValueError(f"{file} has the category {name!r}, which is not among class_names")
        if thing != (name in config.thing_classes):
            raise ValueError(
                f"{file} has {name!r} as a {'thing' if thing else 'stuff'} category, but thing_classes in params.yaml "
                f"{'does not list' if thing else 'lists'} it"
            )
    return {identity: config.class_names.index(name) for identity, name, _ in categories}


# One picture


def _read(
    image: _Place, size: tuple[int, int], lister: str, panoptic: _Panoptic | None, objects: _Objects | None
) -> Labelled:
    """A picture of `size` (height, width) with its labels."""
    data = read_file(*image)
    found = image_size(data, str(image))
    if found != size:
        raise ValueError(
            f"{image} is {found[0]} x {found[1]} (height x width), but {lister} says {size[0]} x {size[1]}"
        )
    instances = None if objects is None else _instances(objects, size)
    if panoptic is None:
        return Labelled(data, None, None, instances=instances)
    return Labelled(data, *_segments(panoptic, size), instances)


def _instances(objects: _Objects, size: tuple[int, int]) -> tuple[Instance, ...]:
    found = []
    for entry in json.loads(f"[{objects.text}]"):
        try:
            left, top, width, height = entry["bbox"]
            found.append(
                Instance(
                    class_id=_class_of(entry, objects.classes),
                    box=(float(left), float(top), float(left + width), float(top + height)),
                    area=float(entry["area"]),
                    crowd=bool(entry.get("iscrowd", 0)),  # pycocotools too does without
                    counts=run_lengths(entry["segmentation"], size),
                )
            )
        except KeyError as error:
            raise ValueError(f"{objects.file}: annotation {entry.get('id')} has no {error.args[0]}") from None
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{objects.file}: annotation {entry.get('id')}: {error}") from None
    return tuple(found)


def _class_of(entry: Mapping[str, Any], classes: Mapping[int, int]) -> int:
    if entry["category_id"] not in classes:
        raise ValueError(f"category_id {entry['category_id']} is not among its `categories`")
    return classes[entry["category_id"]]


def run_lengths(segmentation: Any, size: tuple[int, int]) -> bytes:
    """COCO's `segmentation` as pycocotools' compressed run lengths at `size` (height, width).

    A list of polygons [x, y, x, y, ...], a dict with run lengths as a list, or one with compressed run lengths.
    Polygons of fewer than three points cover nothing. Where there are no others, the mask is empty: nothing to train
    on, but still an annotated object that a detector misses. ValueError gives the reason only.
    """
    from pycocotools import mask

    height, width = size
    if isinstance(segmentation, list) and all(isinstance(polygon, list) for polygon in segmentation):
        polygons = [polygon for polygon in segmentation if len(polygon) >= POLYGON_NUMBERS]
        if polygons:
            return bytes(mask.merge(mask.frPyObjects(polygons, height, width))["counts"])
        segmentation = {"size": [height, width], "counts": [height * width]}
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise ValueError("its segmentation is neither a list of polygons nor run lengths with size and counts")
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(
            f"its run lengths are for {' x '.join(map(str, segmentation['size']))} (height x width), "
            f"its picture is {height} x {width}"
        )
    counts = segmentation["counts"]
    if isinstance(counts, list):
        counts = mask.frPyObjects(segmentation, height, width)["counts"]
    counts = counts.encode() if isinstance(counts, str) else bytes(counts)
    check_run_lengths(counts, size)
    return counts


def _segments(panoptic: _Panoptic, size: tuple[int, int]) -> tuple[np.ndarray, tuple[int, ...], tuple[bool, ...]]:
    """Segment indices (h, w) in the order of `segments_info`, with class and crowd flag of each.

    The PNG's ids are R + 256 G + 65536 B; 0 is nothing (COCO's panoptic format).
    """
    import numpy as np

    file = str(panoptic.map)
    try:
        infos = json.loads(panoptic.text)["segments_info"]
        known = np.array([0, *(info["id"] for info in infos)], np.int64)
        classes = tuple(_class_of(info, panoptic.classes) for info in infos)
        crowd = tuple(bool(info.get("iscrowd", 0)) for info in infos)
    except KeyError as error:
        raise ValueError(f"{panoptic.file}: a segment of {file} has no {error.args[0]}") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{panoptic.file}: segments_info of {file}: {error}") from None
    colours = read_colours(read_file(*panoptic.map), file)
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
    index[index < 0] = IGNORE if len(classes) <= IGNORE else IGNORE_WIDE
    return index, classes, crowd if any(crowd) else ()
