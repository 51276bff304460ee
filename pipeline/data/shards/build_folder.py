"""The folder in which shards are made: whole shards of earlier builds are used again, and brought together."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pipeline.data.shards.writer import (
    ShardFacts,
    ShardJob,
    finished_shard,
)
from pipeline.storage.files import files_below, link_or_copy, matching, read_json
from pipeline.storage.progress import Progress
from pipeline.storage.stores import StoredPath


def finished_builds(shards_root: StoredPath, key: str) -> list[StoredPath]:
    """Folders of finished builds with this key."""
    found = []
    for note in matching(shards_root, "*/build.json"):
        with contextlib.suppress(ValueError):
            if read_json(note, made_by="python -m stages.shard")["key"] == key:
                found.append(note.parent)
    return found


class _Found(NamedTuple):
    """A shard that is there and whole."""

    facts: ShardFacts
    folder: StoredPath


def take_up(dataset: str, jobs: Sequence[ShardJob], on_error: str, folders: Sequence[StoredPath]) -> dict[str, _Found]:
    """Every shard that one of the folders holds as it was written, by name."""
    listed = [files_below(folder) for folder in folders]
    there = [job for job in jobs if any(f"{job.name}.json" in files for files in listed)]
    progress = Progress(f"{dataset}: checking shards that are here already", len(there), unit="shards")
    found = {}
    for job in there:
        for place in folders:
            facts = finished_shard(place, job.name)
            if facts is not None and (on_error == "skip" or not facts.skipped):
                found[job.name] = _Found(facts, place)
                break
        progress.add()
    if there:
        progress.done()
    return found


def bring_together(places: Mapping[str, StoredPath], building: StoredPath, target: StoredPath) -> None:
    """Put what other builds have left into this one's folder too, unless it is in `target`, where all will be.

    places: the folder of every shard, by name.
    """
    for name, place in places.items():
        if place not in (building, target):
            for suffix in (".arrow", ".json"):
                link_or_copy(place / f"{name}{suffix}", building / f"{name}{suffix}")
