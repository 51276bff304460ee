"""What a stage writes for others to read: results/<stage>/<name>.json, as frozen dataclasses.

These files are what DVC tracks: small, and written whole or not at all. Each holds the version of its layout. A file of
another version is refused with the command that makes it again, and so is one with an unknown, missing or wrong value.
No other module spells a path below results/.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from pipeline.files import read_json, write_json
from pipeline.params import Task, parse

RESULTS = Path("results")
"""The folder of all results, in the working directory."""

Label = Literal["instances", "panoptic", "semantic"]
"""A kind of labels that pictures have."""

_Result = TypeVar("_Result")


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
class PictureSizes:
    """Sides of a split's pictures, in pixels: least, median (the lower of two) and greatest."""

    height: tuple[int, int, int]
    width: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedRecord:
    """A record that is in no shard, because it was wrong."""

    file: str
    reason: str


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
    """Of all fields but this one, `samples` and `terms` (pipeline.shards.manifest_digest); a part of run keys."""
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
    pictures: Mapping[str, tuple[int, ...]]
    """That hold a class, for every class."""
    instances: Mapping[str, tuple[int, ...]]
    """Things that are no crowd, of every class."""
    things_per_picture: Mapping[str, Mapping[int, int]]
    """Number of things that are no crowd -> pictures with as many."""
    picture_sizes: Mapping[str, PictureSizes]
    bytes: Mapping[str, int]
    skipped: Mapping[str, tuple[SkippedRecord, ...]]
    sources: tuple[Source, ...]
    """Where they lay is left out."""
    samples: Samples
    terms: str

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


class _File(NamedTuple):
    """Where a kind of result lies, and how its file is read."""

    stage: str
    version: int
    """Rises whenever the fields or their meaning change."""


_FILES: Mapping[type, _File] = {
    FetchedDataset: _File("fetch", 1),
    Manifest: _File("shard", 1),
    ConvertedWeights: _File("weights", 1),
}


def result_path(kind: type, name: str, *, results: Path = RESULTS) -> Path:
    """The file of a stage's result for a row, dataset or entry of weights."""
    return results / _FILES[kind].stage / f"{name}.json"


def made_by(kind: type, name: str) -> str:
    """The command that makes a result again."""
    return f"dvc repro -f {_FILES[kind].stage}@{name}"


def read_result(kind: type[_Result], name: str, *, results: Path = RESULTS) -> _Result:
    """A stage's result. ValueError, with the command that makes it, where it is missing, torn, of another version of
    its layout, or holds a key or value that it should not."""
    path, command, wanted = result_path(kind, name, results=results), made_by(kind, name), _FILES[kind].version
    content = read_json(path, made_by=command)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON object; make it again with: {command}")
    version = content.pop("version", None)
    if version != wanted:
        found = "no version of its layout" if version is None else f"version {version} of its layout"
        raise ValueError(f"{path} has {found}, but version {wanted} is needed; make it again with: {command}")
    try:
        return parse(kind, content, str(path), in_file=True)
    except ValueError as error:
        raise ValueError(f"{error}; make it again with: {command}") from None


def find_result(kind: type[_Result], name: str, *, results: Path = RESULTS) -> _Result | None:
    """`read_result`, or None where the stage has not run."""
    return read_result(kind, name, results=results) if result_path(kind, name, results=results).exists() else None


def write_result(result: Any, name: str, *, results: Path = RESULTS) -> Path:
    """Write a stage's result, whole or not at all; its path."""
    path = result_path(type(result), name, results=results)
    write_json(path, {"version": _FILES[type(result)].version, **dataclasses.asdict(result)})
    return path


def names_of(kind: type, *, results: Path = RESULTS) -> Iterator[str]:
    """The rows, datasets or weights that have such a result, sorted."""
    return (path.stem for path in sorted((results / _FILES[kind].stage).glob("*.json")))
