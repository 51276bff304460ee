"""COCO's layout: <folder>/*.jpg, annotations/{instances,panoptic}_<folder>.json, annotations/panoptic_<folder>/*.png.

`annotation_files` gives other names. One kind of annotation is enough; with both a record carries both. Everything may
be spread over several archives or folders, as COCO publishes it, and lie below a single top folder in each. The
panoptic PNGs may also be in annotations/panoptic_<folder>.zip: COCO publishes an archive of archives.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.data.archives import file_names, plain_name, read_file
from pipeline.data.datasets.coco_labels import (
    Categories,
    Objects,
    Panoptic,
    Place,
    flag,
    picture_id,
    read_labelled,
    whole,
    words,
)
from pipeline.data.images.image_files import ImageReading
from pipeline.data.records import Record
from pipeline.params.sentences import error_shown, shown

if TYPE_CHECKING:
    from pipeline.params.schema import DatasetConfig


_LISTS = ("categories", "images", "annotations")
"""What an annotation file must hold."""

_ALIKE = 0.85
"""How alike (difflib's ratio) names of a category and a class are that are meant to be the same."""


class _Listing(NamedTuple):
    """One annotation file, by picture id. Annotations stay text until their picture is read: parsed, COCO's 860,000
    take many times the memory, and a record is sent to other processes."""

    file: str
    """Archive and name, for messages."""
    categories: Categories
    images: dict[int | str, tuple[str, int, int]]
    """File name, height, width."""
    annotations: dict[int | str, list[str]]
    maps: dict[int | str, str]
    """File name of the panoptic PNG; empty for instances."""


def records(config: DatasetConfig, sources: Sequence[Path], split: str) -> list[Record]:
    """One record per entry of the annotation files' `images`, by id; files that they do not list are left alone.

    Where several sources hold the same file, the first is read. A picture that only the panoptic file lists has no
    instances of its own. ValueError names the first file that is missing, what no annotation file may hold, or a
    disagreement with `thing_classes` or between the two annotation files.
    """
    folder = config.splits[split]
    listed = {source: file_names(source) for source in sources}
    panoptic, instances = _listings(config, listed, split)
    listings = [listing for listing in (panoptic, instances) if listing is not None]
    _check_some_classes(listings)
    images = _files(listed, folder)
    maps_folder = config.annotation_path("panoptic_maps", split)
    maps = _files(listed, maps_folder)
    if not maps and (packed := _file(listed, f"{maps_folder}.zip")):
        inner = Path(*packed)
        maps = _files({inner: file_names(inner)}, maps_folder.rpartition("/")[2])
    found: dict[str, Record] = {}
    reading = ImageReading.of(config)
    found_ids = {identity for listing in listings for identity in listing.images}
    for identity in sorted(found_ids, key=lambda each: (isinstance(each, str), each)):
        entries = {listing.file: listing.images[identity] for listing in listings if identity in listing.images}
        lister, (file_name, height, width) = next(iter(entries.items()))
        if len(set(entries.values())) > 1:
            said = " and ".join(f"{file} has {' '.join(map(shown, entry))}" for file, entry in entries.items())
            raise ValueError(f"image {identity} differs (name, height, width): {said}")
        listed_name = file_name
        if file_name not in images:  # some exporters write the folder too
            file_name = file_name.removeprefix(f"{folder}/")
        if file_name not in images:
            raise ValueError(f"{lister} lists {shown(listed_name)}, but no source has it in {folder}/")
        name = file_name.rpartition(".")[0] or file_name
        if name in found:
            raise ValueError(f"{lister} lists two images called {shown(name)}; keep one of them")
        segments = objects = None
        if instances is not None and identity in instances.images:
            text = ",".join(instances.annotations.pop(identity, []))
            objects = Objects(instances.file, instances.categories, text)
        if panoptic is not None and identity in panoptic.images:
            segments = _panoptic(panoptic, identity, maps, maps_folder)
        label_files = [*([str(segments.map)] if segments else []), *([objects.file] if objects else [])]
        found[name] = Record(
            name=name,
            image_file=str(images[file_name]),
            label_file=" and ".join(label_files),
            read=partial(read_labelled, images[file_name], (height, width), lister, segments, objects, reading),
        )
    if not found:
        raise ValueError(f"{listings[0].file} lists no images")
    return list(found.values())


def _listings(
    config: DatasetConfig, listed: Mapping[Path, Sequence[str]], split: str
) -> tuple[_Listing | None, _Listing | None]:
    """The panoptic and the instance listing of a split. ValueError unless there is one, and those that
    `annotation_files` names."""
    paths = {label_type: config.annotation_path(label_type, split) for label_type in ("panoptic", "instances")}
    places = {label_type: _file(listed, path) for label_type, path in paths.items()}
    missing = [
        path for label_type, path in paths.items() if not places[label_type] and label_type in config.annotation_files
    ]
    if missing or not any(places.values()):
        there = ", ".join([name for names in listed.values() for name in names if name.endswith(".json")][:5])
        wanted = missing[0] if missing else f"{paths['panoptic']} nor {paths['instances']}"
        raise ValueError(
            f"split {split} has {'no' if missing else 'neither'} {wanted} in "
            f"{', '.join(source.name for source in listed) or 'any source: none is listed'}"
            f"{f', but {there}' if there else ''} "
            "(`splits` and `annotation_files` in params.yaml give the names; leave out a split that is not there)"
        )
    panoptic, instances = (None if place is None else _listing(place, config) for place in places.values())
    return panoptic, instances


def _check_some_classes(listings: Sequence[_Listing]) -> None:
    """ValueError where there are categories, and all of them are left out."""
    left_out = list(dict.fromkeys(name for listing in listings for name in listing.categories.left_out.values()))
    if left_out and not any(listing.categories.classes for listing in listings):
        raise ValueError(
            f"{listings[0].file} has the categories {', '.join(map(shown, left_out[:5]))}, none of which is among "
            "class_names in params.yaml"
        )


def _files(listed: Mapping[Path, Sequence[str]], folder: str) -> dict[str, Place]:
    """Files below `folder`, which may be in a top folder, in all sources: by their path below it."""
    pattern = re.compile(rf"(?:[^/]+/)?{re.escape(folder)}/(.+)")
    found: dict[str, Place] = {}
    for source, names in listed.items():
        for name in names:
            if match := pattern.fullmatch(name):
                found.setdefault(match[1], Place(source, name))
    return found


def _file(listed: Mapping[Path, Sequence[str]], path: str) -> Place | None:
    """The first file called `path`, which may be in a top folder."""
    pattern = re.compile(rf"(?:[^/]+/)?{re.escape(path)}")
    places = (Place(source, name) for source, names in listed.items() for name in names if pattern.fullmatch(name))
    return next(places, None)


def _panoptic(listing: _Listing, identity: int | str, maps: Mapping[str, Place], folder: str) -> Panoptic:
    """What a record needs of a panoptic listing."""
    file_name = listing.images[identity][0]
    texts = listing.annotations.pop(identity, [])
    if len(texts) != 1 or identity not in listing.maps:
        raise ValueError(
            f"{listing.file} has {len(texts)} annotations of {shown(file_name)}; panoptic images have one with "
            "segments_info"
        )
    png = listing.maps[identity]
    if png not in maps:
        raise ValueError(f"{listing.file} lists {shown(png)}, but no source has it in {folder}/")
    return Panoptic(listing.file, listing.categories, texts[0], maps[png])


# Annotation files


class _Category(NamedTuple):
    """A category as an annotation file gives it."""

    id: int
    name: str
    thing: bool


def _listing(place: Place, config: DatasetConfig) -> _Listing:
    """An annotation file, instances or panoptic. ValueError says what is wrong with it."""
    listing = _Listing(str(place), Categories({}, {}), {}, defaultdict(list), {})
    categories: dict[int, _Category] = {}
    used = set[int]()
    for key, number, entry, text in _entries(place):
        try:
            if not isinstance(entry, dict):
                raise ValueError(f"it is {shown(entry)}; it must be a mapping")
            if key == "categories":
                # the categories of instances do not say so, but all are things
                category = _Category(whole(entry, "id"), words(entry, "name"), flag(entry, "isthing", default=True))
                if category.id in categories:
                    raise ValueError(
                        f"the category {shown(categories[category.id].name)} has its id too; give each its own"
                    )
                categories[category.id] = category
            elif key == "images":
                identity = picture_id(entry, "id")
                if identity in listing.images:
                    raise ValueError(
                        f"the image {shown(listing.images[identity][0])} has its id too; give each its own"
                    )
                listing.images[identity] = (
                    plain_name(words(entry, "file_name")),
                    whole(entry, "height"),
                    whole(entry, "width"),
                )
            else:
                identity = picture_id(entry, "image_id")
                listing.annotations[identity].append(text)
                used.update(_category_ids(entry))
                if "segments_info" in entry:
                    listing.maps[identity] = plain_name(words(entry, "file_name"))
        except ValueError as error:
            name = f" (id {shown(entry['id'])})" if isinstance(entry, dict) and "id" in entry else ""
            raise ValueError(f"{place}: entry {number} of {key}{name}: {error}") from None
    _check_names(list(categories.values()), used, listing.file, config)
    for category in categories.values():
        if category.name in config.class_names:
            listing.categories.classes[category.id] = config.class_names.index(category.name)
        else:
            listing.categories.left_out[category.id] = category.name
    unknown = listing.annotations.keys() - listing.images.keys()
    if unknown:
        raise ValueError(f"{place} has annotations of image {min(unknown, key=str)}, which its `images` do not list")
    return listing


def _category_ids(annotation: Mapping[str, Any]) -> set[int]:
    """The categories of an annotation or of its segments, as far as they are numbers."""
    infos = annotation.get("segments_info", [annotation])
    ids = (info.get("category_id") for info in infos if isinstance(info, dict)) if isinstance(infos, list) else ()
    return {identity for identity in ids if type(identity) is int}


def _check_names(categories: Sequence[_Category], used: set[int], file: str, config: DatasetConfig) -> None:
    """ValueError where a category's name is that of another, of a class of the other kind, or misspelt. One that is
    unlike all classes is left out, and a class without category is fine."""
    names = [category.name for category in categories]
    for category in categories:
        name, thing = category.name, category.thing
        twice = [other.id for other in categories if other.name == name and other.id in used]
        if len(twice) > 1:
            raise ValueError(
                f"{file} has objects of two categories called {shown(name)}, with the ids {twice[0]} and {twice[1]}; "
                "give them one id, or two names"
            )
        if name in config.class_names and thing != (name in config.thing_classes):
            raise ValueError(
                f"{file} has {shown(name)} as a {'thing' if thing else 'stuff'} category, but thing_classes in "
                f"params.yaml {'does not list' if thing else 'lists'} it"
            )
        if name not in config.class_names:
            same_kind = (other for other in config.class_names if (other in config.thing_classes) == thing)
            alike = {other.casefold(): other for other in same_kind if other not in names}
            if near := difflib.get_close_matches(name.strip().casefold(), alike, n=1, cutoff=_ALIKE):
                raise ValueError(
                    f"{file} has the category {shown(name)}, and class_names in params.yaml has "
                    f"{shown(alike[near[0]])}, which is no category; write both alike"
                )


def _entries(place: Place) -> Iterator[tuple[str, int, Any, str]]:
    """Every category, picture and annotation of a file: key of its list, number from 1, entry, the entry's own text.
    ValueError for a file that is not JSON, or not COCO's."""
    data = read_file(*place)
    number, lists = 0, Counter[str]()
    try:
        for key, entry, text in _elements(data.decode("utf-8-sig")):
            number = number + 1 if text else 0
            if not text:
                lists[key] += 1
            elif key in _LISTS:
                yield key, number, entry, text
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON ({error_shown(error)}); fetch or copy it again") from None
    for key in _LISTS:
        if lists[key] != 1:
            said = f"{lists[key]} lists" if lists[key] else "no list"
            raise ValueError(f"{place} has {said} called {key}; COCO's files hold one each of {', '.join(_LISTS)}")


def _elements(text: str) -> Iterator[tuple[str, Any, str]]:
    """Every element of the lists in a JSON object: key of the list, element, the element's own text. Before the first
    element of a list, its key with no text.

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
        start = at
        key, at = decode(text, start)
        if not isinstance(key, str):
            raise json.JSONDecodeError("Expecting a name", text, start)
        at = past(at, ":")[1]
        if not text.startswith("[", at):
            at = decode(text, at)[1]
        else:
            yield key, None, ""
            mark, at = past(at, "[")
            if text.startswith("]", at):
                mark, at = past(at, "]")
            while mark != "]":
                start = at
                entry, at = decode(text, start)
                yield key, entry, text[start:at]
                mark, at = past(at, ",]")
        mark, at = past(at, ",}")
    if skip(at) < len(text):
        raise json.JSONDecodeError("Extra data", text, skip(at))
