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
from typing import Any, NamedTuple, TypeVar

from pipeline.files import read_json, write_json
from pipeline.params import parse

RESULTS = Path("results")
"""The folder of all results, in the working directory."""

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
