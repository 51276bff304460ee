"""What is known of a dataset and of initial weights: what was fetched, its shards, what was converted."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.params.schema import Task

Label = Literal["instances", "panoptic", "semantic"]
"""A type of labels that pictures have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """An archive or folder that a dataset is made of, wherever it lies."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchedSource(Source):
    """A source as it lies here."""

    path: str
    """Under the storage root; of a folder that is read where it lies, its folder.json."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchedDataset:
    """results/fetch/<dataset>.json."""

    dataset: str
    sources: tuple[FetchedSource, ...]
    """Empty: the pictures are generated."""
    terms: str
    generate: Mapping[str, int]
    """What generated pictures are like; of other datasets empty."""
    waits: str = ""
    """Why no shards are to be made of them now; empty: they may be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One Arrow file."""

    path: str
    """Under the storage root."""
    records: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """The shards of a split, in the order of its records."""

    records: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSides:
    """Sides of a split's pictures, in pixels: least, median (the lower of two) and greatest."""

    height: tuple[int, int, int]
    width: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtremeSizes:
    """(height, width) of images at the ends of a split, each of one that there is."""

    smallest: tuple[int, int]
    """Of the fewest pixels."""
    largest: tuple[int, int]
    """Of the most pixels."""
    narrowest: tuple[int, int]
    """Whose longer side is the most times its shorter one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedImages:
    """Validation images whose bytes are those of a training image too."""

    count: int = 0
    first: tuple[str, ...] = ()
    """Names of the first three; with the training image's where that is another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedRecord:
    """A record that is in no shard, because it was wrong."""

    file: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EmptyThings:
    """Annotated things whose mask has no pixel in their picture: no training sees them."""

    count: int
    first: tuple[str, ...]
    """The first of them: annotation file, annotation, picture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """A picture of some records with their labels."""

    path: str
    """Under the storage root."""
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """results/shard/<dataset>.json: what a dataset's shards hold, and where they lie.

    A field that is added later gets a default, and with that value it leaves the digest as it was.
    """

    dataset: str
    digest: str
    """Of all fields but those of `_TRAINS_NOTHING`; a part of run keys."""
    class_names: tuple[str, ...]
    thing_classes: tuple[str, ...]
    """Classes with countable instances."""
    ignore_label: int
    labels: tuple[Label, ...]
    """That every picture has."""
    pixel_layout: Literal["encoded", "raw"]
    """How pictures and segment ids are stored: as files, or decoded."""
    splits: Mapping[str, Split]
    pixels: Mapping[str, tuple[int, ...]]
    """Of every class, crowds included, by split; so are the other counts."""
    ignored_pixels: Mapping[str, int]
    images: Mapping[str, tuple[int, ...]]
    """That hold a class, for every class."""
    instances: Mapping[str, tuple[int, ...]]
    """Things that are no crowd, of every class."""
    things_per_image: Mapping[str, Mapping[int, int]]
    """Number of things that are no crowd -> pictures with as many."""
    image_sizes: Mapping[str, ImageSides]
    bytes: Mapping[str, int]
    skipped: Mapping[str, tuple[SkippedRecord, ...]]
    sources: tuple[Source, ...]
    """Where they lay is left out."""
    samples: Samples
    terms: str
    empty_things: Mapping[str, EmptyThings] = field(default_factory=dict)
    """Of the splits that have some."""
    left_out: tuple[str, ...] = ()
    """Categories of the annotation files that pictures hold and `class_names` leaves out."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The dataset's settings that shape records (pipeline.data.shards.look.record_settings); empty: not known."""
    extreme_sizes: Mapping[str, ExtremeSizes] = field(default_factory=dict)
    """By split; empty: not known."""
    shared_images: SharedImages = SharedImages()

    def split(self, name: str) -> Split:
        """ValueError where the dataset has no such split."""
        if name not in self.splits:
            raise ValueError(f"dataset {self.dataset} has no split {name}; `splits` in params.yaml names them")
        return self.splits[name]

    def class_names_of(self, task: Task) -> tuple[str, ...]:
        """The classes of a row with this task: the dataset's, or its things alone for an instance row."""
        if task != "instance":
            return self.class_names
        return tuple(name for name in self.class_names if name in self.thing_classes)

    def thing_ids_of(self, task: Task) -> list[int]:
        """Which of the classes of a row with this task are things."""
        return [place for place, name in enumerate(self.class_names_of(task)) if name in self.thing_classes]


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertedWeights:
    """results/weights/<name>.json. None, and an empty URL: there are none, and the backbone starts at random."""

    name: str
    url: str
    """Where they were downloaded from."""
    source_sha256: str | None
    """Of the file that was downloaded."""
    sha256: str | None
    """Of the converted file."""
    path: str | None
    """The converted file, under the storage root."""
    network: str = ""
    """What is kept of a whole network; empty: they are a backbone's."""


_TRAINS_NOTHING = ("digest", "samples", "terms", "empty_things", "settings", "extreme_sizes", "shared_images")
"""Fields of a manifest that its digest leaves out: shards with equal bytes and counts are trained on alike."""


def manifest_digest(manifest: Manifest) -> str:
    """SHA-256 of everything in a manifest but the fields that train nothing.

    A field that holds its default is left out: a new one changes no digest until it is used.
    """
    rest = {key: value for key, value in plain(manifest).items() if key not in _TRAINS_NOTHING}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def plain(value: Any) -> Any:
    """Dataclasses and what is in them as JSON values, without the fields that hold their defaults."""
    if dataclasses.is_dataclass(value):
        held = ((entry, getattr(value, entry.name)) for entry in dataclasses.fields(value))
        return {entry.name: plain(each) for entry, each in held if each != _default(entry)}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, tuple) else value


def _default(entry: dataclasses.Field[Any]) -> Any:
    """MISSING: it has none."""
    return entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()


def wrong_manifest(manifest: Manifest) -> str:
    """What is wrong with a manifest although each value may be, after its file's name; empty: nothing."""
    counts = ("pixels", "images", "instances")
    if not manifest.splits:
        return "has no splits"
    for name in ("ignored_pixels", "things_per_image", "image_sizes", "bytes", "skipped", *counts):
        if {*getattr(manifest, name)} != {*manifest.splits}:
            return f"has other splits in {name} than in splits"
    for name in counts:
        for split, values in getattr(manifest, name).items():
            if len(values) != len(manifest.class_names):
                return f"has {name} of split {split} for {len(values)} classes, but {len(manifest.class_names)} classes"
    if manifest_digest(manifest) != manifest.digest:
        return "was altered: its digest is another"
    return ""


def wrong_weights(weights: ConvertedWeights) -> str:
    """The same of converted weights."""
    given = {name: bool(getattr(weights, name)) for name in ("url", "source_sha256", "sha256", "path")}
    return "" if len({*given.values()}) == 1 else f"has {' and '.join(n for n, there in given.items() if there)} alone"
